"""Several seeds of one experiment: mean, sample standard deviation and 95 % t-interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from memtool.errors import MismatchError
from memtool.evaluation.record import Kind, Record, Row

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values of n seeds. `std` (ddof 1) and the interval need two, and are None for one."""

    values: tuple[float, ...]
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    def interval(
        self, least: float = -math.inf, most: float = math.inf
    ) -> tuple[float, float] | None:
        """The interval, cut at the least and the most that a value can be; None for one seed."""
        if self.low is None or self.high is None:
            return None
        return max(self.low, least), min(self.high, most)


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation and the two-sided 95 % interval of Student's t."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise MismatchError(f"values {list(values)}", expected="one finite number or more")
    kept = tuple(float(value) for value in numbers)
    mean = float(numbers.mean())
    if len(kept) == 1:
        return Summary(kept, mean, None, None, None)
    std = float(numbers.std(ddof=1))
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # a third of a second

    half = float(stdtrit(len(kept) - 1, 0.5 + CONFIDENCE / 2)) * std / math.sqrt(len(kept))
    return Summary(kept, mean, std, mean - half, mean + half)


@dataclass(frozen=True, eq=False)
class RowSummary:
    """One row of an experiment over its seeds.

    accuracy: float64 (seeds, T+1, T), NaN where not measured; unseen: (seeds, T+1 or less), the
    scores on the domain never learned from, or None; recall_error: likewise, or None for a
    row without recalled adapters; metrics: by id, each over the seeds
    that have it; undefined: reasons by id; seconds: over the seeds that were timed, or None;
    replay, reading: as of a `Row`; below: whether its final average is below that of the method.
    """

    id: str
    label: str
    kind: Kind
    accuracy: npt.NDArray[np.float64]
    recall_error: npt.NDArray[np.float64] | None
    metrics: dict[str, Summary]
    undefined: dict[str, str]
    seconds: Summary | None
    unseen: npt.NDArray[np.float64] | None = None
    replay: bool = False
    reading: bool = False
    below: bool = False

    @property
    def is_bound(self) -> bool:
        """Whether it is an upper bound that is one: not below the method."""
        return self.kind == "upper bound" and not self.below

    @property
    def is_rival(self) -> bool:
        """Whether it is a baseline on the terms of the method: no replay, no reading of it."""
        return self.kind == "baseline" and not (self.replay or self.reading)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean accuracy matrix over the seeds (T+1, T)."""
        mean: npt.NDArray[np.float64] = self.accuracy.mean(axis=0)
        return mean


def check_one_experiment(records: Sequence[Record]) -> None:
    """MismatchError unless the records differ by seed only, each seed once (at each order bound).

    The order of classes and tasks, and with it the data fingerprint, may follow the seed.
    """
    if not records:
        raise MismatchError("no records", expected="one record or more")
    first = records[0].run
    for record in records[1:]:
        there_run = record.run
        for name in ("method", "setting", "preset", "mix", "separation", "backbone"):
            here, there = getattr(first, name), getattr(there_run, name)
            if here != there:
                raise MismatchError(
                    f"records of different experiments: {name} {here!r} and {there!r}",
                    expected="records that differ by seed only",
                )
        streams = [(run.data.name, len(run.tasks)) for run in (first, there_run)]
        if streams[0] != streams[1]:
            raise MismatchError(
                "records of different streams: "
                + " and ".join(f"{name!r} of {tasks} tasks" for name, tasks in streams),
                expected="records of one stream",
            )
        if [(row.id, row.kind) for row in record.metrics.rows] != [
            (row.id, row.kind) for row in records[0].metrics.rows
        ]:
            raise MismatchError(
                f"records with rows {[row.id for row in records[0].metrics.rows]} "
                f"and {[row.id for row in record.metrics.rows]}",
                expected="the same rows in the same order",
            )
    seeds = [record.run.seed for record in records]
    bounds = [record.run.bound.name if record.run.bound else None for record in records]
    if len(set(zip(seeds, bounds, strict=True))) != len(seeds):
        # A seed counted twice would shrink the interval without any new evidence.
        raise MismatchError(f"records of seeds {seeds}", expected="each seed once")


def summarise_rows(records: Sequence[Record]) -> tuple[RowSummary, ...]:
    """The rows of the records of one experiment, each over all seeds; order as in the first."""
    check_one_experiment(records)
    rows = [
        _summarise_row([record.metrics.rows[place] for record in records], records)
        for place in range(len(records[0].metrics.rows))
    ]
    own = next((row for row in rows if row.kind == "method"), rows[0]).metrics.get("faa")
    return tuple(
        replace(row, below=own is not None and _mean(row, own.mean) < own.mean) for row in rows
    )


def _mean(row: RowSummary, otherwise: float) -> float:
    """The final average of a row; `otherwise` where it has none."""
    summary = row.metrics.get("faa")
    return otherwise if summary is None else summary.mean


def _summarise_row(rows: Sequence[Row], records: Sequence[Record]) -> RowSummary:
    first = rows[0]
    ids = list(dict.fromkeys(id for row in rows for id in row.metrics))
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return RowSummary(
        id=first.id,
        label=first.label,
        kind=first.kind,
        accuracy=np.stack(
            [row.matrix(r.run.task_names).values for row, r in zip(rows, records, strict=True)]
        ),
        recall_error=np.stack([np.array(row.recall_error, dtype=np.float64) for row in rows])
        if all(row.recall_error for row in rows)
        else None,
        metrics={
            id: summarise([row.metrics[id] for row in rows if id in row.metrics]) for id in ids
        },
        undefined=dict(first.undefined),
        seconds=summarise(seconds) if seconds else None,
        unseen=np.stack([np.array(row.unseen, dtype=np.float64) for row in rows])
        if all(row.unseen for row in rows)
        else None,
        replay=first.keeps_samples,
        reading=first.reads_memory,
    )
