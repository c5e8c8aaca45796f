"""Answers of a memory of a language model to many prompts, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memtool.memories.novelty import LIMIT
from memtool.methods.attached import AttachedTexts
from memtool.methods.method import Method
from memtool_stores import MemoryView

LEAST = 0.0005
"""A weight below this is not told."""


@dataclass(frozen=True)
class Answered:
    """What is told of one prompt.

    `weights` are the adapters that it chose, greatest first; `novelty` and `unlike` are None where
    the memory cannot tell.
    """

    prompt: str
    answer: str
    weights: tuple[tuple[str, float], ...]
    novelty: float | None
    unlike: bool | None


def answered(
    method: Method,
    view: MemoryView,
    model: AttachedTexts,
    prompts: Sequence[str],
    *,
    batch: int,
    adapters: int = 5,
) -> Iterator[Answered]:
    """The answers to prompts in their order, with up to so many adapters each.

    `model` is what `method` attached at the version of `view`. Raises DataError for a prompt that
    is too long, where these are refused.
    """
    for low in range(0, len(prompts), batch):
        some = prompts[low : low + batch]
        texts, weights = model.answered(some, batch=batch)
        far = method.novelties(view, some)
        for prompt, text, row, novelty in zip(some, texts, weights.tolist(), far, strict=True):
            chosen = sorted(zip(model.names, row, strict=True), key=lambda one: -one[1])
            told = tuple((n, w) for n, w in chosen[:adapters] if w >= LEAST)
            unlike = None if novelty is None else novelty > LIMIT
            yield Answered(prompt, text, told, novelty, unlike)
