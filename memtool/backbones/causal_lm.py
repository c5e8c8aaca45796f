"""A causal language model of transformers whose linear layers add what is recalled.

The model runs as transformers wrote it; its blocks and their linear layers are replaced by those
of `called.py`, which find the mixture of a pass in the model's one `Call`.

A batch of token ids is (b, n) int64, padded with `PAD` on the left, so that all samples end at the
same place and generation goes on there. Padding is never looked at and counts for no position: a
sample gets the same answer alone and in any batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool.adapters.values import Recall
from memtool.backbones.called import Call, CalledBlock, CalledLinear
from memtool.backbones.families import Family, family_of, sites_of_block
from memtool.backbones.interface import FrozenModel
from memtool.backbones.quantised import four_bits, require_bitsandbytes
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.devices import in_float32, sent
from memtool.errors import ConfigError, DataError, MismatchError, NotFoundError
from memtool.paths import expand
from memtool.pictured import album_of
from memtool.settings import BackboneSettings, TextSettings
from memtool_stores.printable import shown

ROPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary positions that do not depend on the length of the text, so that keys can be kept.

Those of longrope do not within the context that a model was first trained with.
"""

PROMPT_TOKENS, ANSWER_TOKENS = 1024, 512
"""The most tokens of a prompt and of an answer, where the context has room and nobody says more."""

LEAST_LETTERS = 2**16
"""A text of no more letters is cut into tokens whole, however few of them are wanted."""

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


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no bars of its own."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


