"""Results that one run finished and a later one finds again, in files under `runs`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter, ValidationError

from memtool import sealed
from memtool.errors import CorruptError

if TYPE_CHECKING:
    from memtool.engine import Engine

Result = TypeVar("Result")

SCHEMA = "memtool.kept"


def fingerprint_of(decides: object) -> str:
    """Hex sha256 of all that decides a result, whatever the order of its keys. JSON values only."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _read(file: Path, kind: TypeAdapter[Result]) -> Result | None:
    """What a file holds; of earlier formats, a result without a checksum, as well.

    None where there is no file. CorruptError for one that is not what was written.
    """
    remedy = f"the same command without {file}: it is measured again"
    try:
        data = sealed.read_file(file, "text_bytes")
    except FileNotFoundError:
        return None
    content = data
    if not data.lstrip().startswith(b"["):  # a list has no place for a seal
        found = sealed.parse_json(data, str(file), remedy=remedy)
        if found.content.get("schema") == SCHEMA:
            if not found.sealed:
                raise CorruptError(f"{file} is a kept result without its checksum", remedy=remedy)
            content = json.dumps(found.content.get("result")).encode()
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptError(f"{file} holds no such result: {first['msg']}", remedy=remedy) from error


def kept(
    file: Path,
    kind: TypeAdapter[Result],
    engine: Engine,
    find: Callable[[], Result],
    worth: Callable[[], bool] = lambda: True,
) -> Result:
    """What a file holds when an earlier run wrote it whole, else what `find` gives, written there.

    `worth` says, once it was found, whether it is to be written. The name of the file says what the
    result depends on, as by `fingerprint_of`. CorruptError for a file that is not what was written,
    MemtoolError for one that cannot be read or written.
    """
    known = engine.on_main(lambda: _read(file, kind))
    if known is not None:
        return known
    found = find()
    if not worth():
        return found
    keep(file, kind, engine, found)
    return found


def keep(file: Path, kind: TypeAdapter[Result], engine: Engine, found: Result) -> None:
    """Write a result where `kept` finds it, in the place of an older one."""
    document = {"schema": SCHEMA, "result": json.loads(kind.dump_json(found))}
    engine.on_main(lambda: sealed.write_json(file, document))
