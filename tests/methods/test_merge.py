"""Two memories become one: what is kept comes along, and consolidation works from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memtool_stores
from memtool.errors import AlreadyExistsError, MemtoolError, MismatchError, NotFoundError
from memtool.methods.export import export_peft
from memtool.methods.forget import forget
from memtool.methods.merge import merge
from memtool.methods.mira import consolidate as consolidating
from memtool.methods.mira.method import Mira
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.modulation.method import Modulation
from memtool.methods.moram.method import Moram
from memtool_stores import Backbone, MemoryStore, MemoryView, Space
from tests.methods import test_collection
from tests.methods.conftest import small_config
from tests.methods.facts import moram_of
from tests.methods.test_collection import (
    PROMPTS,
    SHAPES,
    opened,
    write_adapter,
    write_prompts,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)


place = test_collection.place


def collected(place: Path, where: Path, *names: str, **changes: object) -> PromptMemory:
    """A memory of these adapters of the collection, each with its prompts, texts and all."""
    method = opened(place, where, **changes)
    where.mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(where / "prompts.jsonl", {name: PROMPTS[name] for name in names})
    folders = [str(place / "adapters" / name) for name in names]
    method.collect(folders, prompts, keep_prompts=True)
    return method


def keys_of(method: PromptMemory | Mira) -> dict[str, np.ndarray]:
    """The key of every adapter after consolidation, by its name."""
    method.consolidate()
    view = method.workspace.store.view()
    keys = view.keys()
    assert keys is not None
    return {record.name: keys[:, n] for n, record in enumerate(view.adapters)}


def kept_of(view: MemoryView) -> dict[str, Any]:
    """All that a memory keeps of every adapter, by its name, whatever ids and numbers are."""
    found = {}
    for record in view.live:
        number, blobs = record.meta["task"], {}
        for begin in ("looks.", "prompts."):
            blobs[begin] = view.blob_hashes.get(f"{begin}{record.id}")
        for begin in ("routing.", "queries.", "features."):
            blobs[begin] = view.blob_hashes.get(f"{begin}{number}")
        blobs["head."] = view.blob_hashes.get(f"head.{record.name}")
        blobs["peft"] = view.blob_hashes[str(record.meta["peft"])]
        meta = {k: v for k, v in record.meta.items() if k not in ("task", "merged_from")}
        found[record.name] = (view.export(record.id), record.scaling, record.pruned, meta, blobs)
    return found


def files_of(store: MemoryStore) -> dict[str, bytes]:
    root = Path(store.url)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# Collections of a language model -----------------------------------------------------------------


def test_a_joined_memory_is_the_one_that_imported_all(place: Path, tmp_path: Path) -> None:
    a = collected(place, tmp_path / "a", "letters")
    b = collected(place, tmp_path / "b", "sums", "turned")
    everything = collected(place, tmp_path / "all", *SHAPES)
    a.consolidate()
    store, other = a.workspace.store, b.workspace.store
    before = files_of(other)
    result = merge(store.url, other.url)
    assert files_of(other) == before  # the source is only read
    assert [one.name for one in result.added] == ["sums", "turned"]
    assert result.renumbered == {"sums": 2, "turned": 3}
    view = store.view()
    assert kept_of(view) == kept_of(everything.workspace.store.view())
    assert [record.meta["task"] for record in view.adapters] == [1, 2, 3]
    origin = {"memory": other.url, "version": other.head()}
    assert view.get("sums").meta["merged_from"] == origin
    assert "merged_from" not in view.get("letters").meta
    assert view.metadata["verb"] == "merge"
    assert view.metadata["from"]["store_id"] == other.view().store_id
    assert a.known_in(view) == (1,)  # until the keys are solved again
    joined, imported = keys_of(a), keys_of(everything)
    assert joined.keys() == imported.keys()
    for name, key in joined.items():
        assert np.array_equal(key, imported[name])
    for name in SHAPES:
        answered = a.retrieve(prompt=PROMPTS[name][0])
        assert answered.answer == everything.retrieve(prompt=PROMPTS[name][0]).answer
    assert store.verify().ok
    store.gc(keep_last=1)
    assert store.verify().ok
    export_peft(a.workspace, None, out=tmp_path / "back")
    for name in SHAPES:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            original = (place / "adapters" / name / file).read_bytes()
            assert (tmp_path / "back" / name / file).read_bytes() == original


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    mine=st.sets(st.sampled_from([*SHAPES])),
    theirs=st.sets(st.sampled_from([*SHAPES]), min_size=1),
)
def test_whatever_is_where_the_union_is_what_was_imported_at_once(
    place: Path,
    tmp_path_factory: pytest.TempPathFactory,
    mine: set[str],
    theirs: set[str],
) -> None:
    """With an empty set of one's own, the memory is a new one."""
    folder = tmp_path_factory.mktemp("law")
    b = collected(place, folder / "b", *sorted(theirs))
    everything = collected(place, folder / "all", *sorted(mine | theirs))
    a = opened(place, folder / "a")
    if mine:
        collected(place, folder / "a", *sorted(mine))
    result = merge(a.workspace.store_path, b.workspace.store.url)
    assert {one.name for one in result.added} == theirs - mine
    assert {one.name for one in result.known} == theirs & mine
    assert result.unchanged == (theirs <= mine)
    view = a.workspace.store.view()
    assert kept_of(view) == kept_of(everything.workspace.store.view())
    numbers = [record.meta["task"] for record in view.adapters]
    assert len({*numbers}) == len(numbers)
    if len(mine | theirs) > 1:
        joined, imported = keys_of(a), keys_of(everything)
        for name, key in joined.items():
            np.testing.assert_allclose(key, imported[name], rtol=2e-4, atol=2e-4)
    head = a.workspace.store.head()
    again = merge(a.workspace.store_path, b.workspace.store.url)
    assert again.unchanged
    assert a.workspace.store.head() == head
    assert not again.added
    assert not again.renumbered


