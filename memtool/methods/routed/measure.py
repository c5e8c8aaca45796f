"""What a routed memory is worth, beside a hard choice, the uniform mixture and the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.answering import RecallOf
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Kind, Row
from memtool.learning.answers import Answering, AnswerScores, answer_row
from memtool.learning.looks import looks
from memtool.methods.outcome import share_right
from memtool.methods.routed.memory import RoutedMemory, Way, hardest, only, uniform
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace

OTHER_WAYS: Mapping[str, tuple[str, Way]] = {
    "hard": ("hard choice", hardest),
    "uniform": ("uniform mixture", uniform),
}
"""By id: the label of a row, and how the weights are used."""


def as_they_are(weights: Tensor) -> Tensor:
    """The weights of the rule."""
    return weights


def scores(
    work: Workspace, memory: RoutedMemory, images: Images, way: Way = as_they_are
) -> tuple[Tensor, Tensor]:
    """Scores (n, classes) of images, and the weights (n, adapters) behind them, on the CPU."""
    backbone, head = work.backbone, memory.head
    assert head is not None

    def run(batch: Tensor) -> Tensor:
        pixels = backbone.preprocess(batch)
        weights = way(memory.routing.weights(backbone.features(pixels)))
        features = backbone.features(pixels, memory.routing.recall(weights))
        return torch.cat([head(features, weights), weights], dim=1)

    joined = work.engine.predict(run, images.images)
    return joined[:, : head.classes], joined[:, head.classes :]


def answering(work: Workspace, memory: RoutedMemory, way: Way = as_they_are) -> Answering:
    """The language model under the mixtures that prompts choose; they stay while it answers."""
    lm, routing = work.backbone, memory.routing

    def choose(prompts: Tensor) -> Recall:
        with torch.no_grad():
            return routing.recall(way(routing.weights(routing.look(lm, prompts))))

    return Answering(work, RecallOf(choose))


def row(
    work: Workspace,
    id: str,
    label: str,
    kind: Kind,
    tasks: Sequence[Task],
    there: Mapping[int, tuple[RoutedMemory, Sequence[Way]]],
) -> Row:
    """The row of memories after so many tasks, each with the way that every task is asked in."""
    if work.reads == "texts":
        found = {
            count: _answered(work, memory, tasks, ways, label)
            for count, (memory, ways) in there.items()
        }
        return answer_row(id, label, kind, tasks, found)
    matrix = AccuracyMatrix.empty([task.name for task in tasks])
    for count in work.telling(f"evaluate: {label}", sorted(there)):
        memory, ways = there[count]
        right = [
            share_right(scores(work, memory, task.test, way)[0], task.test)
            for task, way in zip(tasks, ways, strict=True)
        ]
        matrix = matrix.with_row(count, right)
    return Row.measured(id, label, kind, matrix)


def _answered(
    work: Workspace,
    memory: RoutedMemory,
    tasks: Sequence[Task],
    ways: Sequence[Way],
    label: str,
) -> AnswerScores:
    """What answers reach, task by task."""
    parts = [
        answering(work, memory, way).scores([task], f"after {len(memory.tasks)} tasks: {label}")
        for task, way in zip(tasks, ways, strict=True)
    ]
    return AnswerScores.joined(parts)


def other_rows(work: Workspace, memory: RoutedMemory, tasks: Sequence[Task]) -> list[Row]:
    """The same adapters and rule, used otherwise; and the oracle, which is told the task."""
    count = len(memory.tasks)
    rows = [
        row(work, id, label, "baseline", tasks, {count: (memory, [way] * len(tasks))})
        for id, (label, way) in OTHER_WAYS.items()
    ]
    told = [only(memory.tasks.index(task.number), memory.routing.owners) for task in tasks]
    oracle = row(
        work, "oracle", "oracle adapter, task given", "upper bound", tasks, {count: (memory, told)}
    )
    return [*rows, oracle]


def task_accuracy(work: Workspace, memory: RoutedMemory, tasks: Sequence[Task]) -> float:
    """Share of test samples whose own task has most of the weight."""
    right = total = 0
    for task in tasks:
        routing = memory.routing
        weights = routing.weights(looks(work, task.test, routing.look).to(routing.owners.device))
        of_task = memory.routing.owners == memory.tasks.index(task.number)
        most = of_task[weights.argmax(dim=1)]
        right, total = right + int(most.sum()), total + len(most)
    return right / max(total, 1)
