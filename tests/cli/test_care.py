"""Forgetting, bisect, pages of ls and deleted names, as a user types them."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess

import numpy as np
import pytest

from memtool.config import resolve
from memtool.methods.mira.method import Mira
from memtool_stores import MemoryStore
from tests.cli.test_history import document
from tests.methods.conftest import learn

SMALL = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "60",
    "MEMTOOL_STREAM__TEST_PER_TASK": "60",
    "MEMTOOL_TRAIN__EPOCHS": "2",
    "MEMTOOL_ENGINE__DEVICE": "cpu",
}


@pytest.fixture
def crowd(memory):
    """121 adapters: three of the fixture, and 118 of task 4 in one version."""
    with memory.transaction("write many") as txn:
        for number in range(118):
            value = np.full(32, number, np.float32)
            txn.add(f"many-{number:03}", value, {"task": 4, "task_name": "crowd"})
    return memory


def test_ls_gives_a_script_all_of_them_unless_told_otherwise(crowd, memtool):
    assert len(memtool("ls", "-q").stdout.split()) == 121
    record = document(memtool("ls", "--json"))
    assert record["total"] == len(record["adapters"]) == 121
    assert {adapter["kind"] for adapter in record["adapters"]} == {"adapter"}
    page = memtool("ls", "--limit", "50", "--page", "3", "--json")
    assert document(page)["adapters"][0]["name"] == "many-097"
    assert document(page)["total"] == 121
    assert "101 to 121 of 121" in page.stderr
    beyond = memtool("ls", "--limit", "50", "--page", "4")
    assert (beyond.returncode, beyond.stdout) == (3, "")
    assert "page 4 of a list of 121 adapters" in beyond.stderr
    assert "--page 1 to 3" in beyond.stderr
    second = memtool("ls", "--page", "2", "-q")
    assert len(second.stdout.split()) == 21


def test_ls_filters_by_task_name_and_pattern(crowd, memtool):
    assert document(memtool("ls", "--task", "crowd", "--json"))["total"] == 118
    assert document(memtool("ls", "--task", "2", "--json"))["total"] == 1
    found = memtool("ls", "--match", "many-00*", "-n", "4")
    assert [line.split("\t")[1] for line in found.stdout.splitlines()[1:]] == [
        "many-000",
        "many-001",
        "many-002",
        "many-003",
    ]
    assert "1 to 4 of 10" in found.stderr
    assert "memtool ls --match 'many-00*' --limit 4 --page 2" in found.stderr
    nothing = memtool("ls", "--match", "none-*", "-q")
    assert (nothing.returncode, nothing.stdout) == (0, "")


def test_a_terminal_gets_a_page_and_is_told_of_the_next(crowd, here, environ, start):
    master, slave = pty.openpty()
    done = subprocess.Popen(
        [*start, "ls"],
        cwd=here,
        env=environ | {"TERM": "xterm-256color"},
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed: how a pty says so
            break
        if not part:
            break
        shown += part
    os.close(master)
    _, said = done.communicate(timeout=60)
    assert shown.decode().count("many-") == 97
    assert "1 to 100 of 121" in said
    assert "memtool ls --page 2" in said


def test_rows_of_atoms_are_listed_by_their_kind(memory, memtool):
    with memory.transaction("atoms") as txn:
        txn.add_atoms("atoms-1", np.ones(32, np.float32), {"task": 1})
    record = document(memtool("ls", "--task", "1", "--json"))
    assert [(a["name"], a["kind"]) for a in record["adapters"]] == [
        ("task-1", "adapter"),
        ("atoms-1", "atoms"),
    ]


def test_tags_and_backups_are_deleted_by_name(memory, memtool):
    memory.tag("v1")
    backup = memory.rollback("HEAD~1")
    assert memtool("tag", "--delete", "v1").returncode == 2  # nobody is there to ask
    assert document(memtool("tag", "--delete", "v1", "--yes", "--json"))["name"] == "v1"
    assert memory.tags() == {}
    assert memtool("tag", "--delete", backup, "--yes", "-q").stdout.split() == [backup]
    assert set(memory.branches()) == {"main"}
    for name in ("v1", "main"):
        done = memtool("tag", "--delete", name, "--yes")
        assert done.returncode == 3
        assert name in done.stderr


def test_forget_without_a_consolidated_memory_needs_no_torch(memory, torchless):
    torchless("forget --dry-run task-2", "forget 2", "forget 1 --purge --yes")
    assert [record.name for record in memory.view().adapters] == ["task-3"]


def test_forget_plans_commits_and_says_where_it_still_is(memory, memtool, here):
    head = memory.head()
    plan = document(memtool("forget", "task-2", "3", "--dry-run", "--json"))
    assert plan["adapters"] == ["task-2", "task-3"]
    assert memory.head() == head
    (here / "runs" / "adapters" / "task-2").mkdir(parents=True)
    done = memtool("forget", "task-2", "--json")
    record = document(done)
    assert record["schema"] == "memtool.forget"
    assert (record["adapters"], record["left"], record["purged"]) == (["task-2"], 2, None)
    assert memory.head() == record["version"] != head
    assert "memtool rollback" in done.stderr
    assert "runs/adapters/task-2: still there" in done.stderr
    gone = memtool("forget", "task-2")
    assert gone.returncode == 3
    assert "nothing of 'task-2'" in gone.stderr


def test_purge_refuses_while_names_keep_it_and_then_proves(memory, memtool):
    memory.tag("v1")
    backup = memory.rollback("HEAD~1")
    head = memory.head()
    plan = document(memtool("forget", "2", "--purge", "--dry-run", "--json"))
    assert plan["holders"] == [backup, "v1"]
    refused = memtool("forget", "2", "--purge", "--yes")
    assert refused.returncode == 4
    assert refused.stdout == ""
    assert f"memtool tag --delete {backup}" in refused.stderr
    assert "memtool tag --delete v1" in refused.stderr
    assert memory.head() == head
    for name in ("v1", backup):
        assert memtool("tag", "--delete", name, "--yes").returncode == 0
    unasked = memtool("forget", "2", "--purge")
    assert unasked.returncode == 2
    assert "all older versions of main" in unasked.stderr
    row = memory.view().get("task-2").sha256
    assert memory.find_bytes([row])
    done = memtool("forget", "2", "--purge", "--yes")
    assert done.returncode == 0, done.stderr
    assert "objects looked at, 0 hold it" in done.stdout
    assert "gone: " in done.stdout
    fresh = MemoryStore.open(memory.url)
    assert fresh.find_bytes([row]) == {}
    assert len(fresh.log()) == 1
    assert memtool("verify").returncode == 0


def test_purge_exits_with_1_when_bytes_are_left(memory, memtool, here):
    (here / "memory" / "a-copy").write_bytes(memory.view().value("task-2").tobytes())
    done = memtool("forget", "2", "--purge", "--yes", "--json")
    assert done.returncode == 1
    record = json.loads(done.stdout)
    assert record["purged"]["left"] == {"adapter task-2": ["a-copy"]}
    assert "memtool forget 2 --purge" in done.stderr


@pytest.fixture(scope="module")
def _three(tmp_path_factory):
    """A folder with three tasks in memory, which are learned once."""
    folder = tmp_path_factory.mktemp("three")
    places = {"store": str(folder / "memory"), "runs": str(folder / "runs")}
    config = resolve(preset="digits-dil", overrides=places, environ=SMALL, cwd=folder).config
    learn(Mira.open(config, seed=0))
    return folder


@pytest.fixture
def spoiled(_three, here):
    """Three tasks in memory; then keys turned over, and a harmless commit."""
    shutil.copytree(_three, here, dirs_exist_ok=True)
    store = MemoryStore.open(here / "memory")
    with store.transaction("keys turned over") as txn:
        txn.set_keys(np.ascontiguousarray(store.view().keys()[:, ::-1]))
    with store.transaction("a note") as txn:
        txn.put_blob("note", b"1")
    return store


def test_bisect_names_the_commit_and_rollback_undoes_it(spoiled, memtool):
    line = spoiled.log()
    arguments = ("bisect", "--drop", "10", "--good", "HEAD~2")
    done = memtool(*arguments, "--json", **SMALL)
    record = document(done)
    assert record["schema"] == "memtool.bisect"
    assert record["culprit"]["version"] == line[1].id
    assert record["tasks"] == ["upright", "inverted", "rot90"]
    assert "first bad" in done.stderr
    quiet = memtool(*arguments, "-q", **SMALL)
    assert quiet.stdout.split() == [line[1].id]
    assert quiet.stderr == ""
    never = memtool("bisect", "--drop", "10", "--good", "HEAD~3", "--bad", "HEAD~2", **SMALL)
    assert never.returncode == 1
    assert "never fell" in never.stderr
    assert never.stderr.count(" %") == 2
    header, *rows = never.stdout.splitlines()
    assert header.split("\t")[:4] == ["version", "time", "message", "faa"]
    assert len(rows) == 2
    assert all(row.endswith("\tgood") for row in rows)
    undone = memtool("rollback", f"{record['culprit']['version']}~1", "--yes")
    assert undone.returncode == 0, undone.stderr
    assert spoiled.head() == line[2].id


def test_forget_a_task_of_a_consolidated_memory(spoiled, memtool):
    assert memtool("rollback", "HEAD~2", "--yes").returncode == 0
    record = document(memtool("forget", "inverted", "--json"))
    assert record["tasks"] == [2]
    left = document(memtool("retrieve", "--task", "3", "--json", **SMALL))
    assert [a["name"] for a in left["adapters"]] == ["task-1-seed-0", "task-3-seed-0"]
    assert memtool("forget", "1", "3", "-q").returncode == 0
    empty = memtool("retrieve", "--task", "3", **SMALL)
    assert empty.returncode == 2
    assert "never consolidated" in empty.stderr
