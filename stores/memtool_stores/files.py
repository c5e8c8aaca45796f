"""Files that appear whole or not at all, and what is left when a process dies in between.

A file in the making lies beside its place, under a name that nobody can guess
(`.<name>.<random>.memtool-part`), and is opened exclusively. A process that is killed leaves it
there, and leftovers.py finds it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from memtool_stores import limits
from memtool_stores.errors import SchemaError
from memtool_stores.printable import printable, shown

PIECE_BYTES = 1024 * 1024
"""How much is read at a time of a file that says nothing of its size."""

PART = ".memtool-part"
"""How the names of files and folders in the making end; they begin with a dot."""

_OURS = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(PART)}", re.DOTALL)
_OF_ICECHUNK = re.compile(r"[0-9A-Za-z._-]+#[0-9]+")

_DESCRIPTOR = re.compile(r"/proc/(?:self|\d+|thread-self)(?:/task/\d+)?/fd")


@contextmanager
def appearing(path: Path, *, private: bool = False, flushed: bool = True) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` when the block ends well, else is gone.

    It is flushed to the disk before it is put in place, so that a reader sees the old file or the
    new one, whatever stops in between; without `flushed`, the caller sees to that. An old file
    keeps its mode; a new one has that of any new file, or with `private` only its owner may read
    it. Links are followed. What is no ordinary file (a device, a pipe, standard output) is never
    replaced: it is written to as it stands.

    Raises:
        OSError: the file system refuses; nothing has changed.
    """
    descriptor = _descriptor(path)
    if descriptor is not None or _is_special(path):
        handle = os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
        with os.fdopen(handle, "wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    temporary = part(target)
    try:
        with temporary.open("r+b") as file:
            yield file
            file.flush()
            if flushed:
                os.fsync(file.fileno())
        temporary.chmod(_mode(target, private))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write `data` to `path` as `appearing` does.

    Raises:
        OSError: the file system refuses; nothing has changed.
    """
    with appearing(path, private=private) as file:
        file.write(data)


def read_ordinary(path: Path, limit: str) -> bytes:
    """All bytes of an ordinary file that is not above the limit of that name; links are followed.

    Raises:
        SchemaError: it is a folder, a pipe or a device, which could keep a reader for ever, or is
            too large, or no file can have this path.
        OSError: the file system refuses.
    """
    try:
        # A pipe would wait for its writer here.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:
        raise SchemaError(
            f"{shown(str(path))} cannot be the path of a file", expected="a path without NUL"
        ) from error
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
        raise SchemaError(
            f"{printable(str(path))} is {what}",
            expected="an ordinary file",
            remedy="the path of a file; what a program writes goes into one first",
        )
    with os.fdopen(handle, "rb") as file:
        limits.require(limit, state.st_size, printable(str(path)))
        # It may grow, or say nothing of its size; room is made for no more than is there.
        pieces, total = [file.read(state.st_size + 1)], 0
        while pieces[-1]:
            total = limits.require(limit, total + len(pieces[-1]), printable(str(path)))
            pieces.append(file.read(PIECE_BYTES))
    return pieces[0] if len(pieces) <= 2 else b"".join(pieces)


@contextmanager
def appearing_folders(*targets: Path) -> Iterator[list[Path]]:
    """A folder to fill for each target; they become these when the block ends well, else are gone.

    A target may be an empty folder. The folders above it are made, and after an error taken back.
    Links are followed.

    Raises:
        OSError: the file system refuses, or a target is there and holds something; nothing has
            changed.
    """
    targets = tuple(Path(os.path.realpath(target)) for target in targets)
    above, building, done = list[Path](), list[Path](), list[Path]()
    try:
        for target in targets:
            missing = [folder for folder in target.parents if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                above.append(folder)
            building.append(part_folder(target))
        yield building
        for folder, target in zip(building, targets, strict=True):
            open_as_usual(folder)
            folder.rename(target)
            done.append(target)
    except BaseException:
        for folder in (*building, *done):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in reversed(above):
            with suppress(OSError):  # somebody else put something there
                folder.rmdir()
        raise


def open_as_usual(folder: Path) -> None:
    """Give a folder in the making, which is private, the mode of any new folder."""
    folder.chmod(0o777 & ~_mask())


def is_stdout(path: Path) -> bool:
    """Whether what is written to `path` comes out of this process's standard output."""
    return _descriptor(path) == 1


def is_special(path: Path) -> bool:
    """Whether `path` is there and no ordinary file and no folder: a device, a pipe."""
    return _descriptor(path) is not None or _is_special(path)


def part(target: Path) -> Path:
    """A new empty file beside `target`, for what will be put in its place; private to its owner."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target), suffix=PART)
    os.close(handle)
    return Path(name)


def part_folder(target: Path) -> Path:
    """As `part`, a folder."""
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target), suffix=PART))


def is_part(name: str) -> bool:
    """Whether this is the name of a file or folder in the making: one that `part` gives."""
    return bool(_OURS.fullmatch(name))


def is_staged(name: str) -> bool:
    """Whether icechunk gives this name to a file in the making; other programs do, too."""
    return bool(_OF_ICECHUNK.fullmatch(name))


def _prefix(target: Path) -> str:
    # Names may be as long as the file system takes; what is random needs some room.
    return f".{target.name.encode()[:200].decode(errors='ignore')}."


def _descriptor(path: Path) -> int | None:
    """The open file that a path like /dev/stdout or /dev/fd/1 stands for."""
    for _ in range(40):
        parent = os.path.realpath(path.parent)
        if _DESCRIPTOR.fullmatch(parent) and path.name.isdecimal():
            own = {"self", "thread-self", str(os.getpid())}
            return int(path.name) if parent.split("/")[2] in own else None
        if not path.is_symlink():
            return None
        path = Path(parent, path.readlink())
    return None


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _mode(target: Path, private: bool) -> int:
    if private:
        return 0o600
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        return 0o666 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
