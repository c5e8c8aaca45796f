"""A training that cannot be saved says which file, why, and how much room there is."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from memtool.checkpoints import save_checkpoint
from memtool.errors import MemtoolError


def test_a_checkpoint_without_room_names_file_and_room_and_keeps_the_old_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "train.safetensors"
    parameter = torch.nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.SGD([parameter])
    save_checkpoint(path, "one", {"w": parameter}, optimizer, (1, [], []))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file can grow further: what a full disk is like without one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(MemtoolError, match=r"train\.safetensors.*bytes free") as caught:
            save_checkpoint(path, "two", {"w": parameter}, optimizer, (2, [], []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.remedy is not None
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
