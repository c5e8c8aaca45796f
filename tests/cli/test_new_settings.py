"""The settings vil, mtl and dgcl as a user types them, and the laws that tie them to the others."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtool.evaluation.record import Record
from memtool.experiments import run as experiment
from memtool_stores import MemoryStore
from tests.cli.conftest import inside

TINY = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "20",
    "MEMTOOL_STREAM__TEST_PER_TASK": "20",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "MEMTOOL_BASELINES": "none",
    "MEMTOOL_ENGINE__DEVICE": "cpu",
    "MEMTOOL_ENGINE__PRECISION": "fp32",
}


@pytest.fixture(autouse=True)
def no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no report, whose figures take seconds; one test wants it."""
    if "page" not in request.keywords:
        monkeypatch.setattr(experiment, "write_report", lambda *_, **__: None)


def run(folder: Path, name: str, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`memtool run` of a memory of its own below `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MEMTOOL_")}
    here = {"XDG_CONFIG_HOME": str(folder / "user"), "OMP_NUM_THREADS": "1"}
    here["MEMTOOL_CACHE"] = str(folder / "cache")
    place = ("--store", f"{name}/memory", "--set", f"runs={name}/runs")
    return inside(folder, {**kept, **TINY, **here, **more}, "run", *place, *options)


def record_of(done: subprocess.CompletedProcess[str]) -> Record:
    assert done.returncode == 0, done.stderr
    return Record.from_json(done.stdout)


def sets(**values: str) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"stream.{key}={value}")]


def adapters(store: Path) -> np.ndarray:
    view = MemoryStore.open(store).view()
    return view.values([record.id for record in view.adapters])


def same_numbers(one: Record, other: Record) -> None:
    assert [row.id for row in one.metrics.rows] == [row.id for row in other.metrics.rows]
    for row, beside in zip(one.metrics.rows, other.metrics.rows, strict=True):
        assert (row.accuracy, row.metrics) == (beside.accuracy, beside.metrics)


def of_rows(rows: Sequence, id: str):
    return next(row for row in rows if row.id == id)


@pytest.mark.slow
def test_vil_with_one_domain_is_cil(tmp_path):
    cil = record_of(run(tmp_path, "cil", *sets(setting="cil", splits="2"), "--json"))
    pairs = ",".join(f"{name}@upright" for name in cil.run.task_names)
    options = sets(setting="vil", splits="2", order=pairs)
    vil = record_of(run(tmp_path, "vil", *options, "--json"))
    assert vil.run.setting == "vil"
    assert {task.domain for task in vil.run.tasks} == {"upright"}
    same_numbers(vil, cil)
    assert np.array_equal(adapters(tmp_path / "vil/memory"), adapters(tmp_path / "cil/memory"))


def test_vil_with_one_group_of_classes_is_dil_and_mtl_ends_where_dil_does(tmp_path):
    order = sets(order="rot90,upright")
    dil = record_of(run(tmp_path, "dil", *order, "--json"))
    vil = record_of(run(tmp_path, "vil", *order, *sets(setting="vil", splits="1"), "--json"))
    same_numbers(vil, dil)
    # Adapters that are trained apart, keys and head in closed form: nothing goes by the order.
    options = (*order, *sets(setting="mtl"), "--baselines", "joint")
    mtl = record_of(run(tmp_path, "mtl", *options, "--json"))
    assert np.array_equal(adapters(tmp_path / "mtl/memory"), adapters(tmp_path / "dil/memory"))
    for id in ("memory", "oracle", "uniform"):
        last = dil.row(id).accuracy[-1]
        if id != "uniform":  # whose head is of the adapters that were there
            assert mtl.row(id).accuracy[-1] == last
        assert mtl.row(id).accuracy[:-1] == ((None, None),) * 2
    told = inside(
        tmp_path,
        {**os.environ, **TINY},
        *("eval", "--store", "mtl/memory", "--set", "runs=mtl/runs", *order),
        *(*sets(setting="mtl"), "--setting", "til", "--json"),
    )
    assert record_of(told).row("memory").accuracy[-1] is not None
    joint = mtl.row("joint")
    assert "rank 8 (2 x 4)" in joint.label
    assert joint.kind == "baseline"
    of_adapters = adapters(tmp_path / "mtl/memory").size
    assert joint.parameters >= of_adapters > joint.parameters - of_adapters / 4  # and its head


def test_mtl_says_the_rank_of_joint_training_before_it_runs(tmp_path):
    options = (*sets(setting="mtl"), "--adapters-per-task", "2", "--baselines", "all")
    done = run(tmp_path, "plan", *options, "--dry-run")
    assert "rank 40: 10 times that of an adapter" in done.stdout, done.stderr
    facts = json.loads(run(tmp_path, "plan", *options, "--dry-run", "--json").stdout)["plan"]
    assert facts["joint_rank"] == 40
    assert facts["baselines"] == ["frozen", "joint", "moe-lora"]


@pytest.mark.parametrize(
    ("how", "says", "passes"),
    [("one-pass", "5 tasks, in one pass: 1, 2, 3, 4, 5", [[1, 2, 3, 4, 5]])]
    + [(how, "5 tasks, each in a process", None) for how in ("processes", "auto")],
)
def test_a_dry_run_says_which_tasks_are_trained_at_once(tmp_path, how, says, passes):
    options = ("--parallel-tasks", "5", "--set", f"engine.tasks_at_once={how}", "--dry-run")
    options += ("--warm-start", "none", "--device", "cpu")
    assert says in run(tmp_path, "plan", *options).stdout
    facts = json.loads(run(tmp_path, "plan", *options, "--json").stdout)["plan"]
    assert facts["parallel_tasks"] == 5
    assert facts["passes"] == passes


def test_labels_that_come_again_add_up_in_a_shared_head(tmp_path):
    pairs = "6..5@upright,8..3@upright,6..5@rot90"
    options = (*sets(setting="vil", splits="2", order=pairs), "--set", "head.scope=shared")
    baselines = "frozen,ease"
    record = record_of(run(tmp_path, "vil", *options, "--baselines", baselines, "--json"))
    first, _, again = (set(task.classes) for task in record.run.tasks)
    assert first == again
    assert len(first) == 5
    ids = {row.id for row in record.metrics.rows}
    assert {"memory", "oracle", "frozen-lda", "ease"} <= ids
    memory = record.row("memory")
    assert set(memory.metrics) >= {"faa", "forgetting.max", "task_accuracy"}
    assert memory.accuracy[-1][0] > 0.2  # of ten classes
    refused = run(tmp_path, "vil", *options, "--baselines", "s-prompts")
    assert refused.returncode != 0
    assert "dil or dgcl" in refused.stderr


def write_domains(folder: Path, noise: int) -> None:
    """Three domains of two classes, dark and bright; `noise` is that of domain `c` alone."""
    for place, domain in enumerate(("a", "b", "c")):
        generator = np.random.default_rng(noise if domain == "c" else place)
        for label, level in (("dark", 60), ("light", 180)):
            there = folder / domain / label
            there.mkdir(parents=True)
            for number in range(12):
                if domain == "c" and noise:  # no image, and no label, as they were
                    level = int(generator.integers(0, 200))
                pixels = generator.integers(level, level + 50, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(there / f"{number:02}.png")


@pytest.mark.slow
def test_what_dgcl_trains_does_not_depend_on_the_domain_held_out(tmp_path):
    records, stores = [], []
    for noise in (0, 99):
        write_domains(tmp_path / f"data-{noise}", noise)
        options = (*sets(setting="dgcl", source=f"data-{noise}"), "--held-out", "c")
        done = run(tmp_path, f"run-{noise}", *options, "--baselines", "frozen", "--json")
        records.append(record_of(done))
        stores.append(MemoryStore.open(tmp_path / f"run-{noise}/memory").view())
    first, second = stores
    assert np.array_equal(*(adapters(tmp_path / f"run-{noise}/memory") for noise in (0, 99)))
    assert np.array_equal(first.keys(), second.keys())
    learned = [name for name in first.blobs() if name == "head" or name.startswith("features")]
    assert learned
    assert all(first.blob(name) == second.blob(name) for name in learned)
    for one, other in zip(*(record.metrics.rows for record in records), strict=True):
        assert one.accuracy == other.accuracy
    unseen = [of_rows(record.metrics.rows, "memory").unseen for record in records]
    assert len(unseen[0]) == 3
    assert unseen[0] != unseen[1]
    assert unseen[0][-1] == records[0].row("memory").metrics["dgcl.heldout"]


def test_dgcl_holds_every_domain_out_in_turn_and_goes_on(tmp_path):
    options = sets(setting="dgcl", order="rot0,rot30,rot60")
    done = run(tmp_path, "all", *options, "--json")
    record = record_of(done)
    assert record.run.task_names == ("rot0", "rot30", "rot60")
    assert [task.test_samples for task in record.run.tasks] == [20] * 3
    found = record.row("memory")
    folds = [
        Record.from_json(
            (tmp_path / f"all/runs/seed-0/without-{name}/record.json").read_bytes()
        ).row("memory")
        for name in record.run.task_names
    ]
    for id in ("dgcl.heldout", "dgcl.average", "forgetting.max"):
        mean = sum(fold.metrics[id] for fold in folds) / 3
        assert found.metrics[id] == pytest.approx(mean)
    assert found.metrics["dgcl.seen"] == pytest.approx(sum(f.metrics["faa"] for f in folds) / 3)
    assert found.accuracy[-1] == tuple(fold.unseen[-1] for fold in folds)
    assert len(list((tmp_path / "all/runs/seed-0/adapters").glob("[!.]*"))) == 3
    # Whatever is gone is made again, and nothing else: the same numbers.
    (tmp_path / "all/runs/seed-0/record.json").unlink()
    again = run(tmp_path, "all", *options, "--json")
    same_numbers(record_of(again), record)
    assert ": adapt" not in again.stderr


@pytest.mark.parametrize(
    ("method", "setting", "match"),
    [
        ("moram", "mtl", "atoms learn on top"),
        ("modulation", "vil", "mts, where it is predicted"),
        ("modulation", "mtl", "mts, where it is predicted"),
        ("modulation", "dgcl", "mts, where it is predicted"),
    ],
)
def test_what_a_method_cannot_learn_is_refused_at_once(method, setting, match, tmp_path):
    done = run(tmp_path, "no", "--method", method, *sets(setting=setting), "--dry-run")
    assert done.returncode != 0
    assert match in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("setting", [pytest.param("vil", marks=pytest.mark.slow), "dgcl"])
def test_moram_learns_them_too(setting, tmp_path):
    named = "6..5@upright,6..5@rot90" if setting == "vil" else "rot0,rot30,rot60"
    options = [*sets(setting=setting, splits="2", order=named), "--method", "moram"]
    options += ["--held-out", "rot60"] if setting == "dgcl" else []
    row = record_of(run(tmp_path, "moram", *options, "--json")).row("memory")
    assert None not in row.accuracy[-1]
    assert len(row.unseen) == (3 if setting == "dgcl" else 0)


def test_orders_of_vil_are_orders_of_tasks(tmp_path):
    options = (*sets(setting="vil", splits="5"), "--dry-run", "--json")
    plain = json.loads(run(tmp_path, "o", *options).stdout)["plan"]["tasks"]
    assert len(plain) == 25
    for setting, option in (("mtl", "--vary"), ("mtl", "--orders"), ("dgcl", "--orders")):
        value = "order" if option == "--vary" else "bounds"
        refused = run(tmp_path, "o", *sets(setting=setting), option, value)
        assert refused.returncode != 0
        assert f"setting {setting}" in refused.stderr
