"""Classifiers on the pooled features: trained ones, and ones solved from running statistics."""

from __future__ import annotations

from memtool.heads.analytic import FeatureStatistics
from memtool.heads.linear import LinearClassifier, LinearHead, mask_logits
from memtool.heads.losses import both_ways, distillation, over_seen_texts
from memtool.heads.prototype import CosineHead, prototype_head
from memtool.heads.random_projection import ProjectedMoments, Projection
from memtool.heads.recalled import RecalledHead
from memtool.heads.solve import solve_head, solve_recalled_head

__all__ = [
    "CosineHead",
    "FeatureStatistics",
    "LinearClassifier",
    "LinearHead",
    "ProjectedMoments",
    "Projection",
    "RecalledHead",
    "both_ways",
    "distillation",
    "mask_logits",
    "over_seen_texts",
    "prototype_head",
    "solve_head",
    "solve_recalled_head",
]
