"""Derived files of a store beside its values: whole, named by what they follow from, checked.

They hold nothing of their own. A file begins with the sha256 of its name and of what it holds, so
one that was damaged, cut short or renamed is as good as none: whoever wants it makes it again. As
the values, it is read and never mapped, and only its owner may read it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat

from memtool_stores.cache import INDEX_SUFFIX, LOCK_SECONDS, folder, make_private, prune
from memtool_stores.files import part

DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def read(store_id: str, name: str) -> memoryview | None:
    """What the file of this name holds; None where there is none that is whole.

    Raises:
        SchemaError: as `cache.folder`.
    """
    path = folder(store_id) / f"{name}{INDEX_SUFFIX}"
    try:
        # A link may lead to a file of others, and a pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            sound = stat.S_ISREG(os.fstat(handle).st_mode)
            whole = b""
            if sound:
                with os.fdopen(handle, "rb", closefd=False) as file:
                    whole = file.read()
        finally:
            os.close(handle)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read (%s); it is made again", path, error)
        return None
    data = memoryview(whole)[DIGEST_BYTES:]
    if whole[:DIGEST_BYTES] != _digest(name, data):
        _log.warning("%s is not what was written there; it is made again", path)
        return None
    return data


def keep(store_id: str, name: str, data: bytes, *, files: int) -> None:
    """Write what `read` gives, and delete all but the newest so many files.

    Where that cannot be, a warning says so: the next process makes it again.

    Raises:
        SchemaError: as `cache.folder`.
    """
    import filelock

    place = folder(store_id)
    try:
        make_private(place)
        with filelock.FileLock(place / "lock", timeout=LOCK_SECONDS):
            building = part(place / f"{name}{INDEX_SUFFIX}")
            try:
                with building.open("r+b") as file:
                    file.write(_digest(name, data))
                    file.write(data)
                building.replace(place / f"{name}{INDEX_SUFFIX}")
            finally:
                building.unlink(missing_ok=True)
            prune(place, INDEX_SUFFIX, files)
    except (OSError, filelock.Timeout) as error:
        _log.warning("%s is not kept in the cache (%s)", name, error)


def _digest(name: str, data: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(data)
    return digest.digest()
