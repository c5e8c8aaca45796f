"""A store somewhere else: clones and bundles, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import memtool_stores
from memtool_stores import (
    AlreadyExistsError,
    IntegrityError,
    LockTimeoutError,
    MemoryStore,
    SchemaError,
    StorageError,
    limits,
)
from memtool_stores.bundle import MANIFEST, read_bundle, write_bundle
from memtool_stores.leftovers import find
from memtool_stores.move import belongs, copy
from memtool_stores.objects import objects_at
from memtool_stores.testing import small_space, some_values

SPACE = small_space()


@pytest.fixture
def store(tmp_path):
    made = MemoryStore.create(tmp_path / "memory", SPACE)
    for number in range(3):
        with made.transaction(f"write {number}") as txn:
            txn.add(f"a{number}", some_values(SPACE, number), {"task": number})
            txn.put_blob("note", str(number).encode())
    made.tag("v1", "HEAD~1")
    made.rollback("HEAD~1")
    return made


def history(store):
    return [(v.id, v.message, v.time) for v in store.log()], store.tags(), store.branches()


def test_a_clone_is_the_same_store_and_goes_its_own_way(store, tmp_path):
    told = []
    copied = store.clone(tmp_path / "copy", lambda step, total: told.append((step, total)))
    assert history(copied) == history(store)
    assert copied.view().store_id == store.view().store_id
    assert copied.verify().ok
    assert told[-1][0] == told[-1][1] == len(told)
    with copied.transaction("more") as txn:
        txn.add("more", some_values(SPACE, 9))
    assert len(copied.view()) == len(store.view()) + 1


def test_a_bundle_comes_back_as_the_same_store(store, tmp_path):
    file = tmp_path / "memory.bundle"
    size = store.bundle(file)
    assert size == file.stat().st_size
    copied = MemoryStore.from_bundle(file, tmp_path / "copy")
    assert history(copied) == history(store)
    assert copied.verify().ok
    store.bundle(tmp_path / "again.bundle")
    assert (tmp_path / "again.bundle").read_bytes() == file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        about = json.loads(archive.read(MANIFEST))
    assert about["store_id"] == store.view().store_id
    assert about["adapters"] == 2


def test_a_bundle_goes_through_a_pipe_and_into_a_device(store, tmp_path):
    pipe, file = tmp_path / "pipe", tmp_path / "memory.bundle"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: file.write_bytes(pipe.read_bytes()))
    reader.start()
    size = store.bundle(pipe)
    reader.join()
    assert size == file.stat().st_size == store.bundle(os.devnull)
    assert history(MemoryStore.from_bundle(file, tmp_path / "copy")) == history(store)
    assert Path(os.devnull).is_char_device()


def test_nothing_is_overwritten(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        store.clone(tmp_path / "full")
    store.bundle(tmp_path / "memory.bundle")
    with pytest.raises(AlreadyExistsError):
        store.bundle(tmp_path / "memory.bundle")
    with pytest.raises(AlreadyExistsError):
        MemoryStore.from_bundle(tmp_path / "memory.bundle", tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_every_cut_and_every_flipped_byte_of_a_bundle_is_found(store, tmp_path):
    file = tmp_path / "memory.bundle"
    store.bundle(file)
    data = file.read_bytes()
    broken = tmp_path / "broken.bundle"
    step = max(1, len(data) // 40)
    for place in range(40, len(data), step):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        broken.write_bytes(flipped)
        try:
            copied = MemoryStore.from_bundle(broken, tmp_path / "copy")
        except (IntegrityError, SchemaError):
            assert not (tmp_path / "copy").exists()
        else:
            # A byte that means nothing, such as a date: what came out is right all the same.
            assert copied.verify().ok
            assert history(copied) == history(store)
            shutil.rmtree(tmp_path / "copy")
        broken.write_bytes(data[:place])
        with pytest.raises(IntegrityError):
            MemoryStore.from_bundle(broken, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_no_bit_of_a_bundle_that_says_how_to_read_it_goes_unseen(store, tmp_path):
    """Of names, sizes, methods and flags: an error that says so, or the same files."""

    class Kept(dict):
        def write_pieces(self, path, pieces):
            self[path] = b"".join(pieces)

    file = tmp_path / "memory.bundle"
    store.bundle(file)
    data = file.read_bytes()
    whole, broken = Kept(), tmp_path / "broken.bundle"
    read_bundle(file, whole)
    places = [*range(30), *range(data.rfind(MANIFEST.encode()) - 46, len(data))]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        broken.write_bytes(flipped)
        kept = Kept()
        try:
            read_bundle(broken, kept)
        except (IntegrityError, SchemaError):
            continue
        assert kept == whole, place


def test_a_clone_of_a_damaged_head_is_not_kept(store, tmp_path):
    path = f"ice/snapshots/{store.head()}"
    objects = objects_at(store.url)
    objects.write(path, objects.read(path)[:-7])
    with pytest.raises(IntegrityError):
        store.clone(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_no_file_of_a_bundle_is_in_memory_whole(tmp_path):
    source = objects_at(str(tmp_path / "source"))
    source.write("ice/refs/branch.main/ref.json", b"{}")
    size = 64 * 1024 * 1024
    source.write_pieces("ice/chunks/large", (bytes(1024) for _ in range(size // 1024)))
    tracemalloc.start()
    try:
        write_bundle(source, tmp_path / "bundle", {})
        read_bundle(tmp_path / "bundle", objects_at(str(tmp_path / "copy")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy/ice/chunks/large").stat().st_size == size
    assert peak < size // 8


def test_a_file_whose_hash_is_wrong_never_appears(store, tmp_path):
    store.bundle(tmp_path / "bundle")
    with zipfile.ZipFile(tmp_path / "bundle") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    said = json.loads(content.pop(MANIFEST))
    wrong = sorted(name for name in content if "chunks" in name)[0]
    said["files"][wrong] = "0" * 64
    with zipfile.ZipFile(tmp_path / "lying", "w") as archive:
        for name, data in (*content.items(), (MANIFEST, json.dumps(said))):
            archive.writestr(name, data)
    with pytest.raises(IntegrityError, match=wrong):
        read_bundle(tmp_path / "lying", objects_at(str(tmp_path / "plain")))
    assert not (tmp_path / "plain" / wrong).exists()
    assert not find(tmp_path / "plain")


@pytest.mark.parametrize("name", ["bundle_files", "text_bytes"])
def test_what_could_not_be_read_again_is_not_written(store, tmp_path, name):
    store.bundle(tmp_path / "bundle")
    before = limits.current()
    try:
        limits.use(replace(before, **{name: 10}))
        for do in (
            lambda: store.bundle(tmp_path / "other"),
            lambda: MemoryStore.from_bundle(tmp_path / "bundle", tmp_path / "copy"),
        ):
            with pytest.raises(SchemaError, match=r"bundle|other") as caught:
                do()
            assert f"limits.{name}" in str(caught.value)
    finally:
        limits.use(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "memory"]


def test_files_that_are_no_bundle(tmp_path):
    with pytest.raises(StorageError, match="no bundle"):
        MemoryStore.from_bundle(tmp_path / "nowhere", tmp_path / "copy")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(SchemaError, match="no bundle of memtool"):
        MemoryStore.from_bundle(other, tmp_path / "copy")
    newer = tmp_path / "newer.zip"
    with zipfile.ZipFile(newer, "w") as archive:
        archive.writestr(MANIFEST, json.dumps({"bundle_schema": 9, "files": {}}))
    with pytest.raises(SchemaError, match="newer memtool"):
        MemoryStore.from_bundle(newer, tmp_path / "copy")
    outside = tmp_path / "outside.zip"
    with zipfile.ZipFile(outside, "w") as archive:
        files = {"ice/../../evil": "0" * 64, "ice/refs/branch.main/ref.json": "0" * 64}
        archive.writestr(MANIFEST, json.dumps({"bundle_schema": 1, "files": files}))
        archive.writestr("ice/../../evil", "evil")
    with pytest.raises(IntegrityError, match=r"\.\./\.\./evil"):
        MemoryStore.from_bundle(outside, tmp_path / "deep" / "copy")
    assert not list(tmp_path.rglob("evil"))


def test_a_copy_that_was_cut_short_is_no_store(store, tmp_path):
    class Cut(Exception):
        pass

    def cut(step, total):
        if step == total - 3:
            raise Cut

    with pytest.raises(Cut):
        store.clone(tmp_path / "copy", cut)
    assert not (tmp_path / "copy").exists()
    # Without the folder's own atomicity, as in a bucket: the references are still missing.
    target = objects_at(str(tmp_path / "bucket"))
    with pytest.raises(Cut):
        copy(objects_at(store.url), target, cut)
    assert not MemoryStore.exists(tmp_path / "bucket")


def test_a_copy_that_a_writer_overtakes_is_the_store_as_it_was(store, tmp_path):
    before = history(store)
    source = objects_at(store.url)

    class Overtaken:
        """Commits, the first time that anything but a reference is read."""

        done = False

        def list(self, prefix=""):
            return source.list(prefix)

        def read(self, path):
            if not self.done and "refs" not in path:
                self.done = True
                with store.transaction("meanwhile") as txn:
                    txn.add("meanwhile", some_values(SPACE, 7))
            return source.read(path)

        def pieces(self, path):
            yield self.read(path)

    copy(Overtaken(), objects_at(str(tmp_path / "copy")))
    copied = MemoryStore.open(tmp_path / "copy")
    assert history(copied) == before
    assert copied.verify().ok
    assert len(store.view()) == len(copied.view()) + 1


WRITER = """
import sys
import threading
from memtool_stores import MemoryStore, MemtoolError, testing
space = testing.small_space()
store = MemoryStore.open(sys.argv[1])
view = store.view()
print("open", flush=True)
sys.stdin.readline()
def commit(txn):
    testing.fill(txn, space, "moved", 9)