def test_single_tasks_and_older_versions_come_and_go(place: Path, tmp_path: Path) -> None:
    b = collected(place, tmp_path / "b", *SHAPES)
    other = b.workspace.store
    other.tag("whole")
    forget(other, ["sums"])
    target = str(tmp_path / "new")
    merge(target, other.url, ["turned"])
    store = MemoryStore.open(target)
    assert [record.name for record in store.view().live] == ["turned"]
    assert store.view().get("turned").meta["task"] == 3
    with pytest.raises(NotFoundError, match="nothing of 'sums'"):
        merge(target, other.url, ["sums"])
    result = merge(target, f"{other.url}@whole", ["sums", "letters"])
    assert {one.name for one in result.added} == {"letters", "sums"}
    # What was forgotten comes back from an older version of the same memory.
    merge(other.url, f"{other.url}@whole", ["sums"])
    assert {record.name for record in other.view().live} == {*SHAPES}
    assert kept_of(other.view()) == kept_of(other.view("whole"))
    # A task moves: there first, then out of here.
    forget(store, ["turned"])
    assert "turned" not in {record.name for record in store.view().live}
    assert store.verify().ok


def test_what_a_known_adapter_lacks_comes_and_what_it_has_stays(
    place: Path,
    tmp_path: Path,
) -> None:
    a, b = opened(place, tmp_path / "a"), collected(place, tmp_path / "b", "sums")
    folder = str(place / "adapters" / "sums")
    a.collect([folder])
    result = merge(a.workspace.store_path, b.workspace.store.url)
    assert (result.added, result.unchanged) == ((), False)
    assert kept_of(a.workspace.store.view()) == kept_of(b.workspace.store.view())
    other = write_prompts(tmp_path / "other.jsonl", {"sums": PROMPTS["letters"]})
    a.collect([folder], other)
    mine = kept_of(a.workspace.store.view())
    result = merge(a.workspace.store_path, b.workspace.store.url)
    assert "kept in both memories" in result.notes[0]
    after = kept_of(a.workspace.store.view())["sums"][-1]
    assert after["looks."] == mine["sums"][-1]["looks."]


def test_prompts_do_not_come_without_what_they_look_like(place: Path, tmp_path: Path) -> None:
    a, b = opened(place, tmp_path / "a"), opened(place, tmp_path / "b")
    folder = str(place / "adapters" / "sums")
    a.collect([folder], write_prompts(tmp_path / "other.jsonl", {"sums": PROMPTS["letters"]}))
    own = write_prompts(tmp_path / "own.jsonl", {"sums": PROMPTS["sums"]})
    b.collect([folder], own, keep_prompts=True)
    id = a.workspace.store.view().get("sums").id
    merge(a.workspace.store_path, b.workspace.store.url)
    assert f"looks.{id}" in a.workspace.store.view().blobs()
    assert f"prompts.{id}" not in a.workspace.store.view().blobs()


def test_one_task_of_both_is_one_task(place: Path, tmp_path: Path) -> None:
    a, b = opened(place, tmp_path / "a"), opened(place, tmp_path / "b")
    a.collect([f"{place / 'adapters' / 'letters'}:other", f"{place / 'adapters' / 'sums'}:maths"])
    b.collect([f"{place / 'adapters' / 'turned'}:maths"])
    result = merge(a.workspace.store_path, b.workspace.store.url)
    assert result.renumbered == {"maths": 2}
    tasks = {r.name: r.meta["task"] for r in a.workspace.store.view().live}
    assert tasks == {"letters": 1, "sums": 2, "turned": 2}


