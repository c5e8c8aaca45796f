"""Which commit made the memory worse? The evaluation over history, by halving.

Every version is measured on the same tasks, those that the good version knows, so that learning
more tasks is no change by itself. A version that cannot be measured (no keys yet) is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import memtool_stores
from memtool.errors import (
    ConfigError,
    CorruptError,
    MemtoolError,
    MismatchError,
    NotFoundError,
    did_you_mean,
)
from memtool.evaluation import metrics
from memtool.methods.results import BisectResult, Probe

if TYPE_CHECKING:
    from memtool.methods.mira import Mira
    from memtool.methods.modulation.method import Modulation
    from memtool.methods.moram.method import Moram
    from memtool_stores import Version

METRICS = ("faa", "task_accuracy")
"""Metrics of one version on a fixed set of tasks, better when higher.

The others of `memtool.evaluation.metrics` compare versions with each other, or are one of these
under the name of another benchmark.
"""

LOSS = "loss"
"""Of texts: nats, better when lower."""

TEXT_METRICS = (LOSS, *METRICS)

UNMEASURABLE: tuple[type[MemtoolError | memtool_stores.StoreError], ...] = (
    ConfigError,
    NotFoundError,
    MismatchError,
    CorruptError,
    memtool_stores.NotFoundError,
    memtool_stores.IntegrityError,
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
    method: Mira | Modulation | Moram,
    *,
    metric: str | None = None,
    drop: float,
    good: str | None = None,
    bad: str = "HEAD",
    setting: str | None = None,
) -> BisectResult:
    """Find the first version after `good`, up to `bad`, whose metric is `drop` worse or more.

    `metric` is one of `METRICS`, of texts one of `TEXT_METRICS`; by default the first. `drop` is a
    fraction (0.02 for two points); of a loss it is nats. Without `good`: the oldest version before
    `bad` that can be measured. Raises NotFoundError when `good` does not lead to `bad`, or when one
    of the two cannot be measured; ConfigError for another metric.
    """
    known = TEXT_METRICS if method.config.stream.setting == "trace" else METRICS
    metric = known[0] if metric is None else metric
    if metric not in known:
        if metric in metrics.METRICS:
            raise ConfigError(
                f"metric {metric!r} is none of a single version", expected=" or ".join(known)
            )
        raise ConfigError(f"unknown metric {metric!r}", expected=did_you_mean(metric, known))
    if metric == LOSS and drop <= 0:
        raise ConfigError(f"a loss that rises by {drop:g}", expected="more than 0 nats")
    if metric != LOSS and not 0 < drop < 1:
        raise ConfigError(f"a drop of {100 * drop:g} points", expected="more than 0, less than 100")
    store = method.workspace.store
    line = store.log(bad)[::-1]
    if good is None:
        start = next((place for place, v in enumerate(line) if method.known_tasks(v.id)), None)
        if start is None:
            raise NotFoundError(
                f"no version up to {bad} can be measured", remedy="memtool consolidate"
            )
    else:
        wanted = store.view(good).version
        start = next((place for place, v in enumerate(line) if v.id == wanted), None)
        if start is None:
            raise NotFoundError(
                f"{good} does not lead to {bad}", expected="an older version on the same line"
            )
    line = line[start:]
    tasks = method.known_tasks(line[0].id)
    if not tasks:
        raise NotFoundError(
            f"version {line[0].id} cannot be measured: it knows no task",
            remedy="--good with a version after memtool consolidate",
        )
    seen: dict[int, Probe] = {}

    def look(place: int) -> Probe:
        """Measure a place, at most once; the good and the bad end must be measurable."""
        if place in seen:
            return seen[place]
        at: Version = line[place]
        method.workspace.tell(f"bisect: {at.message}", len(seen), len(line))
        value, reason = None, None
        try:
            values = method.measure(at.id, tasks, setting)
            if metric not in values:
                raise ConfigError(
                    f"{metric} of answers that are not generated",
                    expected=" or ".join(values),
                    remedy="--set text.generate=true",
                )
            value = values[metric]
        except UNMEASURABLE as error:
            if place in (0, len(line) - 1):
                raise
            reason = error.message
        # A drop of exactly `drop` counts, whatever the last bit says.
        good_value = seen[0].value if place else value
        fell = None
        if value is not None and good_value is not None:
            lost = value - good_value if metric == LOSS else good_value - value
            fell = lost >= drop - 1e-12
        seen[place] = Probe(
            version=at.id, message=at.message, time=at.time, value=value, fell=fell, reason=reason
        )
        return seen[place]

    first, last = look(0), look(len(line) - 1)
    assert first.value is not None
    assert last.value is not None
    found: Found | None = None
    if last.fell:
        found = first_bad(len(line), lambda place: look(place).fell)
    return BisectResult(
        metric=metric,
        drop=drop,
        good=first.version,
        bad=last.version,
        tasks=tuple(method.workspace.task(str(number)).name for number in tasks),
        good_value=first.value,
        bad_value=last.value,
        probes=tuple(seen[place] for place in sorted(seen)),
        culprit=seen[found.culprit] if found else None,
        suspects=tuple(seen[place] for place in found.suspects) if found else (),
    )
