"""A model of images and text: what it sees of pictures comes before its language tower, as always.

The model runs as transformers wrote it, vision tower, projection and all; the blocks of its
language tower are those that adapters change. What its processor makes of a prompt and its pictures
is a row of token ids, in which every token of a picture is a number below `PAD`: it says whose
pictures they are. So a batch of prompts is one tensor (b, n), with pictures or without, that is
padded, trimmed, chosen from and looked at as any other.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool.backbones.causal_lm import PAD, PROMPT_TOKENS, CausalLM, EncodedTexts, context_of
from memtool.backbones.families import FAMILIES, Family
from memtool.errors import ConfigError, DataError, NotFoundError
from memtool.pictured import Album, album_of
from memtool.settings import TextSettings
from memtool_stores.printable import shown

GIVEN = ("pixel_values", "pixel_attention_mask", "image_sizes")
"""What a model may be given of pictures: none of it has a place for every token."""

KEPT_BYTES = 2**28
"""Pictures that are kept ready for the model, in bytes."""

KEPT_ROWS = 2**16
"""Prompts with pictures of which the tokens are kept."""

KEPT_ALBUMS = 64
"""Prompts of which the pictures are known although nobody holds the prompt."""

KINDS = "LLaVA, LLaVA-NeXT, SmolVLM or Idefics3"


def reads_pictures(source: str) -> bool:
    """Whether the configuration of a model, in a folder or on the hub, is one of images and text.

    False for what has none that can be read.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return config.model_type in KNOWN and config.get_text_config() is not config
    except (OSError, ValueError):  # none, or one of several towers of text
        return False


def open_processor(source: str) -> Any:
    """What makes token ids and pixels of a prompt and its pictures, with its own sizes.

    Raises NotFoundError where the files of one are not there, ConfigError where it needs a package.
    """
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_processor(source, f": {error}") from error
    except ImportError as error:
        raise ConfigError(f"the processor of {source!r} needs a package: {error}") from error
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        raise _no_processor(source, "")
    return found


def _no_processor(source: str, why: str) -> NotFoundError:
    return NotFoundError(
        f"no processor of images and text in {source!r}{why}",
        expected="processor_config.json or preprocessor_config.json beside the tokenizer",
        remedy="AutoProcessor.from_pretrained(MODEL).save_pretrained(FOLDER)",
    )


