"""CPU seconds of whole processes of the verbs, over those of `python -c "import torch"`.

A memory of two small tasks on the embedded model; each round runs every command once, in turn, each
on the same memory. The value of a case is the median of the ratios, round by round; `spread` their
least and greatest.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import environment, progress

LIMITS: dict[str, float | None] = {
    "--help": None,
    "log": 0.22,
    "ls": 0.45,
    "show": 0.45,
    "diff HEAD~1": 0.45,
    "verify": None,
    "config show": None,
    "write -q": 0.45,
    "write theirs --task 1": 0.45,
    "import theirs --task 1": 0.45,
    "import memory.bundle --store copy": 0.45,
    "export --out out": 0.45,
    "export --bundle out.bundle": 0.45,
    "retrieve --image image.png": 1.35,
    "explain --image image.png": None,
    "consolidate": None,
    "eval": None,
}
"""By command: the limit of its ratio, where it has one."""

_SMALL = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "60",
    "MEMTOOL_STREAM__TEST_PER_TASK": "60",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "OMP_NUM_THREADS": "1",
}
_TORCH = [sys.executable, "-c", "import torch"]


def _memtool(command: str) -> list[str]:
    code = "from memtool_cli.main import run; run()"
    return [sys.executable, "-c", code, *command.split()]


def _seconds(words: list[str], folder: Path) -> float:
    """CPU seconds, of user and system, of one process and its children."""
    environ = {**os.environ, **_SMALL}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed: modules are compiled once
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[3:])}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _made(folder: Path) -> None:
    """A consolidated memory of two tasks, an image, and an adapter as somebody else made it."""
    for command in (
        "train-adapter --task 1 -q",
        "write -q",
        "train-adapter --task 2 -q",
        "write -q",
        "consolidate -q",
    ):
        _seconds(_memtool(command), folder)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    shutil.copytree(folder / "runs" / "adapters" / "task-1-seed-0", folder / "theirs")
    for own in ("memtool.json", "head.safetensors"):
        (folder / "theirs" / own).unlink()
    _seconds(_memtool("export --bundle memory.bundle -q"), folder)
    shutil.copytree(folder / "memory", folder / "as made")


def _again(folder: Path) -> None:
    """The folder as it was made: without what a command wrote."""
    for name in ("memory", "copy", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "out.bundle").unlink(missing_ok=True)
    shutil.copytree(folder / "as made", folder / "memory")


def run(repeats: int) -> dict[str, Any]:
    """Every command of `LIMITS`, `repeats` times."""
    ratios: dict[str, list[float]] = {command: [] for command in LIMITS}
    seconds: dict[str, list[float]] = {command: [] for command in (*LIMITS, "import torch")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _made(folder)
        for repeat in range(repeats):
            progress(f"round {repeat + 1} of {repeats}")
            torch_seconds = _seconds(_TORCH, folder)
            if repeat == 0:  # everything is compiled and in the page cache afterwards
                for command in LIMITS:
                    _again(folder)
                    _seconds(_memtool(command), folder)
            seconds["import torch"].append(torch_seconds)
            for command in LIMITS:
                _again(folder)
                found = _seconds(_memtool(command), folder)
                seconds[command].append(found)
                ratios[command].append(found / torch_seconds)
    cases = []
    for command, limit in LIMITS.items():
        value = statistics.median(ratios[command])
        cases.append(
            {
                "name": f"memtool {command}",
                "value": value,
                "spread": [min(ratios[command]), max(ratios[command])],
                "seconds": statistics.median(seconds[command]),
                "limit": limit,
                "passed": limit is None or value <= limit,
            }
        )
    return {
        "environment": environment(),
        "torch_seconds": statistics.median(seconds["import torch"]),
        "cases": cases,
        "passed": all(case["passed"] for case in cases),
    }
