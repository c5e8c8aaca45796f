"""The store from 100 to 10,000 adapters (`--full`: 100,000): commit, open, ls, verify and gc.

Adapters are small (rank 1, 64 float32), so that their number is what is measured and 100,000 fit
on a disk; each has a key of two layers and a blob of its own, as its head would be. A store is made
by commits of 5,000, so that versions are few. Then, at every number T of adapters in the same
rounds:

 * append: one adapter, its key, its blob and a state that is put in the place of the old one, in
   one commit by a process that has read the catalog before, as in a training run.
 * bytes: what such a commit leaves in files of its own.
 * open: of a store by a process that has imported everything.
 * page: the first 50 records by a store that was just opened, as for `memtool ls --limit 50`.
 * ls, verify, gc: all records of a version by a store that was just opened; everything read and
   checked; all versions but the newest deleted. Linear in T: seconds by thousand adapters,
   against those of the T before it. The memory is the peak of a process that does only that, over
   one that only opens the store.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store import opening_warm, workplace
from benchmarks.timing import case, environment, figure, interleaved, progress
from memtool_stores import Backbone, Layout, MemoryStore, Segment, Space

SIZES = (100, 10_000)
FULL = (*SIZES, 100_000)
WIDTH, LAYERS, KEY_WIDTH, BLOB_BYTES = 32, 2, 16, 200

AT_ONCE = 5_000
"""Adapters of one commit while a store is made."""

PAGE = 50
"""Records of a page: fewer than the smallest store has, of which all would be read otherwise."""

FILE_BYTES = 20_000
"""About what an adapter takes on a disk whose blocks are of 4 KiB, and its part of all else."""

APPENDS = 5
"""Appends a repeat: some commits close a manifest or a page, and most do not."""

PEAK = """
import os, re, sys
from memtool_stores import MemoryStore
store = MemoryStore.open(sys.argv[1])
match sys.argv[2]:
    case "ls":
        assert store.view().adapters
    case "verify":
        assert store.verify().ok
    case "gc":
        assert store.gc(keep_last=1)
