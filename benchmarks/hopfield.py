"""Hopfield recall from 10,000 adapters against the limit: reading all their values once.

The values are of ViT-Tiny size (q and v of 12 blocks, rank 4). The peer is one product of a vector
with the same values, the fastest way to touch every byte of them once. A dense recall mixes all of
them, and so has to read them; an exact recall of one adapter reads the keys and one value.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.timing import case, environment, interleaved
from memtool.memories.hopfield import HopfieldMemory

ADAPTERS = 10_000
NUMEL = 12 * 2 * (4 * 192 + 192 * 4)
QUERIES = 8


def run(repeats: int) -> dict[str, Any]:
    """Dense and exact recall, of one key and of several at once."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(ADAPTERS, NUMEL)
    for first in range(0, ADAPTERS, 1000):
        values[first : first + 1000].normal_(std=0.02, generator=generator)
    names = [str(number) for number in range(ADAPTERS)]
    dense = HopfieldMemory.of(names, values, similarity="dot", beta=1.0)
    exact = HopfieldMemory.of(names, values, similarity="euclidean", beta=1e4)
    keys = dense.key_of(values[:QUERIES]).clone()
    weights = torch.rand(1, ADAPTERS, generator=generator)
    error = (exact.recall(keys).patterns - values[:QUERIES]).norm() / values[:QUERIES].norm()
    calls = {
        "read once": lambda: weights @ values,
        "dense recall": lambda: dense.recall(keys[:1]),
        "dense recall of 8": lambda: dense.recall(keys),
        "exact recall": lambda: exact.recall(keys[:1]),
    }
    seconds = interleaved(calls, repeats)
    size = f"{ADAPTERS:,} values of {NUMEL:,}"
    cases = [
        case(f"dense recall, {size}", seconds, "dense recall", "read once", at_most=2.0),
        # Eight recalls of one key each would read the values eight times.
        case(
            f"dense recall of 8 keys, {size}", seconds, "dense recall of 8", "read once", at_most=8
        ),
        case(
            f"exact recall, {size}",
            seconds,
            "exact recall",
            "read once",
            at_most=2.0,
            relative_error=float(error),
        ),
    ]
    return {
        "benchmark": "hopfield",
        "environment": environment(),
        "bytes": values.numel() * 4,
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }
