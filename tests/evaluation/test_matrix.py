"""The accuracy matrix: built row by row, never changed in place, exact on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool.atomic import write_atomic
from memtool.errors import (
    ConfigError,
    CorruptError,
    DataError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.matrix import AccuracyMatrix

scores = st.none() | st.floats(0, 1)


@st.composite
def built(draw: st.DrawFn) -> AccuracyMatrix:
    tasks = draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    matrix = AccuracyMatrix.empty(tasks)
    for number in draw(st.lists(st.integers(0, len(tasks)))):
        row = draw(st.lists(scores, min_size=len(tasks), max_size=len(tasks)))
        matrix = matrix.with_row(number, row)
    return matrix


def test_rows_are_added_to_a_copy() -> None:
    empty = AccuracyMatrix.empty(["photo", "art"])
    one = empty.with_row(1, [0.9, None])
    assert np.isnan(empty.values).all()
    assert one.cells == ((None, None), (0.9, None), (None, None))
    with pytest.raises(ValueError, match="read-only"):
        one.values[0, 0] = 1


def test_the_array_given_stays_the_callers() -> None:
    values = np.zeros((2, 1))
    matrix = AccuracyMatrix(("a",), values)
    values[0, 0] = 1
    assert matrix.values[0, 0] == 0


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_round_trip_is_exact(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"matrix{suffix}"

    @given(built())
    def check(matrix: AccuracyMatrix) -> None:
        assert AccuracyMatrix.load(matrix.save(path)) == matrix

    check()
    assert list(tmp_path.iterdir()) == [path]


def test_up_to_is_the_stream_cut_short() -> None:
    values = np.arange(12).reshape(4, 3) / 12
    short = AccuracyMatrix(("a", "b", "c"), values).up_to(2)
    assert short.tasks == ("a", "b")
    np.testing.assert_array_equal(short.values, values[:3, :2])
    with pytest.raises(MismatchError):
        short.up_to(3)


def test_bad_rows() -> None:
    matrix = AccuracyMatrix.empty(["a", "b"])
    with pytest.raises(MismatchError, match="row 3"):
        matrix.with_row(3, [0, 0])
    with pytest.raises(MismatchError, match="1 scores"):
        matrix.with_row(1, [0])
    with pytest.raises(DataError, match=r"84 on task 'a' after 1 tasks.*\n(.*\n)*.*divide"):
        matrix.with_row(1, [84, 0])
    with pytest.raises(DataError):
        matrix.with_row(1, [-0.1, 0])


@pytest.mark.parametrize("tasks", [[], ["a", "a"]])
def test_bad_names(tasks: list[str]) -> None:
    with pytest.raises(MismatchError):
        AccuracyMatrix.empty(tasks)


def test_wrong_shape() -> None:
    with pytest.raises(MismatchError, match="shape"):
        AccuracyMatrix(("a",), np.zeros((1, 1)))
    with pytest.raises(MismatchError):
        AccuracyMatrix.of_cells(["a", "b"], [[0.1, 0.2], [0.1], [0.1, 0.2]])


def test_other_types_are_not_equal() -> None:
    assert AccuracyMatrix.empty(["a"]) != "a"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.json", "{"),
        ("m.json", '{"schema": "memtool.matrix", "schema_version": 1, "tasks": ["a"]}'),
        ("m.json", '{"schema": "other", "schema_version": 1}'),
        ("m.csv", "after,a\n0,0.5\n"),
        ("m.csv", "after,a\n0,0.5\n1,much\n"),
        ("m.csv", "task,a\n0,0.5\n1,0.5\n"),
        ("m.csv", ""),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
        AccuracyMatrix.load(tmp_path / name)


def test_newer_schema_missing_file_and_other_suffix(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"schema": "memtool.matrix", "schema_version": 2}')
    with pytest.raises(MismatchError, match="upgrade memtool"):
        AccuracyMatrix.load(path)
    with pytest.raises(NotFoundError):
        AccuracyMatrix.load(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"m\.txt"):
        AccuracyMatrix.empty(["a"]).save(tmp_path / "m.txt")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomic(tmp_path / "new folder" / "file", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemtoolError, match=r"No space left.*\n.*free some space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MemtoolError, match="cannot write"):
        write_atomic(tmp_path / "file" / "matrix.csv", "x")
