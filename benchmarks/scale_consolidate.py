"""One more task and an answer, among 100 to 10,000 adapters in a store (`--full`: 100,000).

The digits memory of the defaults (nano, keys in closed form, a head of every task) with ten small
adapters a task, of which an input recalls two (`memory.separation=topk`) and 10 MB are held at a
time (`engine.resident`). Three tasks are learned; before the last two, others are put beside the
first: its head, its values with noise, and its moments moved by a step of their own, so that their
keys differ. The consolidation of the last task, which is new among T adapters, runs in a process of
its own:

 * bytes: what the commit leaves beside the keys, over those among the fewest adapters. Keys in
   closed form are relative to each other, so all are written anew.
 * seconds, by the clock.
 * memory: the peak of the process over that among the fewest adapters.

Then what an attached memory (`memory.attach()`, as `predict` and `serve` have it) takes for 32
images and for one, over the same among the fewest adapters: with head, weights and novelty; and
what the first 32 images take, whose tasks are read.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.scale_store import sizes_of, written
from benchmarks.store import workplace
from benchmarks.timing import case, environment, figure, interleaved, progress
from memtool.config import resolve
from memtool.heads import FeatureStatistics
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.moments import Moments
from memtool.methods.in_store import features_blob
from memtool.methods.mira.method import Mira
from memtool.methods.mira.state import queries_blob
from memtool.methods.pieces import PIECE_BYTES
from memtool.methods.records import own_head_blob
from memtool.settings import Config
from memtool_stores import MemoryStore

EACH = 10
"""Adapters a task."""

AT_ONCE = 500
"""Tasks of one commit while a memory is made."""

TASK_BYTES = 600_000
"""What a task takes on a disk: its adapters and heads, and the moments of queries and features."""

SETTINGS: dict[str, Any] = {
    "stream.train_per_task": 60,
    "stream.test_per_task": 20,
    "stream.order": ("upright", "inverted", "rot90"),
    "train.epochs": 1,
    "adapter.rank": 1,
    "adapter.per_task": EACH,
    "memory.separation": "topk",
    "engine.resident": 10_000_000,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}

CONSOLIDATE = """
import os, re, sys, time
from pathlib import Path
from benchmarks.scale_consolidate import opened
memory = opened(Path(sys.argv[1]), sys.argv[2])
begin = time.perf_counter()
memory.consolidate()
seconds = time.perf_counter() - begin
peak = int(re.search(r"VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1]) / 1024
print(seconds, peak, flush=True)
os._exit(0)
"""


def run(repeats: int, sizes: Sequence[int] = (), full: bool = False) -> dict[str, Any]:
    """All cases at every T of `sizes`, or without any of `sizes_of`."""
    measured = sorted(set(sizes or sizes_of(full)))
    cases = store_cases(repeats, measured)
    return {
        "benchmark": "scale_consolidate",
        "environment": environment(),
        "sizes": measured,
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def store_cases(repeats: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The cases alone; a consolidation is measured once, as its bytes and peak do not vary."""
    cases: list[dict[str, Any]] = []
    answering: dict[int, nn.Module] = {}
    few: tuple[float, float] | None = None
    with workplace(sum(sizes) // EACH * TASK_BYTES + (1 << 28)) as folder:
        learned = folder / "learned"
        memory = opened(learned)
        adapters = [[one.path for one in memory.adapt(str(task))] for task in (1, 2, 3)]
        for size in sizes:
            memory = opened(learned, store=f"memory-{size}")
            memory.write(adapters[0])
            memory.consolidate()
            begin = time.perf_counter()
            grow(memory.workspace.store, size // EACH)
            progress(f"T = {size}: made in {time.perf_counter() - begin:.0f} s")
            memory.write(adapters[1])
            memory.consolidate()
            memory.write(adapters[2])
            before = written(Path(memory.workspace.store_path))
            seconds, peak = consolidated(learned, f"memory-{size}")
            after = written(Path(memory.workspace.store_path))
            keys = memory.workspace.store.view().keys()
            assert keys is not None
            beside = (after - before - keys.nbytes) / 1e3
            few = few or (beside, peak)
            name = f"T = {size}"
            # Rows of heads, tasks, adapters, and of what was asked: the last blob of each.
            most = few[0] + 4 * PIECE_BYTES / 1e3
            cases += [
                figure(f"bytes beside keys, {name}", "kB", beside, most, keys=keys.nbytes / 1e3),
                figure(f"consolidation, {name}", "seconds", seconds, None),
                figure(f"memory, {name}", "MB over the fewest", peak - few[1], None, peak=peak),
            ]
            answering[size] = model = opened(learned, f"memory-{size}").attach()
            begin = time.perf_counter()
            answered(model, drawn(32))
            first = time.perf_counter() - begin
            cases.append(figure(f"first 32 images, {name}", "seconds", first, None))
        return [*cases, *answers(answering, repeats)]


def answers(models: Mapping[int, nn.Module], repeats: int) -> list[dict[str, Any]]:
    """Seconds of a batch of every attached memory, by how many adapters it has."""
    cases: list[dict[str, Any]] = []
    for batch in (32, 1):
        images = drawn(batch)
        labels = {size: f"{batch} images among {size}" for size in models}
        ways = {labels[size]: partial(answered, model, images) for size, model in models.items()}
        seconds = interleaved(ways, repeats, inner=32 // batch)
        few, *more = labels.values()
        most = 1.1 if batch > 1 else None  # of one image the keys are read for it alone
        cases += [case(f"{many}, over few", seconds, many, few, at_most=most) for many in more]
    return cases


def drawn(batch: int) -> Tensor:
    """Images of noise, uint8 (batch, 32, 32, 3)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, 32, 32, 3), generator=generator).to(torch.uint8)


@torch.inference_mode()
def answered(model: nn.Module, images: Tensor) -> None:
    """What a memory makes of images."""
    model(images)


def opened(folder: Path, store: str = "memory") -> Mira:
    """The method over a memory in a folder."""
    return Mira.open(config_of(folder, store), seed=0)


def config_of(folder: Path, store: str) -> Config:
    """Its settings."""
    places = {"store": str(folder / store), "runs": str(folder / "runs")}
    found = resolve(
        preset="digits-dil", overrides={**SETTINGS, **places}, environ={}, cwd=folder.parent
    )
    return found.config


def consolidated(folder: Path, store: str) -> tuple[float, float]:
    """Seconds and megabytes of a consolidation in a process of its own."""
    command = [sys.executable, "-c", CONSOLIDATE, str(folder), store]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def move(moments: Moments, step: Tensor) -> None:
    """Make moments those of the same vectors, all moved by a step (dim,) of their own spread."""
    count, mean = moments.counts.sum(), moments.sums.sum(dim=1) / moments.counts.sum()
    spread = (moments.second.diagonal(dim1=1, dim2=2) / count - mean.square()).clamp_min(0).sqrt()
    by = spread * step  # (groups, dim)
    cross = moments.sums.sum(dim=1).unsqueeze(2) * by.unsqueeze(1)
    moments.second += cross + cross.mT + count * by.unsqueeze(2) * by.unsqueeze(1)
    moments.sums += moments.counts.unsqueeze(1) * by.unsqueeze(1)


def grow(store: MemoryStore, tasks: int) -> None:
    """So many tasks more, each with the moments and heads of the first one."""
    view = store.view()
    records = view.adapters
    values = view.values(view.ids)
    generator = np.random.default_rng(0)
    heads = [view.blob(own_head_blob(record.name)) for record in records]
    for first in range(0, tasks, AT_ONCE):
        with store.transaction("grow") as txn:
            for number in range(100 + first, 100 + min(tasks, first + AT_ONCE)):
                asked = QueryStatistics.from_bytes(view.blob(queries_blob(1)), "queries")
                seen = FeatureStatistics.from_bytes(view.blob(features_blob(1)), "features")
                for moments in (asked.moments, seen.moments):
                    move(moments, torch.from_numpy(generator.standard_normal(moments.dim)))
                txn.put_blob(queries_blob(number), asked.to_bytes())
                txn.put_blob(features_blob(number), seen.to_bytes())
                for record, value, head in zip(records, values, heads, strict=True):
                    noise = generator.standard_normal(len(value), dtype=np.float32)
                    name = f"{number}-{record.name}"
                    about = {key: one for key, one in record.meta.items() if key != "task_name"}
                    txn.add(name, value + 0.01 * noise, {**about, "task": number})
                    txn.put_blob(own_head_blob(name), head)
