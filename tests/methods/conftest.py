"""A small real memory: nano on three digits domains, few images and epochs, made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtool.config import resolve
from memtool.methods.mira.method import Mira
from memtool.settings import Config
from tests.methods.colours import write_chain

SMALL = {
    "stream.train_per_task": 60,
    "stream.test_per_task": 40,
    "stream.order": ("upright", "inverted", "rot90"),
    "train.epochs": 2,
    "adapter.warm_start": "previous",
    "engine.device": "cpu",
    "engine.precision": "fp32",
}


def small_config(folder: Path, **overrides: object) -> Config:
    """The default configuration, cut down, with everything under `folder`."""
    values = {**SMALL, "store": str(folder / "memory"), "runs": str(folder / "runs")}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(preset="digits-dil", overrides=values, environ={}, cwd=folder).config


def learn(mira: Mira, tasks: int = 3, *, each: bool = True) -> Mira:
    """Adapt, write and consolidate the first tasks, one by one or all at once."""
    for task in range(1, tasks + 1):
        adapters = [one.path for one in mira.adapt(str(task))]
        if each:
            mira.write(adapters)
            mira.consolidate()
    if not each:
        mira.write()
        mira.consolidate()
    return mira


@pytest.fixture(scope="session")
def _learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    learn(Mira.open(small_config(folder), seed=0))
    return folder


NOT_SCORED = shutil.ignore_patterns("scores")
"""What a test that only reads has scored is not copied: whether one ran before is chance."""


@pytest.fixture
def adapted(_learned: Path, tmp_path: Path) -> Path:
    """A folder with the adapters of the three tasks and no memory: to adapt finds them there."""
    shutil.copytree(_learned / "runs", tmp_path / "runs", ignore=NOT_SCORED)
    return tmp_path


@pytest.fixture
def learned(_learned: Path) -> Mira:
    """Three tasks in memory; for reading only."""
    return Mira.open(small_config(_learned), seed=0)


@pytest.fixture
def learned_copy(_learned: Path, tmp_path: Path) -> Mira:
    """Three tasks in memory; a copy that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(_learned, folder, ignore=NOT_SCORED)
    return Mira.open(small_config(folder), seed=0)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a chain of two data sets of colours."""
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
