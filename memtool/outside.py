"""Files that others made, read whole: ordinary ones only, and none larger than is believed."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from memtool.errors import CorruptError, MemtoolError, NotFoundError
from memtool_stores.files import read_ordinary


def read_file(path: Path, limit: str = "text_bytes") -> bytes:
    """The bytes of an ordinary file; links are followed. `limit` is one of `limits`.

    Raises NotFoundError, SchemaError for what is no ordinary file (a folder, a pipe: nothing is
    waited for) and for one above the limit, MemtoolError when the file system refuses.
    """
    try:
        return read_ordinary(path, limit)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise unreadable(path, error) from error


def is_file(path: Path) -> bool:
    """Whether there is an ordinary file; no path that the system refuses leads to one."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; no path that the system refuses leads to one."""
    try:
        return path.is_dir()
    except OSError:
        return False


def way_to_write(error: OSError) -> str:
    """What helps where the system refused to write."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space, or name another folder"
        case errno.EFBIG:
            return "files may not be as large here: ulimit -f unlimited"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "name a folder that you may write"
    return "free some space, or name a folder that you may write"


def unreadable(path: Path, error: OSError) -> MemtoolError:
    """What a refusal of the system to read a file is told as: nothing is known to be damaged."""
    remedy: str | None = None
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            remedy = "ulimit -n 4096, or end other programs, then the same command again"
        case errno.EACCES | errno.EPERM:
            remedy = f"permissions that let you read {path}"
        case errno.EIO:
            remedy = "a look at the disk (dmesg), then the same command again"
        case errno.ENOMEM:
            remedy = "end other programs, then the same command again"
        case errno.ELOOP:
            remedy = "the file itself in the place of a link that leads back to itself"
    return MemtoolError(f"cannot read {path}: {error.strerror or error}", remedy=remedy)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Errors as `read_file` and `parsed_json`."""
    return parsed_json(read_file(path), str(path))


def parsed_json(data: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object. Raises CorruptError that names `where` for anything else."""
    try:
        content = json.loads(data, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptError(f"{where} holds a {type(content).__name__}", expected="a JSON object")
    return content


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is more than 64 bits can hold")
    return number
