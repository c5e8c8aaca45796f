"""MIRA as a user types it: every choice of `run`, its ablations, seeds, and going on after a kill.

The tiny cut is one step of training a task: what is tested is that a choice reaches the memory, not
how good it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from memtool_stores import MemoryStore
from tests.cli.conftest import inside

TINY = {
    "MEMTOOL_STREAM__ORDER": "upright,inverted",
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "40",
    "MEMTOOL_STREAM__TEST_PER_TASK": "20",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "MEMTOOL_BASELINES": "frozen",
    "MEMTOOL_ENGINE__DEVICE": "cpu",
}
DG = {
    "MEMTOOL_STREAM__SETTING": "dg",
    "MEMTOOL_STREAM__ORDER": "rot0,rot60,rot120",
    "MEMTOOL_STREAM__VALIDATION": "0.25",
    "MEMTOOL_CONSOLIDATE__KEYS": "random",
    "MEMTOOL_CONSOLIDATE__EPOCHS": "1",
    "MEMTOOL_HEAD__SCOPE": "shared",
}
LEARNING = ("--set", "consolidate.keys=random", "--set", "consolidate.epochs=1")
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("no_page")  # but in the run of `place`


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after one run; its adapters serve the runs with other choices."""
    folder = tmp_path_factory.mktemp("mira")
    done = inside(folder, environment(folder), "run", "--preset", "digits-dil", "-q")
    assert done.returncode == 0, done.stderr
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    return kept | TINY | {"XDG_CONFIG_HOME": str(folder / "user"), "OMP_NUM_THREADS": "1"} | more


def record_of(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Every choice of a run


@pytest.mark.parametrize(
    ("options", "key", "word"),
    [
        (("--routing", "prototype"), "memory.routing", "prototype"),
        (("--protect", "dual-gpm", *LEARNING), "consolidate.protect", "dual-gpm"),
        (("--head", "shared", *LEARNING), "head.kind", "shared"),
        (("--query-module", "linear", *LEARNING), "memory.query", "linear"),
        pytest.param(("--routing", "mixture"), "memory.routing", "mixture", marks=slow),
        pytest.param(("--routing", "lda"), "memory.routing", "lda", marks=slow),
        pytest.param(
            ("--protect", "freeze", *LEARNING), "consolidate.protect", "freeze", marks=slow
        ),
        pytest.param(("--protect", "none", *LEARNING), "consolidate.protect", "none", marks=slow),
        *(
            pytest.param(("--head", kind), "head.kind", kind, marks=slow)
            for kind in ("grown", "ncm", "ridge", "lda")
        ),
        pytest.param(("--query-module", "mlp", *LEARNING), "memory.query", "mlp", marks=slow),
        pytest.param(("--sep", "affine", "--mix", "params"), "memory.mix", "params", marks=slow),
    ],
    ids=lambda value: "-".join(value[:2]).strip("-") if isinstance(value, tuple) else "",
)
def test_a_choice_about_the_memory(options, key, word, place):
    store = "memory" + "".join(options[:2])
    done = inside(place, environment(place), "run", "--store", store, *options, "--json")
    record = record_of(done)
    section, name = key.split(".")
    assert record["run"]["configuration"][section][name] == word
    rows = {row["id"]: row for row in record["metrics"]["rows"]}
    assert {"memory", "uniform", "oracle", "frozen-linear"} <= set(rows)
    assert ": adapt" not in done.stderr  # the adapters are those of the first run
    view = MemoryStore.open(place / store).view()
    assert len(view.adapters) == 2
    state = json.loads(view.blob("memory"))
    assert state["consolidate" if section == "consolidate" else section][name] == word


@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        (("--adapters-per-task", "2", "--warm-start", "mean"), 4),
        pytest.param(("--warm-start", "previous"), 2, marks=slow),
        pytest.param(("--warm-start", "none"), 2, marks=slow),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value, tuple) else "",
)
def test_a_choice_about_the_adapters(options, adapters, memtool, here):
    record = record_of(memtool("run", *options, "--json", **TINY))
    assert record["metrics"]["rows"][0]["id"] == "memory"
    records = MemoryStore.open(here / "memory").view().adapters
    assert len(records) == adapters
    folders = (here / "runs" / "seed-0" / "adapters").glob("task-2-*")
    started = [
        json.loads((folder / "memtool.json").read_text())["warm_start"] for folder in folders
    ]
    if options[-1] == "none":
        assert started == ["zero"]
    else:
        assert all(records[0].id in start for start in started)


