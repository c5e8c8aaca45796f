"""Which settings the rows of a table were chosen to have, on validation samples alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class _Part(BaseModel):
    """Frozen; an unknown key, NaN or infinity is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Part):
    """One combination of values that was tried, by dotted key."""

    values: dict[str, JsonValue]

    @property
    def text(self) -> str:
        """As on the command line: `"train.lr=0.001, train.epochs=2"`."""
        return ", ".join(f"{key}={_text(value)}" for key, value in self.values.items())


def _text(value: JsonValue) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return "none" if value is None else str(value)


class Choice(_Part):
    """What a row reached in every cell on validation samples, and the number of the chosen cell.

    figures: in the order of the cells, None where it was not measured; chosen: the first of the
    best, from 0; of: the baseline that the row is of, None of the memory; failed: why there is no
    figure, by the number of the cell, where it could not be run to its end. Rows that read the
    memory in other ways have its choice.
    """

    figures: tuple[float | None, ...]
    chosen: Annotated[int, Field(ge=0)]
    of: str | None = None
    failed: dict[Annotated[int, Field(ge=0)], str] = {}

    @model_serializer(mode="wrap")
    def _without_none_failed(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        if not self.failed:
            document.pop("failed", None)
        return document


class Selection(_Part):
    """What was tried on a tuning seed that is not reported, and what was chosen for every row.

    samples: how many validation samples all tasks have; validation: what `stream.validation` was
    then; measure: of the figures, of which a loss is better when it is lower; rows: by id, in the
    order of the table.
    """

    seed: int
    validation: float
    samples: Annotated[int, Field(ge=0)]
    measure: Literal["accuracy", "loss"]
    cells: Annotated[tuple[Cell, ...], Field(min_length=1)]
    rows: dict[str, Choice]

    @model_validator(mode="after")
    def _of_the_cells(self) -> Selection:
        for id, choice in self.rows.items():
            if len(choice.figures) != len(self.cells) or choice.chosen >= len(self.cells):
                raise ValueError(f"row {id!r}: another number of cells than {len(self.cells)}")
            for number in choice.failed:
                if number >= len(self.cells) or choice.figures[number] is not None:
                    raise ValueError(f"row {id!r}: no such cell, or not failed: {number}")
        return self

    @property
    def has_failed(self) -> bool:
        """Whether a cell could not be run to its end for some row."""
        return any(choice.failed for choice in self.rows.values())

    @property
    def memory(self) -> Cell:
        """What was chosen for the memory."""
        choices = [choice for choice in self.rows.values() if choice.of is None]
        return self.cells[choices[0].chosen if choices else 0]

    def rows_of(self, baseline: str) -> Mapping[str, Cell]:
        """The rows of a baseline with the cell of each."""
        return {
            id: self.cells[choice.chosen]
            for id, choice in self.rows.items()
            if choice.of == baseline
        }

    @property
    def on(self) -> str:
        """On what it was chosen, in words."""
        return f"{self.samples:,} validation samples of seed {self.seed}"

    def sentence(self, ids: Sequence[str]) -> str:
        """What was chosen for which of these rows, for a caption."""
        groups: dict[int, list[str]] = {}
        for id, choice in self.rows.items():
            if id in ids:
                groups.setdefault(choice.chosen, []).append(id)
        chosen = "; ".join(
            f"{self.cells[number].text} for {', '.join(names)}"
            for number, names in sorted(groups.items())
        )
        return (
            f"Each row has the best of {len(self.cells)} settings on {self.on}, chosen before any "
            f"test sample was read: {chosen}."
        )


def first_best(figures: tuple[float | None, ...], *, lower: bool) -> int:
    """The number of the best figure, the first of equal ones; 0 where there is none."""
    known = [
        (figure if lower else -figure, number)
        for number, figure in enumerate(figures)
        if figure is not None
    ]
    return min(known)[1] if known else 0
