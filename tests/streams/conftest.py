"""A cache of its own for the tests, image folders made with Pillow, and the real data if any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtool.streams.table import Table

Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMTOOL_CACHE", str(session_cache))
    return session_cache


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    folder = tmp_path / "own cache"
    monkeypatch.setenv("MEMTOOL_CACHE", str(folder))
    return folder


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("MEMTOOL_DATA")
    if not folder:
        pytest.skip("needs real data: set MEMTOOL_DATA to the folder that holds it")
    return Path(folder)


@pytest.fixture
def image_folder(tmp_path: Path) -> Folder:
    """Makes a folder of noise images: `image_folder(["photo/dog", "photo/cat"], each=5)`."""

    def make(leaves: Iterable[str], each: int = 5, name: str = "pictures") -> Path:
        generator = np.random.default_rng(0)
        for leaf in leaves:
            folder = tmp_path / name / leaf
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(each):
                pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02}.png")
        return tmp_path / name

    return make


@pytest.fixture
def table() -> Table:
    """Two domains of three classes, ten rows of each; every image holds its row number."""
    domains, labels, _ = (axis.ravel() for axis in np.mgrid[0:2, 0:3, 0:10])
    images = np.zeros((60, 8, 8, 3), dtype=np.uint8)
    images[:] = np.arange(60, dtype=np.uint8)[:, None, None, None]
    return Table(
        name="toy",
        images=images,
        labels=labels.astype(np.int64),
        domains=domains.astype(np.int64),
        is_test=np.arange(60) % 5 == 0,
        class_names=("ant", "bee", "cat"),
        domain_names=("photo", "sketch"),
        fingerprint="toy",
    )
