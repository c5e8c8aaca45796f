"""The keys that are probably the most alike to a query, found in an index of usearch.

Every key has a score q̂ · k̂ + c (`search.Products`). What all keys have in common adds the same to
all scores of a query, so k̂ and c count less their means m; the rest is put into one product:

    k' = (A (k̂ − m), σ c, √max(0, M² − |·|²))        q' = (A⁻¹ q̂, 1/σ, 0)

A = C^(−1/4), with C the covariance of k̂: between the directions in which keys differ and those in
which queries do. σ gives c the spread of an entry. The last entry, which no query sees, gives nine
keys of ten the length M of the longest of them (Bachrach et al., 2014, "Speeding Up the Xbox
Recommender System"): keys near each other then have much the same scores. Were M the length of the
longest of all, one that is much longer would leave no differences between the others.

The highest products are looked for in a graph of near keys (HNSW, Malkov & Yashunin, 2018), a few
times as many as are wanted. It may miss one. Whoever asks scores what it found.

An index is made whole from all keys and never changes.
"""

from __future__ import annotations

import hashlib
import json
import math
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import without_autocast
from memtool.errors import ConfigError, CorruptError
from memtool.memories.search import Products
from memtool.memories.similarity import SimilarityFunction

CANDIDATES, LEAST = 4, 32
"""Keys that are found for each one that is wanted, and in all at least: some have equal scores."""

COMMON = 0.9
"""Share of the keys that have one length."""

GRAPH = {"dtype": "f16", "connectivity": 16, "expansion_add": 128, "expansion_search": 256}
"""How usearch keeps vectors, and how far it looks around when it adds and finds them."""

LINKS_BYTES = 150
"""Of one key, in its graph."""

SAMPLE = 4096
"""Keys, at random among all, that the means, A, σ and M are of."""

FORMAT = 1
"""Counts what else makes an index another one for the same keys: the formulas above."""

FLAT = 1e-6
"""Variance of a direction, over the largest, below which keys do not differ in it."""

LARGEST = 65504.0
"""Of half precision."""

ROWS_AT_ONCE = 1 << 16


def require_usearch() -> None:
    """Raise ConfigError where the package is not installed."""
    if find_spec("usearch") is None:
        raise ConfigError(
            "memory.index usearch needs the package usearch, which is not installed",
            remedy="pip install 'memtool[usearch]', or memtool consolidate as before, with --set "
            "memory.index=exact",
        )


def index_bytes(keys: int, width: int) -> int:
    """About how large an index of so many keys is, in a file or in memory: vectors and graph."""
    return keys * (2 * (width + 1) + LINKS_BYTES)


