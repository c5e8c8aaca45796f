"""What processes that were killed left in the making: named by `doctor`, taken away by `gc`.

Nobody else makes names like these (files.py), and nobody reads them; what icechunk makes counts
only below the `ice` of a store, since other programs use such names, too. A process that is at work
has written to what it makes within the last hour.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from memtool_stores.files import is_part, is_staged

PATIENCE_SECONDS = 3600.0
"""How long the maker of a file may be silent before it counts as gone."""


@dataclass(frozen=True)
class Leftover:
    """A file or a folder in the making, its bytes, and for how long nobody has written to it."""

    path: Path
    nbytes: int
    silent_seconds: float

    @property
    def is_old(self) -> bool:
        """Whether its maker counts as gone."""
        return self.silent_seconds > PATIENCE_SECONDS


def find(folder: Path, *, below: bool = True) -> list[Leftover]:
    """What lies in the making in a folder, sorted; with `below` also in the folders under it."""
    return sorted(_find(folder, below, is_part), key=lambda leftover: leftover.path)


def find_in_store(folder: Path) -> list[Leftover]:
    """What lies in the making in a store, of ours and of icechunk, sorted."""
    staged = _find(folder / "ice", True, is_staged)
    return sorted([*find(folder), *staged], key=lambda leftover: leftover.path)


def _find(folder: Path, below: bool, is_one: Callable[[str], bool]) -> Iterator[Leftover]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return  # not there, or not ours
    for entry in entries:
        if is_one(entry.name):
            with suppress(FileNotFoundError):  # finished meanwhile
                yield _looked_at(Path(entry.path))
        elif below and entry.is_dir(follow_symlinks=False):
            yield from _find(Path(entry.path), below, is_one)


def _looked_at(path: Path) -> Leftover:
    seen = [path.lstat()]
    for folder, folders, files in os.walk(path):
        seen += [Path(folder, name).lstat() for name in (*folders, *files)]
    # A wrong clock may have stamped what is ahead of ours: that is not old.
    return Leftover(
        path, sum(one.st_size for one in seen), time.time() - max(one.st_mtime for one in seen)
    )


def take_away(found: Iterable[Leftover]) -> list[Leftover]:
    """Delete these; those that are gone. What may not be deleted stays, for `doctor` to name."""
    gone = []
    for leftover in found:
        if leftover.path.is_dir() and not leftover.path.is_symlink():
            shutil.rmtree(leftover.path, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.path.unlink(missing_ok=True)
        if not os.path.lexists(leftover.path):
            gone.append(leftover)
    return gone
