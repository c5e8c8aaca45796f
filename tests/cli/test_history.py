"""The verbs that only the store is asked for, on a real memory."""

from __future__ import annotations

import json
import zipfile
from datetime import datetime
from pathlib import Path

from memtool_stores.migrate import SCHEMA_VERSION

STORES = Path(__file__).parents[1] / "stores" / "fixtures"


def document(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    assert record["schema"].startswith("memtool.")
    assert record["schema_version"] == (2 if record["schema"] == "memtool.verify" else 1)
    return record


def test_log(memory, memtool):
    record = document(memtool("log", "--json"))
    assert record["schema"] == "memtool.log"
    said = [version["message"] for version in record["versions"]]
    assert said[:4] == ["consolidate", "write task 3", "write task 2", "write task 1"]
    assert record["versions"][1]["metadata"] == {"seed": 0}
    assert datetime.fromisoformat(record["versions"][0]["time"]).tzinfo is not None
    ids = memtool("log", "-q").stdout.split()
    assert ids == [version["id"] for version in record["versions"]]
    assert memtool("log", "-n", "2", "-q").stdout.split() == ids[:2]
    assert memtool("log", "-q", "--store", "memory@HEAD~1").stdout.split() == ids[1:]
    header, first, *_ = memtool("log").stdout.splitlines()
    assert header.split("\t") == ["version", "time", "message", "names"]
    assert first.split("\t")[0] == ids[0]
    assert first.split("\t")[3] == "main"


def test_ls_at_any_version(memory, memtool):
    record = document(memtool("ls", "--json"))
    assert [adapter["name"] for adapter in record["adapters"]] == ["task-1", "task-2", "task-3"]
    assert [adapter["task"] for adapter in record["adapters"]] == [1, 2, 3]
    ids = memtool("ls", "-q").stdout.split()
    assert ids == [adapter["id"] for adapter in record["adapters"]]
    assert memtool("ls", "-q", "--store", "memory@HEAD~2").stdout.split() == ids[:2]


def test_show(memory, memtool):
    record = document(memtool("show", "--json"))
    assert record["keys"] == [2, 3, 8]
    assert record["backbone"] == "nano"
    assert record["numbers_per_adapter"] == 32
    older = document(memtool("show", "HEAD~1", "--json"))
    assert older["keys"] is None
    assert older["version"]["message"] == "write task 3"
    assert memtool("show", "-q").stdout.strip() == record["version"]["id"]


def test_diff(memory, memtool):
    record = document(memtool("diff", "HEAD~2", "--json"))
    assert [adapter["name"] for adapter in record["added"]] == ["task-3"]
    assert record["removed"] == []
    assert memtool("diff", "HEAD~3", "HEAD~1", "-q").stdout.split() == ["task-2", "task-3"]


def test_tag_rollback_and_the_way_back(memory, memtool):
    head = memory.head()
    assert document(memtool("tag", "v1", "--json"))["version"] == head
    done = memtool("rollback", "HEAD~1", "--yes", "--json")
    record = document(done)
    assert record["before"] == head
    assert memory.head() == record["version"] != head
    assert f"memtool rollback {record['backup']}" in done.stderr
    assert memtool("rollback", record["backup"], "--yes").returncode == 0
    assert memory.head() == head


def test_verify(memory, memtool):
    record = document(memtool("verify", "--json"))
    assert record["ok"] is True
    assert record["rows"] == 3
    assert record["damages"] == []
    assert memtool("verify", "-q").stdout == ""


def test_gc_asks_plans_and_frees(memory, memtool):
    plan = document(memtool("gc", "--keep-last", "1", "--dry-run", "--json"))
    assert plan["dry_run"] is True
    assert len(memory.log()) == 5
    done = document(memtool("gc", "--keep-last", "1", "--yes", "--json"))
    assert done["expired"] == plan["expired"] != []
    assert memory.log()[0].id == memory.head()
    assert memtool("verify").returncode == 0


def test_migrate_says_what_it_would_do_and_does_it(memtool, here):
    with zipfile.ZipFile(STORES / "schema-1.zip") as archive:
        archive.extractall(here / "old")

    def files():
        return {path: path.stat().st_mtime_ns for path in sorted((here / "old").rglob("*"))}

    before = files()
    told = memtool("migrate", "--dry-run", "--store", "old")
    assert told.returncode == 0, told.stderr
    header, main, side = (line.split("\t") for line in told.stdout.splitlines())
    assert header == ["branch", "version", "schema", "to", "rows", "blobs", "would do"]
    assert (main[0], main[2:]) == ("main", ["1", f"{SCHEMA_VERSION}", "4", "1", "one commit"])
    assert (side[0], side[2:]) == ("side", ["1", f"{SCHEMA_VERSION}", "3", "1", "one commit"])
    assert "nothing was changed" in told.stderr
    assert "next: memtool migrate --store old" in told.stderr
    record = document(memtool("migrate", "--dry-run", "--json", "--store", "old"))
    assert (record["dry_run"], record["schema_to"]) == (True, SCHEMA_VERSION)
    assert [branch["committed"] for branch in record["branches"]] == [None, None]
    assert memtool("migrate", "--dry-run", "-q", "--store", "old").stdout == ""
    said = f"schema 1: the next commit brings it to {SCHEMA_VERSION}"
    assert said in memtool("doctor", "--store", "old").stdout
    assert files() == before

    done = memtool("migrate", "-q", "--store", "old")
    assert done.returncode == 0, done.stderr
    newest = memtool("log", "-q", "-n", "1", "--store", "old").stdout
    assert done.stdout.splitlines(keepends=True)[0] == newest
    again = memtool("migrate", "--store", "old")
    assert again.returncode == 0
    assert "there is nothing to do" in again.stderr


def test_what_cannot_be_migrated(memory, memtool):
    assert memtool("migrate", "--store", "memory@HEAD~1").returncode == 2
    assert memtool("migrate", "--dry-run", "--store", "nowhere").returncode == 3
