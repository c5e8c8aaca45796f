"""Studies, each once and small on the embedded digits; and what must hold of each always."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memtool import sealed
from memtool.config import resolve
from memtool.errors import (
    AlreadyExistsError,
    CapacityError,
    ConfigError,
    CorruptError,
    DataError,
)
from memtool.evaluation.record import RECORD, read_record
from memtool.evaluation.study import StudyRecord, read_study, write_study
from memtool.experiments import run as experiment
from memtool.experiments.studies import cost
from memtool.experiments.studies.known import study_of
from memtool.experiments.studies.study import OpenStudy, studied
from memtool.methods import open_method
from memtool.progress import ProgressEvent
from memtool.reports.study import study_figures, study_grid, write_study_page
from memtool.settings import Config
from tests.conftest import no_pages

SMALL = {
    "stream.order": "upright,inverted,rot90",
    "stream.train_per_task": 40,
    "stream.test_per_task": 20,
    "train.epochs": 1,
}


def config(**more: Any) -> Config:
    return studied(resolve(overrides={**SMALL, **more}, ambient=False).config)


def begin(name: str, folder: Path, points: Sequence[str] = (), **more: Any) -> OpenStudy:
    return OpenStudy.begin(study_of(name), folder, config(**more), points)


class Killed(Exception):
    """What ends a study in the middle of a training."""


@pytest.fixture(scope="module", autouse=True)
def _no_page() -> Iterator[None]:
    with no_pages():
        yield


@pytest.fixture(scope="module")
def capacity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyRecord]:
    """A study that was killed in its first run, when one task was learned, and then went on."""
    folder = tmp_path_factory.mktemp("capacity")

    def kill(event: ProgressEvent) -> None:
        if "task 2/3" in event.stage:
            raise Killed

    with pytest.raises(Killed):
        begin("capacity", folder, ["1", "3"]).work(progress=kill)
    assert len(begin("capacity", folder, ["1", "3"]).sweep.open_jobs()) == 2
    stages: list[str] = []
    found = begin("capacity", folder, ["1", "3"]).work(progress=lambda e: stages.append(e.stage))
    assert not any(stage.startswith("run 1/2") and "task 1/3" in stage for stage in stages)
    return folder, found


@pytest.fixture(scope="module")
def similarity(
    capacity: object, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StudyRecord]:
    folder = tmp_path_factory.mktemp("similarity")
    points, order = ["0", "duplicate", "revisited"], {"stream.order": "upright,inverted"}
    return folder, begin("similarity", folder, points, **order).work()


@pytest.fixture(scope="module")
def interference(
    capacity: object, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StudyRecord]:
    folder = tmp_path_factory.mktemp("interference")
    return folder, begin("interference", folder, ["configured", "random"]).work()


def test_one_adapter_a_task_is_the_plain_run_bit_for_bit_though_it_was_killed(
    capacity: tuple[Path, StudyRecord], tmp_path: Path
) -> None:
    folder, found = capacity
    plain = config(runs=str(tmp_path / "runs"), store=str(tmp_path / "memory"))
    (record,) = experiment.run(plain)
    row, point = record.row("memory"), found.points[0]
    studied_row = read_record(folder / found.runs[0] / RECORD).row("memory")
    assert studied_row.accuracy == row.accuracy
    assert studied_row.right == row.right
    assert studied_row.metrics == row.metrics
    assert point.values["accuracy"][0] == row.metrics["faa"]
    assert point.values["right_choice"][0] == row.metrics["task_accuracy"]
    assert point.values["bytes"][0] == row.bytes


def test_adapters_cost_what_they_hold(capacity: tuple[Path, StudyRecord]) -> None:
    _, found = capacity
    one, three = found.points
    numel = open_method(config(), seed=0).workspace.layout.numel
    assert [point.x for point in found.points] == [1.0, 3.0]
    more = three.values["bytes"][0] - one.values["bytes"][0]
    assert more >= 2 * 3 * 4 * numel  # two adapters more of three tasks, and their keys
    assert set(one.values["accuracy"]) == {0}


def test_of_a_duplicate_the_choice_is_chance_and_nothing_is_lost(
    similarity: tuple[Path, StudyRecord],
) -> None:
    _, found = similarity
    apart, duplicate, revisited = found.points
    for seed in found.seeds:
        # Each of these images stands in both tasks: it is right in one of them, if in any.
        assert duplicate.values["pair_choice"][seed] == duplicate.values["pair_either"][seed] / 2
        assert duplicate.values["pair_either"][seed] >= 0.9
        assert duplicate.values["oldest"][seed] == duplicate.values["last"][seed]
        assert duplicate.values["oldest"][seed] >= apart.values["oldest"][seed] - 0.1
        assert duplicate.values["pair_choice"][seed] < apart.values["pair_choice"][seed]
        assert revisited.values["pair_choice"][seed] < apart.values["pair_choice"][seed]
    assert [point.x for point in found.points] == [0.0, None, None]


def test_drift_at_the_end_is_that_of_the_record(interference: tuple[Path, StudyRecord]) -> None:
    folder, found = interference
    for place, group in enumerate(("configured", "random")):
        row = read_record(folder / found.runs[place] / RECORD).row("memory")
        points = [point for point in found.points if point.group == group]
        assert [point.label for point in points] == ["1 upright", "2 inverted", "3 rot90"]
        last = points[-1]
        for id in ("coefficient_drift", "new_coefficients"):
            assert last.values[id][0] == row.metrics[id]
            assert last.values[id][0] == np.mean(last.by_task[id][0])
        assert last.by_task["accuracy"][0] == row.accuracy[-1]
        assert "coefficient_drift" not in points[0].values
        assert points[0].values["accuracy"][0] == row.accuracy[1][0]
    frozen = [point for point in found.points if point.group == "random"][-1]
    # Keys that never learn do not turn.
    assert frozen.by_task["key_degrees"][0] == pytest.approx((0.0, 0.0), abs=1e-4)


def test_a_finished_study_only_reads(capacity: tuple[Path, StudyRecord], tmp_path: Path) -> None:
    found = capacity[1]
    folder = tmp_path / "copy"
    shutil.copytree(capacity[0], folder)  # its record tells how long this process took
    opened = begin("capacity", folder, ["3", "1"])  # in another order
    again = opened.work(progress=lambda event: pytest.fail(event.stage))
    assert again.points == found.points
    with pytest.raises(AlreadyExistsError, match="study capacity: the sweep in") as refused:
        begin("capacity", folder, ["1", "2"])
    assert "memtool sweep" not in (refused.value.remedy or "")


def test_a_point_that_fails_is_told_and_the_others_stand(
    capacity: tuple[Path, StudyRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(capacity[0], tmp_path / "copy")
    opened = begin("capacity", tmp_path / "copy", ["1", "3"])
    opened.sweep.queue.open_again(opened.sweep.jobs[1].name, lambda _: True)

    def fails(*_: Any, **__: Any) -> None:
        raise DataError("a picture that is none", remedy="another one")

    monkeypatch.setattr(experiment, "run", fails)
    found = opened.work()
    assert found.points[0] == capacity[1].points[0]
    assert found.points[1].failed == {0: "a picture that is none; try: another one"}
    assert found.points[1].values == {}
    assert found.failed == 1
    assert study_grid(found).notes == ("3, seed 0: a picture that is none; try: another one",)


def test_the_record_comes_back_and_is_drawn(
    capacity: tuple[Path, StudyRecord],
    similarity: tuple[Path, StudyRecord],
    interference: tuple[Path, StudyRecord],
    tmp_path: Path,
) -> None:
    for folder, found in (capacity, similarity, interference):
        assert read_study(folder / "study.json") == found
        grid = study_grid(found)
        assert len(grid.rows) == len(found.points)
        assert all(len(row) == len(grid.header) for row in grid.rows)
        figures = study_figures(found)
        assert [one.name for one in figures] == [
            f"{found.study}-{one.id.replace('_', '-')}" for one in found.measured
        ]
        page = write_study_page(found, tmp_path / f"{found.study}.html")
        text = page.read_text()
        assert found.question in text
        assert all(f'id="figure-{one.name}"' in text for one in figures)
        assert write_study_page(found, tmp_path / "twice.html").read_bytes() == page.read_bytes()


def test_bars_are_t_intervals_over_the_seeds(capacity: tuple[Path, StudyRecord]) -> None:
    point = (
        capacity[1].points[0].model_copy(update={"values": {"accuracy": {0: 0.5, 1: 0.6, 2: 0.7}}})
    )
    three = capacity[1].model_copy(update={"points": (point,), "seeds": (0, 1, 2)})
    (figure,) = study_figures(three)
    (bar,) = figure.spec["data"]["values"]
    half = 4.30265 * 10 / 3**0.5  # Student's t of two degrees of freedom, standard deviation 10
    assert (bar["mean"], bar["low"], bar["high"]) == pytest.approx((60, 60 - half, 60 + half))
    assert study_grid(three).rows == (("1", "60.0 ± 10.0"),)
    assert figure.png().startswith(b"\x89PNG")


def test_a_record_that_is_none_is_named(capacity: tuple[Path, StudyRecord], tmp_path: Path) -> None:
    found = capacity[1]
    document = found.model_dump(mode="json", by_alias=True)
    sealed.write_json(tmp_path / "newer.json", {**document, "schema_version": 2})
    with pytest.raises(DataError, match="version 2"):
        read_study(tmp_path / "newer.json")
    document["points"][0]["values"]["colour"] = {"0": 1.0}
    sealed.write_json(tmp_path / "odd.json", document)
    with pytest.raises(CorruptError, match="colour"):
        read_study(tmp_path / "odd.json")
    write_study(found, tmp_path / "study.json")
    text = (tmp_path / "study.json").read_text().replace("capacity", "capacitance")
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(CorruptError):
        read_study(tmp_path / "study.json")


@pytest.mark.slow
def test_the_disk_that_is_asked_for_is_no_less_than_what_is_taken(
    capacity: tuple[Path, StudyRecord], tmp_path: Path
) -> None:
    folder, _ = capacity
    opened = begin("capacity", tmp_path, ["1", "3"])
    asked = cost.cost_of(opened)
    cells = sum(f.stat().st_size for f in (folder / "cells").rglob("*") if f.is_file())
    assert cells <= asked.bytes <= 5 * cells
    assert asked.steps == 2 * 3  # of 40 images, in batches of 50: points, tasks
    assert asked.points[1].seconds > asked.points[0].seconds > 0
    done = begin("capacity", folder, ["1", "3"])
    assert cost.cost_of(done).seconds == cost.cost_of(done).bytes == 0


def test_many_adapters_are_timed_with_few_and_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, int]] = []

    def takes(what: str, seconds: float) -> Callable[[Any, Any, int], float]:
        def timer(clock: Any, work: Any, adapters: int) -> float:
            timed.append((what, adapters))
            return seconds * (1 + adapters / 10)

        return timer

    monkeypatch.setattr(cost._Clock, "_a_step", takes("step", 8.0))
    monkeypatch.setattr(cost._Clock, "_a_pass", takes("pass", 2.0))
    opened = begin("capacity", tmp_path, ["1", "2", "50"])
    seconds = [point.seconds for point in cost.cost_of(opened).points]
    assert sorted(timed) == [("pass", 0), ("pass", 1), ("pass", 16), ("step", 1), ("step", 2)]
    config = opened.sweep.config_of(opened.sweep.jobs[-1])
    work, clock = open_method(config, seed=0).workspace, cost._Clock()
    assert work.config.adapter.per_task == 50
    assert clock.a_step(work) == pytest.approx(8 * 6)
    assert clock.a_pass(work, 275) == pytest.approx(2 * 28.5)
    assert clock.a_pass(work, 0) == pytest.approx(2)
    assert seconds == sorted(seconds)


def test_a_study_larger_than_the_disk_is_refused_with_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_234_567))
    opened = begin("capacity", tmp_path, ["1", "50"])
    with pytest.raises(CapacityError, match=r"study capacity takes about [\d,]+ bytes") as caught:
        cost.require_room(opened)
    assert "1,234,567 bytes" in (caught.value.expected or "")
    with pytest.raises(CapacityError):
        cost.cost_of(opened)


@pytest.mark.parametrize(
    ("name", "points", "more", "named"),
    [
        ("capacity", ["0"], {}, "'0' adapters"),
        ("capacity", ["2", "2"], {}, "2 is 2 once more"),
        ("capacity", [], {"method": "moram"}, "method moram"),
        ("interference", [], {"method": "modulation"}, "method modulation"),
        ("similarity", ["1.5"], {}, "'1.5'"),
        ("similarity", ["1", "duplicate"], {}, "duplicate is 1 once more"),
        ("similarity", [], {"stream.setting": "til"}, "stream.setting til"),
        ("interference", ["frozzen"], {}, "'frozzen'"),
        ("interference", [], {"orders": "bounds"}, "orders bounds"),
    ],
)
def test_what_cannot_be_studied_is_named(
    name: str, points: list[str], more: dict[str, str], named: str, tmp_path: Path
) -> None:
    small = resolve(overrides={"stream.train_per_task": 40, **more}, ambient=False).config
    with pytest.raises(ConfigError, match=named):
        OpenStudy.begin(study_of(name), tmp_path, studied(small), points)
    assert not list(tmp_path.iterdir())


def test_sizes_are_for_who_says_none() -> None:
    plain = resolve(ambient=False).config
    assert studied(plain).stream.train_per_task == 200
    assert studied(plain, frozenset({"stream.train_per_task"})).stream.train_per_task is None
    assert config().stream.train_per_task == 40
    assert studied(plain).baselines == ("none",)
