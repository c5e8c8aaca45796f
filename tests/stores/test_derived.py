"""Derived files: what was written is read, and anything else is as good as none."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from memtool_stores import cache, derived

STORE = "01J0000000000000000000000A"
NAME = "ab" * 32
DATA = bytes(range(256)) * 9


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there."""
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path))
    derived.keep(STORE, NAME, DATA, files=4)
    return cache.folder(STORE) / f"{NAME}.index"


def test_what_was_kept_is_read(kept: Path) -> None:
    assert derived.read(STORE, NAME) == DATA
    assert derived.read(STORE, "cd" * 32) is None
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.name, "lock"]


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    match how:
        case "a bit":
            path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
        case "cut":
            path.write_bytes(whole[:-1])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(whole + b"\0")
        case "another's":  # whole, under a name that is not its own
            derived.keep(STORE, "cd" * 32, DATA, files=4)
            path.with_name("cd" * 32 + ".index").rename(path)
        case "a link":
            path.rename(path.with_suffix(".elsewhere"))
            path.symlink_to(path.with_suffix(".elsewhere"))
        case "a pipe":
            path.unlink()
            os.mkfifo(path)


@pytest.mark.parametrize(
    "how", ["a bit", "cut", "empty", "longer", "another's", "a link", "a pipe"]
)
def test_anything_else_is_told_and_made_again(
    kept: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(kept, how)
    with caplog.at_level(logging.WARNING):
        assert derived.read(STORE, NAME) is None
    assert "made again" in caplog.text
    derived.keep(STORE, NAME, DATA, files=4)
    assert derived.read(STORE, NAME) == DATA
    assert kept.is_file()
    assert not kept.is_symlink()


def test_only_the_newest_stay_and_none_is_left_of_a_purged_row(kept: Path) -> None:
    for number in range(5):
        for path in kept.parent.glob("*.index"):  # each is older than the next by a second at least
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
        derived.keep(STORE, f"{number}", DATA, files=3)
    left = {path.name for path in kept.parent.glob("*.index")}
    assert left == {"2.index", "3.index", "4.index"}
    cache.drop(STORE)
    assert not [*kept.parent.glob("*.index")]


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        derived.keep(STORE, NAME, DATA, files=4)
    assert "is not kept in the cache" in caplog.text
    assert derived.read(STORE, NAME) is None
