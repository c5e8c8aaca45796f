"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from memtool.errors import MemtoolError


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write bytes, or text as UTF-8, to `path`, whole or not at all; returns `path`.

    The content is flushed to the disk beside `path`, then put in place. Makes the folder. A reader
    sees the old file or the new one, and a failure leaves the old one.
    MemtoolError when the file system refuses (permission, space, a file where a folder should be).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private to the user: give it the mode of an ordinary new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise MemtoolError(
            f"cannot write {path}: {error.strerror}",
            remedy="free some space, or name a folder that you may write",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path
