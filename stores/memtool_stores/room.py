"""Room on the disk of a store in a directory: asked for before anything is begun, and kept for gc.

To expire versions, some files are written anew before the old ones go. On a full disk there would
be no room for that, and gc is the way out of a full disk: every store keeps a file of random bytes
that gc gives up first and takes again at its end.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from memtool_stores.errors import MemtoolError
from memtool_stores.files import write_whole
from memtool_stores.ice import disk_full, of_os_error

COMMIT_BYTES = 256 * 1024
"""Room that a commit needs beside its payload, for manifests and the snapshot."""

REFERENCE_BYTES = 16 * 1024
"""Room that a branch or a tag needs: two folders and two files of one block."""

REFERENCE_FILES = 4

RESERVE_BYTES = 64 * 1024
"""What is kept for gc: expiry writes a few kilobytes for each branch and tag."""

RESERVE = "reserve"
"""The file that keeps it."""


def is_full(url: str, nbytes: int) -> bool:
    """Whether so many bytes, or one more file, have no room."""
    return free(url) < nbytes or _free_files(url) < 1


def require(url: str, doing: str, nbytes: int, files: int = 1) -> None:
    """Nothing, when so many bytes and files have room: better none than half of them.

    Raises:
        StorageError: they have not.
    """
    try:
        if is_full(url, nbytes) or _free_files(url) < files:
            raise disk_full(doing, url, nbytes)
    except OSError as error:
        raise of_os_error(error, doing, url) from error


def free(url: str) -> int:
    """Bytes that are free on the disk of a store."""
    return shutil.disk_usage(url).free


def _free_files(url: str) -> float:
    if not hasattr(os, "statvfs"):
        return float("inf")
    found = os.statvfs(url)
    # File systems that make room for files as they need it say that there are none at all.
    return found.f_favail if found.f_files else float("inf")


def keep_reserve(url: str) -> None:
    """Take the reserve of a store, where it has none and there is plenty of room."""
    reserve = Path(url) / RESERVE
    try:
        if not reserve.exists() and free(url) > RESERVE_BYTES + COMMIT_BYTES:
            # Bytes that no file system can store in less room.
            write_whole(reserve, os.urandom(RESERVE_BYTES))
    except OSError as error:
        raise of_os_error(error, "keep room for gc", url) from error


def give_up_reserve(url: str) -> None:
    """Give the reserve of a store up, if it has one."""
    try:
        (Path(url) / RESERVE).unlink(missing_ok=True)
    except OSError as error:
        raise of_os_error(error, "give up the room kept for gc", url) from error


def try_to_keep_reserve(url: str) -> None:
    """As `keep_reserve`; a store without a reserve is whole, so that a failure says nothing."""
    try:
        keep_reserve(url)
    except MemtoolError:
        return
