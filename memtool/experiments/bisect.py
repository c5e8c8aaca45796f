"""Which commit made the memory worse? The evaluation over history, by halving.

Every version is measured on the same tasks, those that the good version knows, so that learning
more tasks is no change by itself. A version that cannot be measured (no keys yet) is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memtool.errors import (
    ConfigError,
    CorruptError,
    MemtoolError,
    MismatchError,
    NotFoundError,
    did_you_mean,
)
from memtool.evaluation import metrics
from memtool.methods.records import number_of
from memtool.methods.results import BisectResult, Probe

if TYPE_CHECKING:
    from memtool.methods.method import Method
    from memtool_stores import Version

LOSS = "loss"
"""Of texts: nats, better when lower; all others are fractions, better when higher."""

METRICS = (LOSS, "faa", "task_accuracy")
"""Metrics of one version on a fixed set of tasks; a method says which of them it has.

The others of `memtool.evaluation.metrics` compare versions with each other, or are one of these
under the name of another benchmark.
"""

UNMEASURABLE: tuple[type[MemtoolError], ...] = (
    ConfigError,
    NotFoundError,
    MismatchError,
    CorruptError,
)
"""What says that a version cannot be measured (no keys, keys of others, damage): it is skipped."""


@dataclass(frozen=True)
class Found:
    """The first bad place, and the places just before it that could not be judged."""

    culprit: int
    suspects: tuple[int, ...]


def first_bad(count: int, is_bad: Callable[[int], bool | None]) -> Found:
    """Place 0 is good, place count − 1 is bad: the first bad one between, by halving.

    `is_bad` is None for a place that cannot be judged; another near the middle is taken then. It is
    asked once for a place, and right when the places go from good to bad once.
    """
    good, bad = 0, count - 1
    unknown: set[int] = set()
    while True:
        middle = (good + bad) // 2
        between = [place for place in range(good + 1, bad) if place not in unknown]
        if not between:
            return Found(bad, tuple(range(good + 1, bad)))
        place = min(between, key=lambda one: (abs(one - middle), one))
        verdict = is_bad(place)
        if verdict is None:
            unknown.add(place)
        elif verdict:
            bad = place
        else:
            good = place


def bisect(
    method: Method,
    *,
    metric: str | None = None,
    drop: float,
    good: str | None = None,
    bad: str = "HEAD",
    setting: str | None = None,
) -> BisectResult:
    """Find the first version after `good`, up to `bad`, whose metric is `drop` worse or more.

    `metric` is one of the method's `metrics`; by default the first. `drop` is a fraction (0.02 for
    two points); of a loss it is nats. Without `good`: the oldest version before `bad` that can be
    measured. Raises NotFoundError when `good` does not lead to `bad`, or when one of the two cannot
    be measured; ConfigError for another metric.
    """
    metric = _followed(metric, method.metrics)
    _require_drop(metric, drop)
    line = _line(method, good, bad)
    tasks = method.known_tasks(line[0].id)
    if not tasks:
        raise NotFoundError(
            f"version {line[0].id} cannot be measured: it knows no task",
            remedy="--good with a version after memtool consolidate",
        )
    probes = _Probes(method, line, tasks, metric, drop, setting)
    first, last = probes.of(0), probes.of(len(line) - 1)
    assert first.value is not None
    assert last.value is not None
    found = first_bad(len(line), lambda place: probes.of(place).fell) if last.fell else None
    return BisectResult(
        metric=metric,
        drop=drop,
        good=first.version,
        bad=last.version,
        tasks=_names(method, first.version, tasks),
        good_value=first.value,
        bad_value=last.value,
        probes=tuple(probes.seen[place] for place in sorted(probes.seen)),
        culprit=probes.seen[found.culprit] if found else None,
        suspects=tuple(probes.seen[place] for place in found.suspects) if found else (),
    )


def _names(method: Method, version: str, tasks: Sequence[int]) -> tuple[str, ...]:
    """The names of tasks, as a version says them, else the stream."""
    view = method.workspace.store.view(version)
    said = {number_of(record): record.meta.get("task_name") for record in view.live}
    named = ((number, said.get(number)) for number in tasks)
    return tuple(str(name or method.workspace.task(str(n)).name) for n, name in named)


def _followed(metric: str | None, known: Sequence[str]) -> str:
    """The metric that is followed: one of those known, by default the first."""
    if metric is None:
        return known[0]
    if metric in known:
        return metric
    if metric in metrics.METRICS:
        raise ConfigError(
            f"metric {metric!r} is none of a single version", expected=" or ".join(known)
        )
    raise ConfigError(f"unknown metric {metric!r}", expected=did_you_mean(metric, known))


def _require_drop(metric: str, drop: float) -> None:
    if metric == LOSS and drop <= 0:
        raise ConfigError(f"a loss that rises by {drop:g}", expected="more than 0 nats")
    if metric != LOSS and not 0 < drop < 1:
        raise ConfigError(f"a drop of {100 * drop:g} points", expected="more than 0, less than 100")


def _line(method: Method, good: str | None, bad: str) -> list[Version]:
    """The versions from the good to the bad one, oldest first."""
    store = method.workspace.store
    line = store.log(bad)[::-1]
    wanted = None if good is None else store.view(good).version
    for place, version in enumerate(line):
        if version.id == wanted or (good is None and method.known_tasks(version.id)):
            return line[place:]
    if good is None:
        raise NotFoundError(f"no version up to {bad} can be measured", remedy="memtool consolidate")
    raise NotFoundError(
        f"{good} does not lead to {bad}", expected="an older version on the same line"
    )


@dataclass(eq=False)
class _Probes:
    """What was found at the places of a line of versions, each measured at most once."""

    method: Method
    line: Sequence[Version]
    tasks: Sequence[int]
    metric: str
    drop: float
    setting: str | None
    seen: dict[int, Probe] = field(default_factory=dict)

    def of(self, place: int) -> Probe:
        """What there is at a place, the good end having been looked at before all others.

        Raises what says that a version cannot be measured where it is the good or the bad end.
        """
        if place in self.seen:
            return self.seen[place]
        at = self.line[place]
        self.method.workspace.tell(f"bisect: {at.message}", len(self.seen), len(self.line))
        value, reason = None, None
        try:
            value = self._measured(at)
        except UNMEASURABLE as error:
            if place in (0, len(self.line) - 1):
                raise
            reason = error.message
        self.seen[place] = Probe(
            version=at.id,
            message=at.message,
            time=at.time,
            value=value,
            fell=self._fell(self.seen[0].value if place else value, value),
            reason=reason,
        )
        return self.seen[place]

    def _measured(self, version: Version) -> float:
        values = self.method.measure(version.id, self.tasks, self.setting)
        if self.metric not in values:
            raise ConfigError(
                f"{self.metric} of answers that are not generated",
                expected=" or ".join(values),
                remedy="--set text.generate=true",
            )
        return values[self.metric]

    def _fell(self, good: float | None, value: float | None) -> bool | None:
        """Whether a value is worse than the good one by `drop`; None where there is none."""
        if good is None or value is None:
            return None
        lost = value - good if self.metric == LOSS else good - value
        return lost >= self.drop - 1e-12  # a drop of exactly `drop` counts, whatever the last bit
