"""The store on disk: writing, reading and room, beside safetensors files and memcpy.

Adapters of ViT-Tiny size (rank 4 on q and v of 12 blocks: 36,864 float32, 147 KB) are appended one
commit at a time, in one store for each number T of adapters. Everything lies in one temporary
folder (TMPDIR says where), so that store and peer share a disk. The peers:

 * `save_file`, `load_file`: of safetensors.numpy, for one adapter of 48 tensors; every save makes a
   new file. `save + fsync` syncs that file as well. A commit of the store always syncs.
 * keys: `save_file` of the same array (12, T, 192), one tensor, and fsync.
 * memcpy: as many bytes as the layer has, in one piece, from an array in memory of the size of all
   values. The layer (one tensor of all adapters) turns through all 48 tensors from call to call,
   the piece through all of the array, so that neither is in the processor's cache from before.
 * payload: the bytes of the values, and of the keys where there are any. Room on disk is in blocks
   that the file system gave out, those of folders too.

Before anything that writes is timed, the system's write buffers are empty: a commit syncs the whole
file system, and would pay for what its peer has left there.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from benchmarks.timing import case, environment, figure, interleaved, progress, ratio
from memtool_stores import Backbone, Layout, MemoryStore, MemoryView, Segment, Space

SIZES = (100, 1_000, 10_000)
DEPTH, WIDTH, RANK = 12, 192, 4

KEYS_FROM = 10_000
"""From this T on the commit of keys has a limit; for fewer keys it is an append without a row."""

GROWTH = 512
"""Bytes per append are those of the last so many: what one append rewrites is largest there."""

FILES = 100
"""Safetensors files that `load_file` turns through."""

ROUNDS = 5
"""Rounds for each repeat, where a call takes milliseconds at most."""

Values = npt.NDArray[np.float32]


def run(repeats: int, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """All cases at every T of `sizes`; some minutes, mostly for the commits of the largest."""
    with workplace(room(sizes, repeats)) as folder:
        peer = Files.written(folder / "files", min(FILES, max(sizes)))
        built = [Built.grown(folder / f"store-{size}", size) for size in sorted(set(sizes))]
        cases = [bytes_per_append(one) for one in built]
        cases += opening(built, repeats)
        for one in built:
            cases += reading(one, peer, repeats)
        for one in built:
            if one.size >= KEYS_FROM:
                cases.append(keys_commit(one, folder, repeats))
        cases += appending(built, peer, repeats)
        cases += [room_after_gc(one) for one in built]
    return {
        "benchmark": "store",
        "environment": environment(),
        "sizes": [one.size for one in built],
        "payload_bytes": space().layout.nbytes,
        "seconds_of_all_appends": {one.size: one.seconds for one in built},
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def room(sizes: Sequence[int], repeats: int) -> int:
    """Bytes that stores of these sizes and their peers take."""
    payload = sum(sizes) * space().layout.nbytes
    keys = sum(DEPTH * size * WIDTH * 4 for size in sizes if size >= KEYS_FROM)
    # The stores and their caches; a version of the keys and two files for every repeat.
    return int(2.4 * payload) + 3 * (repeats + 1) * keys + (1 << 28)


@contextmanager
def workplace(needed: int) -> Iterator[Path]:
    """A temporary folder with room for so many bytes, and the cache of the store in it."""
    before = os.environ.get("MEMTOOL_CACHE")
    with tempfile.TemporaryDirectory(prefix="memtool-bench-") as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(
                f"{folder.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: "
                "set TMPDIR to a larger disk, or give fewer adapters with --sizes"
            )
        os.environ["MEMTOOL_CACHE"] = str(folder / "cache")
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["MEMTOOL_CACHE"]
            else:
                os.environ["MEMTOOL_CACHE"] = before


def space() -> Space:
    """ViT-Tiny with LoRA of rank 4 on q and v."""
    segments: list[Segment] = []
    offset = 0
    for block, name in itertools.product(range(DEPTH), "qv"):
        for side, shape in (("lora_A", (RANK, WIDTH)), ("lora_B", (WIDTH, RANK))):
            segments.append(Segment(f"blocks.{block}.attn.qkv[{name}].{side}", shape, offset))
            offset += RANK * WIDTH
    layout = Layout(tuple(segments), "float32", RANK, 2.0 * RANK, ("q", "v"))
    return Space(Backbone("vit_tiny_patch16_224", "", "0" * 64), layout)


def value(number: int) -> Values:
    """A trained adapter looks like noise; the same noise for a number, (36864,)."""
    return np.random.default_rng(number).standard_normal(space().numel, dtype=np.float32)


def tensors(flat: Values) -> dict[str, Values]:
    """The tensors of a value by name, without a copy."""
    return {
        segment.name: flat[segment.offset : segment.offset + segment.numel].reshape(segment.shape)
        for segment in space().layout.segments
    }


def allocated(folder: Path) -> int:
    """Bytes on disk of a folder and all in it."""
    os.sync()
    return sum(path.lstat().st_blocks * 512 for path in (folder, *folder.rglob("*")))


class Turn:
    """Calls a function with the next of some things every time, round and round."""

    def __init__(self, function: Callable[[Any], object], things: Sequence[Any]) -> None:
        self._function = function
        self._things = itertools.cycle(things)

    def __call__(self) -> None:
        """The next one."""
        self._function(next(self._things))


@dataclass(frozen=True)
class Files:
    """The peer: adapters as safetensors files in a folder."""

    folder: Path
    paths: tuple[Path, ...]
    adapter: Mapping[str, Values]

    @classmethod
    def written(cls, folder: Path, count: int) -> Files:
        """So many files."""
        folder.mkdir()
        paths = tuple(folder / f"{number}.safetensors" for number in range(count))
        for number, path in enumerate(paths):
            save_file(tensors(value(number)), path)
        return cls(folder, paths, tensors(value(0)))

    def save(self) -> Path:
        """One adapter as a new file."""
        path = self.folder / f"{time.monotonic_ns()}.safetensors"
        save_file(dict(self.adapter), path)
        return path

    def save_and_sync(self) -> None:
        """The same, on the disk when it returns."""
        sync(self.save())


def sync(path: Path) -> None:
    """The file is on the disk when this returns."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Built:
    """A store of `size` adapters, each a commit, and what the last of them took on the disk."""

    store: MemoryStore
    folder: Path
    size: int
    seconds: float
    last: int
    last_bytes: int

    @classmethod
    def grown(cls, folder: Path, size: int) -> Built:
        """Append them one by one."""
        store = MemoryStore.create(folder, space())
        last = min(GROWTH, size)
        before = 0
        begin = time.perf_counter()
        for number in range(size):
            if number == size - last:
                before = allocated(folder)
            append(store, value(number))
        seconds = time.perf_counter() - begin
        progress(f"T = {size}: {size} commits in {seconds:.0f} s")
        return cls(store, folder, size, seconds, last, allocated(folder) - before)