@without_bars()
def create_causal_lm(
    settings: BackboneSettings, text: TextSettings, *, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """The model of `hf:<id or path>`, a folder as `save_pretrained` makes it or an id on the hub.

    One of images and text is a `PicturedLM`. Its weights are safetensors and are kept in `dtype`;
    code that comes with it is not run. Raises ConfigError for a name or a model that cannot be
    used, NotFoundError where there are no such files.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memtool.backbones.pictured import PicturedLM, open_processor, reads_pictures

    source = model_source(settings)
    if settings.quantise is not None:
        require_bitsandbytes()
    pictured = reads_pictures(source)
    kind: Any = AutoModelForCausalLM
    if pictured:
        from transformers import AutoModelForImageTextToText

        kind = AutoModelForImageTextToText
    try:
        # Code that comes with a model is never run, nor asked about on the terminal.
        model = kind.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        reader = (
            open_processor(source)
            if pictured
            else AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        )
    except OSError as error:
        raise NotFoundError(
            f"no model {source!r} that can be read: {error}",
            expected="a folder with config.json, model.safetensors and tokenizer.json",
            remedy="name a local folder: hf:FOLDER",
        ) from error
    except ValueError as error:  # an architecture that transformers does not know
        raise ConfigError(f"{source!r} is no causal language model: {error}") from error
    except ImportError as error:  # weights that were quantised by a package that is not here
        raise ConfigError(f"{source!r} needs another package: {error}") from error
    # One model, whatever its numbers are kept in on disk and here: float32 holds them all.
    sha256 = tensor_sha256(model.state_dict(), torch.float32)
    for parameter in model.parameters():  # not buffers: those of the rotary embedding stay float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    made_of = None if settings.quantise is None else partial(four_bits, dtype=dtype)
    made: Any = PicturedLM if pictured else CausalLM
    found: CausalLM = made(model, reader, settings.name, text, sha256=sha256, made_of=made_of)
    return found


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


class CausalLM(FrozenModel):
    """A frozen decoder of `FAMILIES`; takes the model over and replaces its blocks.

    Attributes beside those of `FrozenModel`: `context`, tokens that it can look at;
    `prompt_tokens` and `answer_tokens`, the most that a prompt and an answer may have.
    `sha256` is that of the weights as float32, empty where there are none. Always in eval mode.

    A prompt that is too long loses tokens behind its first one (kept where it is the tokenizer's
    begin-of-text token) and keeps its end, where the question is; or is refused, as
    `text.long_prompts` says. Raises ConfigError for a model that cannot be adapted, and for
    limits that do not fit its context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        text: TextSettings,
        *,
        sha256: str = "",
        made_of: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        """`made_of` makes another layer of every linear one that can be adapted, as of few bits."""
        super().__init__()
        family = self._family_of(model, name)
        config = model.config.get_text_config()
        _check_positions(config, name)
        model.eval().requires_grad_(False)
        self.config = config
        self.name = name
        self.dim = config.hidden_size
        self.context = context_of(config)
        self.prompt_tokens, self.answer_tokens = limits_of(name, self.context, text)
        self._refuse_long = text.long_prompts == "refuse"
        self.sha256 = sha256
        self.tokenizer = tokenizer
        self._chat = _require_template(tokenizer, name) if text.chat else False
        self.ends = _end_tokens(model, tokenizer)
        model.generation_config = type(model.generation_config)()  # how to answer is said in a call
        self.targets = tuple(family.layers)
        self.transposed = family.transposed
        self.call = Call()
        blocks = model.get_submodule(family.blocks)
        for number, block in enumerate(blocks):
            sites = sites_of_block(family, block, config, number)
            for path in dict.fromkeys(family.layers.values()):
                linear = block.get_submodule(path)
                linear = linear if made_of is None else made_of(linear)
                called = CalledLinear(linear, f"{family.blocks}.{number}.{path}", self.call)
                parent, _, own = path.rpartition(".")
                setattr(block.get_submodule(parent), own, called)
            blocks[number] = CalledBlock(block, number, self.call, sites)
        self.depth = len(blocks)
        # What is padding is said in every pass; transformers would guess it by this and warn.
        config.pad_token_id = None
        self.model = model
        self._blocks = family.blocks

    @property
    def blocks(self) -> list[CalledBlock]:
        """The decoder layers, from the text on."""
        return list(self.model.get_submodule(self._blocks))

    @property
    def embed(self) -> nn.Embedding:
        """The vectors of tokens."""
        found: nn.Embedding = self.model.get_input_embeddings()
        return found

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
            self._require_readable(prompt, number)
            end = self._end_of(prompt)
            row = self._prompt_ids(end)
            if not row:
                raise DataError(f"prompt {number + 1} has no tokens: {shown(prompt)}")
            whole = len(end) == len(prompt)
            if len(row) > self.prompt_tokens or not whole:
                cut_prompts += 1
                row = self._cut(row, number, whole=whole)
            lengths.append(0)
            if answers is not None:
                some = answers[number][: self._letters(self.answer_tokens)]
                said = self.tokenizer(some, add_special_tokens=False, verbose=False)
                answer = list(said.input_ids)
                cut_answers += len(answer) >= self.answer_tokens
                answer = [*answer[: self.answer_tokens - 1], self.ends[0]]
                row, lengths[-1] = row + answer, len(answer)
            rows.append(row)
        tokens = torch.full((len(rows), max(map(len, rows), default=0)), PAD)
        for place, row in zip(tokens, rows, strict=True):
            place[len(place) - len(row) :] = torch.tensor(row)
        return EncodedTexts(tokens, torch.tensor(lengths), cut_prompts, cut_answers)

    def _require_readable(self, prompt: str, number: int) -> None:
        """Raise DataError for pictures, which this model does not see."""
        album = album_of(prompt)
        if album is not None:
            raise DataError(
                f"prompt {number + 1} comes with {album.pictures[0].name}, and {self.name} is a "
                "model of text alone",
                expected="a model of images and text, as LLaVA or SmolVLM",
                remedy="--set backbone.name=hf:FOLDER of one, or prompts without images",
            )

    def _end_of(self, prompt: str) -> str:
        """As much of a prompt as is cut into tokens."""
        return prompt[-self._letters(self.prompt_tokens) :]

    def length_of(self, prompt: str) -> int:
        """Tokens of a prompt that is read as it is."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    def _letters(self, tokens: int) -> int:
        """How much of a text is cut into tokens, where so many of them are wanted at most."""
        return max(LEAST_LETTERS, 2 * tokens * self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self._chat:
            said = [{"role": "user", "content": prompt}]
            asked = self.tokenizer.apply_chat_template(
                said, add_generation_prompt=True, tokenize=False
            )
            # The template has the special tokens in it.
            found = self.tokenizer(asked, add_special_tokens=False, verbose=False)
        else:
            # Not verbose: what is longer than the context is cut later.
            found = self.tokenizer(prompt, verbose=False)
        return list(found.input_ids)

    def _cut(self, row: list[int], number: int, *, whole: bool) -> list[int]:
        """The end of a prompt; `whole` says that all of it was cut into tokens."""
        if self._refuse_long:
            raise DataError(
                f"prompt {number + 1} has {'' if whole else 'more than '}{len(row)} tokens",
                expected=f"at most {self.prompt_tokens} (text.prompt_tokens)",
                remedy="--set text.long_prompts=cut keeps the end of long prompts",
            )
        kept = 1 if row[0] == self.tokenizer.bos_token_id else 0
        return row[:kept] + row[max(kept, len(row) - self.prompt_tokens + kept) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of every token id alone, special tokens by their names."""
        return [str(self.tokenizer.decode([one])) for one in ids]

    def ids(self, tokens: Tensor) -> Tensor:
        """Token ids as the model takes them, those of padding any."""
        return tokens.clamp_min(0)

    # Forward --------------------------------------------------------------------------------

    def hidden(self, tokens: Tensor, recall: Recall | None = None, cache: Any = None) -> Tensor:
        """What the head reads, (b, n, dim), of a batch of token ids (b, n).

        `recall(block, hidden)` is called with the input (b, n, dim) of every block, before its
        first norm. With a cache (`new_cache`) that holds some tokens, `tokens` are all so far and
        only those behind them run: the result has as many. Threads take turns; within a pass
        another one is a RuntimeError.
        """
        real = tokens != PAD
        done = 0 if cache is None else cache.get_seq_length()
        # An answer that has ended goes on beside those that have not, perhaps beyond the context,
        # where a model with learned positions has none.
        places = (real.cumsum(1) - 1).clamp(0, self.context - 1)
        given: dict[str, Any] = {
            "attention_mask": _attention_mask(real),
            "position_ids": places[:, done:],
            "use_cache": cache is not None,
        }
        if cache is not None:
            given[self._cache_word] = cache
        given |= self._seen_in(tokens[:, done:])
        ids, decoder = self.ids(tokens[:, done:]), self._decoder
        found: Tensor = self.call.under(recall, lambda: decoder(ids, **given).last_hidden_state)
        return found

    def _family_of(self, model: Any, name: str) -> Family:
        return family_of(model, name)

    def _seen_in(self, tokens: Tensor) -> dict[str, Any]:
        """What the model is given of tokens (b, n) beside their ids."""
        del tokens
        return {}

    @property
    def _decoder(self) -> nn.Module:
        """The model without its head."""
        found: nn.Module = self.model.get_submodule(self._blocks.rpartition(".")[0])
        return found

    @cached_property
    def _cache_word(self) -> str:
        # Before version 5.20 or so, transformers called it past_key_values.
        words = inspect.signature(self._decoder.forward).parameters
        return "cache" if "cache" in words else "past_key_values"

    def new_cache(self) -> Any:
        """Room for the keys and values of a batch, as transformers keeps them."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of what `hidden` gave (..., dim)."""
        scores: Tensor = self.model.lm_head(hidden)
        most = getattr(self.config, "final_logit_softcapping", None)
        return scores if most is None else torch.tanh(scores / most) * most

    def logits(self, tokens: Tensor, recall: Recall | None = None) -> Tensor:
        """Logits (b, n, vocabulary) of the token that follows each of `tokens` (b, n)."""
        return self.head(self.hidden(tokens, recall))

    def gradient_checkpointing(self, on: bool = True) -> None:
        """Compute blocks again for backward instead of keeping what is in them."""
        self.call.checkpoints = on

    def answer_logits(
        self, tokens: Tensor, answers: Tensor, recall: Recall | None = None
    ) -> Tensor:
        """Logits (k, vocabulary) of the k answer tokens of a batch, float32 at least.

        `tokens` and `answers` as in `EncodedTexts`, these best on the CPU; the samples' tokens one
        after another.
        """
        wanted = _before_answers(tokens, answers)
        return in_float32(self.head(self.hidden(tokens, recall)[wanted]))

    def answer_losses(self, logits: Tensor, tokens: Tensor, answers: Tensor) -> Tensor:
        """−log p of each sample's answer by `answer_logits`, summed over its tokens: (b,)."""
        owner, before = _before_answers(tokens, answers)
        each = F.cross_entropy(logits, tokens[owner, before + 1], reduction="none")
        return each.new_zeros(len(tokens)).index_add(0, owner, each)

    def answer_loss(self, tokens: Tensor, answers: Tensor, recall: Recall | None = None) -> Tensor:
        """−log p of each sample's answer, summed over its tokens: (b,), float32 at least."""
        return self.answer_losses(self.answer_logits(tokens, answers, recall), tokens, answers)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        recall: Recall | None = None,
        *,
        most: int | None = None,
        beams: int = 1,
    ) -> list[list[int]]:
        """Answers to prompts (b, n): the most probable token, again and again.

        An answer ends before the end-of-text token, or at `most` tokens (`answer_tokens`). With
        `beams` it is the most probable of so many, searched by transformers; `recall` then is that
        of b x beams rows, every prompt so many times in turn.
        """
        most = self.answer_tokens if most is None else most
        batch, length = tokens.shape
        if length + most > self.context:
            raise MismatchError(
                f"prompts of {length} tokens and answers of {most}",
                expected=f"at most {self.context} tokens together, the context of {self.name}",
            )
        if beams > 1:
            return self._searched(tokens, recall, most, beams)
        cache = self.new_cache()
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

    def _searched(
        self, tokens: Tensor, recall: Recall | None, most: int, beams: int
    ) -> list[list[int]]:
        from transformers import GenerationConfig

        how = GenerationConfig(
            num_beams=beams,
            do_sample=False,
            max_new_tokens=most,
            length_penalty=0.0,  # the most probable, however long
            eos_token_id=list(self.ends),
            pad_token_id=self.ends[0],
        )
        given = {"attention_mask": (tokens != PAD).long(), "generation_config": how}
        given |= self._seen_in(tokens)
        ids = self.ids(tokens)
        found = self.call.under(recall, lambda: self.model.generate(ids, **given))
        answers: list[list[int]] = found[:, tokens.shape[1] :].tolist()
        return [self.ended(answer) for answer in answers]

    def ended(self, answer: list[int]) -> list[int]:
        """An answer up to its end-of-text token."""
        ends = [place for place, token in enumerate(answer) if token in self.ends]
        return answer[: ends[0]] if ends else answer


