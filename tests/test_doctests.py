"""The examples in the docstrings of the library do what they show, beside a small memory."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import memtool
from memtool.config import resolve
from memtool.evaluation.record import write_record
from memtool.methods import open_method
from memtool_stores import MemoryStore

ROOT = Path(__file__).parents[1]
PACKAGES = {"memtool": ROOT, "memtool_stores": ROOT / "stores"}
MODULES = sorted(
    ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for name, root in PACKAGES.items()
    for file in (root / name).rglob("*.py")
    if any(
        ">>>" in line and "+SKIP" not in line
        for line in file.read_text(encoding="utf-8").splitlines()
    )
)
WITH_EXAMPLES = {"load", "resolve", "runs", "create_backbone", "create_stream", "Memory"}
"""Public names whose docstrings, or those of what is inside, show how they are used."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`memory`, of two tasks, tagged `good`, and `runs/seed-0/record.json`."""
    place = tmp_path_factory.mktemp("examples")
    overrides = {
        "store": str(place / "memory"),
        "runs": str(place / "runs"),
        "stream.train_per_task": 40,
        "stream.test_per_task": 30,
        "train.epochs": 1,
        "adapter.rank": 4,
        "adapter.alpha": 4,
        "engine.device": "cpu",
        "engine.precision": "fp32",
    }
    config = resolve(preset="digits-dil", overrides=overrides, ambient=False).config
    method = open_method(config, seed=0)
    for task in "12":
        method.adapt(task)
        method.write()
        method.consolidate()
    MemoryStore.open(place / "memory").tag("good")
    (place / "runs" / "seed-0").mkdir(parents=True, exist_ok=True)
    write_record(method.evaluate(), place / "runs" / "seed-0" / "record.json")
    return place


@pytest.mark.parametrize("name", MODULES)
def test_examples_do_what_they_show(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    module = import_module(name)
    # Of the module itself: what it brings in from others has its examples there.
    failed, tried = doctest.testmod(module, optionflags=flags)
    assert not failed, capsys.readouterr().out
    assert tried


def test_what_is_used_first_has_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in WITH_EXAMPLES:
        found = finder.find(getattr(memtool, name), name)
        assert any(one.examples for one in found), name