changes = {
    "commit": lambda: store.run(commit, "moved"),
    "tag": lambda: store.tag("x"),
    "gc": lambda: store.gc(),
    "rollback": lambda: store.rollback("HEAD~1"),
    "verify": lambda: store.verify(),
    "values": lambda: view.values(),
    "view": lambda: store.view().values(),
    "clone": lambda: store.clone(sys.argv[1] + "-clone"),
}
for name, change in changes.items():
    try:
        change()
    except MemtoolError as error:
        print(type(error).__name__, error.message, flush=True)
    else:
        print("ok", name, flush=True)
"""


@pytest.mark.parametrize("how", ["moved", "linked", "replaced"])
def test_a_store_that_is_moved_under_a_writer(store, tmp_path, how):
    """It says so, makes no half store at the old place, and touches no other one there."""
    old, new = tmp_path / "memory", tmp_path / "moved"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(old)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(memtool_stores.__file__).parents[1])},
    )
    assert writer.stdout.readline() == "open\n"
    old.rename(new)
    if how == "linked":
        old.symlink_to(new)
    elif how == "replaced":
        other = MemoryStore.create(old, SPACE)
        theirs = other.run(lambda txn: txn.add("theirs", some_values(SPACE, 5)), "theirs")
    said, _ = writer.communicate("go\n", timeout=60)
    lines = said.splitlines()
    assert len(lines) == 8
    moved = MemoryStore.open(new)
    assert moved.verify().ok
    if how == "linked":
        assert all(line.startswith("ok") for line in lines), lines
        assert "x" in moved.tags()
        return
    assert "moved" not in {record.name for record in moved.view().adapters}
    assert len(moved.tags()) == 1
    told = [line for line in lines if "was moved or deleted" in line]
    assert len(told) >= 6, lines
    assert not any(line.startswith("IntegrityError") for line in lines), lines
    if how == "replaced":
        assert other.log()[0].message == "theirs"
        assert other.tags() == {}
        assert other.view().get(theirs).name == "theirs"
    else:
        assert not old.exists()


def test_a_link_to_a_store_leads_to_the_same_lock(store, tmp_path):
    (tmp_path / "link").symlink_to("memory")
    linked = MemoryStore.open(tmp_path / "link", lock_timeout=0.1)
    with store._lock(), pytest.raises(LockTimeoutError):
        linked.tag("held")
    linked.tag("free")
    assert "free" in store.tags()


def test_a_lock_that_leads_elsewhere_is_not_followed(store, tmp_path):
    """As a stranger's folder may hold it: a lock is emptied when it is opened."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = Path(store.url) / "lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(victim)
    with pytest.raises(StorageError, match="lock the store"):
        store.tag("x")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "path", ["ice/repo", "ice/config.yaml", "ice", "lock", "sums", "elsewhere/x"]
)
def test_files_that_no_store_has_belong_to_none(path: str) -> None:
    assert not belongs(path, True)


def test_every_file_of_a_store_belongs_to_it(grown: MemoryStore) -> None:
    root = Path(grown.url)
    paths = [p.relative_to(root).as_posix() for p in (root / "ice").rglob("*") if p.is_file()]
    assert paths
    assert all(belongs(path, True) for path in paths)
