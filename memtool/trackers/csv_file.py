"""`curves.csv` in the folder of the run: a line for every point, for any program that reads CSV."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from memtool.atomic import cannot_write
from memtool.trackers import Card, Points
from memtool_stores.printable import as_cell

HEADER = "time,axis,step,name,value"
CURVES = "curves.csv"
"""What the file is called."""


class CsvFile:
    """Lines `time,axis,step,name,value`, written as they come; a run that goes on adds to them."""

    def __init__(self) -> None:
        self._path = Path(CURVES)

    def begin(self, card: Card) -> str:
        """Begin the file, or go on with the one that is there."""
        self._path = card.folder / CURVES
        try:
            card.folder.mkdir(parents=True, exist_ok=True)
            if card.anew or not self._path.exists():
                self._path.write_text(f"{HEADER}\n", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self._path, error) from error
        return str(self._path)

    def log(self, points: Iterable[Points]) -> None:
        """Add lines; times are in UTC."""
        lines = [
            f"{datetime.fromtimestamp(at.time, UTC).isoformat(timespec='milliseconds')},"
            f"{at.axis},{at.step},{_quoted(name)},{value!r}\n"
            for at in points
            for name, value in at.values.items()
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def end(self, *, failed: bool) -> None:
        """Everything is on disk."""
        del failed


def _quoted(name: str) -> str:
    return '"' + as_cell(name).replace('"', '""') + '"'