class PicturedLM(CausalLM):
    """A frozen model of images and text; the targets are those of its language tower.

    A prompt is text, or a `memtool.pictured.Prompt` with a mark (`mark`, as "<image>") for every
    picture. The pictures of token ids are known as long as somebody holds the prompts that these
    were cut from, and those of the last few prompts. A prompt that is too long loses text behind
    its last picture, never a picture.

    Raises ConfigError, beside what `CausalLM` does, for a language tower that is none of
    `FAMILIES`, and for a model that is told of pictures in another way.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        text: TextSettings,
        *,
        sha256: str = "",
        made_of: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        tokenizer = processor.tokenizer
        if not getattr(tokenizer, "chat_template", None):  # that of pictures is the processor's
            tokenizer.chat_template = getattr(processor, "chat_template", None)
        context = context_of(model.config.get_text_config())
        if text.prompt_tokens is None:  # a picture alone may have more tokens than texts do
            most = max(1, context - (text.answer_tokens or context // 4))
            text = text.model_copy(update={"prompt_tokens": min(4 * PROMPT_TOKENS, most)})
        super().__init__(model, tokenizer, name, text, sha256=sha256, made_of=made_of)
        self.processor = processor
        self._albums: WeakValueDictionary[int, Album] = WeakValueDictionary()
        self._numbers: WeakKeyDictionary[Album, int] = WeakKeyDictionary()
        self._next = itertools.count(1)
        self._recent: deque[Album] = deque(maxlen=KEPT_ALBUMS)
        self._rows: OrderedDict[tuple[Any, ...], array[int]] = OrderedDict()
        self._ready: OrderedDict[tuple[str, ...], dict[str, Tensor]] = OrderedDict()
        self._ready_bytes = 0
        self.mark, self.picture_id = _mark_of(processor, model.config, name)
        self._require_expressible()

    @staticmethod
    def _base_of(model: Any) -> tuple[str, Any]:
        """The model without its head, and its name in the whole."""
        name = str(model.base_model_prefix)
        return name, getattr(model, name, None)

    def _family_of(self, model: Any, name: str) -> Family:
        tower = str(getattr(model.config.get_text_config(), "model_type", ""))
        family = FAMILIES.get(tower)
        ours = type(model).__module__.startswith("transformers.")
        prefix, base = self._base_of(model)
        if family is None or not ours or base is None or not hasattr(model, "lm_head"):
            raise ConfigError(
                f"backbone {name} is a {type(model).__name__}, whose language tower "
                f"({tower or 'unknown'}) memtool cannot adapt",
                expected=f"a model such as {KINDS} on one of {', '.join(FAMILIES)}",
            )
        blocks = family.blocks.rpartition(".")[2]
        for path, module in base.named_modules():
            of_tower = getattr(getattr(module, "config", None), "model_type", None) == tower
            if path and of_tower and isinstance(getattr(module, blocks, None), nn.ModuleList):
                return replace(family, blocks=f"{prefix}.{path}.{blocks}")
        raise ConfigError(
            f"backbone {name} is a {type(model).__name__}, and its language tower ({tower}) was "
            "not found in it",
            expected=f"a model such as {KINDS}",
        )

    @property
    def _decoder(self) -> nn.Module:
        found: nn.Module = self._base_of(self.model)[1]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> PicturedLM:
        """A copy knows the same pictures: who holds a prompt is not copied."""
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        shared = ("_albums", "_numbers", "_next", "_recent")
        for name, value in self.__dict__.items():
            made.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        return made

    # Texts and pictures ---------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> EncodedTexts:
        """As `CausalLM.encode`; the tokens of a picture are numbers below `PAD`.

        Raises DataError, too, for another number of pictures than of marks, for an answer with a
        mark, and for a picture that is broken or does not fit.
        """
        for number, answer in enumerate(answers or ()):
            if self.mark in answer:
                raise DataError(
                    f"answer {number + 1} has the mark of a picture, {self.mark}: {shown(answer)}",
                    expected="text alone",
                    remedy="take the mark out",
                )
        return super().encode(prompts, answers)

    def _require_readable(self, prompt: str, number: int) -> None:
        album, marks = album_of(prompt), prompt.count(self.mark)
        pictures = () if album is None else album.pictures
        if len(pictures) == marks:
            return
        named = f" ({pictures[0].name})" if pictures else ""
        wanted = (
            f"--prompt '{self.mark} …' --image FILE"
            if not pictures
            else (f"say where a picture belongs, as in '{self.mark * len(pictures)} …'")
        )
        raise DataError(
            f"prompt {number + 1} has {len(pictures)} pictures{named} and {marks} marks "
            f"{self.mark} for them: {shown(str(prompt))}",
            expected=f"a mark {self.mark} for every picture",
            remedy=wanted,
        )

    def _end_of(self, prompt: str) -> str:
        return super()._end_of(prompt) if album_of(prompt) is None else prompt

    def length_of(self, prompt: str) -> int:
        """As `CausalLM.length_of`, its pictures included."""
        album = album_of(prompt)
        if album is None:
            return super().length_of(prompt)
        return len(self._row(str(prompt), album, special=True))

    def _prompt_ids(self, prompt: str) -> list[int]:
        album = album_of(prompt)
        if not self._chat:
            if album is None:
                return super()._prompt_ids(prompt)
            return self._row(str(prompt), album, special=True)
        asked = self.processor.apply_chat_template(
            [{"role": "user", "content": _parts(str(prompt), self.mark)}],
            add_generation_prompt=True,
            tokenize=False,
        )
        if album is None:
            return list(self.tokenizer(asked, add_special_tokens=False, verbose=False).input_ids)
        return self._row(asked, album, special=False)

    def _row(self, text: str, album: Album, *, special: bool) -> list[int]:
        """The tokens of a text with pictures; `special` adds those that begin a text."""
        key = (text, special, album.content)
        if key not in self._rows:
            ids, seen = self._processed(text, album, special=special)
            self._keep(album.content, seen)
            self._rows[key] = array("q", ids)  # a list is several times as large
            if len(self._rows) > KEPT_ROWS:
                self._rows.popitem(last=False)
        number = self._numbers.get(album)
        if number is None:
            number = self._numbers[album] = next(self._next)
            self._albums[number] = album
        self._recent.append(album)
        return [PAD - number if one == self.picture_id else one for one in self._rows[key]]

    def _processed(
        self, text: str, album: Album, *, special: bool
    ) -> tuple[list[int], dict[str, Tensor]]:
        """What the processor makes of a text and pictures: ids, and what the model is given."""
        pictures = [picture.rgb() for picture in album.pictures]
        try:
            made = self.processor(
                text=[text], images=[pictures], add_special_tokens=special, return_tensors="pt"
            )
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            names = ", ".join(one.name for one in album.pictures)
            raise DataError(
                f"{names}: the processor of {self.name} cannot read it beside {shown(text)[:80]}: "
                f"{error}",
                expected=f"a picture for every mark {self.mark}",
                remedy="a larger picture, or one that is not so narrow",
            ) from error
        seen = {name: one for name, one in made.items() if name in GIVEN}
        return made["input_ids"][0].tolist(), seen

    def _keep(self, content: tuple[str, ...], seen: dict[str, Tensor]) -> None:
        """Keep what the model is given of pictures, and no more than there is room for."""
        self._ready_bytes += _bytes(seen) - _bytes(self._ready.pop(content, {}))
        self._ready[content] = seen
        while self._ready_bytes > KEPT_BYTES and len(self._ready) > 1:
            self._ready_bytes -= _bytes(self._ready.popitem(last=False)[1])

    def _cut(self, row: list[int], number: int, *, whole: bool) -> list[int]:
        last = max((place for place, one in enumerate(row) if one < PAD), default=-1)
        if last < 0 or self._refuse_long:
            return super()._cut(row, number, whole=whole)
        special = set(self.tokenizer.all_special_ids)
        kept = last + 1
        while kept < len(row) and row[kept] in special:  # what closes the picture
            kept += 1
        if kept >= self.prompt_tokens:
            raise DataError(
                f"prompt {number + 1} has {kept} tokens up to the end of its last picture",
                expected=f"fewer than {self.prompt_tokens} (text.prompt_tokens)",
                remedy=f"--set text.prompt_tokens={len(row)}, or smaller pictures",
            )
        return row[:kept] + row[len(row) - self.prompt_tokens + kept :]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """As `CausalLM.token_texts`; that of a picture's tokens is the mark."""
        return super().token_texts([self.picture_id if one < PAD else one for one in ids])

    def ids(self, tokens: Tensor) -> Tensor:
        """As `CausalLM.ids`; those of a picture are what the model knows it by."""
        return super().ids(tokens).masked_fill(tokens < PAD, self.picture_id)

    # Forward --------------------------------------------------------------------------------

    def _seen_in(self, tokens: Tensor) -> dict[str, Any]:
        """What the model is given of the pictures of tokens (b, n)."""
        lowest = tokens.amin(dim=1).tolist() if tokens.numel() else []
        numbers = [PAD - one for one in lowest if one < PAD]
        if not numbers:
            return {}
        found = _joined([self._pixels(number) for number in numbers])
        device, dtype = tokens.device, self.embed.weight.dtype
        return {
            name: one.to(device, dtype if one.is_floating_point() else None)
            for name, one in found.items()
        }

    def _pixels(self, number: int) -> dict[str, Tensor]:
        album = self._albums.get(number)
        if album is None:
            raise DataError(
                "the pictures of these tokens are gone",
                expected="tokens whose prompts are still held",
                remedy="keep the prompts that they were cut from as long as the tokens",
            )
        content = album.content
        if content not in self._ready:
            self._keep(content, self._processed(self.mark * len(content), album, special=False)[1])
        self._ready.move_to_end(content)
        return self._ready[content]

    def _searched(self, tokens: Tensor, *given: Any) -> list[list[int]]:
        numbers = {PAD - one for one in tokens.amin(dim=1).tolist() if one < PAD}
        if any(len(self._pixels(number)["pixel_values"]) > 1 for number in numbers):
            raise ConfigError(
                "a search with beams for prompts of several pictures each",
                expected="one picture a prompt, or token by token",
                remedy="--beams 1",
            )
        return super()._searched(tokens, *given)

    def _require_expressible(self) -> None:
        """Raise ConfigError for a model that is told of pictures in another way than `GIVEN`."""
        try:
            made = self.processor(text=[self.mark], images=[[_blank()]], return_tensors="pt")
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            raise ConfigError(
                f"the processor of {self.name} cannot read a picture: {error}",
                expected=f"the processor of a model such as {KINDS}",
            ) from error
        others = set(made) - {"input_ids", "attention_mask", *GIVEN}
        if others or self.picture_id not in made["input_ids"][0].tolist():
            told = ", ".join(sorted(others)) or f"other tokens than {self.mark}"
            raise ConfigError(
                f"backbone {self.name} is a {type(self.model).__name__}, which is told of pictures "
                f"by {told}, and memtool does not say that",
                expected=f"a model such as {KINDS}",
            )


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (127, 127, 127))


