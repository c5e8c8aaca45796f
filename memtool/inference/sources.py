"""What is to be predicted, as it is named: files, folders, patterns, lists of paths, prompts.

    named = files_named(["photos", "more/*.png", "-"], sys.stdin.buffer)
    named.files     every file, in the order in which it was named; a folder's sorted by path

A path that is there is what it is, whatever characters its name has; else `*`, `?`, `[…]` and `**`
stand for what they stand for in a shell. A folder gives the images below it, as a data set does, a
pattern the images among what it matches; by their suffix, and a pattern for which none has one all
files. A file that is named itself is taken for an image.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from memtool.errors import DataError, NotFoundError
from memtool.streams.files import IMAGE_SUFFIXES, Found, files_below, left_out
from memtool.streams.pictures import COLUMN, with_files
from memtool.streams.rows import lines_of, parse_json
from memtool_stores import limits
from memtool_stores.errors import SchemaError
from memtool_stores.printable import printable, shown

LIST = "-"
"""Stands for a list of paths on standard input."""

TOLD = 20
"""Of many things that are wrong, so many are named."""


@dataclass(frozen=True)
class Named:
    """The files that were named, as they are opened from here, and notes on what was left out."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def files_named(words: Sequence[str], listed: BinaryIO) -> Named:
    """The files of words of a command line; `listed` is read where one of them is "-".

    What a list names and is not there stays among the files: it is missed when it is opened.
    Raises NotFoundError for words that name nothing, all in one message; DataError for a folder
    without images, and above limits.data_files.
    """
    found: list[Path] = []
    notes: list[str] = []
    missing: list[str] = []
    for word in words:
        if word == LIST:
            for path in _listed(listed):
                found += _images_below(path, notes) if path.is_dir() else [path]
        elif os.path.lexists(word):
            path = Path(word)
            found += _images_below(path, notes) if path.is_dir() else [path]
        elif glob.has_magic(word) and (matches := _matches(word, notes)):
            found += matches
        else:
            missing.append(word)
    if missing:
        raise _missing(missing)
    if not found:
        raise DataError("no image was named: the list is empty", expected="a path on every line")
    _require_few(len(found))
    return Named(tuple(found), tuple(dict.fromkeys(notes)))


def prompts_in(file: Path) -> list[str]:
    """The prompts of a file: a line of text each, or of JSON with a `prompt`, perhaps an `image`.

    Raises NotFoundError, DataError with the number of the line.
    """
    found: list[str] = []
    for where, line in lines_of(file):
        if not line.lstrip().startswith("{"):
            found.append(line)
            continue
        entry = parse_json(line, where)
        if not isinstance(entry, dict) or type(entry.get("prompt")) is not str:
            raise DataError(f"{where}: {shown(line)[:80]}", expected='{"prompt": "…"}, or text')
        found.append(with_files(entry["prompt"], entry.get(COLUMN), file.parent, where))
    if not found:
        raise DataError(f"{file} holds no prompts", expected='lines of text, or of {"prompt": "…"}')
    return found


def first_of(things: Sequence[str]) -> str:
    """The first of many things that are wrong, and how many there are beside them."""
    more = len(things) - TOLD
    return ", ".join(things[:TOLD]) + (f" and {more:,} more" if more > 0 else "")


def _images_below(folder: Path, notes: list[str]) -> list[Path]:
    found = files_below(folder)
    images = [file for file in found.files if _is_image(file)]
    name = printable(str(folder))
    if not images:
        there = "; ".join(left_out("found", found, []))
        raise DataError(
            f"{name} holds no images" + (f" ({there})" if there else ""),
            expected="a folder with PNG, JPEG or the like in it, or below",
            remedy="name the files themselves where they have other suffixes",
        )
    notes += left_out(name, found, images)
    return images


def _matches(word: str, notes: list[str]) -> list[Path]:
    """The images of a pattern; of a folder that it matches those below, unless `**` has them."""
    found: list[Path] = []
    for path in map(Path, sorted(glob.glob(word, recursive=True))):  # noqa: PTH207 - as typed
        if not path.is_dir():
            found.append(path)
        elif "**" not in word:
            found += [file for file in files_below(path).files if _is_image(file)]
    images = [file for file in found if _is_image(file)]
    if 0 < len(images) < len(found):
        notes += left_out(printable(word), Found(tuple(found), Counter()), images)
    return images or found


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _listed(stream: BinaryIO) -> Iterator[Path]:
    """The paths of a list, one a line; or, where there are any, one before every NUL."""
    data = stream.read(limits.current().text_bytes + 1)
    try:
        limits.require("text_bytes", len(data), "the list of paths")
    except SchemaError as error:
        raise DataError(error.message, expected=error.expected, remedy=error.remedy) from error
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    return (Path(os.fsdecode(line)) for line in lines if line.strip())


def _require_few(count: int) -> None:
    try:
        limits.require("data_files", count, "what was named")
    except SchemaError as error:
        raise DataError(error.message, expected=error.expected, remedy=error.remedy) from error


def _missing(words: Sequence[str]) -> NotFoundError:
    patterns = [word for word in words if glob.has_magic(word)]
    if len(patterns) == len(words):
        return NotFoundError(
            f"no image matches {first_of([shown(word) for word in words])}",
            remedy="check the pattern, and the folder that it begins in",
        )
    return NotFoundError(
        f"there is no file or folder {first_of([printable(word) for word in words])}",
        remedy="check the path",
    )