def test_a_domain_that_is_held_out(memtool, here):
    options = ("--held-out", "rot60", "--baselines", "frozen,erm", "--json")
    record = record_of(memtool("run", *options, **{**TINY, **DG}))
    assert record["run"]["setting"] == "dg"
    assert [task["name"] for task in record["run"]["tasks"]] == ["rot60"]
    rows = {row["id"]: row for row in record["metrics"]["rows"]}
    assert {"memory", "uniform", "frozen-lda", "erm-linear"} <= set(rows)
    assert rows["memory"]["metrics"]["dg.validation"] >= 0
    names = [one.meta["task_name"] for one in MemoryStore.open(here / "memory").view().adapters]
    assert names == ["rot0", "rot120"]


@slow
def test_every_domain_is_held_out_in_turn(memtool, here):
    record = record_of(memtool("run", "--json", **{**TINY, **DG}))
    assert [task["name"] for task in record["run"]["tasks"]] == ["rot0", "rot60", "rot120"]
    memory = record["metrics"]["rows"][0]
    assert memory["metrics"]["dg.heldout"] == pytest.approx(sum(memory["accuracy"][-1]) / 3)
    assert len(list(here.glob("memory-without-*"))) == 3


@slow
def test_a_preset_on_a_source_of_its_own(memtool, environ):
    data = os.environ.get("MEMTOOL_DATA")
    if not data:
        pytest.skip("needs real data: set MEMTOOL_DATA to the folder that holds it")
    few = {key: TINY[key] for key in TINY if "ORDER" not in key}
    # Its λ by held-out samples needs five of a class.
    settings = ("--set", "stream.source=idigits", "--set", "head.penalty=trace")
    arguments = ("run", "--preset", "mira-dil", *settings, "--json")
    record = record_of(memtool(*arguments, MEMTOOL_DATA=data, **few))
    assert [task["name"] for task in record["run"]["tasks"]] == [
        "mnist",
        "mnist_m",
        "usps",
        "optdigits",
    ]