def _mark_of(processor: Any, config: Any, name: str) -> tuple[str, int]:
    """What stands for a picture in a prompt, and its token id."""
    mark = getattr(processor, "image_token", None)
    number = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if mark is None or number is None:
        raise ConfigError(
            f"backbone {name} has no token that stands for a picture",
            expected=f"a model such as {KINDS}",
        )
    return str(getattr(mark, "content", mark)), int(number)


def _parts(prompt: str, mark: str) -> list[Mapping[str, str]]:
    """A prompt as chat templates take it: texts and pictures in their order."""
    found: list[Mapping[str, str]] = []
    for place, text in enumerate(prompt.split(mark)):
        found += [{"type": "image"}] * (place > 0)
        if text.strip():
            found.append({"type": "text", "text": text})
    return found


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a model is given of several prompts: rows one after another, with zeros as padding."""
    found: dict[str, Tensor] = {}
    for name in parts[0]:
        rows = [part[name] for part in parts]
        most = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]
        found[name] = torch.cat([_padded(row, most) for row in rows])
    return found


def _padded(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    lacking = [wanted - size for size, wanted in zip(rows.shape[1:], sizes, strict=True)]
    return F.pad(rows, [one for lack in reversed(lacking) for one in (0, lack)])


def _bytes(seen: Mapping[str, Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in seen.values())
