"""The image tower of a CLIP of open_clip, alone: `open_clip_image:<name>` (extra `clip`).

Its features are those that the two towers share, so a memory of images reads them as it reads any
other. The text tower is read and checked with the file, and then left out.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.interface import Resumable
from memtool.backbones.open_clip import (
    CLIP_TARGETS,
    AdaptedClipBlock,
    ClipBackbone,
    create_open_clip,
)
from memtool.errors import NotFoundError
from memtool.settings import BackboneSettings

HUB = "hf-hub:"
"""What open_clip writes before the name of a model on the Hugging Face hub."""


def create_clip_image(settings: BackboneSettings, model: str) -> ClipImageBackbone:
    """The image tower of the CLIP `model`: as `create_open_clip`, or `hf-hub:<owner>/<name>`.

    Of a model on the hub the configuration is fetched, and its weights where `settings.weights` is
    none, into the cache of huggingface_hub. Raises NotFoundError where they cannot be had; other
    errors as `create_open_clip`.
    """
    if model.startswith(HUB):
        repository = model.removeprefix(HUB)
        model = str(_fetched(repository, "open_clip_config.json"))
        weights = settings.weights or _fetched(repository, "open_clip_model.safetensors")
        settings = settings.model_copy(update={"weights": weights})
    return ClipImageBackbone(create_open_clip(settings, model))


def _fetched(repository: str, file: str) -> Path:
    """The path of a file of a repository of the hub, fetched unless it is in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotFoundError(
            f"{file} of {repository} could not be had from the Hugging Face hub: {first}",
            expected="a connection, or a copy in its cache",
            remedy="--set backbone.name=open_clip_image:ViT-B-16 and "
            "--set backbone.weights=FILE.safetensors",
        ) from error


class ClipImageBackbone(Resumable):
    """The blocks and features of the image tower of a `ClipBackbone`, which it takes over."""

    targets = CLIP_TARGETS

    def __init__(self, whole: ClipBackbone) -> None:
        super().__init__()
        self.name, self.sha256 = whole.name, whole.sha256
        self.dim, self.depth = whole.dim, whole.image_depth
        self.image_size, self.prefix_tokens = whole.image_size, whole.prefix_tokens
        clip = whole.clip
        for name in ("transformer", "token_embedding", "ln_final"):
            delattr(clip, name)
        clip.text_projection = clip.positional_embedding = None
        self.whole = whole

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """Of the normalisation of channels (3, 1, 1)."""
        return self.whole.mean

    @property
    def std(self) -> Tensor:  # type: ignore[override]
        """As `mean`."""
        return self.whole.std

    @property
    def blocks(self) -> list[AdaptedClipBlock]:
        """The blocks of the image tower."""
        return [*self.whole.clip.visual.transformer.resblocks]

    def block_dim(self, block: int) -> int:
        """Width of the input of a block, which is not that of the features."""
        return self.blocks[block].dim

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (batch, height, width, 3) to normalised float32 (batch, 3, size, size)."""
        return self.whole.preprocess(images)

    def features(self, pixels: Tensor, recall: Recall | None = None) -> Tensor:
        """Image features (batch, dim), not normalised: open_clip's `encode_image`."""
        return self.whole.features(pixels, recall)

    def features_from(self, begin: int, hidden: Tensor, recall: Recall | None = None) -> Tensor:
        """Image features (batch, dim) of the input (batch, tokens, width) of a block."""
        return self.whole.features_from(begin, hidden, recall)

    def hidden_from(
        self, begin: int, hidden: Tensor, block: int, recall: Recall | None = None
    ) -> Tensor:
        """The input (batch, tokens, width) of a block, of that of an earlier one."""
        return self.whole.hidden_from(begin, hidden, block, recall)

    def hidden(self, pixels: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """The input (batch, tokens, width) of a block, the earlier ones under `recall`."""
        return self.whole.hidden(pixels, block, recall)
