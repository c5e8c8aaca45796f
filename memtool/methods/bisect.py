"""Which commit made the memory worse? The evaluation over history, by halving.

Every version is measured on the same tasks, those that the good version knows, so that learning
more tasks is no change by itself. A version that cannot be measured (no keys yet) is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memtool.errors import ConfigError, MemtoolError, NotFoundError, did_you_mean
from memtool.methods.results import BisectResult, Probe
from memtool_stores import StoreError

if TYPE_CHECKING:
    from memtool.methods.mira import Mira
    from memtool.methods.modulation import Modulation
    from memtool_stores import Version

METRICS = ("faa", "task_accuracy")
"""Metrics of one version on a fixed set of tasks, better when higher."""


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
    method: Mira | Modulation,
    *,
    metric: str = "faa",
    drop: float,
    good: str | None = None,
    bad: str = "HEAD",
    setting: str | None = None,
) -> BisectResult:
    """Find the first version after `good`, up to `bad`, whose metric is `drop` lower or more.

    `drop` is a fraction (0.02 for two points). Without `good`: the oldest version before `bad`
    that can be measured. Raises NotFoundError when `good` does not lead to `bad`, or when one of
    the two cannot be measured.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric {metric!r}", expected=did_you_mean(metric, METRICS))
    if not 0 < drop < 1:
        raise ConfigError(f"a drop of {100 * drop:g} points", expected="more than 0, less than 100")
    store = method.workspace.store
    line = store.log(bad)[::-1]
    tasks: tuple[int, ...] = ()
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
    values: dict[int, float | None] = {}

    def measure(place: int) -> float | None:
        if place not in values:
            method.tell(f"bisect: {line[place].message}", len(values), len(line))
            try:
                values[place] = method.measure(line[place].id, tasks, setting)[metric]
            except (MemtoolError, StoreError):
                if place in (0, len(line) - 1):
                    raise
                values[place] = None
        return values[place]

    first, last = measure(0), measure(len(line) - 1)
    assert first is not None
    assert last is not None

    def fell(place: int) -> bool | None:
        value = measure(place)
        # A drop of exactly `drop` counts, whatever the last bit says.
        return None if value is None else first - value >= drop - 1e-12

    def probe(place: int) -> Probe:
        version: Version = line[place]
        return Probe(
            version=version.id,
            message=version.message,
            time=version.time,
            value=values.get(place),
            fell=None if values.get(place) is None else fell(place),
        )

    culprit: Probe | None = None
    suspects: Sequence[int] = ()
    if len(line) > 1 and fell(len(line) - 1):
        found = first_bad(len(line), fell)
        culprit, suspects = probe(found.culprit), found.suspects
    names = [method.workspace.task(str(number)).name for number in tasks]
    return BisectResult(
        metric=metric,
        drop=drop,
        good=line[0].id,
        bad=line[-1].id,
        tasks=tuple(names),
        good_value=first,
        bad_value=last,
        probes=tuple(probe(place) for place in sorted(values)),
        culprit=culprit,
        suspects=tuple(probe(place) for place in suspects),
    )
