"""The files below a folder: which are looked at, and which are left out for what reason."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memtool.errors import DataError
from memtool.streams.parts import listed
from memtool_stores.printable import printable

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "bmp", "gif", "webp"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
    )
)

_LOST = "links that lead nowhere"
_AGAIN = "links to folders that are read already"
_SPECIAL = "pipes and devices"
_HIDDEN = "hidden"


@dataclass(frozen=True)
class Found:
    """Ordinary files below a folder, sorted, and how many other things by what they are."""

    files: tuple[Path, ...]
    left_out: Counter[str]


def files_below(root: Path) -> Found:
    """Every file below `root` that is not hidden; links to files and folders are followed.

    A folder that a link leads to is read once, however many links lead there. Raises DataError for
    a folder that cannot be listed.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders = deque([root])
    links: deque[Path] = deque()
    while folders or links:
        # Links last: what has a place of its own is found there.
        linked = not folders
        folder = links.popleft() if linked else folders.pop()
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                left_out[_AGAIN] += 1
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    _sort_out(entry, files, folders, links, left_out)
        except OSError as error:
            raise DataError(
                f"{printable(str(folder))}: cannot be listed ({error.strerror})",
                remedy="check its permissions, or take it out",
            ) from error
    return Found(tuple(sorted(files)), left_out)


def _sort_out(
    entry: os.DirEntry[str],
    files: list[Path],
    folders: deque[Path],
    links: deque[Path],
    left_out: Counter[str],
) -> None:
    path = Path(entry.path)
    if entry.name.startswith("."):
        left_out[_HIDDEN] += 1
    elif path.is_dir():
        (links if entry.is_symlink() else folders).append(path)
    elif path.is_file():
        files.append(path)
    elif entry.is_symlink() and not path.exists():
        left_out[_LOST] += 1
    else:
        left_out[_SPECIAL] += 1


def left_out(name: str, found: Found, chosen: Sequence[Path]) -> list[str]:
    """A sentence on the files that are not among the chosen ones, by suffix; none for none.

    Hidden files are counted beside others, and not worth a sentence alone.
    """
    kept = set(chosen)
    others: Counter[str] = Counter(
        printable(file.suffix.lower()) or "without suffix"
        for file in found.files
        if file not in kept
    )
    others += found.left_out
    if not any(count for reason, count in others.items() if reason != _HIDDEN):
        return []
    return [f"{name}: left out: {listed(others.most_common())}"]


def files_key(root: Path, files: Iterable[Path]) -> str:
    """A sha256 over the names, sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        name = os.fsencode(file.relative_to(root).as_posix())
        digest.update(name + f"/{state.st_size}/{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
