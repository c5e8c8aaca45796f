"""One tree of errors for the store and the library: one base, one class and one code a meaning."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtool
import memtool_stores
from memtool import errors
from memtool.evaluation.record import read_record
from memtool_cli import failure
from memtool_stores import errors as errors_of_the_store


def _tree(root: type[memtool.MemtoolError]) -> Iterator[type[memtool.MemtoolError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)


@pytest.fixture(scope="module")
def classes() -> list[type[memtool.MemtoolError]]:
    """Every error of ours, wherever it is defined."""
    for package in (memtool_stores, memtool):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    return [kind for kind in _tree(memtool.MemtoolError) if kind.__module__.startswith("memtool")]


def test_one_class_a_name_and_a_code(classes: list[type[memtool.MemtoolError]]) -> None:
    assert len({kind.__name__ for kind in classes}) == len(classes)
    assert len({kind.code for kind in classes}) == len(classes)
    assert {kind.exit_status for kind in classes} == {1, 2, 3, 4, 5}
    for kind in classes:
        parent = kind.__base__
        assert parent in (memtool.MemtoolError, Exception) or kind.exit_status == parent.exit_status


def test_one_except_catches_what_both_raise(tmp_path) -> None:
    raised = []
    for look in (
        lambda: memtool_stores.MemoryStore.open(tmp_path / "nowhere"),
        lambda: read_record(tmp_path / "nowhere"),
    ):
        with pytest.raises(memtool.MemtoolError) as caught:
            look()
        raised.append(type(caught.value))
    assert raised == [memtool_stores.NotFoundError, errors.NotFoundError]
    assert raised[0] is raised[1]


def test_the_page_of_errors_is_the_tree(classes: list[type[memtool.MemtoolError]]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "store.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (\w+Error) \| ([\w-]+) \| (\d) \|", page, re.M)
    actual = [(k.__name__, k.code, str(k.exit_status)) for k in classes if k in _documented()]
    assert sorted(told) == sorted(actual)


def _documented() -> set[type]:
    """What a caller can name: not the base, and not what a module keeps to itself."""
    public = [*vars(errors_of_the_store).values(), *vars(errors).values()]
    return {kind for kind in public if inspect.isclass(kind)} - {memtool.MemtoolError}


def test_the_library_adds_what_it_draws() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+Error) .* exit (\d)$", errors.__doc__, re.M))
    own = {
        name: str(kind.exit_status)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and kind.__module__ == errors.__name__ and hasattr(kind, "code")
    }
    assert drawn == own
    of_the_store = [name for name in errors.__all__ if hasattr(errors_of_the_store, name)]
    assert all(name in errors.__doc__ for name in of_the_store)
    for name in errors.__all__:
        assert getattr(errors, name).__module__ in (errors.__name__, errors_of_the_store.__name__)


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.DataError, errors.CapacityError])
def test_an_error_of_the_library_survives_another_process(kind) -> None:
    error = kind("what", expected="that", remedy="this")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(back), str(back), vars(back)) == (kind, str(error), vars(error))


def test_the_command_line_exits_as_the_class_says(
    classes: list[type[memtool.MemtoolError]], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in classes:
        error = kind.__new__(kind, "what")
        memtool.MemtoolError.__init__(error, "what", remedy="this")
        assert failure.report(error) == kind.exit_status
        assert capsys.readouterr().err == "error: what\n  try: this\n"
