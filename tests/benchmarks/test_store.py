"""The benchmark of the store runs from end to end and says what was held to what limit."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from benchmarks import store
from benchmarks.__main__ import main


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    """Two tiny sizes, with the keys of the larger one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "KEYS_FROM", 5)
        patch.setattr(store, "ROUNDS", 1)
        return store.run(1, sizes=(5, 3))


def test_every_check_of_the_store_has_a_figure_and_a_limit(result: dict[str, object]) -> None:
    cases = {case["name"]: case for case in result["cases"]}
    each = [
        "bytes per append, T = {}",
        "open, T = {}",
        "read one adapter, T = {}",
        "cached read of one adapter, T = {}",
        "cached layer of all adapters, T = {}",
        "append at T = {}, committed",
        "append at T = {}, durable",
        "room after gc, T = {}",
    ]
    wanted = {name.format(size) for name in each for size in (3, 5)}
    assert set(cases) == wanted | {"append, many over few", "commit of all keys, T = 5"}
    for case in cases.values():
        assert math.isfinite(case["value"])
        assert case["value"] > 0
        assert case["passed"] == (case["value"] <= float(case["limit"].removeprefix("<= ")))
    assert result["passed"] == all(case["passed"] for case in cases.values())
    json.dumps(result)


def test_room_is_counted_of_what_is_left(result: dict[str, object]) -> None:
    rooms = [case for case in result["cases"] if case["name"].startswith("room")]
    # A store never holds less than what it was given, nor twice that after gc.
    assert all(1.0 < case["value"] < 2.0 for case in rooms)
    assert all(case["versions_expired"] > 0 for case in rooms)


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(store.tempfile, "tempdir", None)
    before = os.environ.get("MEMTOOL_CACHE")
    with pytest.raises(SystemExit, match="GB are needed"):
        store.run(1, sizes=(10**9,))
    assert list(tmp_path.iterdir()) == []
    assert os.environ.get("MEMTOOL_CACHE") == before


@pytest.mark.parametrize("arguments", [["mixing", "--sizes", "3"], ["store", "--sizes", "0"]])
def test_wrong_sizes_are_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "--sizes" in capsys.readouterr().err
