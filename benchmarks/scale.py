"""The cost of a recall follows what an input recalls, not what is stored.

ViT-Tiny at 96 pixels with random weights, adapters of rank 4 on q and v made at random, one memory
for all blocks. For a hard choice and for the four highest keys, among 10 to 10,000 adapters:

 * What does a batch of 32 images take, over what it takes among 10 adapters?
 * Are the coefficients those of all keys' scores in float64, and the features those of the dense
   mixture?
 * What memory does it take beyond the values and keys that are stored?

What does a look cost beside the same model with one fixed LoRA (`scale_look`)?

And for 100,000 keys and 32 queries: what does an exact search take, over the bare product of that
shape and its four highest, in the fastest number format of the machine? And one in an index of
usearch, where that is installed (`scale_index`)?

Last what the store takes to hold as many: the cases of `scale_store`, with `--full` to 100,000.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor

from benchmarks import scale_store
from benchmarks.scale_index import index_cases
from benchmarks.scale_look import look_cases
from benchmarks.timing import case, environment, figure, interleaved, progress
from memtool.adapters.layout import Layout
from memtool.adapters.recalls import given_for_each
from memtool.adapters.values import AdapterValues
from memtool.backbones.vit import VitBackbone
from memtool.devices import exact as exactly
from memtool.memories.keyed import KeyedMemory
from memtool.memories.search import KeySearch, fastest
from memtool.memories.separation import separation
from memtool.memories.similarity import dot, scaled_dot
from memtool.methods.mira.recall import MemoryModel
from memtool.sections import MemorySettings

BATCH, RANK, PIXELS, TOPK = 32, 4, 96, 4
SIZES = (10, 100, 1_000, 10_000)
KEYS, WIDTH = 100_000, 193
DENSE_UP_TO = 1_000
"""Adapters of which the dense mixture is computed to compare with: it costs what is stored."""

SLOWER = 1.1
"""Times the batch among the fewest adapters, at most."""

SEARCH = 1.3
"""Times the bare product and its highest, at most."""

ROWS_OF_ALL = 6
"""Rows of a float32 for every adapter and image, which may be in memory at once."""

Way = Literal["hard choice", "top 4"]


def run(
    repeats: int, sizes: tuple[int, ...] = SIZES, full: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """All cases; `sizes` are numbers of adapters, of which the least is what others are held to.

    `full` as in `scale_store` and `scale_index`. Looks and the search of keys are those of a CPU,
    and left out elsewhere.
    """
    parts = [partial(recalls, sizes=sorted(sizes), device=device)]
    parts += [look_cases, searches, partial(index_cases, full=full)] if device == "cpu" else []
    with torch.inference_mode():
        cases = [case for part in parts for case in part(repeats)]
    cases += scale_store.store_cases(repeats, scale_store.sizes_of(full))
    return {
        "benchmark": "scale",
        "environment": environment(device),
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def randn(*shape: int, seed: int) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# A recall ----------------------------------------------------------------------------------------


def images() -> Tensor:
    """uint8 (32, 96, 96, 3)."""
    shape = (BATCH, PIXELS, PIXELS, 3)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def memories(
    sizes: list[int], device: str | torch.device = "cpu"
) -> dict[tuple[Way, int], MemoryModel]:
    """A memory for every way and size; the smaller ones have the first adapters of the largest."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=PIXELS
    )
    backbone = VitBackbone(vit, "timm:vit_tiny_patch16_224", mean=(0.5,) * 3, std=(0.5,) * 3)
    layout = Layout(backbone.sites(("q", "v")), RANK)
    flat, keys = randn(max(sizes), layout.numel, seed=2).mul_(0.02), own_keys(backbone, max(sizes))
    found: dict[tuple[Way, int], MemoryModel] = {}
    for size in sizes:
        values = AdapterValues.from_flat(flat[:size], layout, 1.0)
        for way in get_args(Way):
            settings = MemorySettings(separation="max" if way == "hard choice" else "topk", topk=4)
            memory = KeyedMemory.from_settings(
                settings, (settings.look_at_block,), backbone.dim, keys[None, :size]
            )
            model = MemoryModel(backbone, values, memory, settings).requires_grad_(False)
            found[way, size] = model
    return {key: model.to(device) for key, model in found.items()}


def own_keys(backbone: VitBackbone, count: int) -> Tensor:
    """Keys (count, 193) that tell the images apart: they do not see what all images share."""
    keys, settings = randn(count, backbone.dim + 1, seed=3), MemorySettings()
    asked = KeyedMemory.from_settings(
        settings, (settings.look_at_block,), backbone.dim, keys[None, :1]
    )[settings.look_at_block]
    hidden = backbone.hidden(backbone.preprocess(images()), settings.look_at_block)
    shared = torch.nn.functional.normalize(asked.query(hidden).mean(dim=0), dim=0)
    keys -= (keys @ shared).unsqueeze(1) * shared
    return keys * 20


def recalls(repeats: int, sizes: list[int], device: str) -> list[dict[str, Any]]:
    """Time, exactness and memory of a batch, for both ways and all sizes."""
    progress(f"ViT-Tiny, {PIXELS} px, batch {BATCH}, rank {RANK}: {sizes} adapters")
    cases: list[dict[str, Any]] = []
    batch, models = images().to(device), memories(sizes, device)
    for way in get_args(Way):
        mine = {size: models[way, size] for size in sizes}
        for size, model in mine.items():
            cases += exact(way, size, model, batch)
        calls = {
            f"T = {size}": partial(model.with_coefficients, batch) for size, model in mine.items()
        }
        seconds = interleaved(calls, repeats, inner=3)
        least = f"T = {sizes[0]}"
        cases += [
            case(f"{way}, T = {size}", seconds, f"T = {size}", least, at_most=SLOWER)
            for size in sizes[1:]
        ]
        cases.append(slope(way, sizes, seconds))
    for way in get_args(Way):
        cases += taken(way, sizes, device)
    return cases


