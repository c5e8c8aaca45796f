"""Values of JSON that a stranger may have written: parsed, and proved to be what they should be.

Each check gives the value back when it is of its kind, and says where it stands when it is not.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from memtool_stores.errors import SchemaError
from memtool_stores.printable import shown

LARGEST = 2**53
"""Largest whole number that every reader of JSON holds exactly."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


_PLAIN = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
_ONCE = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_once)


def parse(data: bytes, what: str, *, unique: bool = False) -> Any:
    """The value that is written as UTF-8 JSON, without NaN and infinities.

    With `unique` no name stands twice in one object.

    Raises:
        SchemaError: it is none, or nested too deep to be read.
    """
    try:
        return (_ONCE if unique else _PLAIN).decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{what} is not JSON: {error}", expected="JSON in UTF-8") from error


def _refused(value: Any, what: str, expected: str) -> SchemaError:
    return SchemaError(f"{what} is {shown(value)}", expected=expected)


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise _refused(value, what, "a mapping")
    return value


def member(value: dict[str, Any], name: str, what: str) -> Any:
    """What an object has under a name."""
    if name not in value:
        raise SchemaError(f"{what} has no {name}", expected=f"{name} among {shown(sorted(value))}")
    return value[name]


def items(value: Any, what: str) -> list[Any]:
    """A JSON list."""
    if not isinstance(value, list):
        raise _refused(value, what, "a list")
    return value


def text(value: Any, what: str) -> str:
    """Text that can be printed."""
    if not isinstance(value, str) or not value.isprintable():
        raise _refused(value, what, "printable text")
    return value


def whole(value: Any, what: str, least: int = 0) -> int:
    """A whole number, not smaller than `least`."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise _refused(value, what, f"a whole number from {least} to 2^53")
    return value


def number(value: Any, what: str) -> float:
    """A finite number."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is not int or abs(value) > LARGEST:
        raise _refused(value, what, "a finite number")
    return float(value)


def digest(value: Any, what: str) -> str:
    """A SHA-256 in hex."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _refused(value, what, "a SHA-256: 64 digits and letters a to f")
    return value
