"""What killed processes left half made, as doctor names it and gc takes it away."""

from __future__ import annotations

import json
import os

from memtool_stores.files import part, part_folder


def test_what_a_killed_process_left_is_named_and_goes(memtool, memory, here, tmp_path):
    left = [
        part_folder(here / "memory" / "ice" / "dry-run"),
        part(here / "copy.bundle"),
        part_folder(_made(here / "runs" / "seed-0" / "adapters") / "task-1"),
        part(_made(tmp_path / "cache" / "stores" / "another") / "x.values"),
    ]
    (left[2] / "adapter_model.safetensors").write_bytes(bytes(2000))
    found = json.loads(memtool("doctor", "--json").stdout)
    (check,) = [check for check in found["checks"] if check["name"] == "leftovers"]
    assert all(str(path) in check["found"] for path in left)
    assert (check["ok"], check["remedy"]) == (True, "memtool gc")

    def gc(*arguments):
        done = memtool("gc", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout)["leftovers"])

    # Whoever makes what lies outside of the memory may be at work.
    assert gc("--dry-run") == {str(left[0])}
    assert left[0].is_dir()
    for path in (*left, *left[2].iterdir()):
        os.utime(path, (0, 0))
    assert gc("--dry-run") == set(map(str, left))
    assert all(path.exists() for path in left)
    assert gc() == set(map(str, left))
    assert not any(path.exists() for path in left)
    assert gc() == set()
    found = json.loads(memtool("doctor", "--json").stdout)
    assert {"leftovers": "none"}.items() <= {c["name"]: c["found"] for c in found["checks"]}.items()


def _made(folder):
    folder.mkdir(parents=True)
    return folder
