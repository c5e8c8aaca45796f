"""Rows in blobs, and what the moments of all tasks add up to: against reading all of them again."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from memtool.errors import CorruptError, MemtoolError
from memtool.memories import novelty
from memtool.memories.closed_form import QueryStatistics
from memtool.methods import pieces
from memtool.methods.forget import forget
from memtool.methods.in_store import drop
from memtool.methods.mira.method import Mira
from memtool.methods.mira.state import MemoryState
from memtool.methods.mira.sums import ASKED, SEEN, Asked
from memtool.methods.pieces import drop_rows, put_rows, read_rows
from memtool.methods.records import in_runs, out_of_runs
from memtool.program import export_model
from memtool_stores import MemoryStore, MemoryView
from tests.methods.conftest import learn, small_config

SHAPES = {"of": "int64 n", "row": "n d"}


def _rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"of": torch.arange(count), "row": torch.randn(count, 3, generator=generator)}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store whose blobs have four of these rows each."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * (8 + 12) + 3)
    return learn(Mira.open(small_config(tmp_path, train__epochs=1), seed=0), 1).workspace.store


def _put(store: MemoryStore, rows: dict[str, torch.Tensor]) -> set[str]:
    """Names of the blobs that a commit of these rows writes."""
    before = dict(store.view().blob_hashes)
    with store.transaction("rows") as txn:
        put_rows(txn, "some", rows)
        written = {name for name, held in txn._blobs.items() if held is not None}
    assert {name for name in before if not name.startswith("some.")} <= {*store.view().blobs()}
    return written


def test_rows_come_back_and_only_the_last_blobs_are_written(store: MemoryStore) -> None:
    assert read_rows(store.view(), "some", **SHAPES) == {}
    assert _put(store, _rows(6)) == {"some.0", "some.1"}
    assert _put(store, _rows(6)) == set()
    longer = {key: torch.cat([rows, rows[:5]]) for key, rows in _rows(6).items()}
    assert _put(store, longer) == {"some.1", "some.2"}
    found = read_rows(store.view(), "some", **SHAPES)
    assert all(torch.equal(found[key], longer[key]) for key in longer)
    changed = {**longer, "row": longer["row"].clone()}
    changed["row"][1] += 1
    assert _put(store, changed) == {"some.0"}
    assert _put(store, _rows(3)) == {"some.0"}
    assert not store.view().has_blob("some.1")
    with store.transaction("none") as txn:
        drop_rows(txn, "some")
    assert not store.view().has_blob("some.0")


@pytest.mark.parametrize(
    "second",
    [
        {"of": torch.arange(2), "row": torch.zeros(2, 4)},
        {"of": torch.arange(2), "row": torch.full((2, 3), torch.nan)},
        {"of": torch.arange(2)},
        {"of": torch.arange(3), "row": torch.zeros(2, 3)},
    ],
)
def test_strange_rows_are_refused(store: MemoryStore, second: dict[str, torch.Tensor]) -> None:
    with store.transaction("strange") as txn:
        txn.put_blob("some.0", save(_rows(4)))
        txn.put_blob("some.1", save(second))
    with pytest.raises(CorruptError, match=r"some\.1"):
        read_rows(store.view(), "some", **SHAPES)


@given(st.lists(st.integers(0, 12)))
def test_runs_say_the_numbers(numbers: list[int]) -> None:
    assert out_of_runs(in_runs(numbers)) == tuple(numbers)


def test_a_version_of_before_runs_is_read() -> None:
    assert out_of_runs([1, 2, 3, 4, 9]) == (1, 2, 3, 4, 9)


# Sums -------------------------------------------------------------------------------------------


def _counted(by_class: bool, seed: int) -> QueryStatistics:
    generator = torch.Generator().manual_seed(seed)
    found = QueryStatistics(2, 5)
    for part in range(1 + seed % 3 if by_class else 1):
        found.add(part, torch.randn(2, 20, 5, generator=generator))
    return found


@pytest.mark.parametrize("by_class", [False, True])
def test_sums_that_go_on_are_those_of_all_bit_for_bit(store: MemoryStore, by_class: bool) -> None:
    parts = [_counted(by_class, seed) for seed in range(7)]
    wanted = Asked.of(parts, by_class=by_class)
    before = None
    for part in parts:
        found = Asked.of([part], by_class=by_class, before=before)
        with store.transaction("sums") as txn:
            found.put(txn)
        before = Asked.read(store.view())
        assert before is not None
    assert before is not None
    assert before.sizes == wanted.sizes
    for name in ("counts", "sums", "second"):
        assert torch.equal(getattr(before.whole, name), getattr(wanted.whole, name))
    assert torch.equal(before.whole.lda_keys(), wanted.whole.lda_keys())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory__keys_of": "class"},
        {"head__scope": "shared"},
        {"head__kind": "rp-ridge", "head__scope": "shared", "head__width": 64},
        {"head__kind": "rp-ridge", "head__width": 64},
        {"head__kind": "grown"},
        {"memory__routing": "prototype"},
        {"consolidate__keys": "random", "consolidate__epochs": 1},
    ],
)
def test_task_by_task_is_as_if_all_moments_were_read_again(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    config = small_config(tmp_path, train__epochs=1, **changes)
    learn(Mira.open(config, seed=0), 2)
    mira = Mira.open(config, seed=0)
    mira.adapt("3")
    mira.write()
    read: list[str] = []
    honest = MemoryView.blob

    def blob(view: MemoryView, name: str) -> bytes:
        read.append(name)
        return honest(view, name)

    with mock.patch.object(MemoryView, "blob", blob):
        mira.consolidate()
    assert not {"queries.1", "queries.2", "features.1", "features.2"} & {*read}
    found, view = mira.snapshot(), mira.workspace.store.view()
    with mira.workspace.store.transaction("without sums") as txn:  # as an older memtool left it
        for name in (ASKED, SEEN):
            drop(txn, name)
        drop_rows(txn, ASKED)
        state = MemoryState.load(view)
        assert state is not None
        other = state.head.model_copy(update={"ridge": 0.5})
        state.model_copy(update={"head": other}).put(txn)  # heads are solved again
    again = Mira.open(config, seed=0)
    assert not again.consolidate().unchanged
    wanted = again.snapshot()
    if not config.consolidate.epochs:
        assert np.array_equal(found.view.keys(), wanted.view.keys())
    assert found.head is not None
    assert wanted.head is not None
    if config.head.kind == "rp-ridge":
        torch.testing.assert_close(found.head.weight, wanted.head.weight)
        return
    assert torch.equal(found.head.weight, wanted.head.weight)
    assert torch.equal(found.head.bias, wanted.head.bias)
    sums = {name: sha for name, sha in view.blob_hashes.items() if name.startswith((ASKED, SEEN))}
    assert sums == {name: wanted.view.blob_hashes[name] for name in sums}


def test_what_is_forgotten_leaves_the_sums(tmp_path: Path) -> None:
    config = small_config(tmp_path, train__epochs=1, head__scope="shared")
    mira = learn(Mira.open(config, seed=0), 3)
    forget(mira.workspace.store, ["inverted"])
    never = learn(Mira.open(small_config(tmp_path / "never", train__epochs=1), seed=0), 3)
    statistics = [never.snapshot().query_statistics()[task] for task in (1, 3)]
    found, wanted = Asked.read(mira.workspace.store.view()), Asked.of(statistics)
    assert found is not None
    assert found.sizes == (1, 1)
    assert torch.equal(found.whole.second, wanted.whole.second)
    assert torch.equal(found.whole.sums, wanted.whole.sums)


@pytest.mark.parametrize("scope", ["task", "shared"])
def test_a_memory_of_before_rows_is_read_and_goes_on(tmp_path: Path, scope: str) -> None:
    config = small_config(tmp_path, train__epochs=1, head__scope=scope)
    mira = learn(Mira.open(config, seed=0), 2)
    now = mira.snapshot()
    assert now.state is not None
    assert now.head is not None
    written = {**now.state.model_dump(mode="json"), "schema_version": 1}
    with mira.workspace.store.transaction("as it was") as txn:
        for name in ("memory.tasks", "memory.adapters", "heads", ASKED):
            drop_rows(txn, name)
        drop(txn, ASKED)
        drop(txn, SEEN)
        txn.put_blob("memory", json.dumps(written).encode())
        txn.put_blob("head", now.head.to_bytes())
    then = Mira.open(config, seed=0)
    found = then.snapshot()
    assert found.state == now.state.model_copy(update={"schema_version": 1})
    assert found.head is not None
    assert torch.equal(found.head.weight, now.head.weight)
    assert then.consolidate().unchanged
    assert then.evaluate().row("memory").accuracy == mira.evaluate().row("memory").accuracy
    then.adapt("3")
    then.write()
    then.consolidate()
    other = small_config(tmp_path / "never", train__epochs=1, head__scope=scope)
    never = learn(Mira.open(other, seed=0), 3)
    blobs = [dict(one.workspace.store.view().blob_hashes) for one in (then, never)]
    for each in blobs:
        for name in [*each]:
            if name.startswith(("memory", "peft.")):  # which say ids
                del each[name]
    assert blobs[0] == blobs[1]


# Strangers and copies ---------------------------------------------------------------------------


def _strange(rows: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor] | None:
    first = next(iter(rows))
    match kind:
        case "none":
            return None
        case "fewer":
            return {name: one[:-1].contiguous() for name, one in rows.items()}
        case "twice":
            return {name: torch.cat([one, one[-1:]]) for name, one in rows.items()}
        case "empty":
            return {name: one[:0].contiguous() for name, one in rows.items()}
        case "same":
            return {name: one[:1].expand_as(one).contiguous() for name, one in rows.items()}
        case "far":
            return {**rows, first: rows[first] + 20}
    return {**rows, "count": rows["count"] * torch.inf} if "count" in rows else None


@pytest.mark.parametrize("kind", ["none", "fewer", "twice", "empty", "same", "far", "infinite"])
@pytest.mark.parametrize("blob", ["memory.tasks.0", "memory.adapters.0", "heads.0", "asked.0"])
def test_rows_of_a_stranger_are_refused_or_counted_again(
    learned_copy: Mira, blob: str, kind: str
) -> None:
    store = learned_copy.workspace.store
    wanted = store.view().keys()
    rows = _strange(load(store.view().blob(blob)), kind)
    with store.transaction("strange") as txn:
        if rows is None:
            txn.delete_blob(blob)
        else:
            txn.put_blob(blob, save(rows))
    for act in (
        lambda: Mira.open(learned_copy.config, seed=0).consolidate(),
        lambda: forget(store, ["inverted"]),
        lambda: Mira.open(learned_copy.config, seed=0).attach(),
    ):
        with contextlib.suppress(MemtoolError):
            act()
    if blob == "asked.0" and kind in ("none", "fewer", "twice"):  # is counted again
        assert store.view().keys().shape[1] == wanted.shape[1] - 1


@pytest.mark.parametrize("learned", [[1, 2, 3, 4, 5], [[1, 5]], ["x"], [[1]], 7, {"a": 1}])
def test_what_versions_say_they_learned_is_read_or_skipped(
    learned_copy: Mira, learned: object
) -> None:
    store = learned_copy.workspace.store
    with store.transaction("note", metadata={"learned": learned, "train_accuracy": 1.0}) as txn:
        txn.put_blob("note", b"")
    assert Mira.open(learned_copy.config, seed=0).consolidate().unchanged


def test_a_memory_of_many_tasks_is_copied_and_exported_with_the_same_novelty(
    learned: Mira, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "ALL_OF", 1)
    monkeypatch.setattr(novelty, "OF_MANY", 2)
    model, again = (learned.attach().eval() for _ in range(2))
    images = torch.from_numpy(learned.workspace.stream.tasks[1].test.images[:6].copy())
    with torch.no_grad():
        found = model(images).novelty
        copied = pickle.loads(pickle.dumps(again))  # noqa: S301
        torch.testing.assert_close(copied(images).novelty, found)
        export_model(learned.workspace.store_path, tmp_path / "memory.pt2")
        program = torch.export.load(tmp_path / "memory.pt2").module()
        torch.testing.assert_close(program(model.pixels(images))["novelty"], found)


def test_an_attached_memory_answers_when_its_version_is_gone(
    learned_copy: Mira, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "ALL_OF", 1)
    model = learned_copy.attach().eval()
    images = torch.from_numpy(learned_copy.workspace.stream.tasks[1].test.images[:4].copy())
    forget(learned_copy.workspace.store, ["inverted"], purge=True)
    with torch.inference_mode():
        out = model(images)
    assert bool(out.novelty.isnan().all())
    assert out.probabilities.isfinite().all()
