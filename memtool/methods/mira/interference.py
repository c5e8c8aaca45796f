"""What later tasks do to earlier ones inside a memory: keys and weights of old inputs, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtool.methods.mira.measure import Measure, chosen_tasks, drift, drift_degrees
from memtool.methods.mira.state import Snapshot
from memtool.methods.outcome import share_right
from memtool.methods.retrospect import Choices, Moment, OldTask
from memtool.streams.task import Task

if TYPE_CHECKING:
    from memtool.methods.mira.method import Mira


def look_back(mira: Mira, tasks: Sequence[Task]) -> list[Moment]:
    """As `LooksBack.look_back`.

    Reads the test images of every task at every version that knows it.
    """
    versions = mira.after_each(tasks)
    measure = Measure(mira.workspace)
    found: list[Moment] = []
    then: list[tuple[Tensor, Tensor]] = []
    for count, version in enumerate(
        mira.workspace.telling("keys and weights of old inputs", versions), start=1
    ):
        snapshot = mira.snapshot(version)
        _, model, head = snapshot.consolidated()
        keys = _keys(snapshot)
        old = []
        for place, task in enumerate(tasks[:count]):
            logits, now = measure.recall(model, head, task.test.images)
            accuracy = share_right(logits, task.test)
            if place == count - 1:
                then.append((now, keys))
                newest = accuracy
                continue
            old.append(_old(then[place], now, keys, _first_of(tasks[place], snapshot), accuracy))
        found.append(Moment(count, tuple(old), newest))
    return found


def _first_of(task: Task, snapshot: Snapshot) -> list[int]:
    """The places of a task's adapters among the keys."""
    state, *_ = snapshot.consolidated()
    own = state.tasks.index(task.number)
    return [place for place, one in enumerate(state.adapter_tasks) if one == own]


def _old(
    then: tuple[Tensor, Tensor], now: Tensor, keys: Tensor, places: Sequence[int], accuracy: float
) -> OldTask:
    before, keys_before = then
    known = before.shape[-1]
    whole, moved = float(now.abs().sum()), drift([before], [now])
    return OldTask(
        coefficient_drift=moved.get("coefficient_drift"),
        new_coefficients=moved.get("new_coefficients"),
        new_share=float(now[..., known:].abs().sum()) / whole if whole else 0.0,
        key_degrees=_turned(keys_before[:, places], keys[:, places]),
        accuracy=accuracy,
    )


def _turned(before: Tensor, after: Tensor) -> float | None:
    """As `drift_degrees`, of keys (memories, adapters, m, width); None where none has a direction.

    Of an adapter whose keys grew in number the mean of them.
    """
    if before.shape != after.shape:
        before, after = before.mean(dim=2), after.mean(dim=2)
    if not ((before.norm(dim=-1) > 0) & (after.norm(dim=-1) > 0)).any():
        return None
    return drift_degrees(before, after)


def _keys(snapshot: Snapshot) -> Tensor:
    """Keys (memories, adapters, m, width) as they are asked, m of every adapter."""
    memory = snapshot.consolidated()[1].memory
    each = [memory[block].asked_keys.detach().cpu() for block in memory.blocks]
    return torch.stack(each).unflatten(1, (len(snapshot.records), -1))


def choices(mira: Mira, pair: tuple[Task, Task]) -> Choices:
    """As `LooksBack.choices`."""
    measure, snapshot = Measure(mira.workspace), mira.snapshot()
    state, model, head = snapshot.consolidated()
    numbers = [state.tasks.index(task.number) for task in pair]
    own = either = total = 0
    for task, number in zip(pair, numbers, strict=True):
        _, weights = measure.recall(model, head, task.test.images)
        chosen = chosen_tasks(state, weights)
        own += int((chosen == number).sum())
        either += int(torch.isin(chosen, torch.tensor(numbers)).sum())
        total += len(task.test)
    return Choices(own / total, either / total)
