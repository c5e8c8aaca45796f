"""merge: another memory or single tasks of it, by its folder; torch only where it is needed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from memtool_stores import Backbone, MemoryStore, Space


@pytest.fixture
def other(memory, here):
    """Two more tasks of the same space at ./other, one of which bears a number of ./memory."""
    store = MemoryStore.create(here / "other", memory.space)
    with store.transaction("write") as txn:
        for task, name in ((2, "poems"), (9, "letters")):
            value = np.full(32, task, np.float32)
            txn.add(f"{name}-lora", value, {"task": task, "task_name": name})
            txn.put_blob(f"routing.{task}", name.encode())
    return store


def test_all_of_another_memory_in_a_process_of_its_own(memory, other, process, memtool):
    done = process("merge", "other")
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [
        "adapter",
        "poems-lora",
        "letters-lora",
    ]
    assert "task 'poems' has number 4 in this memory" in done.stderr
    assert "letters" not in done.stderr.partition("next:")[0].replace("letters-lora", "")
    assert "next: memtool consolidate" in done.stderr
    view = memory.view()
    assert view.message == "merge poems-lora, letters-lora of other"
    assert {r.name: r.meta["task"] for r in view.live if "lora" in r.name} == {
        "poems-lora": 4,
        "letters-lora": 9,
    }
    assert (view.blob("routing.4"), view.blob("routing.9")) == (b"poems", b"letters")
    assert view.value("poems-lora").tolist() == [2.0] * 32
    head = memory.head()
    again = memtool("merge", "other")
    assert again.returncode == 0
    assert "nothing new; in memory already: poems-lora, letters-lora" in again.stderr
    assert "next:" not in again.stderr
    assert memory.head() == head
    for verb in ("verify", "gc"):
        assert memtool(verb).returncode == 0


def test_one_task_as_json_and_by_id_into_a_new_memory(other, memtool, here):
    done = memtool("merge", "other", "poems", "--store", "new", "--json")
    said = json.loads(done.stdout)
    assert (said["schema"], said["source"], said["kind"]) == ("memtool.merge", "other", "adapter")
    assert [one["name"] for one in said["added"]] == ["poems-lora"]
    assert (said["version"], said["source_version"]) == (
        MemoryStore.open(here / "new").head(),
        other.head(),
    )
    quiet = memtool("merge", f"other@{other.head()[:6]}", "poems", "--store", "new", "-q")
    assert quiet.stdout.split() == [said["added"][0]["id"]]
    assert quiet.stderr == ""
    # It moves: there first, then out of here.
    assert memtool("forget", "poems", "--store", "other").returncode == 0
    assert memtool("ls", "--store", "new", "-q").stdout.split() == quiet.stdout.split()


def test_torch_is_not_loaded_where_no_state_asks_for_it(other, torchless):
    torchless("merge other")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], 3, "no store at"),
        (["other", "prose"], 3, "did you mean 'poems' or 'poems-lora'?"),
        (["other", "--store", "memory@HEAD~1"], 2, "can be read, not written to"),
        (["stranger"], 2, "the other memory is of strange (cdcdcdcdcdcd…), this one of nano"),
        (["unlike"], 4, "both memories hold an adapter named 'task-1', and they differ"),
        (["empty"], 3, "holds no adapters"),
    ],
)
def test_what_is_refused_leaves_the_memory_as_it_was(
    words, code, said, memory, other, here, memtool
):
    empty = MemoryStore.create(here / "empty", memory.space)
    assert empty.view().live == ()
    for place, space in (
        ("stranger", Space(Backbone("strange", "", "cd" * 32), memory.space.layout)),
        ("unlike", memory.space),
    ):
        with MemoryStore.create(here / place, space).transaction("write") as txn:
            txn.add("task-1", np.zeros(32, np.float32), {"task": 1})
    head = memory.head()
    done = memtool("merge", *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert memory.head() == head


def test_damage_of_the_other_memory_is_met_and_nothing_comes(memory, other, here, memtool):
    for chunk in (here / "other" / "ice" / "chunks").rglob("*"):
        if chunk.is_file() and chunk.stat().st_size == 32 * 4 + 4:
            data = bytearray(chunk.read_bytes())
            data[5] ^= 1
            chunk.write_bytes(data)
    head = memory.head()
    done = memtool("merge", "other")
    assert done.returncode == 5, done.stderr
    assert "poems-lora" in done.stderr
    assert memory.head() == head
    memory.gc()
    assert memory.verify().ok
