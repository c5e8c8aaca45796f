"""The same numbers before and after a change: `python -m benchmarks.golden FILE [--against OLDER]`.

Runs small cuts of the presets on one thread of the CPU in float32 with seed 0, by the command line,
and writes what came out: every number of the records, the hashes of adapters, keys and blobs, and
the names under which finished work is kept. The file of another commit, made on the same machine,
is then equal number for number; else every difference is listed and the exit code is 1. Presets
that read MEMTOOL_DATA need it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DIGITS = ["stream.train_per_task=120", "stream.test_per_task=60", "train.epochs=2"]
_IMAGES = ["stream.train_per_task=40", "stream.test_per_task=20", "engine.precision=fp32"]
CUTS: dict[str, list[str]] = {
    "digits-dil": [*_DIGITS, "baselines=[all]"],
    "digits-til": [*_DIGITS, "baselines=[sequential]"],
    "modulation-digits": _DIGITS,
    "moram-digits": [*_DIGITS, "baselines=[sequential]"],
    "mira-cil": [*_IMAGES, "train.epochs=1", "baselines=[none]"],
    "mira-dg": [*_IMAGES, "consolidate.epochs=1", "baselines=[erm]"],
    "moram-xtail-small": [
        "stream.shots=4",
        "stream.test_per_task=20",
        "engine.precision=fp32",
        "train.iterations=3",
        "baselines=[none]",
    ],
    "moram-trace": [
        "stream.train_per_task=8",
        "stream.test_per_task=4",
        "text.epochs=[1,1,1,1,1,1,1,1]",
        "baselines=[sequential]",
    ],
}
"""By preset: the settings that make it small."""

_NEVER_THE_SAME = {"seconds", "created", "environment", "store_version", "configuration"}


def golden(preset: str) -> dict[str, Any]:
    """What one preset gives; a record by its place, a hash by what it is of."""
    with tempfile.TemporaryDirectory() as folder:
        given = [word for cut in CUTS[preset] for word in ("--set", cut)]
        command = ["run", "--preset", preset, *given, "--device", "cpu", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", "from memtool_cli.main import run; run()", *command],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{preset}: {done.stderr}")
        records = [json.loads(line) for line in done.stdout.splitlines()]
        return {
            "records": [_without(record, _NEVER_THE_SAME) for record in records],
            "kept": sorted(_kept(Path(folder))),
            "stores": {
                str(path.parent.relative_to(folder)): _hashes(path.parent)
                for path in sorted(Path(folder).rglob("ice"))
            },
        }


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return [_without(one, keys) for one in value] if isinstance(value, list) else value


def _kept(folder: Path) -> Iterator[str]:
    """Files of `runs` by the names that a later run looks for."""
    for path in (folder / "runs").rglob("*"):
        if path.is_file() and not path.name.endswith(".lock"):
            yield str(path.relative_to(folder))


def _hashes(store: Path) -> dict[str, str]:
    from memtool_stores import MemoryStore

    view = MemoryStore.open(str(store)).view()
    keys = view.keys()
    found = {f"adapter {record.name}": record.sha256 for record in view.live}
    for name in view.blobs():
        data = view.blob(name)
        for record in view.live:  # ids are drawn anew for every store
            data = data.replace(record.id.encode(), record.name.encode())
        found[f"blob {name}"] = hashlib.sha256(data).hexdigest()
    found["keys"] = "none" if keys is None else hashlib.sha256(keys.tobytes()).hexdigest()
    return found


def differences(older: Any, newer: Any, place: str = "") -> Iterator[str]:
    """Every place where two documents differ, with both values."""
    if isinstance(older, dict) and isinstance(newer, dict):
        for key in [*older, *(key for key in newer if key not in older)]:
            where = f"{place}/{key}"
            if key not in newer or key not in older:
                yield f"{where}: only in the {'older' if key in older else 'newer'}"
            else:
                yield from differences(older[key], newer[key], where)
    elif isinstance(older, list) and isinstance(newer, list) and len(older) == len(newer):
        for index, (one, other) in enumerate(zip(older, newer, strict=True)):
            yield from differences(one, other, f"{place}/{index}")
    elif older != newer:
        yield f"{place}: {older!r} -> {newer!r}"


def main(arguments: list[str]) -> int:
    """Make a file, perhaps compare it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path, help="a file that an older commit made")
    parser.add_argument("--only", choices=CUTS, action="append", help="presets; may be repeated")
    given = parser.parse_args(arguments)
    found = {}
    for preset in given.only or CUTS:
        start = time.perf_counter()
        found[preset] = golden(preset)
        print(f"{preset}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        given.file.write_text(json.dumps(found, indent=1, sort_keys=True))
    if given.against is None:
        return 0
    older = json.loads(given.against.read_text())
    listed = list(differences({name: older.get(name) for name in found}, found))
    print("\n".join(listed) or f"{len(found)} presets, equal in every number")
    return 1 if listed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
