"""What a killed process leaves half made is found, kept while it may be at work, and goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memtool_stores
from memtool_stores import MemoryStore, Space
from memtool_stores.leftovers import find
from memtool_stores.testing import fill

LEFT = Path(__file__).parent / "left.py"


def killed(store: MemoryStore, what: str, target: Path) -> None:
    source = Path(memtool_stores.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, str(LEFT), store.url, what, str(target)],
        env={**os.environ, "PYTHONPATH": str(source)},
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL


def age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    for one in (path, *path.rglob("*")):
        os.utime(one, (moment, moment))


@pytest.mark.parametrize("what", ["commit", "dry-run"])
def test_in_the_store_it_goes_at_once(grown: MemoryStore, tmp_path: Path, what: str) -> None:
    killed(grown, what, tmp_path / "target")
    (left,) = find(Path(grown.url))
    assert left.nbytes > 0
    assert grown.verify().ok
    assert [one.path for one in grown.gc(dry_run=True).leftovers] == [left.path]
    assert left.path.exists()
    assert [one.path for one in grown.gc().leftovers] == [left.path]
    assert not find(Path(grown.url))
    assert grown.verify().ok


@pytest.mark.parametrize("what", ["create", "clone", "bundle", "cache"])
def test_elsewhere_it_goes_when_nobody_has_written_to_it_for_an_hour(
    grown: MemoryStore, tmp_path: Path, cache: Path, what: str
) -> None:
    target = tmp_path / "target"
    killed(grown, what, target)
    place = cache if what == "cache" else tmp_path
    (left,) = find(place, below=what == "cache")
    assert not target.exists()
    assert grown.gc().leftovers == ()
    age(left.path, 7200)
    if what in {"create", "clone"}:
        # Somebody writes deep inside it.
        deep = next(path for path in left.path.rglob("*") if path.is_file())
        os.utime(deep)
        assert grown.gc().leftovers == ()
        age(left.path, 7200)
    assert [one.path for one in grown.gc(dry_run=True).leftovers] == [left.path]
    assert [one.path for one in grown.gc().leftovers] == [left.path]
    assert not left.path.exists()
    # And the same again, undisturbed.
    if what == "clone":
        assert grown.clone(target).verify().ok
    elif what == "bundle":
        grown.bundle(target)
        assert MemoryStore.from_bundle(target, tmp_path / "copy").verify().ok
    assert len(grown.view().values()) == 3


def test_a_copy_has_nothing_half_made(grown: MemoryStore, tmp_path: Path, space: Space) -> None:
    killed(grown, "commit", tmp_path)
    (Path(grown.url) / "ice" / "chunks" / "0123456789#1").write_bytes(b"of icechunk")
    grown.bundle(tmp_path / "bundle")
    for copy in (
        grown.clone(tmp_path / "clone"),
        MemoryStore.from_bundle(tmp_path / "bundle", tmp_path / "copy"),
    ):
        assert not find(Path(copy.url))
        with copy.transaction("goes on") as txn:
            fill(txn, space, "more", 4)
        assert copy.verify().ok


def test_what_others_make_is_nobodys_leftover(tmp_path: Path) -> None:
    names = [".x.part", "x.part", ".x.12345678.part", "movie.mkv.part", ".x.memtool-part", "#1#"]
    for name in (*names, "run#1", ".film.download.part"):
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path)
    assert not find(tmp_path)


def test_gc_leaves_what_others_keep_beside_a_store_and_in_it(grown: MemoryStore) -> None:
    for folder in (Path(grown.url).parent, Path(grown.url)):
        for name in ("run#1", ".film.download.part"):
            theirs = folder / name
            theirs.mkdir()
            (theirs / "file").write_bytes(b"theirs")
            age(theirs, 7200)
    assert grown.gc().leftovers == ()
    assert (Path(grown.url).parent / "run#1" / "file").read_bytes() == b"theirs"
