"""Results that one run finished and a later one finds again, in files under `runs`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from memtool.atomic import write_atomic
from memtool.engine import Engine

Result = TypeVar("Result")


def fingerprint_of(decides: object) -> str:
    """Hex sha256 of all that decides a result, whatever the order of its keys. JSON values only."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _read(file: Path, kind: TypeAdapter[Result]) -> Result | None:
    try:
        return kind.validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):  # not there, or cut short by a full disk
        return None


def kept(
    file: Path, kind: TypeAdapter[Result], engine: Engine, find: Callable[[], Result]
) -> Result:
    """What a file holds when an earlier run wrote it whole, else what `find` gives, written there.

    The name of the file says what the result depends on, as by `fingerprint_of`.
    """
    known = engine.on_main(lambda: _read(file, kind))
    if known is not None:
        return known
    found = find()
    content = kind.dump_json(found, indent=2).decode() + "\n"
    engine.on_main(lambda: write_atomic(file, content))
    return found
