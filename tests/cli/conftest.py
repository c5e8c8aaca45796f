"""The command line in an empty folder, as a real process or in this one, and a real memory."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from memtool_cli.main import main
from memtool_stores import Backbone, Layout, MemoryStore, Segment, Space

ROOT = Path(__file__).parents[2]
PROBE = """
import os, shlex, sys
from memtool_cli.main import main
for line in sys.argv[1:]:
    code = main(shlex.split(line))
    loaded = [name for name in ("torch", "timm", "datasets", "sklearn") if name in sys.modules]
    if code or loaded:
        print(f"{line}: {code}: {loaded}", file=sys.stderr, flush=True)
        os._exit(1)
os._exit(0)
"""
"""It ends as `run` does: threads of icechunk may abort an interpreter that is torn down."""
Memtool = Callable[..., "subprocess.CompletedProcess[str]"]


def inside(
    folder: Path, environment: Mapping[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """What the process `memtool …` in `folder` does, without its start, which imports torch."""
    out, said = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(sys, "argv", ["memtool", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
    ):
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), said.getvalue())


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """No settings from around: no variables, a user folder of the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    packages = os.pathsep.join(str(ROOT / folder) for folder in ("", "cli", "stores"))
    return kept | {
        "PYTHONPATH": packages,
        "XDG_CONFIG_HOME": str(tmp_path / "user"),
        "MEMTOOL_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def start() -> list[str]:
    """What the console script `memtool` does."""
    return [sys.executable, "-c", "from memtool_cli.main import run; run()"]


@pytest.fixture
def memtool(here: Path, environ: dict[str, str]) -> Memtool:
    """Run `memtool …` in the empty folder, in this process: where a start is not the point."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return inside(here, environ | variables, *arguments)

    return run


@pytest.fixture
def process(here: Path, environ: dict[str, str], start: list[str]) -> Memtool:
    """Run `memtool …` in the empty folder, as a process of its own."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*start, *arguments],
            cwd=here,
            env=environ | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def torchless(here: Path, environ: dict[str, str]) -> Callable[..., None]:
    """Command lines in one process of their own: each ends with 0, and none has torch loaded."""

    def run(*lines: str, **variables: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *lines],
            cwd=here,
            env=environ | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def memory(here: Path) -> MemoryStore:
    """Three adapters in three versions, and keys in a fourth, at ./memory."""
    layout = Layout(
        (Segment("a.lora_A", (2, 8), 0), Segment("a.lora_B", (8, 2), 16)), "float32", 2, 4.0, ("q",)
    )
    store = MemoryStore.create(here / "memory", Space(Backbone("nano", "", "ab" * 32), layout))
    generator = np.random.default_rng(0)
    for task in (1, 2, 3):
        with store.transaction(f"write task {task}", {"seed": 0}) as transaction:
            value = generator.standard_normal(32).astype(np.float32)
            transaction.add(f"task-{task}", value, {"task": task, "domain": f"domain {task}"})
    with store.transaction("consolidate") as transaction:
        transaction.set_keys(generator.standard_normal((2, 3, 8)).astype(np.float32))
    return store
