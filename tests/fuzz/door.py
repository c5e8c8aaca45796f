"""What every test of a door shares: how many cases, what may come out, and what must not change.

A door is where something that a stranger made comes in. Whatever it is, it is taken or refused with
an error of ours that says what and where; it neither hangs nor writes where it was not asked to.
`make test` runs `CASES` generated cases a door; `make test-all` sets MEMTOOL_FUZZ_CASES to 20,000.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from memtool.errors import MemtoolError

CASES = int(os.environ.get("MEMTOOL_FUZZ_CASES", "100"))
HANG_SECONDS = 5
WAIT_SECONDS = 60

cases = settings(
    max_examples=CASES,
    deadline=None,  # by `no_hang`: that of hypothesis counts what other processes do meanwhile
    suppress_health_check=list(HealthCheck),
    # A run of a few cases finds the same as the run before; a long one looks for what is new.
    derandomize=CASES <= 200,
)
"""Decorator of a test of a door: so many cases."""

long = pytest.mark.timeout(max(300, CASES))
"""Mark of a test of a door: 20,000 cases take their time."""


@contextmanager
def no_hang(seconds: float = HANG_SECONDS) -> Iterator[None]:
    """The block works for less than `seconds`, and waits for less than `WAIT_SECONDS`."""
    worked, began = time.process_time(), time.monotonic()
    yield
    worked, waited = time.process_time() - worked, time.monotonic() - began
    assert worked < seconds, f"{worked:.1f} s of work"
    assert waited < max(seconds, WAIT_SECONDS), f"{waited:.1f} s"


@contextmanager
def refused_or_taken() -> Iterator[None]:
    """Nothing comes out of the block but an error of ours, with a message that can be printed.

    And that without a hang.
    """
    try:
        with no_hang():
            yield
    except MemtoolError as error:
        for text in (error.message, error.expected, error.remedy):
            assert text is None or (text.strip() and text.isprintable()), repr(text)


@contextmanager
def nothing_else_changes(sandbox: Path, *, but: Path | None = None) -> Iterator[None]:
    """Nothing in `sandbox` appears, goes or changes inside the block, `but` under one path."""
    before = _listing(sandbox, but)
    yield
    after = _listing(sandbox, but)
    changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    assert not changed, f"written outside of {but}: {changed[:5]}"


def _listing(sandbox: Path, but: Path | None) -> dict[str, tuple[int, ...]]:
    found = {}
    for folder, _, files in os.walk(sandbox):
        for path in (Path(folder, file) for file in files):
            if but is None or not path.is_relative_to(but):
                stat = path.lstat()
                found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


class _Whole(bytes):
    """Bytes that hypothesis does not write out whenever it names what it draws from."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a good file after up to four accidents: flips, cuts, repeats, strange bytes."""
    return _damaged(_Whole(whole))


@st.composite
def _damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "replace", "repeat", "remove"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(STRANGE)
            case "replace":
                strange = draw(STRANGE)
                data[at : at + len(strange)] = strange
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case _:
                del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


_BYTES = b"../ / { [[[[[[[[[[[[[[[[ 1e999 NaN -1 99999999999999999999 null =1+1 <script>".split()
STRANGE = st.one_of(
    st.binary(max_size=16),
    st.sampled_from([*_BYTES, b"\x00", b"\xff" * 8, b"\x1b[2J", b"\xed\xa0\x80", b"\n", b"\t"]),
)
"""Bytes that parsers stumble over."""

_NAMES = ". .. ../x ../../x /abs/x a/b a\\b .hidden -rf ~ ~root =1+1 <b> CON HEAD main a@b %s {0}"
NAMES = st.one_of(
    st.text(max_size=40),
    st.sampled_from([*_NAMES.split(), "", "nul\0", "tab\t", "line\n", "\x1b[2J", "\u202eabc"]),
    st.sampled_from(["\ud800", "x" * 300, "é" * 150, " x", "x ", "a b", "0" * 20]),
)
"""Names as a stranger would choose them."""

_NUMBERS = [-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**15, 10**30, -(10**15), 0.5, 1e308, -0.0]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([*_NUMBERS, float("nan"), float("inf")]),
        st.integers(-3, 50),
        NAMES,
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
"""Values of JSON as a stranger would write them."""


@st.composite
def altered(draw: st.DrawFn, document: object) -> object:
    """A good document of JSON in which one or two places are strange, doubled or gone."""
    result = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 2))):
        places = [*_places(result)]
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["value", "value", "gone", "name", "like another"])):
            case "gone":
                del holder[key]
            case "name" if isinstance(holder, dict):
                holder[draw(NAMES)] = holder.pop(key)
            case "like another":
                other, place = draw(st.sampled_from(places))
                holder[key] = copy.deepcopy(other[place])
            case _:
                holder[key] = draw(VALUES)
    return result


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document, as what holds it and the key or index of it."""
    keys = document if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from _places(document[key])
