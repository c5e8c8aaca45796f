"""What a sweep is asked for, what each of its runs came to, and its cells over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from memtool import sealed
from memtool.errors import AlreadyExistsError, CorruptError
from memtool.evaluation.record import Kind, OrderBound
from memtool.evaluation.selection import Cell
from memtool.evaluation.summary import summarise
from memtool.experiments.runs import PLAN
from memtool_stores.printable import shown


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PlannedCell(_Part):
    """Settings that are run with every seed; at an order bound, the order that it has there."""

    name: str
    values: dict[str, JsonValue]
    bound: OrderBound | None = None
    order: tuple[str, ...] | None = None

    @property
    def text(self) -> str:
        """As on the command line, `"train.lr=0.001"`, and the order."""
        words = Cell(values=self.values).text or "as configured"
        return words if self.bound is None else f"{words}, {self.bound.name} order"


class Asked(_Part):
    """What makes a sweep: the configuration without what is of a machine, and what is varied."""

    memtool: str
    configuration: dict[str, JsonValue]
    axes: dict[str, list[JsonValue]]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    orders: Literal["given", "bounds"]

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(seeds))


class Plan(_Part):
    """The file `sweep.json`."""

    schema_name: Literal["memtool.sweep"] = Field("memtool.sweep", alias="schema")
    schema_version: Literal[1] = 1
    asked: Asked
    preset: str | None
    lease_seconds: Annotated[float, Field(gt=0)]
    cells: Annotated[tuple[PlannedCell, ...], Field(min_length=1)]


class RowResult(_Part):
    """A row of one run: its final average, None where only losses were measured, and all metrics.

    Files that have the final loss as the `figure` of such a row are read, too.
    """

    id: str
    label: str
    kind: Kind
    figure: float | None
    metrics: dict[str, float]

    @property
    def final_average(self) -> float | None:
        """Mean accuracy after the last task."""
        only_loss = "loss.final" in self.metrics and "faa" not in self.metrics
        return None if only_loss else self.figure

    @property
    def loss(self) -> float | None:
        """The final loss of texts, in nats per answer token."""
        return self.metrics.get("loss.final")


class CellResult(_Part):
    """What a cell and a seed came to, as the queue keeps it; `failed` is the error of one that did.

    record: where the whole record is, from the folder of the sweep; token: of the lease under which
    it was published.
    """

    schema_name: Literal["memtool.sweep-cell"] = Field("memtool.sweep-cell", alias="schema")
    schema_version: Literal[1] = 1
    cell: str
    seed: int
    token: int
    record: str | None = None
    failed: str | None = None
    measure: Literal["accuracy", "loss"] = "accuracy"
    rows: tuple[RowResult, ...] = ()


class Spread(_Part):
    """Numbers of several seeds, in their order."""

    values: tuple[float, ...]
    mean: float
    std: float | None


class SweepRow(_Part):
    """A row of a cell over its seeds, in their order; the spread needs two seeds.

    Of final averages, and apart from them of final losses, where either was measured.
    """

    id: str
    label: str
    kind: Kind
    values: tuple[float, ...]
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    loss: Spread | None = None
    metrics: dict[str, float]


class SweptCell(_Part):
    """What a cell came to: seeds that ended well, the errors of others, and its rows."""

    name: str
    values: dict[str, JsonValue]
    order: str | None
    seeds: tuple[int, ...]
    failed: dict[int, str]
    rows: tuple[SweepRow, ...]

    def row(self) -> SweepRow | None:
        """The row of the memory: the first of a method."""
        return next((row for row in self.rows if row.kind == "method"), None)


class Results(_Part):
    """The file `results.json`; the same whoever ran what. `left`: runs without a result yet.

    `measure` is what the best cell is chosen by.
    """

    schema_name: Literal["memtool.sweep-results"] = Field("memtool.sweep-results", alias="schema")
    schema_version: Literal[1] = 1
    axes: dict[str, list[JsonValue]]
    seeds: tuple[int, ...]
    orders: Literal["given", "bounds"]
    measure: Literal["accuracy", "loss"]
    left: int
    cells: tuple[SweptCell, ...]

    @property
    def failed(self) -> int:
        """How many runs ended with an error."""
        return sum(len(cell.failed) for cell in self.cells)


def over_seeds(cell: PlannedCell, results: Sequence[CellResult]) -> SweptCell:
    """A cell over the seeds that have a result."""
    well = [result for result in results if result.failed is None]
    rows = []
    for id in dict.fromkeys(row.id for result in well for row in result.rows):
        here = [row for result in well for row in result.rows if row.id == id]
        figures = [row.final_average for row in here if row.final_average is not None]
        losses = [row.loss for row in here if row.loss is not None]
        over = summarise(figures) if figures else None
        shared = [m for m in here[0].metrics if all(m in row.metrics for row in here)]
        rows.append(
            SweepRow(
                id=id,
                label=here[0].label,
                kind=here[0].kind,
                values=tuple(figures),
                mean=over and over.mean,
                std=over and over.std,
                low=over and over.low,
                high=over and over.high,
                loss=_spread(losses),
                metrics={m: sum(row.metrics[m] for row in here) / len(here) for m in shared},
            )
        )
    return SweptCell(
        name=cell.name,
        values=cell.values,
        order=cell.bound and cell.bound.name,
        seeds=tuple(result.seed for result in well),
        failed={r.seed: r.failed for r in results if r.failed is not None},
        rows=tuple(rows),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    over = summarise(values)
    return Spread(values=tuple(values), mean=over.mean, std=over.std)


def read_plan(folder: Path) -> Plan | None:
    """The plan in a folder, None where there is none. CorruptError, ConfigError."""
    file = folder / PLAN
    try:
        content = sealed.read_json(file).content
    except FileNotFoundError:
        return None
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptError(
            f"{file} is no sweep of this memtool: {place}: {first['msg']}",
            remedy="another folder with --out",
        ) from error


def require_same(there: Asked, asked: Asked, folder: Path) -> None:
    """Raise AlreadyExistsError, which names the first difference, for another sweep.

    In which order the values of an axis were said makes no other one.
    """
    there, asked = _in_order(there), _in_order(asked)
    if there == asked:
        return
    for name in ("memtool", "axes", "seeds", "orders"):
        here, other = getattr(asked, name), getattr(there, name)
        if here != other:
            raise of_another(folder, f"{name} {shown(other)}", f"{name} {shown(here)}")
    flat = _differences(there.configuration, asked.configuration)
    key, (other, here) = next(iter(flat.items()))
    raise of_another(folder, f"{key} {shown(other)}", f"{key} {shown(here)}")


def _in_order(asked: Asked) -> Asked:
    axes = {key: sorted(values, key=str) for key, values in asked.axes.items()}
    return asked.model_copy(update={"axes": axes})


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in {**a, **b}:
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= _differences(one, other, f"{head}{key}.")
        elif one != other:
            found[head + key] = (one, other)
    return found


def of_another(folder: Path, there: str, here: str) -> AlreadyExistsError:
    """The error for a folder that has another sweep than this one."""
    return AlreadyExistsError(
        f"the sweep in {folder} has {there}, this one {here}",
        expected="the same sweep, which this process would join",
        remedy="--out with another folder; or memtool sweep --out DIR alone, which joins",
    )
