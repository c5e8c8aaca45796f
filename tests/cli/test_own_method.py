"""The page on methods of one's own is true: its files and its commands, on images and on texts."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping

import pytest

import memtool
from memtool import registry
from tests.cli.conftest import inside
from tests.contract.kinds import SMALL
from tests.methods.facts import settings_of, write_facts
from tests.shown import METHOD, PAGE, write_shown

COMMANDS = re.search(r"<!-- own -->\n```bash\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
Own = Callable[..., str]


def _variables(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings as variables of a process."""
    names = {key: "MEMTOOL_" + key.replace(".", "__").upper() for key in settings}
    return {names[key]: str(value) for key, value in settings.items()}


@pytest.fixture
def own(here, environ, monkeypatch) -> Own:
    """Run a line of the page in a folder with its files; what it prints."""
    write_shown(here)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(line: str, **variables: str) -> str:
        name, *arguments = shlex.split(line, comments=True)
        assert name == "memtool", line
        done = inside(here, environ | variables, *arguments)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(params=["images", "texts"])
def reads(request) -> str:
    return request.param


@pytest.fixture
def small(reads, here) -> dict[str, str]:
    """Small settings of images or of texts, as variables."""
    if reads == "texts":
        return _variables(settings_of(write_facts(here), here))
    shared = {key: value for key, value in SMALL.items() if not key.startswith("modulation")}
    return _variables(shared | {"stream.order": "upright,rot90"})


def test_the_page_runs(own, reads, small, here):
    assert COMMANDS is not None
    assert len((here / METHOD.partition(":")[0]).read_text().splitlines()) <= 80
    said, variables = [], dict(small)
    for line in COMMANDS[1].splitlines():
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            variables[name] = value
            continue
        texts = reads == "texts" and line.startswith(("memtool run", "memtool config"))
        line = line.partition("#")[0] + (" --preset moram-trace" if texts else "")
        before = {path: path.stat().st_mtime_ns for path in here.glob("runs/adapters/*/*")}
        said.append(own(line, **variables))
        if before and "run" in line:
            after = {path: path.stat().st_mtime_ns for path in here.glob("runs/adapters/*/*")}
            assert after == before
    settings, first, again, recalled, explained, compared, history, log, forgotten, left = said
    assert re.search(r"nearest_mean.sharpness\s+20.0", settings)
    assert "nearest-mean" in (here / "report.html").read_text()
    assert ": adapt" in first
    assert ": adapt" not in again
    assert recalled.index("task-2-seed-0") > 0
    assert "task-2-seed-0" in explained
    assert "nearest-mean" in (here / "explained.html").read_text()
    for row in ("hard choice", "uniform mixture", "oracle adapter"):
        assert row in compared
    assert "nearest-mean" in history
    assert "consolidate tasks 1" in log
    assert "task-1-seed-0" in forgotten
    assert "nearest-mean" in left

    memory = memtool.load(here / "memory", overrides={"method": str(here / METHOD)})
    assert memory.reads == reads
    left_over = [f"task-{number}-seed-0" for number in ((2, 3) if reads == "texts" else (2,))]
    assert [record.name for record in memory.adapters] == left_over
    assert not memory.attach().training


def test_a_memory_remembers_the_settings_of_its_method(own, small, reads, here):
    method = {**small, "MEMTOOL_METHOD": METHOD}
    preset = " --preset moram-trace" if reads == "texts" else ""
    for verb in ("train-adapter --task 1", "write", "consolidate"):
        own(f"memtool {verb} --set nearest_mean.sharpness=7 {preset}", **method)
    shown = json.loads(own("memtool show --json"))
    assert "nearest_mean" in json.dumps(shown)
    memory = memtool.load(here / "memory", overrides={"method": str(here / METHOD)})
    assert memory.config.nearest_mean.sharpness == 7


def test_a_baseline_a_separation_and_a_backbone_of_the_page(own, here):
    small = _variables(SMALL | {"stream.order": "upright,rot90"})
    small = {name: value for name, value in small.items() if "MODULATION" not in name}
    said = own(
        "memtool run --baselines mine.py:Held --sep mine.py:sharper "
        "--set backbone.name=mine.py:faint --json",
        **small,
    )
    assert "sequential LoRA, held back" in said
    assert "no baseline" not in said
    assert registry.is_installed("separations", "mine.py:sharper")
    record = json.loads((here / "runs/seed-0/record.json").read_text())
    assert record["run"]["separation"] == "mine.py:sharper"
    assert record["run"]["backbone"]["name"] == "mine.py:faint"