# Words that are wrong


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--routing", "mixtur"), 2, "did you mean 'mixture'"),
        (("--protect", "dualgpm"), 2, "did you mean 'dual-gpm'"),
        (("--head", "rigde"), 2, "did you mean 'ridge'"),
        (("--warm-start", "previos"), 2, "did you mean 'previous'"),
        (("--query-module", "liner"), 2, "did you mean 'linear'"),
        (("--baselines", "frozen,sequental"), 2, "did you mean 'sequential'"),
        (("--adapters-per-task", "0"), 2, "adapter.per_task"),
        (("--held-out", "upright"), 2, "stream.setting dg"),
        (
            ("--set", "stream.setting=dg", "--held-out", "rot6", "--set", "stream.order=none"),
            2,
            "rot60",
        ),
        (("--preset", "mira-dli"), 3, "did you mean 'mira-dil'"),
        (("--set", "stream.source=idigit"), 3, "did you mean 'idigits'"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_wrong_words_are_answered_with_the_right_ones(arguments, code, said, memtool, here):
    done = memtool("run", *arguments, **TINY)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert not list(here.iterdir())


def test_an_unknown_ablation(memtool):
    done = memtool("ablate", "separations", **TINY)
    assert done.returncode == 2
    assert "did you mean 'separation'" in done.stderr


def test_an_ablation_says_what_it_would_run(memtool, here):
    done = memtool("ablate", "read", "--dry-run", "--json", "--seed", "0,1", **TINY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "memtool.ablation-plan"
    assert found["variants"] == ["mixture", "mixture-linear", "energy-linear", "decoder-linear"]
    assert found["besides"]["consolidate.epochs"] == [0, 4]
    assert found["seeds"] == [0, 1]
    assert found["trainings"] == 4  # two tasks, whose adapters serve all variants
    assert found["steps"] > 0
    table = memtool("ablate", "adapters", "--dry-run", **TINY)
    assert "variants\t1, 5, 10\n" in table.stdout
    assert not list(here.iterdir())


# Seeds, kills and failures


def test_two_seeds_have_a_spread_and_intervals(memtool, here):
    done = memtool("run", "--seed", "0", "--seed", "1", "--report", "page.html", **TINY)
    assert done.returncode == 0, done.stderr
    methods, tasks, differences = done.stdout.split("\n\n")
    header, memory, *_ = (line.split("\t") for line in methods.splitlines())
    assert header[1:3] == ["upright %", "inverted %"]
    assert all(" ± " in cell for cell in memory[1:4])
    header, *rows = (line.split("\t") for line in tasks.splitlines())
    assert [row[0] for row in rows] == ["upright", "inverted", "final average"]
    assert all(" to " in cell for row in rows for cell in row[1:])
    assert differences.startswith("\tdifference, points\t95 %: from\tto\t")
    page = (here / "page.html").read_text()
    assert "2 seeds" in page
    assert "95 % t-interval" in page
    assert {path.name for path in here.glob("memory*")} == {"memory-seed-0", "memory-seed-1"}
    records = [str(path) for path in sorted(here.glob("runs/seed-*/record.json"))]
    assert len(records) == 2
    assert memtool("report", *records, "--out", "again.html").returncode == 0
    assert memtool("report", "runs", "--out", "folder.html").returncode == 0
    assert "2 seeds" in (here / "folder.html").read_text()
    none = memtool("report", "runs/seed-0/adapters")
    assert none.returncode == 3
    assert "no record.json in the folder runs/seed-0/adapters" in none.stderr


def test_a_run_that_was_killed_goes_on_where_it_was(here, environ, start, memtool):
    arguments = ("run", "--json")
    with subprocess.Popen(
        [*start, *arguments],
        cwd=here,
        env=environ | TINY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("task 2/2"):
                break
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    before = [version.id for version in MemoryStore.open(here / "memory").log()]
    trained = here / "runs" / "seed-0" / "adapters" / "task-1-seed-0" / "adapter_model.safetensors"
    time = trained.stat().st_mtime_ns
    record = record_of(memtool(*arguments, **TINY))
    assert record["metrics"]["rows"][0]["accuracy"][-1].count(None) == 0
    after = [version.id for version in MemoryStore.open(here / "memory").log()]
    assert after[-len(before) :] == before
    assert len(after) == 5  # create, and write and consolidate of both tasks
    assert trained.stat().st_mtime_ns == time


def test_divergence_is_a_no_and_the_memory_still_answers(place):
    head = MemoryStore.open(place / "memory").head()
    options = ("--set", "train.lr=1e6", "--set", "train.epochs=2", "--set", "runs=elsewhere")
    done = inside(place, environment(place), "run", *options)
    assert done.returncode == 1, done.stderr
    assert "error: task 1/2 upright: adapt: " in done.stderr
    assert " at step " in done.stderr
    assert "a smaller learning rate than 1e+06" in done.stderr
    assert done.stdout == ""
    assert MemoryStore.open(place / "memory").head() == head
    done = inside(place, environment(place), "eval", "-q")
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) <= 1


def test_more_adapters_than_memory_is_a_conflict(memtool, here):
    done = memtool("run", "--adapters-per-task", "30000", **TINY)
    assert done.returncode == 4, done.stderr
    assert "training 30000 adapters in one pass takes about" in done.stderr
    assert "--adapters-per-task" in done.stderr
    assert not (here / "memory").exists()


# Ablations


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("memory", {"memory", "routed", "uniform", "oracle"}),
        pytest.param(
            "separation",
            {
                f"separation-{one}"
                for one in ("affine", "identity", "softmax", "relu", "tanh", "topk")
            },
            marks=slow,
        ),
        pytest.param("query", {"query-identity", "query-linear", "query-mlp"}, marks=slow),
        pytest.param("adapters", {"adapters-1", "adapters-5", "adapters-10"}, marks=slow),
        pytest.param(
            "keys",
            {
                "keys-learned",
                "keys-random",
                "keys-mean-query",
                "keys-closed-form",
                "keys-closed-form-learned",
                "keys-closed-form-of-classes",
            },
            marks=slow,
        ),
        pytest.param("protect", {"protect-dual-gpm", "protect-freeze", "protect-none"}, marks=slow),
    ],
)
def test_an_ablation_is_one_command(what, rows, place):
    done = inside(place, environment(place), "ablate", what, "--json")
    found = {row["id"] for row in record_of(done)["metrics"]["rows"]}
    assert rows <= found
    assert what == "memory" or found == rows
    if what != "adapters":
        assert ": adapt: " not in done.stderr  # the adapters of the first run serve all variants
