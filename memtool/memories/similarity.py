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

from memtool.errors import ConfigError, MismatchError, did_you_mean

SimilarityFunction = Callable[[Tensor, Tensor], Tensor]
"""(queries (..., d), keys (t, d)) → scores (..., t)."""


def dot(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products: queries (..., d), keys (t, d) → (..., t)."""
    queries, keys = _in_score_precision(queries, keys)
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.mT


def scaled_dot(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products over √d: queries (..., d), keys (t, d) → (..., t)."""
    return dot(queries, keys) / math.sqrt(keys.shape[-1])


def cosine(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of the angles: queries (..., d), keys (t, d) → (..., t); a zero vector scores 0."""
    queries, keys = _in_score_precision(queries, keys)
    return dot(F.normalize(queries, dim=-1), F.normalize(keys, dim=-1))


def negative_squared_euclidean(queries: Tensor, keys: Tensor) -> Tensor:
    """−|q − k|²: queries (..., d), keys (t, d) → (..., t); exactly 0 on an exact hit.

    The differences are formed, (..., t, d) of memory: |q|² − 2 q·k + |k|² would cancel near a hit.
    """
    queries, keys = _in_score_precision(queries, keys)
    return -(queries.unsqueeze(-2) - keys).square().sum(dim=-1)


SIMILARITIES: Mapping[str, SimilarityFunction] = MappingProxyType(
    {
        "dot": dot,
        "scaled-dot": scaled_dot,
        "cosine": cosine,
        "euclidean": negative_squared_euclidean,
    }
)


def similarity(name: str) -> SimilarityFunction:
    """The similarity of that name: "dot", "scaled-dot", "cosine" or "euclidean".

    Raises ConfigError for an unknown name.
    """
    try:
        return SIMILARITIES[name]
    except KeyError:
        raise ConfigError(
            f"unknown similarity {name!r}", expected=did_you_mean(name, SIMILARITIES)
        ) from None


def _in_score_precision(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one float type of at least 32 bits, after a check of their widths."""
    if keys.ndim != 2 or queries.shape[-1] != keys.shape[-1]:
        raise MismatchError(
            f"queries {tuple(queries.shape)} against keys {tuple(keys.shape)}",
            expected="queries (..., d) and keys (t, d) of one width d",
        )
    precision = torch.promote_types(
        torch.promote_types(queries.dtype, keys.dtype),
        torch.float32,
    )
    return queries.to(precision), keys.to(precision)
