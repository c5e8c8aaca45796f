"""Memories attached to their frozen model: modules that take a batch and say what they make of it.

    model = memory.attach()
    out = model(batch)      images uint8 (n, h, w, 3), or float (n, 3, size, size) as transformed

One version of a memory, as it was written: nothing here learns, and no stream is read. A module
for each kind of memory; `attach` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.recalls import chosen, every
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.answering import RecallOf, answers, by_length, trimmed
from memtool.backbones.causal_lm import CausalLM
from memtool.backbones.interface import Backbone, FrozenModel
from memtool.errors import DataError
from memtool.heads import LinearClassifier, Projection, RecalledHead
from memtool.learning.looks import FeatureModel
from memtool.memories.novelty import LIMIT
from memtool.streams.pictures import with_pictures


@dataclass(frozen=True, eq=False)
class Output:
    """What an attached memory makes of a batch of images.

    logits (n, classes), whose softmax are the probabilities (n, classes): scores of one head, or
    the logarithm of what several heads say together; -inf for classes that no head saw. weights (n,
    adapters): the share of every adapter, mean over blocks; atoms that fell below the threshold
    leave less than one in all. novelty (n,), on the CPU: how far the input lies from what was
    learned, of many tasks from what it recalls; NaN where the memory cannot tell. unlike (n,) where
    it is beyond.
    """

    logits: Tensor
    probabilities: Tensor
    weights: Tensor
    novelty: Tensor

    @property
    def unlike(self) -> Tensor:
        """Which inputs are unlike all that was learned: bool (n,)."""
        return self.novelty > LIMIT


torch.export.register_dataclass(Output, serialized_type_name="memtool.Output")


class HeadModule(nn.Module):
    """A head as buffers of a module, so that they move with it."""

    weight: Tensor
    bias: Tensor
    owners: Tensor | None
    projection: Tensor | None

    def __init__(self, head: RecalledHead) -> None:
        super().__init__()
        self.register_buffer("weight", head.weight)
        self.register_buffer("bias", head.bias)
        self.register_buffer("owners", head.owners)
        drawn = None if head.projection is None else head.projection.weight
        self.register_buffer("projection", drawn)
        self.of_directions = head.of_directions

    def forward(self, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities (n, classes) of features under weights (n, adapters)."""
        drawn = self.projection
        head = RecalledHead(
            self.weight.float(),
            self.bias.float(),
            self.owners,
            None if drawn is None else Projection(drawn.float()),
            self.of_directions,
        )
        scores = head(features, weights)
        probabilities = head.probabilities(scores)
        if head.owners is None:
            return scores, probabilities
        seen = head.bias.isfinite().any(dim=0)
        logits = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
        return logits.masked_fill(~seen, -torch.inf), probabilities


class Attached(nn.Module):
    """A memory on its frozen model. Always in eval mode; no parameter learns."""

    def __init__(self, backbone: FrozenModel, precision: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.precision = precision

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        del mode
        return super().train(False)

    def computing(self) -> AbstractContextManager[object]:
        """The number format of the computation: float32, or bfloat16 where that was asked for."""
        return torch.autocast(
            self.backbone.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )


class AttachedImages(Attached, ABC):
    """A memory on an image model: `forward(batch)` gives an `Output`."""

    backbone: Backbone

    def pixels(self, batch: Tensor) -> Tensor:
        """uint8 (n, h, w, 3) preprocessed; floats (n, 3, size, size) in the model's own type.

        Raises DataError, MismatchError for anything else.
        """
        if not isinstance(batch, Tensor):
            raise DataError(
                f"a batch of type {type(batch).__name__}",
                expected="a tensor: uint8 (n, height, width, 3), or float (n, 3, size, size)",
                remedy="memory.transform makes one of a PIL image",
            )
        pixels = batch if batch.is_floating_point() else self.backbone.preprocess(batch)
        return pixels.to(next(self.backbone.parameters()).dtype)

    def forward(self, batch: Tensor) -> Output:
        """What the memory makes of a batch of images."""
        pixels = self.pixels(batch)
        with self.computing():
            return self.seen(pixels)

    @abstractmethod
    def seen(self, pixels: Tensor) -> Output:
        """What the memory makes of preprocessed pixels (n, 3, size, size)."""

    def hold_all(self) -> None:
        """Read all that it would read when it is needed; here nothing."""


class AttachedTexts(Attached, ABC):
    """A memory on a language model: it answers prompts."""

    backbone: CausalLM

    @abstractmethod
    def recall(self, prompts: Tensor) -> Recall | None:
        """What is recalled for prompts, token ids (n, length) padded on the left."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What the columns of `weights` are called: adapters, or tasks."""

    @abstractmethod
    def weights(self, prompts: Sequence[str]) -> Tensor:
        """Whose adapters prompts use: (n, adapters), a column for each of `names`."""

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, length, words) of token ids (n, length), as `CausalLM.encode` makes them."""
        with self.computing():
            return self.backbone.logits(tokens, self.recall(tokens))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[Any] | None = None,
        batch: int = 16,
        most: int | None = None,
        beams: int = 1,
    ) -> list[str]:
        """The answers to prompts, without white space around them: greedy, or the best of beams.

        `images` are those of each prompt, as `memtool.streams.with_pictures` takes them: a path, a
        PIL image, uint8 (height, width, 3), a list of several, or None.
        An answer has at most `most` tokens; none: as the memory was made (`text.answer_tokens`).
        """
        require_texts(prompts)
        prompts = with_pictures(prompts, images)
        self.require_beams(beams)
        recall = RecallOf(self.recall)
        with self.computing():
            return answers(self.backbone, prompts, recall, batch=batch, most=most, beams=beams)

    def answered(
        self,
        prompts: Sequence[str],
        *,
        batch: int = 16,
        most: int | None = None,
        beams: int = 1,
    ) -> tuple[list[str], Tensor]:
        """The answers to prompts as `generate` gives them, and their `weights`."""
        found = self.generate(prompts, batch=batch, most=most, beams=beams)
        return found, self.weights(prompts)

    def require_beams(self, beams: int) -> None:
        """Raise ConfigError where what is recalled does not allow a search with so many beams."""
        del beams

    def answer(self, prompt: str, image: Any = None) -> str:
        """The greedy answer to one prompt, perhaps with an image or a list of them."""
        return self.generate([prompt], images=[image])[0]


class AttachedByPrompt(AttachedTexts):
    """Whole adapters on a language model, chosen by the prompt and kept while it answers."""

    def __init__(self, lm: CausalLM, names: Sequence[str], precision: str) -> None:
        super().__init__(lm, precision)
        self._names = tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order of their weights."""
        return self._names

    @abstractmethod
    def weights_of(self, prompts: Tensor) -> Tensor:
        """The weights (n, adapters) that prompts choose, token ids (n, length)."""

    @abstractmethod
    def asked(self, prompts: Tensor) -> tuple[Recall, Callable[[], Tensor]]:
        """What prompts recall; and what tells their weights, as `weights_of`, once they ran.

        The prompts are looked at once for both.
        """

    @torch.no_grad()
    def weights(self, prompts: Sequence[str]) -> Tensor:
        """The weights (n, adapters) that prompts choose."""
        require_texts(prompts)
        found = torch.zeros(len(prompts), len(self.names))
        if not prompts:
            return found
        tokens = self.backbone.encode(prompts).tokens
        for rows in by_length(tokens, 16):
            asked = trimmed(tokens[rows]).to(self.backbone.device)
            with self.computing():
                found[rows] = self.weights_of(asked).float().cpu()
        return found


