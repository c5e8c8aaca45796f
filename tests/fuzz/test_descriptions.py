"""Descriptions as strangers write them, and folders with any names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from memtool.errors import ConfigError, MemtoolError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams.description import Description, read_description
from memtool.streams.sources import built_in_descriptions, find_source
from memtool.streams.text import (
    TaskFolders,
    open_text_stream,
    read_task_folders,
    text_sources,
)
from tests.fuzz.door import NAMES, cases, damaged, long, nothing_else_changes, refused_or_taken

pytestmark = long

SECRET = "hunter2-do-not-say"

_WHOLE = [
    *(file.read_bytes() for file in built_in_descriptions().values()),
    *(file.read_bytes() for file in text_sources().values()),
]
_KEYS = [*Description.model_fields, *TaskFolders.model_fields]
_WORDS = [
    *("parquet", "json", "csv", "imagefolder", "hub", "folder", "chain", "join", "..", "a.csv"),
    *("../outside", "/etc", "${SECRET}", "${SECRET}/x", "~nobody", "given.yaml", "here", "here/.."),
    *("https://example.org/x", "zip://x::y", "hf://datasets/a/b", "owner/name", "/dev/stdin"),
]
_VALUES = st.one_of(st.sampled_from(_WORDS), NAMES, st.integers(), st.none(), st.booleans())
_TREES = st.dictionaries(
    st.one_of(st.sampled_from(_KEYS), NAMES),
    st.one_of(_VALUES, st.lists(_VALUES, max_size=3), st.dictionaries(NAMES, _VALUES, max_size=2)),
    max_size=6,
)


def _described(kind: str, keys: dict[str, object]) -> dict[str, object]:
    return {"path": "here", **keys, "kind": kind}


_LIKELY = st.builds(
    _described,
    st.sampled_from(["parquet", "json", "csv", "imagefolder", "hub", "folder", "chain", "join"]),
    _TREES,
)
_CONTENTS = st.one_of(
    st.sampled_from(_WHOLE).flatmap(damaged),
    st.one_of(_TREES, _LIKELY).map(lambda tree: yaml.safe_dump(tree).encode()),
)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a file for the description, and some data beside it."""
    root = tmp_path_factory.mktemp("descriptions")
    (root / "here" / "ant").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(root / "here" / "ant" / "1.png")
    (root / "here" / "a.csv").write_text("image,label\nant/1.png,ant\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", SECRET)
        patch.setenv("MEMTOOL_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


@contextmanager
def keeps_secret() -> Iterator[None]:
    """What is refused in the block does not say what a variable holds."""
    try:
        yield
    except MemtoolError as error:
        if SECRET in str(error):
            pytest.fail(f"{error} says a secret")
        raise


@cases
@given(content=_CONTENTS)
@example(content=b"kind: hub\npath: ../../x\n")
@example(content=b"kind: chain\nsources: [given.yaml]\n")
@example(content=b"kind: folder\npath: ${SECRET}\n")
@example(content=b"kind: csv\npath: here\ntrain: /etc/passwd\n")
@example(content=b"path: ${SECRET}/x\ntasks: [{name: ../x, metric: sari}]\n")
def test_a_description(sandbox: Path, content: bytes) -> None:
    file = sandbox / "given.yaml"
    file.write_bytes(content)
    with nothing_else_changes(sandbox):
        for read in (
            lambda: find_source(str(file)).domain_names,
            lambda: read_task_folders(file),
            lambda: open_text_stream(StreamSettings(source=str(file), setting="trace")),
        ):
            with refused_or_taken(), keeps_secret():
                read()


@cases
@given(source=NAMES)
@example(source="/")
def test_the_name_of_a_source(sandbox: Path, source: str) -> None:
    with refused_or_taken():
        find_source(source)


@cases
@given(names=st.lists(st.lists(NAMES, min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_folder_with_any_names(tmp_path_factory: pytest.TempPathFactory, names: list) -> None:
    root = tmp_path_factory.mktemp("folder")
    for parts in names:
        safe = [part.replace("/", "_").replace("\0", "_")[:60] or "_" for part in parts]
        file = root.joinpath(*(part for part in safe if part not in (".", "..")), "1.png")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
        except (OSError, ValueError):
            continue  # no file system has such a name
    with refused_or_taken():
        source = find_source(str(root))
        assert all(note.isprintable() for note in source.notes)
        with source.open() as listing:
            assert len(listing.labels) == len(listing.is_test)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "csv", "path": "here", "train": "../other.csv"}, "outside of its folder"),
        ({"kind": "parquet", "path": "here", "train": "/etc/passwd"}, "outside of its folder"),
        ({"kind": "hub", "path": "here"}, "cannot be the id"),
        ({"kind": "hub", "path": "here/ant"}, "is a folder here"),
        ({"kind": "hub", "path": "/etc/passwd"}, "cannot be the id"),
        ({"kind": "chain", "sources": ["given.yaml"]}, "is a chain itself"),
    ],
)
def test_what_leads_elsewhere_is_refused(sandbox: Path, keys: dict[str, object], said: str) -> None:
    (sandbox / "given.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ConfigError, match=said):
        find_source(str(sandbox / "given.yaml"))


@pytest.mark.parametrize("path", ["${SECRET}", "${SECRET}/x", "x/${SECRET}"])
def test_what_a_variable_holds_is_not_said(sandbox: Path, path: str) -> None:
    (sandbox / "given.yaml").write_text(yaml.safe_dump({"kind": "folder", "path": path}))
    with pytest.raises(NotFoundError) as caught:
        find_source(str(sandbox / "given.yaml"))
    assert "${SECRET}" in caught.value.message
    assert SECRET not in str(caught.value)


def test_a_description_that_is_no_file(sandbox: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(ConfigError, match=name):
            read_description(tmp_path / name)
