"""A memory of images that is served: made once, and pictures of its tasks."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memtool.config import resolve
from memtool.methods import open_method
from memtool.serving.models import Models

SMALL = {
    "stream.train_per_task": 40,
    "stream.test_per_task": 30,
    "train.epochs": 1,
    "adapter.rank": 4,
    "adapter.alpha": 4,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}


class Memory:
    """A memory of two tasks that grows by a third, which is trained; and pictures of all three."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "memory"
        where = {"store": str(self.store), "runs": str(folder / "runs")}
        config = resolve(preset="digits-dil", overrides=SMALL | where, ambient=False).config
        self.method = open_method(config, seed=0)
        tasks = [self.method.workspace.task(str(number)) for number in (1, 2, 3)]
        self.pictures = [
            encoded(np.asarray(tasks[place % 3].test.images[place])) for place in range(12)
        ]

    @classmethod
    def made(cls, folder: Path) -> Memory:
        memory = cls(folder)
        for task in "12":
            memory.method.adapt(task)
            memory.method.write()
            memory.method.consolidate()
        memory.method.workspace.store.branch("served")
        memory.method.adapt("3")
        return memory

    def copy(self, folder: Path) -> Memory:
        """The same memory elsewhere."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Memory(folder)

    def models(self, ref: str = "") -> Models:
        return Models(f"{self.store}{ref}")


def encoded(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    return Memory.made(tmp_path_factory.mktemp("served"))
