"""Runs of words and shares of them: what both forms of SARI count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

GRAMS = 4
"""SARI looks at runs of 1 to so many words."""


def grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """All runs of n words, counted."""
    return Counter(tuple(words[place : place + n]) for place in range(len(words) - n + 1))


def share(part: int, whole: int) -> float:
    """Part / whole; nothing of nothing is all."""
    return part / whole if whole else 1.0


def f_measure(precision: float, recall: float) -> float:
    """The harmonic mean, 0 of two zeros."""
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0
