"""The errors of the store: as they are drawn, each with its own code, whole in another process."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import re
from collections.abc import Iterator

import pytest

from memtool_stores import errors
from memtool_stores.errors import IntegrityError, MemtoolError, StorageError


def _tree(root: type[MemtoolError]) -> Iterator[type[MemtoolError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from _tree(kind)


CLASSES = list(_tree(MemtoolError))


def _example(kind: type[MemtoolError]) -> MemtoolError:
    """One of that class with everything said that can be."""
    told = {"expected": "the one", "remedy": "that"}
    if issubclass(kind, IntegrityError):
        return kind(what="values", name="photo", found="the other", **told)
    if issubclass(kind, StorageError):
        return kind("a message", transient=True, **told)
    return kind("a message", **told)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickle_and_copy(kind: type[MemtoolError]) -> None:
    error = _example(kind)
    error.add_note("seen on Monday")
    pickled = [
        pickle.loads(pickle.dumps(error, protocol))  # noqa: S301
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    for back in (*pickled, copy.copy(error), copy.deepcopy(error)):
        assert type(back) is kind
        assert vars(back) == vars(error)
        assert back.args == error.args
        assert str(back) == str(error)
        assert (back.code, back.exit_status) == (error.code, error.exit_status)


def _fail() -> None:
    raise IntegrityError(what="blob", name="head", expected="this", found="that")


def test_an_error_of_a_worker_reaches_its_caller() -> None:
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(IntegrityError, match="blob 'head' is damaged: found that") as caught,
    ):
        pool.apply(_fail)
    assert (caught.value.what, caught.value.expected) == ("blob", "this")


def test_the_drawn_tree_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, tuple[str, str | None]] = {}
    parents = ["MemtoolError"]
    for line in errors.__doc__.splitlines():
        found = re.match(r"([├└│─ ]*)(\w+Error)\s+(\S.*?)\s{2,}(\S+)$", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        parents[depth:] = [found[2]]
        drawn[found[2]] = (parents[depth - 1], found[4])
    actual = {
        kind.__name__: (kind.__base__.__name__ if kind.__base__ else "", kind.code)
        for kind in CLASSES
        if kind is not MemtoolError
    }
    assert drawn == actual


def test_no_two_classes_share_a_code() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert {kind.exit_status for kind in CLASSES} <= set(range(1, 6))
    defined = [
        c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, MemtoolError)
    ]
    assert set(defined) == set(CLASSES)
