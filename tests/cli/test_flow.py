"""The five verbs in an empty folder, as a script would call them: real training, very short.

The first adapter goes through bash and processes, as does what is about signals; the rest runs the
same command lines in this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtool_stores import MemoryStore
from tests.cli.conftest import inside

ROOT = Path(__file__).parents[2]
SHORT = ("stream.train_per_task=60", "stream.test_per_task=40", "train.epochs=1")

SCRIPT = """
set -euo pipefail
directory=$(memtool train-adapter --task 1 -q)
test -f "$directory/adapter_model.safetensors"
test -f "$directory/adapter_config.json"
memtool write "$directory" -q > ids-1
"""
THEN = {
    "version-1": "consolidate --sep affine -q",
    "adapter-2": "train-adapter --task 2 -q",
    "ids-2": "write -q",
    "version-2": "consolidate --sep affine -q",
    "retrieve.json": "retrieve --task 2 --json",
    "eval.json": "eval --setting dil --json",
    "average": "eval --history -q",
}


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after the bash pipeline over two tasks, with its settings in variables."""
    folder = tmp_path_factory.mktemp("flow")
    (folder / "bin").mkdir()
    start = folder / "bin" / "memtool"
    start.write_text(f"#!{sys.executable}\nfrom memtool_cli.main import run\nrun()\n")
    start.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", SCRIPT],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for file, line in THEN.items():
        done = memtool(folder, *line.split())
        assert done.returncode == 0, done.stderr
        (folder / file).write_text(done.stdout)
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    settings = dict(text.split("=") for text in SHORT)
    return (
        kept
        | {f"MEMTOOL_{key.replace('.', '__').upper()}": value for key, value in settings.items()}
        | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "cli", "stores")),
            "XDG_CONFIG_HOME": str(folder / "user"),
            "MEMTOOL_CACHE": str(folder / "cache"),
            "MEMTOOL_ENGINE__DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
    )


def memtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return inside(folder, environment(folder), *arguments)


def test_a_script_reads_ids_versions_and_numbers(flow):
    ids = [(flow / f"ids-{task}").read_text().split() for task in (1, 2)]
    # Written again, an adapter that is there says its id, too.
    assert ids[1][0] == ids[0][0]
    assert [len(id) for id in ids] == [1, 2]
    versions = memtool(flow, "log", "-q").stdout.split()
    assert versions[0] == (flow / "version-2").read_text().strip()
    assert (flow / "version-1").read_text().strip() in versions
    assert memtool(flow, "ls", "-q").stdout.split() == ids[1]


def test_records_name_their_schema(flow):
    retrieved = json.loads((flow / "retrieve.json").read_text())
    assert retrieved["schema"] == "memtool.retrieve"
    assert retrieved["separation"] == "affine"
    assert [adapter["task"] for adapter in retrieved["adapters"]] == [1, 2]
    evaluated = json.loads((flow / "eval.json").read_text())
    assert evaluated["schema"] == "memtool.evaluation"
    assert evaluated["run"]["setting"] == "dil"
    assert evaluated["run"]["preset"] is None  # as the memory was made
    assert evaluated["run"]["command"].startswith("memtool eval")


def test_the_average_is_one_number_and_a_missed_threshold_is_a_no(flow):
    average = float((flow / "average").read_text())
    assert 0.5 < average <= 1
    assert memtool(flow, "eval", "--at-least", "0.1", "-q").returncode == 0
    done = memtool(flow, "eval", "--at-least", "1.0", "-q")
    assert done.returncode == 1
    assert float(done.stdout) == average


def test_an_old_version_can_be_asked(flow):
    done = memtool(flow, "ls", "--store", f"memory@{(flow / 'version-1').read_text().strip()}")
    assert "task-1" in done.stdout
    assert "task-2" not in done.stdout


def test_what_was_done_is_not_done_again(flow):
    before = memtool(flow, "log", "-q").stdout
    done = memtool(flow, "train-adapter", "--task", "1")
    assert done.returncode == 0, done.stderr
    assert "--fresh" in done.stderr
    assert "next: memtool write" in done.stderr
    assert "nothing new" in memtool(flow, "write").stderr
    assert memtool(flow, "log", "-q").stdout == before


def test_an_unknown_task_names_the_known_ones(flow):
    done = memtool(flow, "train-adapter", "--task", "invertd")
    assert done.returncode == 3
    assert "'inverted'" in done.stderr
    assert memtool(flow, "train-adapter", "--task", "9").returncode == 3


def test_a_missing_and_a_broken_image(flow):
    assert memtool(flow, "retrieve", "--image", "nowhere.png").returncode == 3
    (flow / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    done = memtool(flow, "retrieve", "--image", "broken.png")
    assert done.returncode == 2
    assert "broken.png" in done.stderr


def test_another_rank_does_not_fit_this_memory(flow):
    done = memtool(flow, "retrieve", "--task", "1", "--rank", "7")
    assert done.returncode == 2
    assert "rank" in done.stderr


def test_a_dry_run_writes_nothing(flow):
    done = memtool(flow, "train-adapter", "--task", "3", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["schema"] == "memtool.plan"
    assert plan["plan"]["tasks"] == ["rot90"]
    assert not any("task-3" in path.name for path in (flow / "runs").rglob("*"))


SPEAKS = """
from memtool_cli.main import run
from memtool_cli.output import PlainProgress
PlainProgress.__init__.__defaults__ = (0.0,)
run()
"""
"""memtool with a line for every step, in place of one every few seconds."""


def test_ctrl_c_while_training_is_safe_and_the_same_command_goes_on(flow):
    command = ["memtool", "train-adapter", "--task", "4", "--set", "train.epochs=60", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", SPEAKS, *command[1:]],
        cwd=flow,
        env=environment(flow),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        assert training.stderr is not None
        first = training.stderr.readline()  # a line of progress: training is on
        training.send_signal(signal.SIGINT)
        out, said = training.communicate(timeout=60)
    assert ": adapt: " in first
    assert training.returncode == 130
    assert out == ""
    assert "the same command again" in said
    assert "Traceback" not in said
    done = memtool(flow, *command[1:])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] is True


@pytest.mark.slow
def test_two_processes_work_as_one(tmp_path):
    """Under torchrun both processes train, one writes and speaks."""
    script = tmp_path / "go.py"
    script.write_text("from memtool_cli.main import run\nrun()\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outputs = []
    for verb in (["train-adapter", "--task", "1"], ["write"], ["consolidate"], ["eval"]):
        done = subprocess.run(
            [*launch, str(script), *verb, "-q"],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert [len(words) for words in outputs] == [1, 1, 1, 1]
    assert float(outputs[-1][0]) > 0.3
    store = MemoryStore.open(tmp_path / "memory")
    assert [version.message.split()[0] for version in store.log()] == [
        "consolidate",
        "write",
        "create",
    ]
