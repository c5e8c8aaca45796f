"""A memory whose keys are searched in an index: what it recalls, keeps and forgets."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import memtool
from memtool.errors import ConfigError
from memtool.memories import index
from memtool.memories.index import KeyIndex, name_of
from memtool.methods.forget import forget
from memtool.methods.mira import about
from memtool.methods.mira.cost import image_cost
from memtool.methods.mira.method import Mira
from memtool_stores import cache
from tests.methods.conftest import learn, small_config

IN_INDEX = {
    "memory__index": "usearch",
    "memory__separation": "topk",
    "memory__topk": 2,
    "memory__beta": 0.2,
    "consolidate__keys": "mean-query",
}


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three keys are many; on one thread the same keys give the same index."""
    pytest.importorskip("usearch", reason="usearch is not installed")
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 2)
    monkeypatch.setattr("memtool.methods.mira.indexed.LEAST_KEYS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))


def opened(folder: Path, **settings: object) -> Mira:
    return Mira.open(small_config(folder, **{**IN_INDEX, **settings}), seed=0)


def indexes(mira: Mira) -> list[Path]:
    """The index files of its store, the oldest first."""
    folder = cache.folder(mira.workspace.store.view().store_id)
    return sorted(folder.glob("*.index"), key=lambda path: path.stat().st_mtime_ns)


def recalled(mira: Mira) -> torch.Tensor:
    """Coefficients of some images at the newest version."""
    _, model, _ = mira.snapshot().consolidated()
    images = torch.from_numpy(mira.workspace.stream.tasks[1].test.images[:20].copy())
    with torch.inference_mode():
        return model.with_coefficients(images)[1]


def file_without(keys: torch.Tensor, mira: Mira) -> tuple[str, bytes]:
    """Name and content of the index file of these keys, made from nothing else."""
    (block,) = mira.snapshot().consolidated()[1].memory.blocks
    memory = mira.snapshot().consolidated()[1].memory[block]
    given = {"constant": memory.query.bias}
    made = KeyIndex(keys, memory.similarity, **given)
    return f"{name_of(keys, memory.similarity, **given)}.index", made.to_bytes()


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory__scope": "block"},
        {"memory__separation": "max"},
        {"memory__routing": "lda"},
        {"memory__routing": "prototype"},
        {"consolidate__keys": "closed-form", "memory__beta": 1.0},
    ],
)
def test_it_recalls_what_an_exact_search_recalls(adapted: Path, settings: dict[str, object]):
    mira = learn(opened(adapted, **settings), each=False)
    record = mira.evaluate()
    row = record.row("memory")
    assert row.metrics["missed"] == 0
    found = recalled(mira)
    memories = len(mira.snapshot().consolidated()[1].memory.blocks)
    assert len(indexes(mira)) == memories
    exact = opened(adapted, **settings, memory__index="exact")
    exact.consolidate()
    torch.testing.assert_close(found, recalled(exact))
    wanted = exact.evaluate()
    assert wanted.row("memory").accuracy == row.accuracy
    assert "missed" not in wanted.row("memory").metrics
    assert (
        record.run.configuration["memory"]["index"],
        wanted.run.configuration["memory"]["index"],
    ) == (
        "usearch",
        "exact",
    )
    assert "usearch" in record.environment.packages


