"""Two rows on the same test samples: by how much one is better, and how sure that is.

For every test sample, d is 1 where only the first row was right, −1 where only the second was,
else 0. The difference is the mean over tasks of the mean of d: that of the final averages. Its 95 %
interval is the bootstrap's: within each task, samples are drawn again with replacement, `RESAMPLES`
times, and the interval ends at the quantiles 2.5 and 97.5 %. Samples that are easy or hard for both
rows cancel in d, so the interval is narrower than that of two accuracies side by side.

p is McNemar's exact one (McNemar 1947; exact by the binomial law): how likely a sum of d at least
as far from zero is where each d that is not zero might as well have the other sign.

Both say what other test samples of these tasks would change, the models being as they are. Of
several seeds with the same tests, d is first averaged over the seeds, so that a sample counts once:
p flips the sign of a sample in all seeds at once. Seeds with other tests (other orders or cuts) are
compared each by itself, and nothing is gained by their number: the interval ends at the means of
their ends, which is as wide as if all had the same samples, and p is twice the mean of theirs,
which holds whatever they share (Vovk and Wang 2020).
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
    them right, over all seeds; p: two-sided.
    """

    difference: float
    low: float
    high: float
    p: float
    only_first: int
    only_second: int
    samples: int

    @property
    def holds(self) -> bool:
        """Whether the first row is better by both tests, at 5 %: interval and p agree."""
        return self.low > 0 and self.p < 1 - CONFIDENCE


def paired(
    records: Sequence[Record], first: str, second: str, *, task: int | None = None
) -> Paired | None:
    """The paired difference of two rows of one experiment, by their ids.

    On the tests of all tasks, or of the one at a place. None where a row does not say which samples
    were right on every one of them after the last line, or the rows not of the same samples.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.run.data.fingerprint, []).append(record)
    found = [_on_the_same(group, first, second, task) for group in groups.values()]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    if len(known) == 1:
        return known[0]
    weights = [len(group) for group in groups.values()]
    low, high, p = (
        float(np.average([getattr(one, name) for one in known], weights=weights))
        for name in ("low", "high", "p")
    )
    return Paired(
        difference=float(np.average([one.difference for one in known], weights=weights)),
        low=low,
        high=high,
        p=min(1.0, 2 * p),
        only_first=sum(one.only_first for one in known),
        only_second=sum(one.only_second for one in known),
        samples=max(one.samples for one in known),
    )


def _on_the_same(
    records: Sequence[Record], first: str, second: str, task: int | None
) -> Paired | None:
    """Of records that were tested on the same samples."""
    sides = [[_flags(record.row(id).right, task) for record in records] for id in (first, second)]
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
        p=mcnemar(np.concatenate([d.sum(axis=0, dtype=np.int64) for d in differences])),
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


def mcnemar(differences: npt.NDArray[np.int64]) -> float:
    """P(|T| ≥ |Σ d|) for T = Σ ±d, each sign by a fair coin: exact, for whole numbers d (n,).

    With d of −1, 0 and 1 that is McNemar's exact test: b against c is a binomial draw of b + c.
    """
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    laws = []
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        if size:  # the law of size · (2 · Binomial(count, ½) − count), at −size · count, …
            law = np.zeros(2 * size * count + 1)
            law[:: 2 * size] = _fair(count)
            laws.append(law)
    if not laws:
        return 1.0
    law = laws[0]
    if len(laws) > 1:
        length = sum(len(one) - 1 for one in laws) + 1
        spectrum = np.prod([np.fft.rfft(one, length) for one in laws], axis=0)
        law = np.fft.irfft(spectrum, length).clip(0)
    totals = np.arange(len(law)) - (len(law) - 1) // 2
    return min(1.0, float(law[np.abs(totals) >= abs(int(differences.sum()))].sum()))


def _fair(count: int) -> npt.NDArray[np.float64]:
    """The law of how many of so many fair coins fall on one side: (count + 1,)."""
    above = np.arange(1, count + 1, dtype=np.float64)
    logs = np.concatenate([[0.0], np.cumsum(np.log((count - above + 1) / above))])
    law: npt.NDArray[np.float64] = np.exp(logs - count * np.log(2))
    return law


def _flags(right: Sequence[Right | None], task: int | None) -> list[npt.NDArray[np.bool_]]:
    """The flags of every task, or of one; none unless all are known."""
    wanted = right if task is None else right[task : task + 1]
    known = [one.flags for one in wanted if one is not None]
    return known if len(known) == len(wanted) else []
