"""Two rows on the same test samples: by how much one is better, and how sure that is.

For every test sample, d is 1 where only the first row was right, −1 where only the second was,
else 0. The difference is the mean over tasks of the mean of d: that of the final averages. Its 95 %
interval is the bootstrap's: within each task, samples are drawn again with replacement, `RESAMPLES`
times, and the interval ends at the quantiles 2.5 and 97.5 %. Samples that are easy or hard for both
rows cancel in d, so the interval is narrower than that of two accuracies side by side.

It says what other test samples of these tasks would change, the models being as they are. Of
several seeds with the same tests, d is first averaged over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memtool.evaluation.record import Record
from memtool.evaluation.right import Right
from memtool.evaluation.summary import CONFIDENCE

RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """How much better a first row is than a second on the same samples, as a fraction −1..1.

    samples: test samples of all tasks; only_first, only_second: how often one row alone had one of
    them right, over all seeds.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    samples: int


def paired(records: Sequence[Record], first: str, second: str) -> Paired | None:
    """The paired difference of two rows of one experiment, by their ids.

    None where a row does not say which samples were right on every task of its last line, or the
    records were not tested on the same samples.
    """
    if len({record.run.data.fingerprint for record in records}) != 1:
        return None
    sides = [[_flags(record.row(id).right) for record in records] for id in (first, second)]
    if any(not tasks for side in sides for tasks in side):
        return None
    # one (seeds, samples) array of −1, 0 and 1 for every task
    ours, theirs = ([np.stack(of_task) for of_task in zip(*side, strict=True)] for side in sides)
    if [one.shape for one in ours] != [one.shape for one in theirs]:
        return None
    differences = [one.astype(np.int8) - other for one, other in zip(ours, theirs, strict=True)]
    means = [d.mean(axis=0) for d in differences]
    low, high = bootstrap(means)
    return Paired(
        difference=float(np.mean([d.mean() for d in means])),
        low=low,
        high=high,
        only_first=sum(int((d > 0).sum()) for d in differences),
        only_second=sum(int((d < 0).sum()) for d in differences),
        samples=sum(len(d) for d in means),
    )


def bootstrap(tasks: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """The interval of the mean over tasks of the means of (n,) values; the same at every call.

    A sample matters by its value alone, so how often each value is drawn is one multinomial draw.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for values in tasks:
        distinct, counts = np.unique(values, return_counts=True)
        drawn = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
        total += drawn @ distinct / len(values)
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(total / len(tasks), (outside, 1 - outside))
    return float(low), float(high)


def _flags(right: Sequence[Right | None]) -> list[npt.NDArray[np.bool_]]:
    """The flags of every task; none unless all are known."""
    known = [one.flags for one in right if one is not None]
    return known if len(known) == len(right) else []
