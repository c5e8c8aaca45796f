"""CLIP models of open_clip as a backbone with two towers (extra `clip`).

Image and text tower are Transformers of the same block. The forward pass of open_clip's `CLIP`,
`VisionTransformer` and `ResidualAttentionBlock` is written out here once more, because the mixture
of a block has to reach its linear layers as an argument: `nn.MultiheadAttention` becomes a fused
projection, an attention and an output projection with the same tensors. Models of another build
(ResNets, timm or Hugging Face towers, attentional pooling) are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.linear import AdaptedLinear
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall
from memtool.backbones.interface import TwoTowers
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.backbones.vit import attend, check_image_size, check_pixels, to_pixels
from memtool.backbones.weight_files import drawn_alike, read_weights
from memtool.errors import (
    ConfigError,
    CorruptError,
    DataError,
    MismatchError,
    NotFoundError,
    did_you_mean,
)
from memtool.outside import read_json
from memtool.paths import expand
from memtool.settings import BackboneSettings

CLIP_TARGETS = ("q", "k", "v", "out", "fc", "proj")

# The normalisation of the published models, unless a configuration says another.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def create_open_clip(settings: BackboneSettings, model: str) -> ClipBackbone:
    """The CLIP `model`: a name that open_clip knows, or the path of a configuration (.json).

    Weights come from the local safetensors file `settings.weights`, or are random; nothing is
    downloaded. A position embedding for another image size is resampled to `settings.image_size`.

    Raises ConfigError for a model that is not known or of another build and where open_clip is not
    installed, NotFoundError without weights, CorruptError and MismatchError for weights that cannot
    be read or do not fit.
    """
    configuration, preprocessing = read_configuration(model)
    path = settings.weights
    if path != "random" and (path is None or not path.is_file()):
        raise NotFoundError(
            f"no weights for {settings.name}" + (f" at {path}" if path else ""),
            expected="a local safetensors file with open_clip's tensor names",
            remedy="name it as backbone.weights; memtool downloads no CLIP",
        )
    with drawn_alike():
        clip = build_clip(configuration, settings.image_size, settings.name)
    if path != "random":
        _load(clip, path)
    return ClipBackbone(
        clip,
        settings.name,
        mean=preprocessing.get("mean", _MEAN),
        std=preprocessing.get("std", _STD),
    )


def read_configuration(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's `model_cfg` and `preprocess_cfg` of a name, or of the path of a .json file.

    Errors as `create_open_clip`.
    """
    if not model.endswith(".json"):
        open_clip = _open_clip()
        found = open_clip.get_model_config(model) if "/" not in model else None
        if found is None:
            raise ConfigError(
                f"open_clip has no model {model!r}",
                expected=did_you_mean(model, open_clip.list_models()),
                remedy="a name of these, or the path of a configuration in .json",
            )
        return found, {}
    path = expand(model)
    if not path.is_file():
        raise NotFoundError(f"there is no CLIP configuration {path}", remedy="check the path")
    try:
        content = read_json(path)
    except CorruptError as error:
        raise ConfigError(error.message, expected="embed_dim, vision_cfg, …") from error
    return content.get("model_cfg", content), content.get("preprocess_cfg", {})


def build_clip(configuration: dict[str, Any], image_size: int, name: str) -> Any:
    """open_clip's `CLIP` of a `model_cfg` for images of that size, with random weights.

    Raises ConfigError for a configuration of another build; `name` is what it is called then.
    """
    _open_clip()
    from open_clip.model import CLIP

    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    settings = {**configuration, "vision_cfg": {**configuration.get("vision_cfg", {})}}
    settings["vision_cfg"] |= {"image_size": image_size, "patch_dropout": 0.0}
    extra = sorted(settings.keys() - known)
    text = settings.get("text_cfg", {})
    foreign = [
        key
        for key in ("timm_model_name", "hf_model_name", "hf_tokenizer_name", "attentional_pool")
        if settings["vision_cfg"].get(key) or text.get(key)
    ]
    if extra or foreign:
        raise ConfigError(
            f"backbone {name} has {', '.join(extra + foreign)}, which memtool cannot adapt",
            expected="a CLIP of two plain Transformers, as ViT-B-16",
        )
    patch = settings["vision_cfg"].get("patch_size", 16)
    check_image_size(image_size, patch, name)
    try:
        return CLIP(**settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"backbone {name} cannot be built: {error}") from error


def _open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a backbone open_clip:<name> needs the package open_clip_torch",
            remedy="pip install 'memtool[clip]'",
        ) from error
    return open_clip


