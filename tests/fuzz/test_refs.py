"""How versions are named: on the command line, and in the files of branches and tags."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool.paths import split_store
from memtool_stores import MemoryStore
from memtool_stores.names import check_ref
from memtool_stores.testing import fill, small_space
from tests.fuzz.door import (
    NAMES,
    STRANGE,
    cases,
    damaged,
    long,
    nothing_else_changes,
    refused_or_taken,
)

pytestmark = long


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    space = small_space()
    store = MemoryStore.create(tmp_path_factory.mktemp("refs") / "memory", space)
    for task in range(2):
        with store.transaction(f"write task {task}") as txn:
            fill(txn, space, f"t{task}", task)
    store.tag("v1", "HEAD~1")
    store.branch("side")
    return store


STEPS = st.sampled_from(["~", "~1", "~~", "~-1", "~²", "~1e3", "~٣", "~" + "9" * 5000, "~ 1"])
REFS = st.one_of(
    NAMES,
    st.builds("{}{}".format, st.sampled_from(["HEAD", "main", "v1", "", "0" * 20]) | NAMES, STEPS),
    st.integers(0, 10**20).map(lambda back: f"HEAD~{back}"),
    st.text(alphabet="0123456789ABCDEFGHJKMNPQRSTVWXYZabcſı~", max_size=25),
)


@cases
@given(ref=REFS)
def test_a_version_is_found_or_refused(store: MemoryStore, ref: str) -> None:
    known = {version.id for version in store.log()}
    with refused_or_taken():
        assert store.view(ref).version in known
    with refused_or_taken(), store.transaction("never stored", branch=ref):
        pass


@cases
@given(name=NAMES | REFS)
def test_a_name_of_a_version_is_made_or_refused(store: MemoryStore, name: str) -> None:
    with nothing_else_changes(Path(store.url).parent, but=Path(store.url)):
        for make, names, delete in (
            (store.tag, store.tags, store.delete_tag),
            (store.branch, store.branches, store.delete_branch),
        ):
            before = names()
            with refused_or_taken():
                delete(f"{name}-not-there")
            with refused_or_taken():
                make(name)
                assert names().keys() == before.keys() | {name}
                delete(name)
            assert names() == before
    # What is left of a deleted tag would make every case longer than the one before.
    for left in (Path(store.url) / "ice" / "refs").glob("*/ref.json.deleted"):
        shutil.rmtree(left.parent)


@cases
@given(text=st.builds("{}@{}".format, NAMES, REFS) | NAMES | REFS)
def test_a_store_and_a_version_in_one_text_are_told_apart(text: str) -> None:
    with refused_or_taken():
        path, version = split_store(text)
        assert text in {path, f"{path}@", f"{path}@{version}"}


@cases
@given(
    which=st.sampled_from(["branch.main", "branch.side", "tag.v1"]),
    instead=damaged(b'{"snapshot":"1CECHNKREP0F1RSTCMT0"}') | STRANGE | st.just(None),
    folder=st.sampled_from(["branch.", "tag.", "", "x."]),
    name=NAMES,
    ask=st.sampled_from(["tags", "branches", "log", "head"]),
)
def test_a_strange_reference_is_named_or_in_nobodys_way(
    store: MemoryStore, which: str, instead: bytes | None, folder: str, name: str, ask: str
) -> None:
    """The file of a branch or tag with anything in it; beside it one with any name."""
    references = Path(store.url) / "ice" / "refs"
    right = (references / which / "ref.json").read_bytes()
    strange = references / (folder + name).encode(errors="replace").decode().replace("/", "_")
    if instead is not None:
        (references / which / "ref.json").write_bytes(instead)
    try:
        made = _made(strange, right)
        try:
            with refused_or_taken():
                report = store.verify("heads")
                if instead not in {None, right}:
                    assert not report.ok
                for damage in report.damages:
                    assert damage.name.isprintable()
            with refused_or_taken():
                getattr(store, ask)()
            with refused_or_taken():
                assert len(MemoryStore.open(store.url).view("side")) <= 2
        finally:
            if made:
                (strange / "ref.json").unlink()
                strange.rmdir()
    finally:
        (references / which / "ref.json").write_bytes(right)
    assert all(check_ref(name, "branch") for name in store.branches())


def _made(folder: Path, content: bytes) -> bool:
    """Whether there can be such a folder; then it is there, with a reference in it."""
    try:
        folder.mkdir()
        (folder / "ref.json").write_bytes(content)
    except (OSError, ValueError):
        return False
    return True
