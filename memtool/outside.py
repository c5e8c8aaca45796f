"""Files that others made, read whole: ordinary ones only, and none larger than is believed."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from memtool.errors import CorruptError, DataError, MemtoolError, NotFoundError
from memtool_stores import limits


def read_file(path: Path, limit: str = "text_bytes") -> bytes:
    """The bytes of an ordinary file; links are followed. `limit` is one of `limits`.

    Raises NotFoundError, DataError for what is no ordinary file (a folder, a pipe: nothing is
    waited for), SchemaError for one above the limit, MemtoolError when the file system refuses.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # a NUL in the path
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise MemtoolError(f"cannot read {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise _no_file(path)
            return file.read(limits.require(limit, found.st_size, str(path)))
    except IsADirectoryError:
        raise _no_file(path) from None
    except OSError as error:
        raise MemtoolError(f"cannot read {path}: {error.strerror}") from error


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


def _no_file(path: Path) -> DataError:
    return DataError(f"{path} is no ordinary file", expected="a file, not a folder or a pipe")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is more than 64 bits can hold")
    return number