def test_what_does_not_belong_together_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    a = collected(place, tmp_path / "a", "letters", "sums")
    store = a.workspace.store
    head = store.head()

    def refused(other: PromptMemory | str, error: type[MemtoolError], *words: str) -> None:
        url = other if isinstance(other, str) else other.workspace.store.url
        with pytest.raises(error) as said:
            merge(store.url, url)
        whole = f"{said.value.message} {said.value.expected} {said.value.remedy}"
        assert all(word in whole for word in words), whole
        assert store.head() == head

    looked = collected(place, tmp_path / "b", "turned", **{"memory.look_at": ("final",)})
    refused(looked, MismatchError, "look_at final in the other", "blocks,tokens in this one")
    exact = collected(place, tmp_path / "c", "turned", **{"engine.precision": "bf16"})
    refused(exact, MismatchError, "engine.precision is bf16 in the other memory, and fp32")
    write_adapter(place / "model", tmp_path / "sums", 9, **SHAPES["sums"])
    unlike = opened(place, tmp_path / "d")
    unlike.collect([str(tmp_path / "sums")])
    refused(unlike, AlreadyExistsError, "an adapter named 'sums', and they differ", "forget sums")
    renamed = opened(place, tmp_path / "e")
    renamed.collect([f"{place / 'adapters' / 'sums'}:maths"])
    refused(renamed, AlreadyExistsError, "of task 'maths' in the other", "'sums' in this one")
    space = store.space
    strange = Space(Backbone("hf:other", "", "cd" * 32), space.layout)
    stranger = MemoryStore.create(tmp_path / "f", strange)
    with stranger.transaction("write") as txn:
        txn.add("x", np.zeros(space.numel, np.float32))
    refused(stranger.url, MismatchError, "hf:other (cdcdcdcdcdcd…)", f"{space.backbone.name} (")
    atoms = MemoryStore.create(tmp_path / "g", space)
    refused(atoms.url, NotFoundError, "holds no adapters")
    with atoms.transaction("write") as txn:
        txn.add_atoms("x", np.zeros(space.numel, np.float32), {"task": 1})
    refused(atoms.url, MismatchError, "rows of atoms of moram")
    refused(str(tmp_path / "nowhere"), NotFoundError, "no store at")


KILLED = """
import os, signal, sys
from memtool.methods.merge import merge
from memtool_stores import arrays, parts
target, other, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
arrays.WRITTEN_CHUNKS = 1
real, calls = arrays.put, []
def put(group, files):
    if len(calls) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    real(group, files)
arrays.put = parts.put = put
merge(target, other)
os._exit(0)
"""