def _load(clip: Any, path: Path) -> None:
    """Load every tensor of a safetensors file; position embeddings are resampled."""
    from open_clip.model import resize_pos_embed

    given = read_weights(
        path,
        clip.state_dict(),
        "open_clip's",
        resample=lambda tensors: resize_pos_embed(tensors, clip),
    )
    clip.load_state_dict(given)


class ClipBackbone(TwoTowers):
    """A frozen CLIP; takes open_clip's model over and replaces its blocks.

    `dim` is the width of the features that both towers share; a block's input has another
    (`block_dim`). Blocks 0 … `image_depth` − 1 are those of the image tower, the text tower's
    follow. Always in eval mode. Raises ConfigError for a build that this class does not express.
    """

    targets = CLIP_TARGETS

    def __init__(
        self, clip: Any, name: str, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer

        visual = clip.visual
        if type(visual) is not VisionTransformer or visual.attn_pool is not None:
            raise ConfigError(
                f"the image tower of {name} is a {type(visual).__name__}, perhaps with pooling by "
                "attention",
                expected="open_clip's VisionTransformer without it",
            )
        clip.eval().requires_grad_(False)
        self.name = name
        self.sha256 = tensor_sha256(clip.state_dict())
        self.dim = visual.output_dim
        self.image_size = visual.image_size[0]
        self.prefix_tokens = 1
        self.logit_scale = float(clip.logit_scale.exp())
        self.context = clip.context_length
        # The feature of a text is that of its end token, which sees nothing behind it.
        self._sees_no_padding = clip.attn_mask is not None and clip.text_pool_type == "argmax"
        for tower, prefix in ((visual.transformer, "visual."), (clip.transformer, "")):
            tower.resblocks = nn.ModuleList(
                AdaptedClipBlock(block, f"{prefix}transformer.resblocks.{number}")
                for number, block in enumerate(tower.resblocks)
            )
        self.image_depth = len(visual.transformer.resblocks)
        self.depth = self.image_depth + len(clip.transformer.resblocks)
        self.clip = clip
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def blocks(self) -> list[AdaptedClipBlock]:
        """The blocks of the image tower, then those of the text tower."""
        return [*self.clip.visual.transformer.resblocks, *self.clip.transformer.resblocks]

    def block_dim(self, block: int) -> int:
        """Width of the input of a block: that of its tower."""
        return self.blocks[block].dim

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (batch, height, width, 3) to normalised float32 (batch, 3, size, size)."""
        return (to_pixels(images, self.image_size) - self.mean) / self.std

    def features(self, pixels: Tensor, recall: Recall | None = None) -> Tensor:
        """Image features (batch, dim), not normalised: open_clip's `encode_image`."""
        return self.features_from(0, self._embed(pixels), recall)

    def features_from(self, begin: int, hidden: Tensor, recall: Recall | None = None) -> Tensor:
        """Image features (batch, dim) of the input (batch, tokens, width) of a block."""
        blocks = self.clip.visual.transformer.resblocks
        for number, block in enumerate(blocks[begin:], start=begin):
            hidden = block(hidden, None if recall is None else recall(number, hidden), None)
        pooled, _ = self.clip.visual._pool(hidden)
        features: Tensor = pooled @ self.clip.visual.proj
        return features

    def hidden(self, pixels: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """The input (batch, tokens, width) of a block of the image tower, under `recall`."""
        return self.hidden_from(0, self._embed(pixels), block, recall)

    def hidden_from(
        self, begin: int, hidden: Tensor, block: int, recall: Recall | None = None
    ) -> Tensor:
        """The input (batch, tokens, width) of a block of the image tower, of an earlier one's."""
        if not begin <= block < self.image_depth:
            raise MismatchError(
                f"block {block} of the image tower of {self.name}",
                expected=f"a block from {begin} to {self.image_depth - 1}",
            )
        blocks = self.clip.visual.transformer.resblocks
        for number, earlier in enumerate(blocks[begin:block], start=begin):
            mixture = None if recall is None else recall(number, hidden)
            hidden = earlier(hidden, mixture, None)
        return hidden

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 (texts, longest), on the CPU; zeros behind the end of shorter ones.

        Raises DataError for no text, and for one that is longer than the context.
        """
        from open_clip.tokenizer import SimpleTokenizer

        if not texts:
            raise DataError("no texts to tokenise", expected="at least one")
        tokenizer = SimpleTokenizer(context_length=self.context)
        rows = [
            [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
            for text in texts
        ]
        longest = max(rows, key=len)
        if len(longest) > self.context:
            raise DataError(
                f"the prompt {texts[rows.index(longest)]!r} has {len(longest)} tokens",
                expected=f"at most {self.context}, the context of {self.name}",
                remedy="a shorter template or class name",
            )
        if tokenizer.eot_token_id >= self.clip.vocab_size:
            raise ConfigError(
                f"backbone {self.name} knows {self.clip.vocab_size} tokens",
                expected=f"more than {tokenizer.eot_token_id}, the tokens of CLIP's tokeniser",
            )
        width = len(longest) if self._sees_no_padding else self.context
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def text_features(self, tokens: Tensor, recall: Recall | None = None) -> Tensor:
        """Text features (texts, dim), not normalised: open_clip's `encode_text`."""
        from open_clip.transformer import text_global_pool

        clip = self.clip
        length = tokens.shape[1]
        hidden = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        mask = None if clip.attn_mask is None else clip.attn_mask[:length, :length]
        for number, block in enumerate(clip.transformer.resblocks, start=self.image_depth):
            hidden = block(hidden, None if recall is None else recall(number, hidden), mask)
        pooled = text_global_pool(
            clip.ln_final(hidden), tokens, clip.text_pool_type, eos_token_id=clip.text_eos_id
        )
        projection = clip.text_projection
        if projection is None:
            return pooled
        projected: Tensor = (
            projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
        )
        return projected

    def _embed(self, pixels: Tensor) -> Tensor:
        """The input of the first block of the image tower."""
        check_pixels(pixels, self.image_size)
        embedded: Tensor = self.clip.visual._embeds(pixels)
        return embedded


class AdaptedClipBlock(nn.Module):
    """open_clip's pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, block: Any, name: str) -> None:
        super().__init__()
        from open_clip.transformer import ResidualAttentionBlock

        # A subclass may compute something else: only the very class is known to be equal.
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            raise ConfigError(
                f"{name} is a {type(block).__name__}, which memtool cannot adapt",
                expected="open_clip's plain ResidualAttentionBlock",
                remedy="choose a plain CLIP, as ViT-B-16",
            )
        attention = block.attn
        self.dim: int = attention.embed_dim
        self.heads: int = attention.num_heads
        self.ln_1, self.ls_1 = block.ln_1, block.ls_1
        self.in_proj = AdaptedLinear(_fused(attention), f"{name}.attn.in_proj")
        self.out_proj = AdaptedLinear(attention.out_proj, f"{name}.attn.out_proj")
        self.ln_2, self.ls_2 = block.ln_2, block.ls_2
        self.c_fc = AdaptedLinear(block.mlp.c_fc, f"{name}.mlp.c_fc")
        self.act = block.mlp.gelu
        self.c_proj = AdaptedLinear(block.mlp.c_proj, f"{name}.mlp.c_proj")

    def forward(self, x: Tensor, mixture: Mixture | None, mask: Tensor | None) -> Tensor:
        """(batch, tokens, dim) to the same shape; `mask` as in `attend`."""
        x = x + self.ls_1(self._attention(self.ln_1(x), mixture, mask))
        hidden = self.act(self.c_fc(self.ln_2(x), mixture))
        return x + self.ls_2(self.c_proj(hidden, mixture))

    @property
    def first_norm(self) -> nn.Module:
        """What its input goes through first."""
        norm: nn.Module = self.ln_1
        return norm

    def _attention(self, x: Tensor, mixture: Mixture | None, mask: Tensor | None) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.in_proj(x, mixture).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(q, k, v, mask).transpose(1, 2).reshape(batch, tokens, dim)
        return self.out_proj(mixed, mixture)

    def site(self, number: int, target: str) -> Site:
        """Where one of `CLIP_TARGETS` lies in this block, which is block `number`."""
        match target:
            case "q" | "k" | "v":
                return self.in_proj.site(number, target)
            case "out":
                return self.out_proj.site(number)
            case "fc":
                return self.c_fc.site(number)
            case _:
                return self.c_proj.site(number)


def _fused(attention: nn.MultiheadAttention) -> nn.Linear:
    """The fused projection for q, k and v as a linear layer with the very same parameters."""
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise ConfigError(
            "attention with keys and values of its own", expected="self-attention of one width"
        )
    rows, width = attention.in_proj_weight.shape
    fused = nn.Linear(width, rows, device="meta")
    fused.weight = attention.in_proj_weight
    fused.register_parameter("bias", attention.in_proj_bias)
    return fused
