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
from memtool_stores import limits
from memtool_stores.errors import SchemaError
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
    a folder that cannot be listed, for a whole file system, and above limits.data_files.
    """
    if root.resolve().parent == root.resolve():
        raise DataError(
            f"{root} is a whole file system",
            expected="a folder that holds the data and nothing else",
            remedy="name that folder",
        )
    files: list[Path] = []
    out: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders, links = deque([root]), deque[Path]()
    count = 0
    while folders or links:
        # Links last: what has a place of its own is found there.
        folder = folders.pop() if folders else links.popleft()
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                out[_AGAIN] += 1
                continue
            seen.add((state.st_dev, state.st_ino))
            names = sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
            count += len(names)
            limits.require("data_files", count, f"{printable(str(root))} and below")
            for name in names:
                _sort_out(folder / name, files, folders, links, out)
        except SchemaError as error:
            raise DataError(error.message, expected=error.expected, remedy=error.remedy) from error
        except OSError as error:
            raise DataError(
                f"{printable(str(folder))}: cannot be listed ({error.strerror})",
                remedy="check its permissions, or take it out",
            ) from error
    return Found(tuple(sorted(files)), out)


def _sort_out(
    path: Path,
    files: list[Path],
    folders: deque[Path],
    links: deque[Path],
    out: Counter[str],
) -> None:
    if path.name.startswith("."):
        out[_HIDDEN] += 1
    elif path.is_dir():
        (links if path.is_symlink() else folders).append(path)
    elif path.is_file():
        files.append(path)
    elif path.is_symlink() and not path.exists():
        out[_LOST] += 1
    else:
        out[_SPECIAL] += 1


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