@pytest.mark.parametrize("die_at", [0, 3, 6])
def test_a_kill_leaves_nothing_or_everything(place: Path, tmp_path: Path, die_at: int) -> None:
    a = collected(place, tmp_path / "a", "letters")
    b = collected(place, tmp_path / "b", "sums", "turned")
    store, other = a.workspace.store, b.workspace.store
    head = store.head()
    roots = [str(Path(memtool_stores.__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    script = [sys.executable, "-c", KILLED, store.url, other.url, str(die_at)]
    assert subprocess.run(script, env=environment, check=False).returncode == -signal.SIGKILL
    assert store.head() == head
    assert store.verify().ok
    merge(store.url, other.url)
    assert {record.name for record in store.view().live} == {*SHAPES}
    store.gc(keep_last=1)
    assert store.verify().ok


# Images -------------------------------------------------------------------------------------------


def copied(mira: Mira, tmp_path: Path, kind: type = Mira, **changes: object) -> Any:
    """Another memory beside the same trained adapters."""
    config = small_config(tmp_path, runs=mira.config.runs, **changes)
    return kind.open(config, seed=0)


def written(method: Any, *tasks: int) -> Any:
    folder = method.workspace.adapter_folder
    names = [
        name for task in tasks for name in method.adapter_names(method.workspace.task(str(task)))
    ]
    method.write([folder / name for name in names])
    return method


def test_images_are_keyed_from_what_both_memories_counted(
    learned: Mira, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, everything = (
        written(copied(learned, tmp_path / name), *tasks)
        for name, tasks in (("a", (1, 2)), ("b", (3,)), ("all", (1, 2, 3)))
    )
    b.consolidate()
    a.consolidate()
    expected = keys_of(everything)
    merge(a.workspace.store.url, b.workspace.store.url)
    assert set(a.known_tasks("HEAD")) == {1, 2}

    def counted(*args: object, **more: object) -> None:
        raise AssertionError("images were looked at again")

    monkeypatch.setattr(consolidating, "count_task", counted)
    joined = keys_of(a)
    for name, key in joined.items():
        assert np.array_equal(key, expected[name])
    assert a.evaluate().metrics.rows[0].accuracy == everything.evaluate().metrics.rows[0].accuracy
    # The same from an empty memory, which says how it was counted and nothing else.
    new = copied(learned, tmp_path / "new")
    for part in (a, b):
        merge(new.workspace.store_path, part.workspace.store.url)
    fresh = keys_of(new)
    for name, key in fresh.items():
        assert np.array_equal(key, expected[name])


def test_images_that_were_cut_or_counted_otherwise_are_refused(
    learned: Mira, tmp_path: Path
) -> None:
    a = written(copied(learned, tmp_path / "a"), 1, 2)
    other = written(copied(learned, tmp_path / "b", memory__query_norm="none"), 3)
    a.consolidate()
    other.consolidate()
    with pytest.raises(MismatchError, match=r"memory\.query_norm is 'none' in the other"):
        merge(a.workspace.store.url, other.workspace.store.url)
    order = ("rot90", "upright", "inverted")
    reordered = Mira.open(small_config(tmp_path / "c", stream__order=order), seed=0)
    reordered.adapt("1")
    with pytest.raises(MismatchError, match=r"stream\.order is .* in the other memory"):
        merge(a.workspace.store.url, written(reordered, 1).workspace.store.url)


def test_adapters_that_are_recalled_whole_are_joined(learned: Mira, tmp_path: Path) -> None:
    memories = {}
    for name, tasks in (("a", (1, 2)), ("b", (3,))):
        config = small_config(
            tmp_path / name,
            runs=tmp_path / "runs",
            method="modulation",
            stream__setting="til",
            stream__source="digits",
            stream__order=None,
            stream__classes_per_task=4,
            adapter__warm_start="none",
            head__kind="grown",
            modulation__memory=("hopfield", "bayes-pcn"),
        )
        memories[name] = Modulation.open(config, seed=0)
        for task in tasks:
            memories[name].adapt(str(task))
        written(memories[name], *tasks)
    a, b = memories["a"], memories["b"]
    merge(a.workspace.store.url, b.workspace.store.url)
    a.consolidate()
    assert a.known_tasks("HEAD") == (1, 2, 3)
    view = a.workspace.store.view()
    theirs = b.workspace.store.view()
    for record in theirs.live:
        assert np.array_equal(view.value(record.name), theirs.value(record.id))
    assert a.retrieve(task="3").recall_error < 0.1


# Atoms --------------------------------------------------------------------------------------------


def test_atoms_of_texts_are_one_bank(place: Path, tmp_path: Path) -> None:
    a, b = moram_of(place, tmp_path / "a"), moram_of(place, tmp_path / "b")
    for method, task in ((a, "1"), (b, "2")):
        method.adapt(task)
        method.write()
    merge(a.workspace.store.url, b.workspace.store.url)
    assert a.known_tasks("HEAD") == (1, 2)
    values = [a.workspace.store.view().value(r.id) for r in a.workspace.store.view().atom_records]
    assert np.array_equal(values[1], b.workspace.store.view().value("task-2-seed-0"))
    assert len(a.retrieve(prompt="3 and 1 is").tasks) == 2
    again = merge(a.workspace.store.url, b.workspace.store.url)
    assert again.unchanged
    other = moram_of(place, tmp_path / "c", **{"moram.threshold": 0.5})
    other.adapt("3")
    other.write()
    with pytest.raises(MismatchError, match="another gate"):
        merge(a.workspace.store.url, other.workspace.store.url)
    twice = moram_of(place, tmp_path / "d", **{"train.lr": 0.01})
    twice.adapt("2")
    twice.write()
    store = twice.workspace.store
    with store.transaction("rename") as txn:
        txn.update("task-2-seed-0", name="again")
    with pytest.raises(AlreadyExistsError, match="atoms of task 2"):
        merge(a.workspace.store.url, store.url)


def test_atoms_of_images_get_the_head_of_all(learned: Mira, tmp_path: Path) -> None:
    memories = []
    for name, tasks in (("a", (1, 2)), ("b", (3,))):
        config = small_config(
            tmp_path / name,
            method="moram",
            stream__train_per_task=100,
            adapter__warm_start="none",
            adapter__rank=2,
        )
        method = Moram.open(config, seed=0)
        for task in tasks:
            method.adapt(str(task))
            method.write()
        memories.append(method)
    a, b = memories
    merge(a.workspace.store.url, b.workspace.store.url)
    assert a.known_tasks("HEAD") == (1, 2, 3)
    snapshot = a.snapshot()
    assert snapshot.head is not None
    accuracy = a.evaluate().metrics.rows[0].accuracy[-1]
    assert all(score is not None and score > 0.3 for score in accuracy)
    assert merge(a.workspace.store.url, b.workspace.store.url).unchanged
