"""A causal language model of the Llama family whose linear layers take a mixture as an argument.

The forward pass of the family's decoder layer (norm, attention with rotary positions and grouped
keys and values, gated MLP) is written out here once more, because the mixture of a block has to
reach its linear layers as an argument. Layers of another kind are refused by name.

A batch of token ids is (b, n) int64, padded with `PAD` on the left, so that all samples end at the
same place and generation goes on there. Padding is never looked at and counts for no position: a
sample gets the same answer alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.linear import AdaptedLinear
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall
from memtool.backbones.interface import FrozenModel
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.errors import ConfigError, DataError, MismatchError, NotFoundError
from memtool.paths import expand
from memtool.settings import BackboneSettings, TextSettings

CAUSAL_LM_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Kinds of decoder layers in transformers that `AdaptedLayer` expresses."""

ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary positions that do not depend on the length of the text, so that keys can be kept."""

PROMPT_TOKENS, ANSWER_TOKENS = 1024, 512
"""The most tokens of a prompt and of an answer, where the context has room and nobody says more."""

PAD = -1
"""The token id of padding: that of no token, while a tokenizer's own may stand for a real one."""


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Prompts with their answers as token ids.

    `tokens` (n, longest) int64, padded on the left with PAD; the last `answers[i]` tokens of sample
    i are its answer, the end-of-text token included. `cut_prompts` and `cut_answers` say how many
    samples lost tokens to the limits.
    """

    tokens: Tensor
    answers: Tensor
    cut_prompts: int = 0
    cut_answers: int = 0


def create_causal_lm(
    settings: BackboneSettings, text: TextSettings, *, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """The model of `hf:<id or path>`, a folder as `save_pretrained` makes it or an id on the hub.

    Its weights are safetensors and are kept in `dtype`; code that comes with it is not run. Raises
    ConfigError for a name or a model that cannot be used, NotFoundError where there are no such
    files.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    source = model_source(settings)
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # Code that comes with a model is never run, nor asked about on the terminal.
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise NotFoundError(
            f"no model {source!r} that can be read: {error}",
            expected="a folder with config.json, model.safetensors and tokenizer.json",
            remedy="name a local folder: hf:FOLDER",
        ) from error
    except ValueError as error:  # an architecture that transformers does not know
        raise ConfigError(f"{source!r} is no causal language model: {error}") from error
    finally:
        if had_bars:
            logging.enable_progress_bar()
    # One model, whatever its numbers are kept in on disk and here: float32 holds them all.
    sha256 = tensor_sha256(model.state_dict(), torch.float32)
    for parameter in model.parameters():  # not buffers: those of the rotary embedding stay float32
        parameter.data = parameter.data.to(dtype)
    return CausalLM(model, tokenizer, settings.name, text, sha256=sha256)


def model_source(settings: BackboneSettings) -> str:
    """Where transformers finds the model of `hf:<id or path>`: a folder that is there, or an id.

    Raises ConfigError for another kind of name, NotFoundError for a folder that is not there.
    """
    family, _, wanted = settings.name.partition(":")
    if family != "hf" or not wanted:
        raise ConfigError(
            f"backbone {settings.name!r} is no language model",
            expected="hf:<id or path>, as hf:meta-llama/Llama-3.2-1B",
        )
    if settings.weights is not None:
        raise ConfigError(
            f"backbone.weights with {settings.name}",
            expected="no weights: a language model is a folder, with its tokenizer",
            remedy="--set backbone.name=hf:FOLDER",
        )
    place = expand(wanted)
    if not place.is_dir() and (Path(wanted).is_absolute() or "$" in wanted):
        raise NotFoundError(f"there is no folder {wanted}", expected="a folder with config.json")
    return str(place) if place.is_dir() else wanted