def slope(way: Way, sizes: list[int], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What ten times the adapters add, as a share of the time among the fewest: least squares."""
    medians = [statistics.median(seconds[f"T = {size}"]) for size in sizes]
    tens = [math.log10(size) for size in sizes]
    fitted = statistics.linear_regression(tens, [one / medians[0] for one in medians])
    curve = ", ".join(
        f"{size}: {1000 * one:.1f} ms" for size, one in zip(sizes, medians, strict=True)
    )
    progress(f"{way}: {curve}")
    return figure(f"{way}, slope a tenfold", "share", fitted.slope, None, milliseconds=curve)


def exact(way: Way, size: int, model: MemoryModel, batch: Tensor) -> list[dict[str, Any]]:
    """How far coefficients and features lie from those of all scores, and of the dense mixture."""
    features, found = model.with_coefficients(batch)
    (block,) = model.memory.blocks
    memory = model.memory[block]
    query = memory.query(model.backbone.hidden(model.backbone.preprocess(batch), block))
    scores = scaled_dot(exactly(query), exactly(memory.keys))
    name = "max" if way == "hard choice" else "topk"
    wanted, told = separation(name, topk=TOPK)(scores), found[:, 0].cpu()
    if not torch.equal(told != 0, wanted != 0):
        raise AssertionError(f"{way}, T = {size}: other adapters than those of the highest scores")
    used = int(found.any(dim=0).any(dim=0).sum())
    away = float((told - wanted).abs().max())
    name = f"{way}, T = {size}, coefficients off by"
    cases = [figure(name, "largest of all", away, 1e-5, adapters=used)]
    if size <= DENSE_UP_TO:
        dense = model.under(batch, given_for_each(model.values, found, model.mix))
        off = float((features - dense).norm() / dense.norm())
        name = f"{way}, T = {size}, features off by"
        cases.append(figure(name, "share of their length", off, 1e-5))
    return cases


# Memory ------------------------------------------------------------------------------------------


def taken(way: Way, sizes: list[int], device: str) -> list[dict[str, Any]]:
    """What a batch takes beyond what is stored, of the most adapters less of the fewest."""
    if device == "mps" or not Path("/proc/self/clear_refs").exists():
        progress("memory is left out: this system does not tell the peak of a process")
        return []
    most, least = (peak_of(way, size, device) for size in (sizes[-1], sizes[0]))
    row = BATCH * sizes[-1] * 4
    allowed = 0.1 * least + ROWS_OF_ALL * row
    return [
        figure(
            f"{way}, T = {sizes[-1]}, peak memory more than T = {sizes[0]}",
            "MB",
            (most - least) / 1e6,
            allowed / 1e6,
            peak_bytes={sizes[0]: least, sizes[-1]: most},
        )
    ]


def peak_of(way: Way, size: int, device: str) -> int:
    """Bytes at most in use by a batch, in a process of its own that gives back what is free."""
    code = f"from benchmarks.scale import tell_peak; tell_peak({way!r}, {size}, {device!r})"
    # What is freed leaves the process at once, so that the second batch is seen to take it.
    alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    told = subprocess.run(
        [sys.executable, "-c", code], env=alone, check=True, capture_output=True, text=True
    )
    return int(told.stdout.split()[-1])


@torch.inference_mode()
def tell_peak(way: Way, size: int, device: str) -> None:
    """Print how far the memory of this process, or its device, rises over a batch, in bytes."""
    torch.set_num_threads(1)
    batch, model = images().to(device), memories([size], device)[way, size]
    model.with_coefficients(batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.with_coefficients(batch)
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model.with_coefficients(batch)
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(found.split()[1])


# The search --------------------------------------------------------------------------------------


def searches(repeats: int) -> list[dict[str, Any]]:
    """The exact search among 100,000 keys, over the bare product and its highest."""
    keys, queries = randn(KEYS, WIDTH, seed=4), randn(BATCH, WIDTH, seed=5)
    progress(f"{KEYS} keys of {WIDTH} numbers, {BATCH} queries, the {TOPK} highest")
    ready = KeySearch(keys, dot)

    def search() -> Tensor:
        near = ready.near(queries, TOPK)
        return near[dot(queries, keys[near]).topk(TOPK).indices]

    def bare(keys: Tensor) -> Tensor:
        return (queries.to(keys.dtype) @ keys.T).topk(TOPK).indices

    calls: dict[str, Callable[[], Tensor]] = {"search": search}
    for dtype in {torch.float32, torch.bfloat16, fastest()}:
        calls[f"bare {dtype}".replace("torch.", "")] = partial(bare, keys.to(dtype))
    seconds = interleaved(calls, repeats, inner=3)
    medians = {
        name: statistics.median(times) for name, times in seconds.items() if name != "search"
    }
    best = min(medians, key=lambda name: medians[name])
    wrong = int((search() != bare(keys.double())).sum())
    return [
        case(f"search, T = {KEYS}", seconds, "search", best, at_most=SEARCH),
        figure(f"search, T = {KEYS}, other than the {TOPK} highest", "keys", wrong, 0),
    ]