def _attention_mask(real: Tensor) -> Tensor | None:
    """What transformers is told of padding (b, n): nothing where there is none.

    On the meta device, where it cannot look at numbers, a mask (1, 1, n, n) that is ready.
    """
    if real.is_meta:
        return real.new_empty(1, 1, real.shape[1], real.shape[1])
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real.long()


def _before_answers(tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens (b, n) predict a token of an answer: samples (k,) and places (k,), ascending.

    How many they are depends on `answers` (b,), which on the CPU need no wait for the device.
    """
    length = tokens.shape[1]
    wanted = torch.arange(1, length) >= length - answers.cpu().unsqueeze(1)
    owner, before = wanted.nonzero().unbind(1)
    return sent(owner, tokens.device), sent(before, tokens.device)


def _check_positions(config: Any, name: str) -> None:
    """Refuse rotary positions under which keys cannot be kept."""
    for said in _ropes(config):
        rope = said.get("rope_type", "default")
        if rope not in ROPES:
            raise ConfigError(
                f"backbone {name} has rotary positions {rope!r}",
                expected=f"one of {', '.join(ROPES)}",
            )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """What a configuration says of rotary positions: once, or for every kind of attention."""
    # Before version 5, transformers called it rope_scaling.
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [one for one in (said, *said.values()) if isinstance(one, dict)]


def context_of(config: Any) -> int:
    """Tokens that a model of a configuration can look at, always in the same way."""
    context: int = config.max_position_embeddings
    word = "original_max_position_embeddings"
    for one in _ropes(config):
        if one.get("rope_type") == "longrope":
            context = min(context, one.get(word) or getattr(config, word, None) or context)
    return context


def _require_template(tokenizer: Any, name: str) -> bool:
    """True. Raises ConfigError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"text.chat with {name}, whose tokenizer has no chat template",
            expected="a model that was trained to chat",
            remedy="--set text.chat=false",
        )
    return True


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text, the tokenizer's own first."""
    settings = getattr(model, "generation_config", None)
    found: list[int] = []
    for said in (
        getattr(tokenizer, "eos_token_id", None),
        getattr(settings, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
    ):
        many = said if isinstance(said, list | tuple) else [said]
        found += [one for one in many if one is not None and one not in found]
    if not found:
        raise ConfigError("the model has no end-of-text token", expected="eos_token_id")
    return tuple(found)