class KeyIndex:
    """An index of keys (t, d) float32 by one of `search.SEARCHED`; `data` is one made before.

        near = KeyIndex(keys, similarity.dot).near(queries, 4)                  # (b, 32)
        scores = similarity.dot(queries, keys).gather(1, near)

    It takes minutes for 100,000 keys. On one thread of torch the same keys give the same index.
    `constant` says that the last entry of every query is 1. Raises ConfigError without usearch,
    CorruptError for data that is no index of as many keys.
    """

    def __init__(
        self,
        keys: Tensor,
        likeness: SimilarityFunction,
        *,
        constant: bool = False,
        data: bytes | memoryview | None = None,
    ) -> None:
        require_usearch()
        from usearch.index import Index

        self.count = len(keys)
        self._products = Products(keys, likeness, constant=constant)
        # It may be made at the first look, under an autocast.
        with without_autocast(keys):
            # Keys come task by task, as many of each: equal steps would meet the same one of each.
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0))
            some = keys[order[:SAMPLE].sort().values]
            self._prepare(some)
            self._index = Index(ndim=len(self._mean) + 2, metric="ip", **GRAPH)
            if data is None:
                self._fill(keys, some)
            else:
                self._load(data)

    def _load(self, data: bytes | memoryview) -> None:
        try:
            self._index.load(data)
        except RuntimeError as error:
            raise CorruptError(f"an index of keys: {error}") from error
        found = (len(self._index), self._index.ndim)
        if found != (self.count, len(self._mean) + 2):
            raise CorruptError(f"an index of {found[0]:,} keys of {found[1]:,} entries")

    def _prepare(self, some: Tensor) -> None:
        """Find the means, A and σ from some of the keys."""
        ready, extra = self._products.of_keys(some)
        self._mean, self._middle = ready.mean(dim=0), extra.mean()
        self._to_keys, self._to_queries = _balanced(ready - self._mean)
        wide = ((ready - self._mean) @ self._to_keys).square().mean().sqrt()
        spread = (extra - self._middle).square().mean().sqrt()
        self._scale = float((wide if wide > 0 else 1.0) / spread) if spread > 0 else 1.0

    def _fill(self, keys: Tensor, some: Tensor) -> None:
        """Add all keys, of the length that most of some have."""
        squares = self._vectors(some).square().sum(dim=1)
        common = squares.kthvalue(math.ceil(COMMON * len(some))).values
        for first in range(0, self.count, ROWS_AT_ONCE):
            rows = self._vectors(keys[first : first + ROWS_AT_ONCE])
            rest = (common - rows.square().sum(dim=1)).clamp_min(0).sqrt()
            rows = torch.cat([rows, rest.unsqueeze(1)], dim=1)
            rows /= common.sqrt().clamp_min(torch.finfo().tiny)
            rows.clamp_(-LARGEST, LARGEST)
            places = np.arange(first, first + len(rows), dtype=np.uint64)
            self._index.add(places, rows.numpy(), threads=torch.get_num_threads())

    def _vectors(self, keys: Tensor) -> Tensor:
        """What k' (t, d̂ + 1) of keys (t, d) begin with: all but the last entry."""
        ready, extra = self._products.of_keys(keys)
        scaled = self._scale * (extra - self._middle)
        return torch.cat([(ready - self._mean) @ self._to_keys, scaled.unsqueeze(1)], dim=1)

    def to_bytes(self) -> bytes:
        """The index, as `data` takes it."""
        return bytes(self._index.save())

    def near(self, queries: Tensor, count: int) -> Tensor:
        """The keys (b, c) that are probably the nearest of each query (b, d), c a few for each.

        (0,) where it finds fewer, or a query is of no number.
        """
        with without_autocast(queries):
            ready = self._products.of_queries(queries) @ self._to_queries
        asked = F.normalize(F.pad(ready, (0, 1), value=1 / self._scale), dim=1)
        count = min(max(CANDIDATES * count, LEAST), self.count)
        nothing = torch.empty(0, dtype=torch.int64)
        if not len(asked) or not asked.isfinite().all():
            return nothing
        vectors = F.pad(asked, (0, 1)).numpy()
        found = self._index.search(vectors, count, threads=torch.get_num_threads())
        # Of one query it counts none, and gives no more than it found.
        if found.keys.size < len(asked) * count or np.any(getattr(found, "counts", count) < count):
            return nothing
        return torch.from_numpy(found.keys.astype(np.int64)).view(len(asked), count)


def _balanced(keys: Tensor) -> tuple[Tensor, Tensor]:
    """A and A⁻¹ (d, d) of keys (t, d) less their mean; see above. Both are symmetric."""
    keys = keys.double()
    sizes, directions = torch.linalg.eigh(keys.T @ keys / len(keys))
    largest = sizes[-1]
    sizes = (sizes / largest).clamp_min(FLAT) if largest > 0 else torch.ones_like(sizes)
    forth, back = (directions * sizes**power @ directions.T for power in (-0.25, 0.25))
    return forth.float(), back.float()


def name_of(keys: Tensor, likeness: SimilarityFunction, *, constant: bool) -> str:
    """Hex sha256 of all that an index follows from: keys, similarity, and what makes it."""
    require_usearch()
    from usearch import __version__

    ours = [FORMAT, SAMPLE, COMMON, FLAT]
    decides = [
        str(keys.dtype),
        [*keys.shape],
        likeness.__name__,
        constant,
        __version__,
        GRAPH,
        ours,
    ]
    found = hashlib.sha256(json.dumps(decides).encode())
    found.update(keys.detach().contiguous().numpy().data)
    return found.hexdigest()
