"""The runs that lie in a folder, from their records: listed, compared, drawn, a data frame."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from memtool.errors import ConfigError, MemtoolError, NotFoundError
from memtool.evaluation.record import RECORD, Record, Row, read_record
from memtool.experiments.queue import Queue
from memtool_stores.printable import printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

PLAN = "sweep.json"
"""What a sweep has in its folder, beside the folders of its runs and of its queue."""

NOT_COMPARED = ("store", "runs", "lock_timeout", "seed")
"""Settings that say where a run is, or have a column of their own."""


@dataclass(frozen=True, eq=False)
class FoundRun:
    """A record and the folder that it lies in, as a person would write it."""

    place: str
    record: Record

    @property
    def row(self) -> Row:
        """The row of the memory: the first of a method."""
        rows = self.record.metrics.rows
        return next((row for row in rows if row.kind == "method"), rows[0])

    @property
    def final_average(self) -> float | None:
        """Mean accuracy after the last task, a fraction; None where only losses were measured."""
        return self.row.metrics.get("faa")

    @property
    def loss(self) -> float | None:
        """The final loss of texts, in nats per answer token."""
        return self.row.metrics.get("loss.final")

    @property
    def order(self) -> str | None:
        """At which bound its order is."""
        bound = self.record.run.bound
        return None if bound is None else bound.name

    @property
    def label(self) -> str:
        """For a legend: the name that it was given, or its folder; order and seed."""
        run = self.record.run
        if run.name is None:
            return self.place
        return " ".join(filter(None, (run.name, self.order, f"seed {run.seed}")))

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted key."""
        return dotted(self.record.run.configuration)


class Runs(Sequence[FoundRun]):
    """Runs, the oldest first."""

    def __init__(self, found: Sequence[FoundRun]) -> None:
        self._found = tuple(sorted(found, key=lambda one: (one.record.run.created, one.place)))

    @overload
    def __getitem__(self, index: int) -> FoundRun: ...
    @overload
    def __getitem__(self, index: slice) -> Runs: ...
    def __getitem__(self, index: int | slice) -> FoundRun | Runs:
        found = self._found[index]
        return found if isinstance(found, FoundRun) else Runs(found)

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[FoundRun]:
        return iter(self._found)

    def where(self, fits: Callable[[FoundRun], bool]) -> Runs:
        """Those that fit.

        >>> len(runs("runs").where(lambda one: one.record.run.seed == 1))
        0
        """
        return Runs([one for one in self if fits(one)])

    def differences(self) -> dict[str, list[Any]]:
        """The settings in which runs differ: by dotted key, a value for every run in order.

        None where a run has no such setting.
        """
        settings = [one.settings for one in self]
        keys = dict.fromkeys(key for one in settings for key in one)
        found = {key: [one.get(key) for one in settings] for key in keys}
        return {
            key: values
            for key, values in found.items()
            if key.partition(".")[0] not in NOT_COMPARED and any(v != values[0] for v in values)
        }

    def to_pandas(self) -> pd.DataFrame:
        """A line for every run: what it is, settings by dotted key, `metric.<id>` of its memory.

        final_average is a fraction; created is in UTC.

        >>> frame = runs("runs").to_pandas().sort_values("final_average")
        >>> frame[["seed", "tasks", "adapter.rank"]].to_dict("records")
        [{'seed': 0, 'tasks': 2, 'adapter.rank': 4}]
        >>> float(frame["metric.faa"].iloc[-1]) == float(frame["final_average"].iloc[-1])
        True
        """
        import pandas as pd

        lines = []
        for one in self:
            run = one.record.run
            lines.append(
                {
                    "place": one.place,
                    "name": run.name,
                    "note": run.note,
                    "tags": ", ".join(run.tags),
                    "created": run.created,
                    "data": run.data.name,
                    "tasks": len(run.tasks),
                    "preset": run.preset,
                    "seed": run.seed,
                    "order": one.order,
                    "final_average": one.final_average,
                    "loss": one.loss,
                    "wall_seconds": one.record.environment.wall_seconds,
                }
                | {k: v for k, v in one.settings.items() if k not in ("seed", "store", "runs")}
                | {f"metric.{id}": value for id, value in one.row.metrics.items()}
            )
        return pd.DataFrame(lines)

    def plot(self, file: Path) -> Path:
        """Draw the accuracy of the tasks seen so far after each task, a line for every run.

        The suffix of the file says the format: .svg, .png or .pdf. Raises ConfigError for another,
        and where no accuracy was measured after any task.
        """
        from memtool.atomic import write_atomic

        if file.suffix.lower() not in (".svg", ".png", ".pdf"):
            raise ConfigError(f"--plot {file}", expected="a name ending in .svg, .png or .pdf")
        curves = [(one, curve) for one in self if (curve := _seen(one))]
        if not curves:
            raise ConfigError(
                f"no accuracy to draw in {len(self)} runs",
                expected="a run of images, or of texts with generated answers",
            )
        return write_atomic(file, _drawn(curves, file.suffix.lower()[1:]))


