"""The keys that may be the most alike to a query, found by one product in few bits.

Every similarity here ranks keys as q̂ · k̂ + c does, with a vector k̂ and a number c of the key:

    dot, scaled-dot            q · k, where the last entry of q may be a constant 1 and c that of k
    cosine, centred-cosine     of directions, c = 0
    euclidean                  −|q − k|² / 2 = q̂ · k̂ − |k̂|² / 2 − |q̂|² / 2, both less the mean key

The product in the fastest number format of the machine is off by no more than a bound that follows
from the lengths of q̂ and k̂ (Cauchy-Schwarz); c is told in as many parts as make it exact. So all
keys whose rough score is within twice the bound of the k-th highest are kept, the k highest surely
among them, and the similarity is computed for these alone. What is found is exact; only how many
are kept depends on how close the scores are.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool import sections
from memtool.devices import cpu_multiplies_bfloat16
from memtool.memories.similarity import SIMILARITIES, SimilarityFunction

LEAST_KEYS = 1024
"""Fewer keys are not worth a search: all their scores are computed."""

GROUP = 128
"""Keys of which one maximum is kept; the groups of the highest are looked into."""

PARTS = 3
"""Numbers of eight bits or more that add up to one of float32."""

_PRODUCTS = (SIMILARITIES["dot"], SIMILARITIES["scaled-dot"])
SEARCHED: tuple[SimilarityFunction, ...] = tuple(SIMILARITIES[one] for one in sections.SEARCHED)
"""The similarities that keys are searched by."""


def fastest() -> torch.dtype:
    """The number format in which the CPU multiplies matrices fastest, of those with wide range."""
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


class Search(Protocol):
    """Keys (t, d) made ready to be searched."""

    def near(self, queries: Tensor, count: int) -> Tensor:
        """Keys to be scored for queries (b, d), of which the `count` highest are wanted.

        (u,), ascending: all that any of the queries needs; or (b, c): of each query its own. None
        at all: every key is to be scored.
        """


class Searcher(Protocol):
    """Makes keys (t, d) float32 ready to be searched by one of `SEARCHED`.

    `constant` says that the last entry of every query is 1.
    """

    def __call__(
        self, keys: Tensor, likeness: SimilarityFunction, *, constant: bool = False
    ) -> Search:
        """Keys made ready."""


class Products:
    """What makes a similarity to keys (t, d) one of q̂ · k̂ + c, as above; it keeps no keys."""

    def __init__(self, keys: Tensor, likeness: SimilarityFunction, *, constant: bool) -> None:
        self._likeness = likeness
        self._constant = constant and likeness in _PRODUCTS
        self._mean = keys.detach().float().mean(dim=0)

    def of_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """k̂ (t, d̂) and c (t,) of keys (t, d), float32."""
        ready = self.of_queries(keys)
        extra = ready.new_zeros(len(keys))
        if self._constant:
            extra = keys.detach().float()[:, -1]
        elif self._likeness is SIMILARITIES["euclidean"]:
            extra = -ready.square().sum(dim=1) / 2
        return ready, extra

    def of_queries(self, queries: Tensor) -> Tensor:
        """q̂ (b, d̂) of queries (b, d), float32."""
        vectors = queries.detach().float()
        if self._constant:
            return vectors[:, :-1]
        if self._likeness in _PRODUCTS:
            return vectors
        if self._likeness is SIMILARITIES["euclidean"]:
            return vectors - self._mean
        if self._likeness is SIMILARITIES["centred-cosine"]:
            vectors = vectors - vectors.mean(dim=-1, keepdim=True)
        return F.normalize(vectors, dim=-1)


class KeySearch:
    """Keys (t, d) float32, made ready to be searched by one of `SEARCHED`, exactly.

        near = KeySearch(keys, similarity.dot).near(queries, 4)
        scores = similarity.dot(queries, keys[near])      # the 4 highest of all are among them

    `constant` says that the last entry of every query is 1; `dtype` is that of the rough product,
    None: the fastest.
    """

    def __init__(
        self,
        keys: Tensor,
        likeness: SimilarityFunction,
        *,
        constant: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = fastest() if dtype is None else dtype
        self.count = len(keys)
        self._is_euclidean = likeness is SIMILARITIES["euclidean"]
        self._products = Products(keys, likeness, constant=constant)
        ready, extra = self._products.of_keys(keys)
        self._longest, self._most = ready.norm(dim=1).max(), extra.abs().max()
        parts = [ready]
        for _ in range(PARTS):
            parts.append(extra.to(self.dtype).float().unsqueeze(1))
            extra = extra - parts[-1][:, 0]
        # Room for whole groups.
        self._keys = F.pad(torch.cat(parts, dim=1), (0, 0, 0, -len(keys) % GROUP)).to(self.dtype)

    def near(self, queries: Tensor, count: int) -> Tensor:
        """The keys (u,), ascending, that may be among the `count` highest of a query (b, d).

        Equal ones up to roundings of float32 are all among them.
        """
        ready = self._products.of_queries(queries)
        with torch.autocast(ready.device.type, enabled=False):
            rough = F.pad(ready, (0, PARTS), value=1.0).to(self.dtype) @ self._keys.T
        rough[:, self.count :] = -torch.inf
        # Group g has the keys g, g + groups, …: a maximum over rows reads memory in order.
        grouped = rough.view(len(rough), GROUP, -1)
        highest = grouped.amax(dim=1).float()
        groups, count = highest.shape[1], min(count, self.count)
        # The k-th highest of the maxima is no higher than the k-th highest of all.
        least = (highest if count <= groups else rough.float()).topk(count, dim=1).values[:, -1:]
        least = self._lowered(least, ready)
        sample, group = (highest >= least).nonzero(as_tuple=True)
        close = grouped[sample, :, group].float() >= least[sample]
        found, member = close.nonzero(as_tuple=True)
        return (group[found] + groups * member).unique()

    def _lowered(self, least: Tensor, ready: Tensor) -> Tensor:
        """The rough score (b, 1) that no key falls below whose score is as high as of `least`."""
        unit = torch.finfo(self.dtype).eps / 2
        terms = (ready.shape[1] + PARTS + 4) * torch.finfo().eps
        length = ready.norm(dim=1, keepdim=True)
        # Both factors are rounded; sums, here and in the similarity, are of terms in float32.
        product = length * self._longest
        off = (2 * unit + unit**2) * product + 2 * terms * (product + self._most)
        if self._is_euclidean:
            off = off + terms * (length.square() + self._longest.square())
        # The rounding of a sum is monotone: what lies above is rounded to no less.
        lowered: Tensor = (least - unit * least.abs() - 2 * off).to(self.dtype)
        return lowered.float()
