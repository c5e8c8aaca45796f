"""What a memory of whole adapters gives back for a key, and how known the key was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtool.errors import DataError


@dataclass(frozen=True, eq=False)
class Recalled:
    """n completed patterns.

    `patterns` (n, numel) begin with the keys as they were given; `coefficients` (n, t) float64 say
    how much of every stored pattern is in the rest; `energy` (n,) is the memory's own, lower for
    what it knows; `novelty` (n,) goes from 0 for a stored key to 1 for one that is like none.
    """

    patterns: Tensor
    coefficients: Tensor
    energy: Tensor
    novelty: Tensor

    @property
    def nearest(self) -> Tensor:
        """The place (n,) of the stored pattern that has the largest coefficient."""
        return self.coefficients.argmax(dim=-1)


def novelty(keys: Tensor, recalled: Tensor) -> Tensor:
    """Share of keys (..., d_k) that the recalled ones leave unexplained: (...), 0 to 1."""
    left = (keys.double() - recalled.double()).square().sum(dim=-1)
    return (left / keys.double().square().sum(dim=-1)).clamp(0.0, 1.0)


def checked_key(key: Tensor, what: str) -> Tensor:
    """`key` (d_k,), when it can tell one pattern from another.

    Raises DataError for numbers that are not finite, and for a key whose entries are all equal.
    """
    if not bool(torch.isfinite(key).all()):
        raise DataError(f"{what} holds numbers that are not finite")
    if len(key) > 1 and bool((key == key[0]).all()):
        raise DataError(
            f"{what} is constant: {float(key[0]):g} in all {len(key)} entries",
            expected="numbers that differ from adapter to adapter",
            remedy="a larger modulation.key_share, or an adapter that was trained",
        )
    return key
