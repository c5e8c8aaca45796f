"""What an index of keys finds and costs, beside the exact search and the bare product.

Keys of 193 numbers, for batches of 32 and of 1. Random directions are the hardest keys to find:
nothing is near anything. With `--full` there are three times as many, too, and those of groups, as
of tasks that are more alike than others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.timing import figure, interleaved, progress, ratio
from memtool.memories.index import KeyIndex
from memtool.memories.search import KeySearch, fastest
from memtool.memories.similarity import dot

WIDTH, TOPK = 193, 4
BATCHES = (32, 1)
KEYS, MANY = 100_000, 300_000
GROUPS, WITHIN = 1_000, 0.7
"""Groups of keys, and how far a key lies from the middle of its group, over a middle's length."""


def index_cases(repeats: int, full: bool = False) -> list[dict[str, Any]]:
    """All cases; none without the package."""
    if find_spec("usearch") is None:
        progress("an index is left out: the package usearch is not installed")
        return []
    cases = one_index(f"index, T = {KEYS}", *directions(KEYS), repeats)
    if full:
        cases += one_index(f"index, T = {KEYS} in groups", *grouped(KEYS), repeats)
        cases += one_index(f"index, T = {MANY}", *directions(MANY), repeats)
    return cases


def directions(count: int) -> tuple[Tensor, Tensor]:
    """Keys (count, 193) and queries (32, 193) of length one, drawn alike."""
    draw = torch.Generator().manual_seed(6)
    keys, queries = (torch.randn(n, WIDTH, generator=draw) for n in (count, max(BATCHES)))
    return normalize(keys, dim=1), normalize(queries, dim=1)


def grouped(count: int) -> tuple[Tensor, Tensor]:
    """The same around the middles of groups."""
    draw = torch.Generator().manual_seed(7)
    middles = normalize(torch.randn(GROUPS, WIDTH, generator=draw), dim=1)

    def around(n: int) -> Tensor:
        group = torch.randint(GROUPS, (n,), generator=draw)
        away = normalize(torch.randn(n, WIDTH, generator=draw), dim=1)
        return normalize(middles[group] + WITHIN * away, dim=1)

    return around(count), around(max(BATCHES))


def one_index(name: str, keys: Tensor, queries: Tensor, repeats: int) -> list[dict[str, Any]]:
    """How long it takes to make and to ask, how large it is, and what it finds."""
    progress(f"{name}: keys of {WIDTH} numbers, the {TOPK} highest")
    begin = time.perf_counter()
    index = KeyIndex(keys, dot)
    cases = [
        figure(f"{name}, made in", "seconds", time.perf_counter() - begin, None),
        figure(f"{name}, size", "MB", len(index.to_bytes()) / 1e6, None),
    ]
    exact, fast = KeySearch(keys, dot), keys.to(fastest())

    def asked(queries: Tensor) -> Tensor:
        near = index.near(queries, TOPK)
        union, place = near.unique(return_inverse=True)
        best = dot(queries, keys[union]).gather(1, place).topk(TOPK).indices
        return near.gather(1, best)

    def searched(queries: Tensor) -> Tensor:
        near = exact.near(queries, TOPK)
        return near[dot(queries, keys[near]).topk(TOPK).indices]

    def bare(queries: Tensor) -> Tensor:
        return (queries.to(fast.dtype) @ fast.T).topk(TOPK).indices

    for batch in BATCHES:
        some = queries[:batch]
        calls: dict[str, Callable[[], Tensor]] = {
            "index": partial(asked, some),
            "exact search": partial(searched, some),
            "bare product": partial(bare, some),
        }
        seconds = interleaved(calls, repeats, inner=3)
        medians = {call: statistics.median(times) for call, times in seconds.items()}
        for other in ("exact search", "bare product"):
            spread = ratio(seconds, "index", other)
            cases.append(
                figure(
                    f"{name}, {batch} queries",
                    f"index / {other}",
                    spread["median"],
                    None,
                    quartiles=[spread["lower_quartile"], spread["upper_quartile"]],
                    median_seconds=medians,
                )
            )
    wanted = (queries.double() @ keys.double().T).topk(TOPK).indices.tolist()
    both = [
        len({*one} & {*other}) for one, other in zip(asked(queries).tolist(), wanted, strict=True)
    ]
    equal = sum(both) / (TOPK * len(queries))
    cases.append(figure(f"{name}, of the {TOPK} highest", "share found", equal, None))
    return cases
