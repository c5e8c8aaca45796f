"""BayesPCN: seconds, error and memory by the width of the patterns, profiled and not; capacity.

Both forms read the same memory of 20 patterns from the same key (a tenth of the entries) in the
same process: profiled, with the best free entries put in by algebra, and unprofiled, which searches
for them as the published code does. Each width runs in a process of its own, so that its peak
memory is its own. At widths beyond `WHOLE_SEARCH` the search runs `SHORT_STEPS` of its 500 steps
and its seconds are scaled; the row says so, and has no error then.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import environment, progress
from memtool.evaluation.record import peak_resident_bytes
from memtool.memories.bayes_pcn import PRESETS, BayesPCN

WIDTHS = (1_000, 20_000, 73_728, 294_912, 1_000_000)
PATTERNS = 20
KEY_SHARE = 10
WHOLE_SEARCH = 294_912
SHORT_STEPS = 50
LIMIT_WIDTH = 294_912
LEAST_SPEEDUP = 40.0
LARGEST_ERROR = 2e-4
CAPACITIES = (50, 100, 150, 200, 225, 256, 300, 400)
CAPACITY_WIDTH = 8_192


def run(repeats: int) -> dict[str, Any]:
    """Every case; `repeats` is the number of timed writes and profiled reads."""
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with context.Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(of_width, (width, repeats, threads)) for width in WIDTHS]
    for row in rows:
        progress(
            f"d = {row['width']:,}: write {row['write_seconds']:.3f} s, profiled read "
            f"{row['read_seconds']:.3f} s, unprofiled {row['unprofiled_read_seconds']:.1f} s, "
            f"error {row['relative_error']:.1e}, peak {row['peak_bytes'] / 2**20:.0f} MiB"
        )
    capacity = [at_capacity(count) for count in CAPACITIES]
    for point in capacity:
        progress(f"N = {point['patterns']}: {point['state']}, error {point['relative_error']}")
    limited = next(row for row in rows if row["width"] == LIMIT_WIDTH)
    speedup = limited["unprofiled_read_seconds"] / limited["read_seconds"]
    cases = [
        {
            "name": f"unprofiled / profiled read, d = {LIMIT_WIDTH:,}",
            "value": speedup,
            "limit": f">= {LEAST_SPEEDUP:g}",
            "passed": speedup >= LEAST_SPEEDUP,
        },
        {
            "name": f"relative recall error, profiled, d = {LIMIT_WIDTH:,}",
            "value": limited["relative_error"],
            "limit": f"<= {LARGEST_ERROR:g}",
            "passed": limited["relative_error"] <= LARGEST_ERROR,
        },
    ]
    return {
        "benchmark": "bayes_pcn",
        "environment": environment(),
        "hidden": PRESETS["default"].hidden,
        "patterns": PATTERNS,
        "passed": all(case["passed"] for case in cases),
        "cases": cases,
        "widths": rows,
        "capacity": capacity,
    }


def of_width(width: int, repeats: int, threads: int) -> dict[str, Any]:
    """Write and read times, error and memory for patterns of one width."""
    torch.set_num_threads(threads)
    rows = patterns(PATTERNS, width)
    before = peak_resident_bytes() or 0
    memory = BayesPCN(width, width // KEY_SHARE)
    writes = []
    for number, row in enumerate(rows):
        begin = time.perf_counter()
        memory.write(str(number), row)
        writes.append(time.perf_counter() - begin)
    keys = memory.key_of(rows)
    reads = []
    for number in range(repeats):
        begin = time.perf_counter()
        memory.recall(keys[number % PATTERNS][None])
        reads.append(time.perf_counter() - begin)
    errors = relative(memory.recall(keys).patterns, rows)
    peak = peak_resident_bytes() or 0
    steps = memory.settings.steps if width <= WHOLE_SEARCH else SHORT_STEPS
    memory.settings = replace(memory.settings, profiled=False, steps=steps)
    begin = time.perf_counter()
    searched = memory.recall(keys[:1]).patterns
    scale = PRESETS["default"].steps / steps
    whole = scale == 1
    return {
        "width": width,
        "write_seconds": statistics.median(writes[-repeats:]),
        "read_seconds": statistics.median(reads),
        "read_seconds_all": reads,
        "unprofiled_read_seconds": (time.perf_counter() - begin) * scale,
        "unprofiled_steps_run": steps,
        "unprofiled_is_scaled": not whole,
        "relative_error": max(errors),
        "unprofiled_relative_error": relative(searched, rows[:1])[0] if whole else None,
        "pattern_bytes": rows.numel() * rows.element_size(),
        "state_bytes": len(memory.to_bytes()),
        "peak_bytes": peak,
        "peak_bytes_beyond_patterns": peak - before,
        "unprofiled_peak_bytes": peak_resident_bytes(),
    }


def at_capacity(count: int) -> dict[str, Any]:
    """The error of the last memory that holds `count` patterns, or that it refused."""
    rows = patterns(count, CAPACITY_WIDTH)
    memory = BayesPCN(CAPACITY_WIDTH, CAPACITY_WIDTH // KEY_SHARE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # crowded: that is what is measured
        for number, row in enumerate(rows[: memory.capacity]):
            memory.write(str(number), row)
    stored = rows[: len(memory)]
    errors = relative(memory.recall(memory.key_of(stored)).patterns, stored)
    refused = count > memory.capacity
    return {
        "patterns": count,
        "state": f"refused beyond {memory.capacity}" if refused else "held",
        "relative_error": None if refused else statistics.mean(errors),
        "largest_error": None if refused else max(errors),
    }


def patterns(count: int, width: int) -> Tensor:
    """Random patterns (count, width) float32 of the size of LoRA weights, rms 0.02."""
    generator = torch.Generator().manual_seed(width)
    return 0.02 * torch.randn(count, width, generator=generator)


def relative(found: Tensor, expected: Tensor) -> list[float]:
    """|found − expected| / |expected| of every row."""
    errors = (found - expected).double().norm(dim=1) / expected.double().norm(dim=1)
    return [float(error) for error in errors]
