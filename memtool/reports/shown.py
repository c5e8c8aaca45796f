"""What reports and explanations show, before anything is drawn: nothing here loads a plotter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, MismatchError
from memtool.reports.table import Grid
from memtool_stores.files import is_special

SUFFIXES = (".svg", ".png", ".html")


def require_map(values: npt.NDArray[np.float64], expected: tuple[int, ...], what: str) -> None:
    """Refuse numbers of another shape, none of them, or any that is not finite."""
    if values.shape != expected or 0 in expected:
        raise MismatchError(f"{what} of shape {values.shape}", expected=f"{expected}, not empty")
    if not np.isfinite(values).all():
        raise MismatchError(f"{what} with NaN or infinity", expected="finite numbers")


@dataclass(frozen=True, eq=False)
class Explained:
    """What is shown of an explained input.

    values: coefficients (memories, adapters); `blocks`: the block of every memory, empty for one
    memory that serves them all; contributions (adapters,): probability of the class `winner` (None
    for several samples) that goes without the adapter; facts: pairs of name and value; parts: what
    every adapter did, as a table.
    """

    title: str
    about: str
    facts: tuple[tuple[str, str], ...]
    blocks: tuple[int, ...]
    adapters: tuple[str, ...]
    values: npt.NDArray[np.float64]
    contributions: npt.NDArray[np.float64]
    parts: Grid
    winner: str | None = None
    columns: tuple[str, ...] = ()
    by_token: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if self.columns:
            shape = (len(self.adapters), len(self.columns))
            require_map(self.by_token, shape, "weights of tokens")
        expected = (max(len(self.blocks), 1), len(self.adapters))
        if self.values.shape != expected or self.contributions.shape != expected[1:]:
            raise MismatchError(
                f"coefficients of shape {self.values.shape} and contributions of shape "
                f"{self.contributions.shape}",
                expected=f"{expected} and {expected[1:]}",
            )

    @property
    def rows(self) -> list[str]:
        """What the rows of `values` are called."""
        return [f"block {block}" for block in self.blocks] or ["all blocks"]


def coefficient_grid(explained: Explained) -> Grid:
    """Coefficients of every block, the longer side down; negative ones bold."""
    rows, columns, values = explained.rows, list(explained.adapters), explained.values
    if len(columns) > len(rows):
        rows, columns, values = columns, rows, values.T
    values = values.round(3) + 0.0  # what rounds to zero is zero: never "-0.000"
    negative = frozenset((i, 1 + j) for i, j in np.argwhere(values < 0).tolist())
    return Grid(
        title="Coefficients of every block",
        header=("", *columns),
        rows=tuple(
            (name, *(f"{value:.3f}" for value in line))
            for name, line in zip(rows, values.tolist(), strict=True)
        ),
        bold=negative,
        notes=("Bold: negative, subtracted from the mixture.",) if negative else (),
    )


@dataclass(frozen=True, eq=False)
class AtomPicture:
    """What is shown of the atoms of one adapted map.

    weights (atoms, tokens): the tokens are `prefix_tokens` that are no patch, then `side` x `side`
    patches; or, of a text, those that `columns` names. tasks: for every atom the name of its task,
    atoms of a task next to each other; parts: the weight of every task, as a table.
    """

    title: str
    about: str
    tasks: tuple[str, ...]
    weights: npt.NDArray[np.float64]
    prefix_tokens: int
    side: int
    parts: Grid
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.tasks), len(self.columns) or self.prefix_tokens + self.side**2)
        if self.weights.shape != expected:
            raise MismatchError(
                f"weights of shape {self.weights.shape}", expected=f"{expected}: atoms, tokens"
            )

    @property
    def groups(self) -> list[tuple[str, npt.NDArray[np.float64]]]:
        """The rows of every task: (its atoms, tokens), in order."""
        names = np.array(self.tasks)
        return [(name, self.weights[names == name]) for name in dict.fromkeys(self.tasks)]


def format_of(path: Path) -> str:
    """What is written to `path`: "svg", "png" or "html", by its suffix; a page to a device or pipe.

    ConfigError for another suffix.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return suffix[1:]
    if is_special(path):
        return "html"
    raise ConfigError(f"--out {path}", expected=f"a name ending in {', '.join(SUFFIXES)}")
