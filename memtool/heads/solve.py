"""How a head is solved: from running statistics of the features, or from trained classifiers.

One classifier (`solve_head`), or the head of a memory of several tasks (`solve_recalled_head`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import get_args

import torch

from memtool.errors import ConfigError, did_you_mean
from memtool.heads.analytic import FeatureStatistics
from memtool.heads.linear import LinearClassifier
from memtool.heads.recalled import RecalledHead
from memtool.settings import HeadKind, HeadSettings

SOLVED = ("lda", "ridge", "rp-ridge", "ncm")
"""Heads that are solved from moments of the features."""


@dataclass(frozen=True, eq=False)
class Earlier:
    """What came of the first `count` tasks, of which no moments are read then.

    `heads` by number, solved by the same settings from the same moments; `moments` of all together.
    """

    count: int = 0
    heads: Mapping[int, LinearClassifier] = field(default_factory=dict)
    moments: FeatureStatistics | None = None


def solve_head(
    kind: str, statistics: FeatureStatistics, settings: HeadSettings
) -> LinearClassifier:
    """The analytic head of that kind: "ncm", "ridge", "lda" or "rp-ridge".

    `settings.ridge` r regularises all but the first: the penalty of ridge, and the shrinkage
    r / (1 + r) of lda, which gives the covariance the same ratio of r to 1 between trace / dim · I
    and itself. Raises ConfigError for heads that are trained and not solved, for unknown kinds, and
    for rp-ridge where no random projection was counted.
    """
    match kind:
        case "ncm":
            return statistics.ncm()
        case "ridge":
            return statistics.ridge(settings.ridge)
        case "lda":
            return statistics.lda(settings.ridge / (1 + settings.ridge))
        case "rp-ridge":
            return statistics.rp_ridge(settings.ridge if settings.penalty == "trace" else None)
        case "grown" | "shared":
            raise ConfigError(
                f"a {kind} head is trained by gradient, not solved from statistics",
                expected="ncm, ridge, lda or rp-ridge",
            )
        case "prototype" | "text":
            raise ConfigError(
                f"a {kind} head is fixed in advance, not solved from statistics",
                expected="ncm, ridge, lda or rp-ridge",
                remedy="a memory that was begun under it: another --store",
            )
    raise ConfigError(f"unknown head {kind!r}", expected=did_you_mean(kind, get_args(HeadKind)))


def solve_recalled_head(
    settings: HeadSettings,
    statistics: Mapping[int, FeatureStatistics],
    trained: Mapping[int, LinearClassifier | None],
    adapter_tasks: Sequence[int],
    earlier: Earlier | None = None,
) -> RecalledHead:
    """The head of a memory: from the moments of the tasks' features, or the trained classifiers.

    `trained[task]` came with the task's last adapter; a grown head that is shared takes every
    class from the task that trained it last. A head that learns on through every consolidation
    (kind shared) starts as the mean of the trained ones, or as the discriminant head of all tasks
    where an adapter came without.
    """
    earlier = Earlier() if earlier is None else earlier
    if settings.kind == "shared":
        known = [head for head in trained.values() if head is not None]
        if len(known) == len(trained):
            return RecalledHead.shared(averaged(known))
        settings = settings.model_copy(update={"kind": "lda", "scope": "shared"})

    def own(task: int) -> LinearClassifier:
        classifier = trained[task]
        if classifier is None:
            raise ConfigError(
                f"head.kind grown, but the adapter of task {task} came without a trained head",
                remedy="--set head.kind=lda, or an adapter made by memtool train-adapter",
            )
        return classifier

    tasks = list(statistics)
    if settings.scope == "task":

        def solved(task: int) -> LinearClassifier:
            if task in earlier.heads:
                return earlier.heads[task]
            if settings.kind == "grown":
                return own(task)
            return solve_head(settings.kind, statistics[task], settings)

        return RecalledHead.of_tasks([solved(task) for task in tasks], adapter_tasks)
    if settings.kind == "grown":
        return RecalledHead.shared(grown([own(task) for task in tasks]))
    return RecalledHead.shared(solve_head(settings.kind, merged(statistics, earlier), settings))


def going_on(learned: RecalledHead, start: RecalledHead) -> RecalledHead:
    """The learned head (one for all tasks), with the rows of `start` for classes new to it."""
    device = start.weight.device
    parts = [LinearClassifier(each.weight[0], each.bias[0]) for each in (start, learned.to(device))]
    return RecalledHead.shared(grown(parts))


def grown(heads: Sequence[LinearClassifier]) -> LinearClassifier:
    """One head in which each class has the row of the last head that knows it."""
    weight, bias = heads[0].weight.clone(), heads[0].bias.clone()
    for head in heads[1:]:
        known = torch.isfinite(head.bias)
        weight[known], bias[known] = head.weight[known], head.bias[known]
    return LinearClassifier(weight, bias)


def averaged(heads: Sequence[LinearClassifier]) -> LinearClassifier:
    """One head in which each class has the mean of its rows in the heads that know it."""
    known = torch.stack([torch.isfinite(head.bias) for head in heads])
    count = known.sum(dim=0).clamp_min(1)
    weight = torch.stack([head.weight for head in heads]) * known.unsqueeze(-1)
    bias = torch.stack([head.bias.masked_fill(~torch.isfinite(head.bias), 0.0) for head in heads])
    return LinearClassifier(
        weight.sum(dim=0) / count.unsqueeze(-1),
        (bias.sum(dim=0) / count).masked_fill(~known.any(dim=0), -torch.inf),
    )


def merged(
    statistics: Mapping[int, FeatureStatistics], earlier: Earlier | None = None
) -> FeatureStatistics:
    """The moments of all tasks together."""
    whole: FeatureStatistics | None = None
    known = None if earlier is None else earlier.moments
    first = 0 if earlier is None or known is None else earlier.count
    others = (statistics[task] for task in islice(statistics, first, None))
    for part in chain([] if known is None else [known], others):
        if whole is None:
            empty = None if part.projected is None else part.projected.without()
            whole = FeatureStatistics(part.dim, part.classes, empty)
        whole.merge(part)
    assert whole is not None
    return whole
