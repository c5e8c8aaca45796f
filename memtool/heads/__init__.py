"""Classifiers on the pooled features: trained ones, and ones solved from running statistics."""

from __future__ import annotations

from typing import get_args

from memtool.config import HeadKind, HeadSettings
from memtool.errors import ConfigError, did_you_mean
from memtool.heads.analytic import FeatureStatistics
from memtool.heads.linear import LinearClassifier, LinearHead, mask_logits
from memtool.heads.losses import both_ways, distillation
from memtool.heads.prototype import CosineHead, prototype_head
from memtool.heads.recalled import RecalledHead

__all__ = [
    "CosineHead",
    "FeatureStatistics",
    "LinearClassifier",
    "LinearHead",
    "RecalledHead",
    "both_ways",
    "distillation",
    "mask_logits",
    "prototype_head",
    "solve_head",
]


def solve_head(
    kind: str, statistics: FeatureStatistics, settings: HeadSettings
) -> LinearClassifier:
    """The analytic head of that kind: "ncm", "ridge" or "lda".

    `settings.ridge` r regularises both: the penalty of ridge, and the shrinkage r / (1 + r) of lda,
    which gives the covariance the same ratio of r to 1 between trace / dim · I and itself. Raises
    ConfigError for heads that are trained and not solved, and for unknown kinds.
    """
    match kind:
        case "ncm":
            return statistics.ncm()
        case "ridge":
            return statistics.ridge(settings.ridge)
        case "lda":
            return statistics.lda(settings.ridge / (1 + settings.ridge))
        case "grown" | "shared":
            raise ConfigError(
                f"a {kind} head is trained by gradient, not solved from statistics",
                expected="ncm, ridge or lda",
            )
        case "prototype" | "text":
            raise ConfigError(
                f"a {kind} head is fixed in advance, not solved from statistics",
                expected="ncm, ridge or lda",
                remedy="a memory that was begun under it: another --store",
            )
    raise ConfigError(f"unknown head {kind!r}", expected=did_you_mean(kind, get_args(HeadKind)))
