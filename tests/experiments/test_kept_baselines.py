"""Rows of baselines that an earlier run finished: of which code they are found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtool.config import resolve
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row
from memtool.experiments import baselines
from memtool.experiments.baselines import baseline_rows
from memtool.methods import baselines as shipped
from memtool.methods import open_method
from memtool.methods.kept import fingerprint_of
from memtool.methods.method import Method


@pytest.fixture
def method(tmp_path: Path) -> Method:
    overrides = {
        "stream.train_per_task": 20,
        "stream.test_per_task": 10,
        "engine.device": "cpu",
        "engine.precision": "fp32",
        "store": str(tmp_path / "memory"),
        "runs": str(tmp_path / "runs"),
    }
    config = resolve(preset="digits-dil", overrides=overrides, ambient=False).config
    return open_method(config, seed=0)


def test_a_baseline_whose_code_changed_is_measured_again_and_others_are_not(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    tasks = method.workspace.stream.tasks

    def rows(name: str) -> list[Row]:
        def measure(*_: object) -> list[Row]:
            measured.append(name)
            matrix = AccuracyMatrix.empty(["a"]).with_row(1, [0.5])
            return [Row.measured(name, name, "baseline", matrix)]

        monkeypatch.setitem(shipped.BASELINES, name, measure)
        return list(baseline_rows(method, name, tasks))

    for name in ("slca", "lwf", "slca", "lwf"):
        assert [row.id for row in rows(name)] == [name]
    assert measured == ["slca", "lwf"]
    monkeypatch.setitem(shipped.REVISIONS, "slca", 3)
    for name in ("slca", "lwf"):
        rows(name)
    assert measured == ["slca", "lwf", "slca"]


def test_rows_kept_before_there_were_revisions_are_those_of_the_first(method: Method) -> None:
    work = method.workspace

    def before(name: str) -> str:
        decides = [*baselines._decides_of_images(work), None]
        return f"{name}-{fingerprint_of(decides)[:16]}.json"

    mended = {"ease", "mos", "tuna", "dual-prompt", "slca"}
    for name in ("sequential", "ewc", "moe-lora", "treelora", *mended):
        found = baselines.kept_file(work, name).name
        assert (found == before(name)) == (name not in mended)
        assert found.startswith(f"{name}-")


def test_every_revision_is_of_a_baseline() -> None:
    assert {*shipped.BASELINES, *shipped.DG_BASELINES} >= shipped.REVISIONS.keys()
    assert min(shipped.REVISIONS.values()) > 1
