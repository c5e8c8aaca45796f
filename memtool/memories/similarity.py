"""Similarities: how alike a query and every key are, as one score per key.

The first half of the universal Hopfield form, values · separation(β · similarity(keys, query))
(Millidge et al., 2022). Every function maps queries (..., d) and keys (t, d) to scores (..., t) in
float32 or better, also under autocast: half precision overflows on long keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from memtool.devices import in_float32, without_autocast
from memtool.errors import ConfigError, MismatchError, did_you_mean

TERMS_AT_ONCE = 1 << 24
"""Terms of a sum over entries that are in memory at a time."""

SimilarityFunction = Callable[[Tensor, Tensor], Tensor]
"""(queries (..., d), keys (t, d)) → scores (..., t)."""


def dot(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products: queries (..., d), keys (t, d) → (..., t)."""
    queries, keys = _in_score_precision(queries, keys)
    with without_autocast(queries):
        return F.linear(queries, keys)


def scaled_dot(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products over √d: queries (..., d), keys (t, d) → (..., t)."""
    return dot(queries, keys) / math.sqrt(keys.shape[-1])


def cosine(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of the angles: queries (..., d), keys (t, d) → (..., t); a zero vector scores 0."""
    queries, keys = _in_score_precision(queries, keys)
    return dot(F.normalize(queries, dim=-1), F.normalize(keys, dim=-1))


def centred_cosine(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of queries (..., d) and keys (t, d), each less its mean → (..., t): correlations."""
    queries, keys = _in_score_precision(queries, keys)
    return cosine(
        queries - queries.mean(dim=-1, keepdim=True), keys - keys.mean(dim=-1, keepdim=True)
    )


def negative_squared_euclidean(queries: Tensor, keys: Tensor) -> Tensor:
    """−|q − k|²: queries (..., d), keys (t, d) → (..., t); exactly 0 on an exact hit.

    The differences are formed, as |q|² − 2 q·k + |k|² would cancel near a hit.
    """
    return -_distance(queries, keys, 2.0).square()


def negative_manhattan(queries: Tensor, keys: Tensor) -> Tensor:
    """−Σ |q_i − k_i|: queries (..., d), keys (t, d) → (..., t); exactly 0 on an exact hit."""
    return -_distance(queries, keys, 1.0)


def negative_scaled_error(queries: Tensor, keys: Tensor) -> Tensor:
    """−mean (q − k)² / var q: queries (..., d), keys (t, d) → (..., t).

    Free of the scale of the data. A query without variance has no scale: its scores are those of a
    variance of one.
    """
    queries, keys = _in_score_precision(queries, keys)
    variance = queries.var(dim=-1, correction=0, keepdim=True)
    variance = torch.where(variance > 0, variance, torch.ones_like(variance))
    return negative_squared_euclidean(queries, keys) / (queries.shape[-1] * variance)


def negative_kl(queries: Tensor, keys: Tensor) -> Tensor:
    """−KL(r ‖ p), p and r the softmax of q and k: queries (..., d), keys (t, d) → (..., t).

    Millidge et al. call the divergence of a stored pattern from the query the KL divergence.
    """
    queries, keys = _on_the_simplex(queries, keys)
    return _summed(queries, keys, lambda p, r: -(r.exp() * (r - p)))


def negative_reverse_kl(queries: Tensor, keys: Tensor) -> Tensor:
    """−KL(p ‖ r), p and r the softmax of q and k: queries (..., d), keys (t, d) → (..., t).

    The divergence of the query from a stored pattern: the reverse one of Millidge et al.
    """
    queries, keys = _on_the_simplex(queries, keys)
    return _summed(queries, keys, lambda p, r: -(p.exp() * (p - r)))


def negative_js(queries: Tensor, keys: Tensor) -> Tensor:
    """−(KL(p ‖ m) + KL(r ‖ m)) / 2, m the mean of the softmax p of q and r of k → (..., t).

    Symmetric, and never below −log 2.
    """
    queries, keys = _on_the_simplex(queries, keys)

    def half(p: Tensor, r: Tensor) -> Tensor:
        middle = torch.logaddexp(p, r) - math.log(2)
        return -0.5 * (p.exp() * (p - middle) + r.exp() * (r - middle))

    return _summed(queries, keys, half)


def over_memories(keys: Tensor) -> Tensor:
    """Keys (t, d), each entry divided by its norm over all t: Σ_t k_ti² = 1, or 0 where all are 0.

    As in the code of MIRA's authors, before a cosine. What is found for one key depends on all.

    >>> over_memories(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
    tensor([[0.6000, 0.0000],
            [0.8000, 1.0000]])
    """
    return F.normalize(in_float32(keys), dim=0)


SIMILARITIES: Mapping[str, SimilarityFunction] = MappingProxyType(
    {
        "dot": dot,
        "scaled-dot": scaled_dot,
        "cosine": cosine,
        "centred-cosine": centred_cosine,
        "euclidean": negative_squared_euclidean,
        "manhattan": negative_manhattan,
        "scaled-error": negative_scaled_error,
        "kl": negative_kl,
        "reverse-kl": negative_reverse_kl,
        "js": negative_js,
    }
)


def similarity(name: str) -> SimilarityFunction:
    """The similarity of that name, one of `SIMILARITIES`.

    Raises ConfigError for an unknown name.
    """
    try:
        return SIMILARITIES[name]
    except KeyError:
        raise ConfigError(
            f"unknown similarity {name!r}", expected=did_you_mean(name, SIMILARITIES)
        ) from None


def _on_the_simplex(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of the softmax of both."""
    queries, keys = _in_score_precision(queries, keys)
    return torch.log_softmax(queries, dim=-1), torch.log_softmax(keys, dim=-1)


def _distance(queries: Tensor, keys: Tensor, order: float) -> Tensor:
    """(Σ |q_i − k_i|^order)^(1/order): queries (..., d), keys (t, d) → (..., t)."""
    queries, keys = _in_score_precision(queries, keys)
    flat = queries.reshape(-1, queries.shape[-1])
    with without_autocast(queries):
        found = torch.cdist(flat, keys, order, "donot_use_mm_for_euclid_dist")
    return found.reshape(*queries.shape[:-1], len(keys))


def _summed(queries: Tensor, keys: Tensor, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Σ_i term(q_i, k_i): queries (..., d), keys (t, d) → (..., t), some entries at a time.

    The terms of all entries at once would take d times the memory of the scores.
    """
    queries, keys = _in_score_precision(queries, keys)
    width = max(1, TERMS_AT_ONCE // max(1, queries[..., 0].numel() * len(keys)))
    total = queries.new_zeros((*queries.shape[:-1], len(keys)))
    for q, k in zip(queries.split(width, dim=-1), keys.split(width, dim=-1), strict=True):
        total = total + term(q.unsqueeze(-2), k).sum(dim=-1)
    return total


def _in_score_precision(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one float type of at least 32 bits, after a check of their widths."""
    if keys.ndim != 2 or queries.shape[-1] != keys.shape[-1]:
        raise MismatchError(
            f"queries {tuple(queries.shape)} against keys {tuple(keys.shape)}",
            expected="queries (..., d) and keys (t, d) of one width d",
        )
    queries, keys = in_float32(queries), in_float32(keys)
    if queries.dtype == keys.dtype:
        return queries, keys
    precision = torch.promote_types(queries.dtype, keys.dtype)
    return queries.to(precision), keys.to(precision)