def limits_of(name: str, context: int, text: TextSettings) -> tuple[int, int]:
    """The most tokens of a prompt, and of an answer, for a model of such a context.

    Raises ConfigError for prompts and answers that together exceed it.
    """
    prompt, answer = text.prompt_tokens, text.answer_tokens
    if prompt is None:
        prompt = min(PROMPT_TOKENS, max(1, context - (answer or context // 4)))
    if answer is None:
        answer = max(1, min(ANSWER_TOKENS, context - prompt))
    if prompt + answer > context:
        raise ConfigError(
            f"prompts of {prompt} and answers of {answer} tokens for {name}, whose context is "
            f"{context}",
            expected=f"at most {context} together",
            remedy=f"--set text.prompt_tokens={max(1, context - context // 4)} "
            f"--set text.answer_tokens={context // 4}",
        )
    return prompt, answer


def require_unicode(text: str, what: str) -> None:
    """Raise DataError for half of a pair of surrogates, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {text[error.start]!r}, which is no character", expected="Unicode text"
        ) from error


class KeyValueCache:
    """The keys and values of all tokens so far, (b, heads, capacity, head_dim) for every block."""

    def __init__(self, depth: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[Tensor | None] = [None] * depth
        self._values: list[Tensor | None] = [None] * depth

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a block so far with new ones (b, heads, n, head_dim) behind them; views.

        `length` is advanced by the caller, once all blocks have theirs.
        """
        old_keys, old_values = self._keys[block], self._values[block]
        if old_keys is None or old_values is None:
            batch, heads, _, width = keys.shape
            old_keys = keys.new_empty(batch, heads, self.capacity, width)
            old_values = torch.empty_like(old_keys)
            self._keys[block], self._values[block] = old_keys, old_values
        end = self.length + keys.shape[2]
        old_keys[:, :, self.length : end] = keys
        old_values[:, :, self.length : end] = values
        return old_keys[:, :, :end], old_values[:, :, :end]


class CausalLM(FrozenModel):
    """A frozen decoder of `LAYERS`; takes the model over and replaces its layers.

    Attributes beside those of `FrozenModel`: `context`, tokens that it can look at;
    `prompt_tokens` and `answer_tokens`, the most that a prompt and an answer may have.
    `sha256` is that of the weights as float32, empty where there are none. Always in eval mode.

    A prompt that is too long loses tokens behind its first one (kept where it is the tokenizer's
    begin-of-text token) and keeps its end, where the question is; or is refused, as
    `text.long_prompts` says. Raises ConfigError for a model that cannot be expressed, and for
    limits that do not fit its context.
    """

    targets = CAUSAL_LM_TARGETS

    def __init__(
        self, model: Any, tokenizer: Any, name: str, text: TextSettings, *, sha256: str = ""
    ) -> None:
        super().__init__()
        _check_model(model, name)
        model.eval().requires_grad_(False)
        config = model.config
        self.name = name
        self.dim = config.hidden_size
        self.depth = len(model.model.layers)
        self.context: int = config.max_position_embeddings
        self.prompt_tokens, self.answer_tokens = limits_of(name, self.context, text)
        self._refuse_long = text.long_prompts == "refuse"
        self.sha256 = sha256
        self.tokenizer = tokenizer
        self.ends = _end_tokens(model, tokenizer)
        self.embed = model.model.embed_tokens
        self.rotary = model.model.rotary_emb
        self.layers = nn.ModuleList(
            AdaptedLayer(layer, number) for number, layer in enumerate(model.model.layers)
        )
        self.norm = model.model.norm
        self.head = model.lm_head

    @property
    def blocks(self) -> list[AdaptedLayer]:
        """The decoder layers, from the text on."""
        return [layer for layer in self.layers if isinstance(layer, AdaptedLayer)]

    # Texts ----------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> EncodedTexts:
        """Token ids of prompts, each followed by its answer and the end-of-text token.

        Prompt and answer are cut into tokens apart, so that a prompt is the same with and without
        its answer. Raises DataError for a prompt without tokens, and for one that is too long where
        these are refused.
        """
        rows: list[list[int]] = []
        lengths: list[int] = []
        cut_prompts = cut_answers = 0
        for number, prompt in enumerate(prompts):
            require_unicode(prompt, f"prompt {number + 1}")
            # Not verbose: what is longer than the context is cut below.
            row = list(self.tokenizer(prompt, verbose=False).input_ids)
            if not row:
                raise DataError(f"prompt {number + 1} has no tokens: {prompt!r}")
            if len(row) > self.prompt_tokens:
                cut_prompts += 1
                row = self._cut(row, number)
            lengths.append(0)
            if answers is not None:
                said = self.tokenizer(answers[number], add_special_tokens=False, verbose=False)
                answer = list(said.input_ids)
                cut_answers += len(answer) >= self.answer_tokens
                answer = [*answer[: self.answer_tokens - 1], self.ends[0]]
                row, lengths[-1] = row + answer, len(answer)
            rows.append(row)
        tokens = torch.full((len(rows), max(map(len, rows), default=0)), PAD)
        for place, row in zip(tokens, rows, strict=True):
            place[len(place) - len(row) :] = torch.tensor(row)
        return EncodedTexts(tokens, torch.tensor(lengths), cut_prompts, cut_answers)

    def _cut(self, row: list[int], number: int) -> list[int]:
        if self._refuse_long:
            raise DataError(
                f"prompt {number + 1} has {len(row)} tokens",
                expected=f"at most {self.prompt_tokens} (text.prompt_tokens)",
                remedy="--set text.long_prompts=cut keeps the end of long prompts",
            )
        kept = 1 if row[0] == self.tokenizer.bos_token_id else 0
        return row[:kept] + row[len(row) - self.prompt_tokens + kept :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of every token id alone, special tokens by their names."""
        return [str(self.tokenizer.decode([one])) for one in ids]

    # Forward --------------------------------------------------------------------------------

    def hidden(
        self, tokens: Tensor, recall: Recall | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """What the head reads, (b, n, dim), of a batch of token ids (b, n).

        `recall(block, hidden)` is called with the input (b, n, dim) of every block, before its
        first norm. With a cache that holds some tokens, `tokens` are all so far and only those
        behind them run: the result has as many.
        """
        real = tokens != PAD
        done = 0 if cache is None else cache.length
        positions = (real.cumsum(1) - 1).clamp_min(0)[:, done:]
        hidden = self.embed(tokens[:, done:].clamp_min(0))
        rotation = self.rotary(hidden, position_ids=positions)
        allowed = _allowed(real, done)
        for number, layer in enumerate(self.layers):
            mixture = None if recall is None else recall(number, hidden)
            hidden = layer(hidden, mixture, rotation, allowed, cache)
        if cache is not None:
            cache.length = tokens.shape[1]
        return self.norm(hidden)

    def logits(self, tokens: Tensor, recall: Recall | None = None) -> Tensor:
        """Logits (b, n, vocabulary) of the token that follows each of `tokens` (b, n)."""
        scores: Tensor = self.head(self.hidden(tokens, recall))
        return scores

    def answer_logits(
        self, tokens: Tensor, answers: Tensor, recall: Recall | None = None
    ) -> Tensor:
        """Logits (k, vocabulary) of the k answer tokens of a batch, float32 at least.

        `tokens` and `answers` as in `EncodedTexts`; the samples' tokens one after another.
        """
        wanted = _before_answers(tokens, answers)
        scores = self.head(self.hidden(tokens, recall)[:, :-1][wanted])
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def answer_losses(self, logits: Tensor, tokens: Tensor, answers: Tensor) -> Tensor:
        """−log p of each sample's answer by `answer_logits`, summed over its tokens: (b,)."""
        wanted = _before_answers(tokens, answers)
        each = F.cross_entropy(logits, tokens[:, 1:][wanted], reduction="none")
        owner = wanted.nonzero()[:, 0]
        return each.new_zeros(len(tokens)).index_add(0, owner, each)

    def answer_loss(self, tokens: Tensor, answers: Tensor, recall: Recall | None = None) -> Tensor:
        """−log p of each sample's answer, summed over its tokens: (b,), float32 at least."""
        return self.answer_losses(self.answer_logits(tokens, answers, recall), tokens, answers)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, recall: Recall | None = None, *, most: int | None = None
    ) -> list[list[int]]:
        """Greedy answers to prompts (b, n): the most probable token, again and again.

        An answer ends before the end-of-text token, or at `most` tokens (`answer_tokens`).
        """
        most = self.answer_tokens if most is None else most
        batch, length = tokens.shape
        if length + most > self.context:
            raise MismatchError(
                f"prompts of {length} tokens and answers of {most}",
                expected=f"at most {self.context} tokens together, the context of {self.name}",
            )
        cache = KeyValueCache(self.depth, length + most)
        ends = torch.tensor(self.ends, device=tokens.device)
        running = torch.ones(batch, dtype=torch.bool, device=tokens.device)
        answers: list[list[int]] = [[] for _ in range(batch)]
        for _ in range(most):
            following = self.head(self.hidden(tokens, recall, cache)[:, -1]).argmax(dim=-1)
            running &= ~torch.isin(following, ends)
            if not bool(running.any()):
                break
            for answer, token, more in zip(
                answers, following.tolist(), running.tolist(), strict=True
            ):
                if more:
                    answer.append(token)
            tokens = torch.cat([tokens, following.unsqueeze(1)], dim=1)
        return answers


class AdaptedLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a decoder layer of the Llama family."""

    def __init__(self, layer: Any, number: int) -> None:
        super().__init__()
        kind = type(layer)
        if kind.__name__ not in LAYERS or not kind.__module__.startswith("transformers."):
            raise ConfigError(
                f"layer {number} is a {kind.__name__}, which memtool cannot adapt",
                expected=f"one of {', '.join(LAYERS)}",
            )
        self.number = number
        name = f"model.layers.{number}"
        self.input_norm = layer.input_layernorm
        self.attention = AdaptedAttention(layer.self_attn, f"{name}.self_attn")
        self.output_norm = layer.post_attention_layernorm
        self.mlp = AdaptedGatedMlp(layer.mlp, f"{name}.mlp")

    def forward(
        self,
        x: Tensor,
        mixture: Mixture | None,
        rotation: tuple[Tensor, Tensor],
        allowed: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """(b, n, dim) to the same shape; the rest as in `CausalLM.hidden` and `_allowed`."""
        normed = self.input_norm(x)
        mixed = self.attention(normed, mixture, rotation, allowed, cache, self.number)
        x = x + mixed
        return x + self.mlp(self.output_norm(x), mixture)

    def site(self, number: int, target: str) -> Site:
        """Where one of `CAUSAL_LM_TARGETS` lies in this block, which is block `number`."""
        where = self.attention if target in ("q", "k", "v", "o") else self.mlp
        linear: AdaptedLinear = getattr(where, target)
        return linear.site(number)


class AdaptedAttention(nn.Module):
    """Causal attention with rotary positions, and groups of heads that share keys and values."""

    q: AdaptedLinear
    k: AdaptedLinear
    v: AdaptedLinear
    o: AdaptedLinear

    def __init__(self, attention: Any, name: str) -> None:
        super().__init__()
        for target in ("q", "k", "v", "o"):
            linear = getattr(attention, f"{target}_proj")
            setattr(self, target, _adapted(linear, f"{name}.{target}_proj"))
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling

    def forward(
        self,
        x: Tensor,
        mixture: Mixture | None,
        rotation: tuple[Tensor, Tensor],
        allowed: Tensor | None,
        cache: KeyValueCache | None,
        number: int,
    ) -> Tensor:
        """(b, n, dim) to the same shape."""
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x, mixture).view(split) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotated(q.transpose(1, 2), *rotation), rotated(k.transpose(1, 2), *rotation)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(number, k, v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=self.scaling
        )
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1), mixture)


class AdaptedGatedMlp(nn.Module):
    """down(act(gate x) ⊙ up x)."""

    gate: AdaptedLinear
    up: AdaptedLinear
    down: AdaptedLinear

    def __init__(self, mlp: Any, name: str) -> None:
        super().__init__()
        for target in ("gate", "up", "down"):
            linear = getattr(mlp, f"{target}_proj")
            setattr(self, target, _adapted(linear, f"{name}.{target}_proj"))
        self.act = mlp.act_fn

    def forward(self, x: Tensor, mixture: Mixture | None) -> Tensor:
        """(b, n, dim) to the same shape."""
        return self.down(self.act(self.gate(x, mixture)) * self.up(x, mixture), mixture)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (i, i + d/2) of x (b, heads, n, d), turned by angles of cos and sin (b, n, d)."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return x * cos.unsqueeze(1).to(x.dtype) + turned * sin.unsqueeze(1).to(x.dtype)


def _before_answers(tokens: Tensor, answers: Tensor) -> Tensor:
    """Which tokens (b, n − 1) predict a token of an answer: bool."""
    length = tokens.shape[1]
    places = torch.arange(1, length, device=tokens.device)
    return places >= length - answers.unsqueeze(1)


def _allowed(real: Tensor, done: int) -> Tensor | None:
    """Which token may look at which: bool (b, 1, n − done, n); None for causal and no padding.

    Every token may look at itself, also padding, whose softmax would else be over nothing.
    """
    length = real.shape[1]
    if done == 0 and not real.is_meta and bool(real.all()):
        return None
    places = torch.arange(length, device=real.device)
    mine = places[done:].unsqueeze(1)
    return (((places <= mine) & real.unsqueeze(1)) | (places == mine)).unsqueeze(1)


def _adapted(linear: Any, name: str) -> AdaptedLinear:
    if type(linear) is not nn.Linear:
        raise ConfigError(
            f"{name} is a {type(linear).__name__}, which memtool cannot adapt",
            expected="a plain linear layer, not a quantised one",
        )
    return AdaptedLinear(linear, name)


def _check_model(model: Any, name: str) -> None:
    """Refuse what the written-out forward pass does not express."""
    config = model.config
    if not hasattr(getattr(model, "model", None), "layers") or not hasattr(model, "lm_head"):
        raise ConfigError(
            f"backbone {name} is a {type(model).__name__}",
            expected="a decoder of the Llama family: Llama, Mistral, Qwen2 or Qwen3",
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ConfigError(
            f"backbone {name} attends over a sliding window of {window} tokens",
            expected="attention over the whole context",
        )
    # Before version 5, transformers called it rope_scaling.
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = said.get("rope_type", "default")
    if rope not in ROPES:
        raise ConfigError(
            f"backbone {name} has rotary positions {rope!r}", expected=f"one of {', '.join(ROPES)}"
        )


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text, the tokenizer's own first."""
    settings = getattr(model, "generation_config", None)
    found: list[int] = []
    for said in (
        getattr(tokenizer, "eos_token_id", None),
        getattr(settings, "eos_token_id", None),
        model.config.eos_token_id,
    ):
        many = said if isinstance(said, list | tuple) else [said]
        found += [one for one in many if one is not None and one not in found]
    if not found:
        raise ConfigError("the model has no end-of-text token", expected="eos_token_id")
    return tuple(found)
