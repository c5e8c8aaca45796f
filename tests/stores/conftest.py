"""A small store in a fresh folder, with a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtool_stores import MemoryStore, Space
from memtool_stores.testing import fill, small_space


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def space() -> Space:
    return small_space()


@pytest.fixture
def store(tmp_path: Path, space: Space) -> MemoryStore:
    return MemoryStore.create(tmp_path / "memory", space)


@pytest.fixture
def grown(store: MemoryStore, space: Space) -> MemoryStore:
    """Three adapters, one a commit: t0, t1, t2."""
    for task in range(3):
        with store.transaction(f"write task {task}", {"seed": task}) as txn:
            fill(txn, space, f"t{task}", task)
    return store