def append(store: MemoryStore, values: Values) -> None:
    """One adapter in one commit."""
    with store.transaction("append an adapter") as transaction:
        number = transaction.base.state.rows
        transaction.add(f"task-{number}", values, {"task": number, "domain": "noise"})


def bytes_per_append(built: Built) -> dict[str, Any]:
    """What an append puts on the disk, all that is not its value included."""
    payload = built.last * space().layout.nbytes
    return figure(
        f"bytes per append, T = {built.size}",
        f"growth on disk in the last {built.last} appends / payload",
        built.last_bytes / payload,
        1.25,
    )


def opening(built: Sequence[Built], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds to open a store, also in a new process, and to its first catalog."""
    warm = opening_warm({one.size: one.folder for one in built}, ROUNDS * repeats)
    return [
        {
            **found,
            "cold_milliseconds": 1e3 * statistics.median(cold_open(one) for _ in range(3)),
            "catalog_milliseconds": 1e3 * statistics.median(first_catalog(one) for _ in range(3)),
        }
        for found, one in zip(warm, built, strict=True)
    ]


def opening_warm(folders: Mapping[int, Path], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds to open the store of so many adapters, when the modules are there."""
    calls = {str(size): partial(MemoryStore.open, folder) for size, folder in folders.items()}
    seconds = interleaved(calls, rounds)
    return [
        figure(
            f"open, T = {size}", "milliseconds", 1e3 * statistics.median(seconds[str(size)]), 10.0
        )
        for size in folders
    ]


def cold_open(built: Built) -> float:
    """Seconds to import and open in a new process, less the start of Python."""
    program = (
        "import os, sys, time; begin = time.perf_counter();"
        "from memtool_stores import MemoryStore; MemoryStore.open(sys.argv[1]);"
        "print(time.perf_counter() - begin, flush=True); os._exit(0)"  # not the end of Python
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(built.folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(found.stdout)


def first_catalog(built: Built) -> float:
    """Seconds from an opened store to the names of its adapters."""
    store = MemoryStore.open(built.folder)
    begin = time.perf_counter()
    found = len(store.view().adapters)
    seconds = time.perf_counter() - begin
    if found != built.size:
        raise AssertionError(f"{found} adapters in a store of {built.size}")
    return seconds


def reading(built: Built, peer: Files, repeats: int) -> list[dict[str, Any]]:
    """One adapter from the store and from the cache, and a layer of all from the cache."""
    view = built.store.view()
    names = [f"task-{number}" for number in range(min(FILES, built.size))]
    for path, name in zip(peer.paths, names, strict=False):
        flat = np.concatenate([tensor.ravel() for tensor in tensors_of(path)])
        if flat.tobytes() != view.value(name).tobytes():
            raise AssertionError(f"{name} and {path.name} differ")
    some_tensor = space().layout.segments[0].name
    begin = time.perf_counter()
    view.segment(some_tensor)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    built.store.view().segment(some_tensor)
    again = time.perf_counter() - begin
    seconds = interleaved(
        {
            "load_file": Turn(load_file, peer.paths),
            "read": Turn(view.value, names),
            "cached read": Turn(lambda name: view.values([name]), names),
        },
        # A read changes threads: on a busy machine a few wait for long, and most do not.
        10 * ROUNDS * repeats,
    )
    return [
        case(f"read one adapter, T = {built.size}", seconds, "read", "load_file", at_most=6.0),
        case(
            f"cached read of one adapter, T = {built.size}",
            seconds,
            "cached read",
            "load_file",
            at_most=0.6,
            seconds_to_build_the_cache=first,
            seconds_to_check_the_cache=again,
        ),
        layer(view, repeats),
    ]


def tensors_of(path: Path) -> list[Values]:
    """The tensors of a file in the order of the layout."""
    found = load_file(path)
    return [found[segment.name] for segment in space().layout.segments]


def layer(view: MemoryView, repeats: int) -> dict[str, Any]:
    """One tensor of all adapters into an array, against as many bytes of an array in memory."""
    segments = space().layout.segments
    size, numel = len(view), segments[0].numel
    target = np.empty(size * numel, np.float32)
    pieces = view.values().reshape(len(segments), size * numel)

    def gather(segment: Segment) -> None:
        view.segment(segment.name, out=target.reshape(size, *segment.shape))

    def copy(piece: Values) -> None:
        np.copyto(target, piece)

    # Both sides warm: nothing of the file still on its way to the disk, all of it in memory.
    os.sync()
    for segment in segments:
        gather(segment)
    seconds = interleaved(
        {"layer": Turn(gather, segments), "memcpy": Turn(copy, list(pieces))},
        ROUNDS * repeats,
        inner=max(1, 2_000 // size),
    )
    name = f"cached layer of all adapters, T = {size}"
    return case(name, seconds, "layer", "memcpy", at_most=2.0, bytes=target.nbytes)


def keys_commit(built: Built, folder: Path, repeats: int) -> dict[str, Any]:
    """New keys for all adapters, as consolidate writes them."""
    keys = np.random.default_rng(0).standard_normal((DEPTH, built.size, WIDTH), dtype=np.float32)
    numbers = itertools.count()

    def commit() -> None:
        with built.store.transaction("set the keys") as transaction:
            transaction.set_keys(keys)

    def save() -> Path:
        path = folder / f"keys-{next(numbers)}"
        save_file({"keys": keys}, path)
        return path

    seconds = interleaved(
        {"keys commit": commit, "save_file": save, "save + fsync": lambda: sync(save())},
        repeats,
        before=os.sync,
    )
    return case(
        f"commit of all keys, T = {built.size}",
        seconds,
        "keys commit",
        # The commit is on the disk when it returns, and so must be what it is compared with.
        "save + fsync",
        at_most=6.0,
        bytes=keys.nbytes,
        over_save_file=ratio(seconds, "keys commit", "save_file")["median"],
    )


def appending(built: Sequence[Built], peer: Files, repeats: int) -> list[dict[str, Any]]:
    """One more adapter and its commit, at every T in the same rounds."""
    values = value(0)
    labels = {one.size: f"append at T = {one.size}" for one in built}
    seconds = interleaved(
        {
            "save_file": peer.save,
            "save + fsync": peer.save_and_sync,
            **{labels[one.size]: partial(append, one.store, values) for one in built},
        },
        ROUNDS * repeats,
        before=os.sync,
    )
    cases = []
    for label in labels.values():
        cases.append(case(f"{label}, committed", seconds, label, "save_file", at_most=35.0))
        cases.append(case(f"{label}, durable", seconds, label, "save + fsync", at_most=30.0))
    few, many = labels[built[0].size], labels[built[-1].size]
    if few != many:
        cases.append(case("append, many over few", seconds, many, few, at_most=2.0))
    return cases


def room_after_gc(built: Built) -> dict[str, Any]:
    """The store when only its newest version is left."""
    begin = time.perf_counter()
    report = built.store.gc(keep_last=1)
    seconds = time.perf_counter() - begin
    view = built.store.view()
    keys = view.keys()
    payload = len(view) * space().layout.nbytes + (0 if keys is None else keys.nbytes)
    return figure(
        f"room after gc, T = {built.size}",
        "bytes on disk / payload",
        allocated(built.folder) / payload,
        1.05,
        gc_seconds=seconds,
        versions_expired=len(report.expired),
    )
