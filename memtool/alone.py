"""One process at a time in a place of `runs`: the second is refused, and told who is there."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from memtool.atomic import write_atomic
from memtool.errors import BusyError, MemtoolError
from memtool_stores.printable import printable


@contextmanager
def alone(lock: Path, doing: str) -> Iterator[None]:
    """Hold the file `lock` for as long as the block runs; the system frees it of a dead holder.

    A folder that was made for it and got nothing else is taken away again.

    BusyError when another process holds it, which `doing` says what for; MemtoolError where files
    cannot be written.
    """
    import filelock

    held = filelock.FileLock(lock, timeout=0)
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except filelock.Timeout as error:
        raise BusyError(
            f"{_holder(lock)} is {doing}",
            expected="one process at a time",
            remedy="wait for it to end, or another place with --set runs=DIR",
        ) from error
    except OSError as error:
        raise MemtoolError(
            f"cannot lock {lock}: {error.strerror or error}",
            remedy="a folder that you may write, with --set runs=DIR",
        ) from error
    try:
        _leave_word(lock)
        yield
    finally:
        with suppress(OSError):
            _word(lock).unlink(missing_ok=True)
            if made and list(lock.parent.iterdir()) == [lock]:
                lock.unlink()
        held.release()
        for folder in made:
            with suppress(OSError):  # there is more in it
                folder.rmdir()


def _word(lock: Path) -> Path:
    """Where the holder says who it is; the lock itself is emptied by whoever tries it."""
    return lock.with_name(f"{lock.name}-holder")


def _leave_word(lock: Path) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    said = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    write_atomic(_word(lock), json.dumps(said) + "\n", private=True)


def _holder(lock: Path) -> str:
    """Who holds a lock; "another process" for one that has not said it within a second."""
    for _ in range(20):  # it takes the lock, then says who it is
        try:
            said = json.loads(_word(lock).read_bytes())
            names = ("process", "host", "since")
            process, host, since = (printable(str(said[name])) for name in names)
        except (OSError, ValueError, LookupError, TypeError):
            time.sleep(0.05)
        else:
            return f"process {process} on {host}, since {since},"
    return "another process"