def require_texts(prompts: Sequence[str]) -> None:
    """Raise DataError for one text, whose letters would be taken for texts, or what is no text."""
    texts = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not texts or not all(isinstance(one, str) for one in prompts):
        kinds = {type(one).__name__ for one in prompts} if texts else {type(prompts).__name__}
        raise DataError(
            f"prompts of type {', '.join(sorted(kinds))}",
            expected="a list of texts",
            remedy="model.answer(text) for one",
        )


def unknown(features: Tensor) -> Tensor:
    """The novelty (n,) of inputs where a memory cannot tell; float64, on the CPU."""
    return torch.full((features.shape[0],), torch.nan, dtype=torch.float64)


def finite(novelty: Tensor, features: Tensor) -> Tensor:
    """The novelty (n,), infinite where an input has numbers that are none."""
    return novelty.masked_fill(~features.isfinite().all(dim=-1).to(novelty.device), torch.inf)


class TaskOf(nn.Module):
    """The task of every input, a row: the one that is told, or what a predictor sees.

    A predictor is an adapter with a head over the rows.
    """

    def __init__(
        self,
        told: int | None = None,
        predictor: tuple[AdapterValues, LinearClassifier] | None = None,
    ) -> None:
        super().__init__()
        self.told = told
        self.predictor: AdapterValues | None = None
        if told is None and predictor is not None:
            self.predictor, classifier = predictor
            self.tells = HeadModule(RecalledHead.shared(classifier))

    def forward(self, model: FeatureModel, inputs: Tensor) -> Tensor:
        """The row of the task of every preprocessed input (n,), int64."""
        if self.predictor is None:
            return inputs.new_full((inputs.shape[0],), self.told or 0, dtype=torch.int64)
        features = model.features(inputs, every(self.predictor))
        logits, _ = self.tells(features, features.new_zeros(features.shape[0], 1))
        return logits.argmax(dim=1)


class AttachedAdapters(AttachedImages):
    """Whole adapters, one for every input: of a task that is told, or that a predictor sees.

    `values` (t, numel) are the adapters as they are used: recalled, or exact; `places` says which
    of the memory's `adapters` each is. `told` is the row of the task that every input is of.
    """

    def __init__(
        self,
        backbone: Backbone,
        values: AdapterValues,
        heads: Sequence[LinearClassifier],
        precision: str,
        *,
        places: Sequence[int],
        adapters: int,
        told: int | None = None,
        predictor: tuple[AdapterValues, LinearClassifier] | None = None,
        of_directions: bool = False,
    ) -> None:
        """`of_directions`: the heads read features of length one."""
        super().__init__(backbone, precision)
        self.values = values
        head = RecalledHead.of_tasks(heads, range(len(heads)))
        self.head = HeadModule(replace(head, of_directions=of_directions))
        self.adapters = adapters
        self.places: Tensor
        self.register_buffer("places", torch.tensor(places))
        self.task_of = TaskOf(told, predictor)

    def seen(self, pixels: Tensor) -> Output:
        """As `AttachedImages.seen`: two passes where a predictor says the task, else one."""
        row: Tensor = self.task_of(self.backbone, pixels)
        features = self.backbone.features(pixels, chosen(self.values, row))
        own = F.one_hot(row, len(self.values)).float()
        logits, probabilities = self.head(features, own)
        weights = F.one_hot(self.places[row], self.adapters).float()
        return Output(logits, probabilities, weights, unknown(features))
