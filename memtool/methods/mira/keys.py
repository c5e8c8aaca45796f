"""Keys before any learning by gradient: in closed form, as the mean query, or random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memtool.errors import ConfigError
from memtool.memories.closed_form import (
    SHRINKAGE,
    QueryStatistics,
    for_similarity,
    require_dot,
    same_for_every_input,
)
from memtool.methods.mira.sums import Asked
from memtool.sections import ConsolidateSettings, MemorySettings

LINEAR = ("identity", "affine", "normalised", "relu", "tanh", "sigmoid", "power")
"""Separations that pass a score on: their closed-form scores are one-hot, not log posteriors."""


@dataclass(frozen=True)
class Draws:
    """Where random keys come from: a stream of numbers for every (seed, task, block).

    `tasks` are task numbers and `blocks` those of the memories. A task's key does not depend on
    which others are there, nor on when it is drawn; its second adapter has the next numbers.
    """

    seed: int
    tasks: Sequence[int]
    blocks: Sequence[int]
    width: int

    def keys(self, adapter_tasks: Sequence[int], *, uniform: bool = False) -> Tensor:
        """Keys (memories, t, width) of adapters of the tasks at these places.

        Standard normal, or uniform between -1 and 1.
        """
        width = self.width
        drawn = np.empty((len(self.blocks), len(adapter_tasks), width), dtype=np.float32)
        for memory, block in enumerate(self.blocks):
            streams = [np.random.default_rng([self.seed, task, block]) for task in self.tasks]
            for adapter, place in enumerate(adapter_tasks):
                stream = streams[place]
                drawn[memory, adapter] = (
                    2 * stream.random(width, dtype=np.float32) - 1
                    if uniform
                    else stream.standard_normal(width, dtype=np.float32)
                )
        return torch.from_numpy(drawn)


def start_keys(
    settings: ConsolidateSettings,
    memory: MemorySettings,
    asked: Asked | None,
    adapter_tasks: Sequence[int],
    draws: Draws,
) -> Tensor:
    """Keys (memories, t, m · (dim + 1)) of all adapters before any learning by gradient.

    Without `memory.key_bias` they are `dim` wide.

    `asked` has the queries of every task, class by class where adapters have a key for every class
    (`memory.keys_of`); m is then the largest number of classes of a task, else 1. It may be None
    where keys are drawn (`are_drawn`).

    closed-form   separations that normalise (softmax, topk) get discriminant keys: the score is
                  the log posterior of the task. The others get ridge keys: the score is close to
                  1 for the task of the query and to 0 for the rest.
    mean-query    the mean query of the task
    random        N(0, key_std²), from `draws`
    uniform       between -1 and 1, from `draws`; the others draw nothing

    A hard routing has keys of its own, whatever the settings say: discriminant ones for "lda", the
    mean query for "prototype". The adapters of one task share its key, and its weight.

    Raises ConfigError as `require_keys`; and for a memory that all images ask the same, where keys
    are solved from what tells them apart.
    """
    require_keys(settings, memory)
    if are_drawn(settings, memory):
        if settings.keys == "uniform":
            return draws.keys(adapter_tasks, uniform=True)
        return draws.keys(adapter_tasks) * settings.key_std
    assert asked is not None
    tasks, whole = torch.tensor(adapter_tasks), asked.whole
    if _solved(settings, memory):
        _require_told_apart(memory, whole, draws.blocks)
    if memory.keys_of == "class":
        return _keys_of_classes(memory, whole, asked.sizes, tasks)
    shares = torch.bincount(tasks)[tasks].float()
    if memory.routing == "prototype":
        return whole.mean_keys()[:, tasks]
    if memory.routing == "lda":
        return for_similarity(whole.lda_keys(SHRINKAGE)[:, tasks], "scaled-dot")
    if settings.keys == "mean-query":
        return whole.mean_keys()[:, tasks, : whole.dim + memory.key_bias]
    if memory.separation not in LINEAR:
        keys = whole.lda_keys(SHRINKAGE)[:, tasks]
        keys[..., -1] -= shares.log() / memory.beta
    else:
        keys = whole.ridge_keys(SHRINKAGE)[:, tasks] / shares[:, None]
    return for_similarity(keys, memory.similarity)


def require_keys(settings: ConsolidateSettings, memory: MemorySettings) -> None:
    """Raise ConfigError for keys that do not go with separation, similarity or protection."""
    if not _solved(settings, memory):
        if memory.keys_of == "class":
            _require_of_classes(settings, memory)
        return
    _require_biased(settings, memory)
    if settings.protect == "dual-gpm":
        raise ConfigError(
            "keys in closed form under --protect dual-gpm",
            expected="keys that learn: all of those in closed form are solved anew together, and "
            "their part outside the past finds nothing",
            remedy="--protect freeze, or --set consolidate.keys=random with consolidate.epochs",
        )
    if memory.keys_of == "class":
        _require_of_classes(settings, memory)
    elif memory.routing == "mixture":
        require_dot(memory.similarity)
        if memory.separation in LINEAR and memory.similarity == "euclidean":
            raise ConfigError(
                f"closed-form keys for similarity euclidean and separation {memory.separation}",
                expected="scores that are right to the last constant, which distances are not",
                remedy="--set memory.similarity=scaled-dot, or --sep softmax",
            )


def _require_biased(settings: ConsolidateSettings, memory: MemorySettings) -> None:
    """Raise ConfigError for keys that are solved with a bias, and have no room for one."""
    for name, found, fits in (
        ("memory.key_bias", "false", memory.key_bias),
        ("memory.key_norm", memory.key_norm, memory.key_norm == "none"),
    ):
        if not fits and (settings.keys == "closed-form" or memory.routing != "mixture"):
            value = "true" if name == "memory.key_bias" else "none"
            raise ConfigError(
                f"keys in closed form with {name} {found}",
                expected="keys whose length and bias count as they are solved",
                remedy=f"--set {name}={value}, or --set consolidate.keys=random",
            )


def _require_told_apart(
    memory: MemorySettings, whole: QueryStatistics, blocks: Sequence[int]
) -> None:
    """Raise ConfigError for memories that are asked the same by every image of all tasks."""
    found = same_for_every_input([whole])
    if not found or memory.scope != "block":
        return
    numbers = blocks or range(whole.blocks)
    named = ", ".join(str(numbers[place]) for place in found)
    others = [str(block) for place, block in enumerate(numbers) if place not in found]
    raise ConfigError(
        f"keys in closed form: the memory of block {named} is asked the same by every image, as a "
        "class token is that no attention has passed: nothing there tells tasks apart",
        expected="queries that depend on the image",
        remedy=(f"--set memory.blocks={','.join(others)}, or " if others else "")
        + "--set memory.token=mean",
    )


def are_drawn(settings: ConsolidateSettings, memory: MemorySettings) -> bool:
    """Whether keys begin with random numbers, and nothing that was asked matters."""
    return settings.keys in ("random", "uniform") and memory.routing == "mixture"


def _solved(settings: ConsolidateSettings, memory: MemorySettings) -> bool:
    """Whether keys are solved from moments of the queries; those of a hard routing always are."""
    return settings.keys == "closed-form" or memory.routing != "mixture"


def _require_of_classes(settings: ConsolidateSettings, memory: MemorySettings) -> None:
    """Raise ConfigError for keys of classes that learn, or whose sums are no posterior."""
    if settings.keys != "closed-form" or settings.epochs:
        raise ConfigError(
            "memory.keys_of class with keys that learn",
            expected="keys in closed form: consolidate.keys closed-form, consolidate.epochs 0",
            remedy="--set memory.keys_of=task",
        )
    shares = memory.separation in ("softmax", "topk")
    posterior = shares and memory.similarity in ("dot", "scaled-dot")
    if memory.routing == "mixture" and not posterior:
        raise ConfigError(
            f"memory.keys_of class with separation {memory.separation} and similarity "
            f"{memory.similarity}",
            expected="a posterior of the classes: softmax or topk, and dot or scaled-dot",
            remedy="--sep softmax, or --set memory.keys_of=task",
        )


def _keys_of_classes(
    memory: MemorySettings,
    whole: QueryStatistics,
    sizes: Sequence[int],
    tasks: Tensor,
) -> Tensor:
    """Closed-form keys (memories, t, m · (dim + 1)), m for every adapter.

    A task with fewer classes than m has some of its keys several times, each with a part of the
    weight: under softmax the adapter's coefficient is the posterior of its task all the same.
    """
    mixes = memory.routing == "mixture"
    nearest = memory.routing == "prototype"
    keys = whole.mean_keys() if nearest else whole.lda_keys(SHRINKAGE)
    most, found = max(sizes), []
    for own in keys.split([*sizes], dim=1):
        places = torch.arange(most) % own.shape[1]
        repeated = own[:, places]
        if mixes:  # a hard choice shares between equal keys by itself
            repeated[..., -1] -= torch.bincount(places)[places].float().log() / memory.beta
        found.append(repeated)
    each = torch.stack(found, dim=1)[:, tasks]
    if mixes:
        sharing = torch.bincount(tasks)[tasks].float().log() / memory.beta
        each[..., -1] -= sharing.unsqueeze(-1)
    if not nearest:
        each = for_similarity(each, memory.similarity if mixes else "scaled-dot")
    return each.flatten(2)