print(int(re.search(r"VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1]) / 1024)
sys.stdout.flush()
os._exit(0)
"""
"""Not `ru_maxrss`, which a process has from the one that started it; and not the end of Python, at
which threads of icechunk may abort."""


def sizes_of(full: bool) -> tuple[int, ...]:
    """Numbers of adapters that end in minutes, or all."""
    return FULL if full else SIZES


def run(repeats: int, sizes: Sequence[int] = (), full: bool = False) -> dict[str, Any]:
    """All cases at every T of `sizes`, or without any of `sizes_of`."""
    measured = sorted(set(sizes or sizes_of(full)))
    cases = store_cases(repeats, measured)
    return {
        "benchmark": "scale_store",
        "environment": environment(),
        "sizes": measured,
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def store_cases(repeats: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The cases alone, for a report that has others beside them."""
    sizes = sorted(set(sizes))
    with workplace(sum(sizes) * FILE_BYTES + (1 << 26)) as folder:
        built = [Built.made(folder / f"store-{size}", size) for size in sizes]
        cases = appending(built, repeats)
        cases += opening_warm({one.size: one.folder for one in built}, APPENDS * repeats)
        cases += paging(built, APPENDS * repeats)
        for what in DOING:
            cases += caring(built, what)
    return cases


@dataclass(frozen=True)
class Built:
    """A store of `size` adapters."""

    store: MemoryStore
    folder: Path
    size: int

    @classmethod
    def made(cls, folder: Path, size: int) -> Built:
        """Make it in a few commits."""
        store = MemoryStore.create(folder, space())
        begin = time.perf_counter()
        for first in range(0, size, AT_ONCE):
            append(store, min(AT_ONCE, size - first))
        progress(f"T = {size}: made in {time.perf_counter() - begin:.0f} s")
        return cls(store, folder, size)


def space() -> Space:
    """One layer with LoRA of rank 1."""
    a, b = Segment("fc.lora_A", (1, WIDTH), 0), Segment("fc.lora_B", (WIDTH, 1), WIDTH)
    return Space(Backbone("small", "", "0" * 64), Layout((a, b), "float32", 1, 1.0, ("fc",)))


def append(store: MemoryStore, count: int = 1) -> None:
    """So many adapters with their keys and blobs, and a state in the place of the old one."""
    with store.transaction("append") as transaction:
        first = transaction.base.state.rows
        generator = np.random.default_rng(first)
        for task in range(first, first + count):
            values = generator.standard_normal(2 * WIDTH, dtype=np.float32)
            transaction.add(f"task-{task}", values, {"task": task, "domain": "noise"})
            transaction.put_blob(f"head.task-{task}", generator.bytes(BLOB_BYTES))
        shape = (LAYERS, count, KEY_WIDTH)
        transaction.add_keys(generator.standard_normal(shape, dtype=np.float32))
        transaction.put_blob("memory", b"{}" + bytes(BLOB_BYTES))


def appending(built: Sequence[Built], repeats: int) -> list[dict[str, Any]]:
    """Seconds and bytes of one more adapter."""
    labels = {one.size: f"append at T = {one.size}" for one in built}
    for one in built:
        append(one.store)
    before = {one.size: written(one.folder) for one in built}
    rounds = APPENDS * repeats
    seconds = interleaved(
        {labels[one.size]: partial(append, one.store) for one in built}, rounds, before=os.sync
    )
    # One round before the first is not timed, but written.
    nbytes = {one.size: (written(one.folder) - before[one.size]) / (rounds + 1) for one in built}
    cases = [
        figure(f"bytes of a commit, T = {one.size}", "kB", nbytes[one.size] / 1e3, 150.0)
        for one in built
    ]
    few, *more = labels.values()
    return [*cases, *(case(f"{many}, over few", seconds, many, few, at_most=1.2) for many in more)]


def written(folder: Path) -> int:
    """Bytes of all files of a store; a commit adds files and deletes none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def paging(built: Sequence[Built], rounds: int) -> list[dict[str, Any]]:
    """Seconds to open a store and read its first records."""
    labels = {one.size: f"page at T = {one.size}" for one in built}
    seconds = interleaved({labels[one.size]: partial(page, one) for one in built}, rounds)
    few, *more = labels.values()
    return [case(f"{many}, over few", seconds, many, few, at_most=1.5) for many in more]


def page(built: Built) -> None:
    """The first records of a version by a store that was just opened."""
    if len(MemoryStore.open(built.folder).view().page(0, PAGE)) < min(PAGE, built.size):
        raise AssertionError(f"adapters of {built.folder} are missing")


def caring(built: Sequence[Built], what: str) -> list[dict[str, Any]]:
    """Seconds by thousand adapters for what is linear in T, and the memory that it takes."""
    cases, last = [], None
    for one in built:
        append(one.store)
        begin = time.perf_counter()
        DOING[what](one)
        seconds = time.perf_counter() - begin
        by_thousand = 1e3 * seconds / one.size
        name = f"{what} by thousand adapters, T = {one.size}"
        if last is not None:
            said = "seconds, over those of the T before it"
            cases.append(figure(name, said, by_thousand / last, 1.5, seconds=seconds))
        last = by_thousand
    largest = built[-1]
    peaks = {doing: peak(largest.folder, doing) for doing in ("open", what)}
    name = f"memory of {what}, T = {largest.size}"
    more = {"megabytes_to_open": peaks["open"]}
    cases.append(figure(name, "megabytes over open", peaks[what] - peaks["open"], 400.0, **more))
    return cases


def ls(built: Built) -> None:
    """All records of a version by a store that was just opened."""
    if len(MemoryStore.open(built.folder).view().adapters) < built.size:
        raise AssertionError(f"adapters of {built.folder} are missing")


def verify(built: Built) -> None:
    """Everything that lies in a store, read and checked."""
    if not built.store.verify().ok:
        raise AssertionError(f"the store at {built.folder} is damaged")


def gc(built: Built) -> None:
    """All versions but the newest go."""
    built.store.gc(keep_last=1)


DOING = {"ls": ls, "verify": verify, "gc": gc}


def peak(folder: Path, what: str) -> float:
    """Megabytes that a process of its own has in memory at most."""
    command = [sys.executable, "-c", PEAK, str(folder), what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)
