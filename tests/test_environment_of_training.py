"""A file that cannot be written says which, why, and what helps."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from memtool.atomic import cannot_write
from memtool.checkpoints import save_checkpoint
from memtool.errors import MemtoolError


def test_a_checkpoint_without_room_names_file_and_remedy_and_keeps_the_old_one(
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
        with pytest.raises(MemtoolError, match=r"train\.safetensors: File too large") as caught:
            save_checkpoint(path, "two", {"w": parameter}, optimizer, (2, [], []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f unlimited" in (caught.value.remedy or "")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("number", "said", "remedy"),
    [
        (errno.ENOSPC, "bytes free there", "free some space"),
        (errno.EDQUOT, "bytes free there", "free some space"),
        (errno.EFBIG, "File too large; what", "ulimit -f unlimited"),
        (errno.EROFS, "Read-only file system; what", "a folder that you may write"),
    ],
)
def test_what_refuses_a_file_has_the_remedy_that_fits(
    tmp_path: Path, number: int, said: str, remedy: str
) -> None:
    error = cannot_write(tmp_path / "x.json", OSError(number, os.strerror(number)))
    assert said in error.message
    assert remedy in (error.remedy or "")