@pytest.mark.usefixtures("searched")
def test_an_index_is_made_once_and_read_by_whoever_opens_the_memory(
    adapted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mira = learn(opened(adapted), each=False)
    with caplog.at_level(logging.WARNING):
        wanted = recalled(mira)
    assert "an index of 3 keys is made" in caplog.text
    (file,) = indexes(mira)
    before, written = file.read_bytes(), file.stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(recalled(opened(adapted)), wanted)
        attached = memtool.load(mira.config.store).attach().eval()
        images = mira.workspace.stream.tasks[1].test.images[:20].copy()
        with torch.inference_mode():
            torch.testing.assert_close(attached(torch.from_numpy(images)).weights, wanted[:, 0])
    assert not caplog.text
    assert file.stat().st_mtime_ns == written
    # Damaged or foreign it is told, and made again from the keys.
    file.write_bytes(before[:200] + bytes([before[200] ^ 1]) + before[201:])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(recalled(opened(adapted)), wanted)
    assert "is not what was written there; it is made again" in caplog.text
    assert file.read_bytes() == before


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("purge", [False, True])
def test_what_is_forgotten_is_in_no_index(adapted: Path, purge: bool) -> None:
    mira = learn(opened(adapted), each=False)
    recalled(mira)
    (old,) = indexes(mira)
    assert forget(mira.workspace.store, ["2"], purge=purge).left == 2
    # With a purge the file goes as the values do; without, an older version has it still.
    assert indexes(mira) == ([] if purge else [old])
    again = opened(adapted)
    assert recalled(again).shape[2] == 2
    keys = torch.from_numpy(again.snapshot().view.keys()[0].copy())
    name, data = file_without(keys, again)
    used = indexes(again)[-1]
    # The file in use is byte for byte that of a memory that never had the adapter.
    assert used.name == name
    assert used != old
    assert used.read_bytes().endswith(data)
    assert len(used.read_bytes()) == 32 + len(data)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("kept", [1, 4])
def test_a_new_adapter_makes_the_index_anew_and_old_files_go(
    adapted: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "KEEP_FILES", kept)
    mira, seen = opened(adapted), []
    for task in ("1", "2", "3"):
        mira.write([one.path for one in mira.adapt(task)])
        mira.consolidate()
        mira = opened(adapted)
        if task != "1":
            recalled(mira)
            seen.append(indexes(mira)[-1].name)
    assert len({*seen}) == 2
    assert [path.name for path in indexes(mira)] == seen[-kept:]


@pytest.mark.usefixtures("searched")
def test_a_plan_says_how_keys_are_searched(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(**settings: object):  # type: ignore[no-untyped-def]
        mira = opened(adapted, **settings)
        work = mira.workspace
        return image_cost(mira.config, work.stream, work.backbone, work.layout)

    planned, mira = cost(), learn(opened(adapted), each=False)
    recalled(mira)
    (file,) = indexes(mira)
    assert planned.searched == "usearch"
    # A small file has some bytes more than its keys; a large one has not.
    assert 0 < planned.index_bytes < file.stat().st_size
    exact = cost(memory__index="exact")
    assert (exact.searched, exact.index_bytes) == ("exact", 0)
    soft = cost(memory__index="exact", memory__separation="softmax")
    assert soft.searched == "none"
    monkeypatch.setattr("memtool.methods.mira.indexed.LEAST_KEYS", 4)
    assert cost().searched == "none"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"memory__separation": "softmax"}, "memory.separation softmax"),
        ({"memory__separation": "affine"}, "memory.separation affine"),
        ({"memory__similarity": "manhattan"}, "memory.similarity manhattan"),
        ({"memory__keys_of": "class"}, "memory.keys_of class"),
        ({"memory__key_norm": "memories"}, "memory.key_norm memories"),
        ({"stream__setting": "trace", "stream__order": ()}, "memory.index usearch on a stream of"),
    ],
)
def test_an_index_without_a_meaning_is_refused(
    tmp_path: Path, settings: dict[str, object], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(about, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=found) as told:
        about.ABOUT.require(small_config(tmp_path, **{**IN_INDEX, **settings}))
    for remedy in str(told.value.remedy).removeprefix("--set ").split(", or --set "):
        key, _, value = remedy.partition("=")
        changed = {**IN_INDEX, **settings, key.replace(".", "__"): value}
        if "trace" not in settings.values():
            about.ABOUT.require(small_config(tmp_path, **changed))


def test_without_the_package_it_is_said_before_anything_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(about, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package usearch") as told:
        about.ABOUT.require(small_config(tmp_path, **IN_INDEX))
    assert str(told.value.remedy).startswith("pip install 'memtool[usearch]'")


def test_a_memory_from_elsewhere_is_read_exactly_once_it_is_told_to(
    adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(about, "find_spec", lambda name: name)
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 2)
    monkeypatch.setattr(index, "find_spec", lambda name: None)
    mira = learn(opened(adapted), each=False)
    before = mira.snapshot().view.keys()
    with pytest.raises(ConfigError, match="needs the package usearch") as told:
        recalled(mira)
    assert "consolidate as before, with --set memory.index=exact" in str(told.value.remedy)
    exact = opened(adapted, memory__index="exact")
    exact.consolidate()
    assert recalled(exact).shape[2] == 3
    assert np.array_equal(exact.snapshot().view.keys(), before)
