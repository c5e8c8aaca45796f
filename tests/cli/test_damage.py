"""The command line on a damaged memory: verify lists what is wrong, the others exit with 5."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from memtool_cli.main import main
from memtool_stores import MemoryStore

READING = (
    ["ls"],
    ["log"],
    ["show"],
    ["show", "v1"],
    ["diff", "HEAD~2"],
    ["ls", "--store", "memory@HEAD~1"],
)
CHANGING = (["tag", "v9"], ["rollback", "v1", "--yes"], ["gc", "--dry-run"])


def _files(store: MemoryStore) -> dict[str, Path]:
    """One file of every kind, those that the newest version needs where there are several."""
    ice = Path(store.url) / "ice"
    newest = {
        kind: max((ice / kind).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for kind in ("chunks", "manifests")
    }
    return {
        **newest,
        "oldest chunk": min((ice / "chunks").iterdir(), key=lambda p: p.stat().st_mtime_ns),
        "snapshot": ice / "snapshots" / store.head(),
        "older snapshot": ice / "snapshots" / store.view("HEAD~2").version,
        "transaction log": ice / "transactions" / store.head(),
        "main": ice / "refs" / "branch.main" / "ref.json",
        "tag": ice / "refs" / "tag.v1" / "ref.json",
        "checksums": Path(store.url) / "sums" / store.head(),
    }


KINDS = (
    "chunks",
    "manifests",
    "oldest chunk",
    "snapshot",
    "older snapshot",
    "transaction log",
    "main",
    "tag",
    "checksums",
)


@pytest.mark.parametrize("damage", ["flip", "half", "empty", "gone"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_on_a_damaged_memory(
    memory: MemoryStore,
    here: Path,
    kind: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("MEMTOOL_STORE", "MEMTOOL_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "user"))
    monkeypatch.setenv("MEMTOOL_CACHE", str(here / "cache"))
    monkeypatch.chdir(here)
    memory.tag("v1", "HEAD~1")
    path = _files(memory)[kind]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        bit = random.Random(kind).randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": data, "half": data[: len(data) // 2], "empty": b""}[damage])

    assert main(["verify", "--json"]) == 1
    told = capsys.readouterr()
    record = json.loads(told.out)
    assert record["ok"] is False
    assert record["damages"]
    assert "Traceback" not in told.err
    assert main(["verify", "-q"]) == 1
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(set(listed)) == len(record["damages"])

    for arguments in (*READING, *CHANGING):
        status = main(arguments)
        told = capsys.readouterr()
        assert status in (0, 5), (arguments, told.err)
        if status == 5:
            assert "damaged" in told.err
            assert "memtool verify" in told.err
        assert "Traceback" not in told.err


def test_a_damaged_newest_version_is_left_by_a_rollback(
    memory: MemoryStore, here: Path, memtool
) -> None:
    memory.tag("v1", "HEAD~1")
    path = Path(memory.url) / "ice" / "snapshots" / memory.head()
    path.write_bytes(b"")
    done = memtool("verify")
    assert done.returncode == 1
    assert memory.head() in done.stdout
    assert "Traceback" not in done.stderr
    done = memtool("ls")
    assert done.returncode == 5
    assert done.stdout == ""
    assert "memtool verify" in done.stderr
    assert memtool("rollback", "v1", "--yes").returncode == 0
    assert "task-3" in memtool("ls").stdout
