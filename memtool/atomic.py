"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from pathlib import Path

from memtool.errors import MemtoolError
from memtool.outside import way_to_write
from memtool_stores.files import write_whole


def write_atomic(path: Path, content: str | bytes, *, private: bool = False) -> Path:
    """Write bytes, or text as UTF-8, to `path`, whole or not at all; returns `path`.

    As `memtool_stores.files.appearing`: devices, pipes and /dev/stdout are written through, links
    followed. Makes the folder. With `private` only the user may read it.
    MemtoolError when the file system refuses (permission, space, a file where a folder should be).
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data, private=private)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> MemtoolError:
    """The error of a file that could not be written: says why, and of a full disk its room."""
    room = _room(path.parent) if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return MemtoolError(
        f"cannot write {path}: {error.strerror or error}{room}; what was there before is as it was",
        remedy=way_to_write(error),
    )


def _room(folder: Path) -> str:
    """How much is free where a file should have gone, as far as that can be seen."""
    for above in (folder, *folder.parents):
        with suppress(OSError):
            return f" ({shutil.disk_usage(above).free:,} bytes free there)"
    return ""
