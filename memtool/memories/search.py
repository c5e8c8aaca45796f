"""The keys that may be the most alike to a query, found by one product in few bits.

Scores by the product in the fastest number format of the machine are off by no more than a bound
that follows from the lengths of query and key (Cauchy-Schwarz). So all keys whose rough score is
within twice the bound of the k-th highest are kept, the k highest surely among them, and the exact
similarity is computed for these alone. What is found is exact; only how long it takes depends on
how close the scores are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.memories import similarity
from memtool.memories.similarity import SimilarityFunction

LEAST_KEYS = 1024
"""Fewer keys are not worth a search: all their scores are computed."""

GROUP = 128
"""Keys of which one maximum is kept; the groups of the highest are looked into."""


def _directions(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def _centred(vectors: Tensor) -> Tensor:
    return _directions(vectors - vectors.mean(dim=-1, keepdim=True))


AS_PRODUCTS: Mapping[SimilarityFunction, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        similarity.dot: lambda vectors: vectors,
        similarity.scaled_dot: lambda vectors: vectors,
        similarity.cosine: _directions,
        similarity.centred_cosine: _centred,
    }
)
"""Similarities that rank keys as an inner product does, and what of query and key is multiplied."""


def fastest(device: torch.device) -> torch.dtype:
    """The number format in which a device multiplies matrices fastest, of those with wide range."""
    if device.type == "cpu":
        # On other processors bfloat16 is emulated.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class KeySearch:
    """Keys (t, d) float32, made ready to be searched by `likeness`, one of `AS_PRODUCTS`.

    near = KeySearch(keys, similarity.dot).near(queries, 4)
    scores = similarity.dot(queries, keys[near])      # the 4 highest of all are among them
    """

    def __init__(
        self, keys: Tensor, likeness: SimilarityFunction, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` is that of the rough product; None: the fastest."""
        self._as_product = AS_PRODUCTS[likeness]
        self.dtype = fastest(keys.device) if dtype is None else dtype
        self.count = len(keys)
        ready = self._as_product(keys.detach().float())
        self._longest = ready.norm(dim=1).max()
        # Room for whole groups, which is cut off again where scores are read.
        self._keys = F.pad(ready, (0, 0, 0, -len(keys) % GROUP)).to(self.dtype)
        # Both are rounded, as is their product, the terms of which are added in float32; so are
        # those of the similarity, which may take a few roundings more.
        unit, terms = torch.finfo(self.dtype).eps / 2, (keys.shape[1] + 4) * torch.finfo().eps
        self._share = (1 + unit) ** 3 * (1 + terms) - 1 + terms

    def near(self, queries: Tensor, count: int) -> Tensor:
        """The keys (u,), ascending, that may be among the `count` highest of a query (b, d).

        Equal ones up to roundings of float32 are all among them.
        """
        ready = self._as_product(queries.detach().float())
        with torch.autocast(ready.device.type, enabled=False):
            rough = ready.to(self.dtype) @ self._keys.T
        rough[:, self.count :] = -torch.inf
        # Group g has the keys g, g + groups, …: a maximum over rows reads memory in order.
        grouped = rough.view(len(rough), GROUP, -1)
        highest = grouped.amax(dim=1).float()
        groups, count = highest.shape[1], min(count, self.count)
        # The k-th highest of the maxima is no higher than the k-th highest of all.
        least = (highest if count <= groups else rough.float()).topk(count, dim=1).values[:, -1:]
        least = least - 2 * self._share * ready.norm(dim=1, keepdim=True) * self._longest
        sample, group = (highest >= least).nonzero(as_tuple=True)
        close = grouped[sample, :, group].float() >= least[sample]
        found, member = close.nonzero(as_tuple=True)
        return (group[found] + groups * member).unique()
