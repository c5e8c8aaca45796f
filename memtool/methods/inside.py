"""What a report shows of the inside of a memory: who recalls what, examples, and how it learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import memtool_stores
from memtool.devices import exact
from memtool.evaluation.inside import (
    EXAMPLE_LETTERS,
    Curve,
    Example,
    Inside,
    Recalled,
    picture_text,
    strongest,
)
from memtool.methods.records import out_of_runs
from memtool.streams.task import Images, Task, Texts

MOST_EXAMPLES = 24


def recalled(
    tasks: Sequence[Task],
    samples: Sequence[Images | Texts],
    weights: Sequence[Tensor],
    adapters: Sequence[str],
    *,
    blocks: Sequence[int] = (),
    what: str = "weight",
    chances: Sequence[Tensor] = (),
    class_names: Sequence[str] = (),
) -> Inside:
    """The weights (n, adapters) or (n, memories, adapters) of some test samples of every task.

    `blocks` are those of the memories. With `chances` (n, classes) of images the examples say what
    they were taken for: of every task one that was wrong, where there is one, and some that were
    right.
    """
    arrays = [exact(each).numpy() for each in weights]
    names = [task.name for task in tasks]
    map_ = Recalled.of(arrays, names, adapters, blocks=blocks, what=what)
    each_task = max(1, min(4, MOST_EXAMPLES // len(tasks)))
    examples: list[Example] = []
    for place, (task, some, found) in enumerate(zip(tasks, samples, arrays, strict=True)):
        said = None if not chances else chances[place]
        flat = found.mean(axis=1) if found.ndim == 3 else found
        for row in _chosen(some, said, each_task):
            examples.append(
                _example(task.name, some, row, flat[row].tolist(), adapters, said, class_names)
            )
    return Inside(recalled=map_, examples=tuple(examples[:MOST_EXAMPLES]))


def curves(store: memtool_stores.MemoryStore, version: str = "HEAD") -> tuple[Curve, ...]:
    """How adapters and keys learned, as their loss epoch by epoch, where the store keeps it."""
    found = [
        Curve(of="adapters", name=record.name, loss=tuple(losses))
        for record in store.view(version).live
        if (losses := (record.meta.get("provenance") or {}).get("losses"))
    ]
    for one in reversed(store.log(version)):
        if losses := one.metadata.get("losses"):
            tasks = out_of_runs(one.metadata.get("learned") or ())
            found.append(Curve(of="keys", name=f"after {len(tasks)} tasks", loss=tuple(losses)))
    return tuple(found)


def _chosen(some: Images | Texts, chances: Tensor | None, count: int) -> list[int]:
    """Places of samples to show, wrong ones first."""
    if chances is None or not isinstance(some, Images):
        return np.linspace(0, len(some) - 1, min(count, len(some))).astype(int).tolist()
    right = chances.argmax(dim=1).numpy() == np.asarray(some.labels)
    wrong, good = np.flatnonzero(~right).tolist(), np.flatnonzero(right).tolist()
    return [*wrong[: max(1, count // 2)], *good][:count]


def _example(
    task: str,
    some: Images | Texts,
    row: int,
    weights: Sequence[float],
    adapters: Sequence[str],
    chances: Tensor | None,
    class_names: Sequence[str],
) -> Example:
    about: dict[str, Any] = {"task": task, "weights": tuple(strongest(weights, adapters))}
    if isinstance(some, Texts):
        prompt, answer = some.prompts[row], some.answers[row]
        return Example(text=prompt[:EXAMPLE_LETTERS], label=answer[:EXAMPLE_LETTERS], **about)
    about["image"] = picture_text(some.images[row])
    if class_names:
        about["label"] = class_names[int(some.labels[row])]
    if chances is not None:
        best = int(chances[row].argmax())
        about |= {"said": class_names[best], "probability": _share(chances[row][best])}
    return Example(**about)


def _share(value: Tensor) -> float:
    return float(f"{float(torch.clamp(value, 0, 1)):.4g}")
