"""The hardest, the median and the easiest order of a stream, by how similar class means are.

Three random orders hide the tails. Lai et al. (2025, arXiv 2509.22580) find that class-incremental
learners reach more where tasks are more alike, so of groups of classes the easiest order has the
highest mean similarity between classes of different tasks (what is alike is spread over the tasks,
and a task tells unlike classes apart), the hardest the lowest. Of whole domains only their sequence
can change. Bell and Lawrence (2022) and Li and Hiratani (2025, arXiv 2502.03350) find less
forgetting where neighbours are unlike, so the hardest order has the highest mean similarity of
neighbours, the easiest the lowest.

Similar is the cosine between class means of the frozen features of training images, less the mean
of all classes; of two domains its mean over the classes that both have. Up to `EXHAUSTIVE` orders
all are looked at; else it is the best that exchanges of two find from several starts, which need
not be the very end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from memtool.streams.ordering import random_ranks

EXHAUSTIVE = 6_000
STARTS = 3
DRAWN = 501

Matrix = npt.NDArray[np.float64]
Order = tuple[int, ...]


@dataclass(frozen=True)
class BoundedOrder:
    """An order of things by their numbers, and its similarity as the top of the file says."""

    name: Literal["hardest", "median", "easiest"]
    order: Order
    similarity: float


def between_tasks(similarity: Matrix, widths: Sequence[int], order: Order) -> float:
    """Mean similarity (n, n) of things in different tasks, which take `widths` of the order."""
    tasks = np.repeat(np.arange(len(widths)), widths)
    apart = tasks[:, None] != tasks[None, :]
    rows = np.array(order)
    inside = similarity[rows[:, None], rows[None, :]]
    return float(inside[apart].mean()) if apart.any() else 0.0


def of_neighbours(similarity: Matrix, order: Order) -> float:
    """Mean similarity (n, n) of each thing and the next."""
    rows = np.array(order)
    return float(similarity[rows[:-1], rows[1:]].mean())


def bounds(
    similarity: Matrix, widths: Sequence[int] | None, *, seed: int
) -> tuple[BoundedOrder, BoundedOrder, BoundedOrder]:
    """Hardest, median and easiest order of n things by their similarity (n, n).

    Of classes that are cut into tasks of these `widths`; None for whole domains. The median is that
    of all orders, or of `DRAWN` that the seed draws.
    """
    count = len(similarity)

    def score(order: Order) -> float:
        if widths is None:
            return of_neighbours(similarity, order)
        return between_tasks(similarity, widths, order)

    few = math.factorial(count) <= EXHAUSTIVE
    drawn: Iterable[Order] = (
        itertools.permutations(range(count))
        if few
        else (
            tuple(np.argsort(random_ranks(count, f"bounds {start}", seed)).tolist())
            for start in range(DRAWN)
        )
    )
    scored = sorted(((score(order), order) for order in drawn), key=lambda pair: pair[0])
    lowest, highest = scored[0], scored[-1]
    if not few:
        lowest = min(_exchanged(score, order, -1) for _, order in scored[:STARTS])
        highest = max(_exchanged(score, order, 1) for _, order in scored[-STARTS:])
    hardest, easiest = (highest, lowest) if widths is None else (lowest, highest)
    median = scored[(len(scored) - 1) // 2]
    return (
        BoundedOrder("hardest", hardest[1], hardest[0]),
        BoundedOrder("median", median[1], median[0]),
        BoundedOrder("easiest", easiest[1], easiest[0]),
    )


def _exchanged(
    score: Callable[[Order], float], order: Order, sign: Literal[-1, 1]
) -> tuple[float, Order]:
    """The end of the way up (sign 1) or down by exchanges of two; its score and itself."""
    best, found = sign * score(order), list(order)
    better = True
    while better:
        better = False
        for first, second in itertools.combinations(range(len(found)), 2):
            found[first], found[second] = found[second], found[first]
            now = sign * score(tuple(found))
            if now > best + 1e-12:
                best, better = now, True
            else:
                found[first], found[second] = found[second], found[first]
    return sign * best, tuple(found)


def similarity_of_classes(means: Matrix) -> Matrix:
    """Cosines (n, n) of class means (n, dim) less the mean of all."""
    centred = means - means.mean(axis=0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(length == 0, 1.0, length)
    return np.asarray(unit @ unit.T)


def similarity_of_domains(means: Matrix) -> Matrix:
    """Mean cosine (domains, domains) of the means (domains, classes, dim) of the same classes.

    NaN where a domain has no image of a class, and where two have no class in common 0.
    """
    centred = means - np.nanmean(means, axis=(0, 1))
    length = np.linalg.norm(centred, axis=2, keepdims=True)
    unit = centred / np.where(length == 0, 1.0, length)
    cosines = np.einsum("acd,bcd->abc", unit, unit)
    known = ~np.isnan(cosines)
    total = np.where(known, cosines, 0.0).sum(axis=2)
    return np.asarray(total / np.maximum(known.sum(axis=2), 1))