def runs(folder: Path | str = "runs") -> Runs:
    """The runs in a folder and below it; one that cannot be read is left out, with a warning.

    Raises NotFoundError where there is none.

    >>> [one.place for one in runs("runs")]
    ['runs/seed-0']
    """
    top = Path(folder)
    found = []
    for file in find_all(top):
        try:
            record = read_record(file)
        except MemtoolError as error:
            logger.warning("left out: %s", printable(error.message))
            continue
        found.append(FoundRun(file.parent.as_posix(), record))
    if not found:
        raise NotFoundError(
            f"no run in the folder {folder}",
            expected=f"{RECORD} in it, or in a folder below it",
            remedy="memtool run, or memtool runs FOLDER",
        )
    return Runs(found)


def find_all(folder: Path) -> Iterator[Path]:
    """The records below a folder; below a run there are no others, and memories are not entered.

    Of a sweep those that count: a worker that was killed may have left one that does not.
    """
    counted = {one: _counted(one) for one in folder.absolute().parents if (one / PLAN).is_file()}
    for place, inside, files in os.walk(folder):
        here = Path(place)
        if PLAN in files:
            counted[here.absolute()] = _counted(here)
        if RECORD in files and _counts(here.absolute(), counted):
            yield here / RECORD
        leaf = RECORD in files or "ice" in inside  # a run, or a memory
        skipped = {"queue"} if PLAN in files else set()
        inside[:] = [] if leaf else sorted({*inside} - skipped)


def _counted(sweep: Path) -> set[Path]:
    """The folders of the runs of a sweep that are among its results, absolute."""
    queue = Queue(sweep / "queue", lease_seconds=1)
    found: set[Path] = set()
    for job in sorted((sweep / "queue").glob("*/")):
        with suppress(MemtoolError, OSError):  # a result that is damaged counts nothing
            record = (queue.result(job.name) or {}).get("record")
            if isinstance(record, str):
                found.add(sweep.absolute() / record)
    return found


def _counts(run: Path, counted: Mapping[Path, set[Path]]) -> bool:
    """Whether a run is in no sweep, or among the results of the one that it is in."""
    return all(run in own for sweep, own in counted.items() if sweep in run.parents)


def _seen(one: FoundRun) -> list[tuple[int, float]]:
    """Tasks learned, and the mean accuracy of those."""
    from memtool.evaluation.metrics import seen_accuracy

    values = one.row.matrix(one.record.run.task_names).values
    means = enumerate(seen_accuracy(values), start=1)
    return [(step, float(mean)) for step, mean in means if mean == mean]  # not NaN


def _drawn(curves: Sequence[tuple[FoundRun, list[tuple[int, float]]]], kind: str) -> bytes:
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from memtool.reports.drawing import COLOURS, MARKERS, RULE, WIDTH, style

    with style("runs"):
        rows = (len(curves) + 2) // 3
        figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * rows), layout="constrained")
        axes: Axes = figure.subplots()
        for place, (one, curve) in enumerate(curves):
            axes.plot(
                [step for step, _ in curve],
                [100 * mean for _, mean in curve],
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place // len(COLOURS) % len(MARKERS)],
                markersize=4,
                linewidth=1.4,
                label=" " + printable(one.label),  # a leading "_" would hide it
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("tasks learned")
        axes.set_ylabel("accuracy of the tasks seen so far (%)")
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False)
        drawn = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(drawn, format=kind, dpi=160, metadata=metadata)
    return drawn.getvalue()


def dotted(tree: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """Settings by dotted key: {"train": {"lr": 0.1}} is {"train.lr": 0.1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= dotted(value, f"{head}{name}.")
        else:
            found[head + name] = value
    return found
