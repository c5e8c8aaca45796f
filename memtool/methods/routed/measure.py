"""What a routed memory is worth, beside a hard choice, the uniform mixture and the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pydantic import TypeAdapter
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.answering import RecallOf
from memtool.evaluation.course import Course
from memtool.evaluation.inside import Inside
from memtool.evaluation.record import Kind, Row
from memtool.learning.answers import Answering, AnswerScores, answer_row
from memtool.learning.looks import batches
from memtool.methods.calibration import digest_of
from memtool.methods.inside import recalled
from memtool.methods.outcome import share_right
from memtool.methods.routed.memory import RoutedMemory, Way, hardest, of_prompts, only, uniform
from memtool.methods.scored import TAKEN, Earlier, Taken
from memtool.methods.subject import SUBJECT_SAMPLES
from memtool.streams.task import Images, Task, Texts, spread
from memtool.workspace import Workspace

OTHER_WAYS: Mapping[str, tuple[str, Way]] = {
    "hard": ("hard choice: the adapter of most weight", hardest),
    "uniform": ("uniform mixture", uniform),
}
"""By id: the label of a row, and how the weights are used."""


_ANSWERED = TypeAdapter(AnswerScores)


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
            return routing.recalled(lm, prompts, way)

    return Answering(work, RecallOf(choose))


def weights_of(work: Workspace, memory: RoutedMemory, samples: Images | Texts) -> Tensor:
    """The weights of samples (n, adapters), or (n, memories, adapters), on the CPU."""
    routing = memory.routing
    if isinstance(samples, Images):
        return routing.weights(work.features(samples.images).to(routing.owners.device)).cpu()
    lm, tokens = work.backbone, work.backbone.encode(samples.prompts).tokens
    order, parts = list[Tensor](), list[Tensor]()
    for rows, asked in batches(work, tokens):
        with work.engine.autocast():
            parts.append(routing.weighed(lm, asked).cpu())
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def by_memory(weights: Tensor) -> tuple[tuple[float, ...], ...]:
    """The mean weights of samples at every memory."""
    rows = weights if weights.ndim == 3 else weights.unsqueeze(1)
    return tuple(tuple(line) for line in rows.double().mean(dim=0).tolist())


def memories_of(work: Workspace, memory: RoutedMemory) -> tuple[int, ...]:
    """The number of the block that each memory is of; one behind all for one that serves all."""
    depth: int = work.backbone.depth
    return (depth,) if memory.routing.memories is None else (*range(depth),)


def row(
    work: Workspace,
    id: str,
    label: str,
    kind: Kind,
    tasks: Sequence[Task],
    there: Mapping[int, tuple[RoutedMemory, Sequence[Way]]],
    *,
    told: bool = False,
) -> Row:
    """The row of memories after so many tasks, each with the way that every task is asked in.

    A domain that is never learned from is asked as the last of them, unless they are `told`.
    """
    if work.reads == "texts":
        found = {
            count: _answered(work, memory, tasks, ways, f"evaluate: {label}")
            for count, (memory, ways) in there.items()
        }
        return answer_row(id, label, kind, tasks, found)
    course = Course(tasks, None if told else work.unseen)
    for count in work.telling(f"evaluate: {label}", sorted(there)):
        memory, ways = there[count]
        right = [
            share_right(scores(work, memory, task.test, way)[0], task.test)
            for task, way in zip(course.tested, [*ways, ways[-1]], strict=False)
        ]
        course.add(count, right)
    return course.row(id, label, kind)


def history_row(
    work: Workspace, label: str, tasks: Sequence[Task], there: Mapping[int, RoutedMemory]
) -> Row:
    """The row of the versions of a memory after so many tasks.

    What an earlier one scored is measured where nobody did before.
    """
    newest, course = max(there), Course(tasks, work.unseen)
    texts: dict[int, AnswerScores] = {}
    for count in work.telling(f"evaluate: {label}", sorted(there)):
        memory = there[count]
        stage = f"evaluate: {label} after {len(memory.tasks)} tasks"
        known = Earlier(work, [digest_of(memory.view)])
        if work.reads == "texts":
            parts = [
                known.of(
                    task,
                    _ANSWERED,
                    partial(_answered, work, memory, [task], [as_they_are], stage),
                    anew=count == newest,
                )
                for task in tasks
            ]
            texts[count] = AnswerScores.joined(parts)
            continue
        found = [
            known.of(task, TAKEN, partial(_taken, work, memory, task), anew=count == newest)
            for task in course.tested
        ]
        pairs = zip(found, course.tested, strict=True)
        course.add(count, [one.share(task.test) for one, task in pairs])
    if work.reads == "texts":
        return answer_row("memory", label, "method", tasks, texts)
    return course.row("memory", label, "method")


def _taken(work: Workspace, memory: RoutedMemory, task: Task) -> Taken:
    """What the test images of a task are taken for."""
    return Taken.of(share_right(scores(work, memory, task.test)[0], task.test))


def inside(work: Workspace, memory: RoutedMemory, tasks: Sequence[Task]) -> Inside:
    """The weights of some test samples of every task, and examples."""
    samples = [spread(task.test, SUBJECT_SAMPLES[work.reads]) for task in tasks]
    chances: list[Tensor] = []
    names: tuple[str, ...] = ()
    if memory.head is None:
        weights = [weights_of(work, memory, some) for some in samples]
    else:
        found = [scores(work, memory, some) for some in samples]
        weights = [each for _, each in found]
        chances = [memory.head.probabilities(each) for each, _ in found]
        names = work.stream.class_names
    adapters = [record.name for record in memory.records]
    blocks = memories_of(work, memory) if weights[0].ndim == 3 else ()
    return recalled(
        tasks, samples, weights, adapters, blocks=blocks, chances=chances, class_names=names
    )


def _answered(
    work: Workspace,
    memory: RoutedMemory,
    tasks: Sequence[Task],
    ways: Sequence[Way],
    stage: str,
) -> AnswerScores:
    """What answers reach, task by task."""
    if len({*ways}) == 1:
        return answering(work, memory, ways[0]).scores(tasks, stage)
    parts = [
        answering(work, memory, way).scores([task], f"{stage}, {task.name}")
        for task, way in zip(tasks, ways, strict=True)
    ]
    return AnswerScores.joined(parts)


def other_rows(work: Workspace, memory: RoutedMemory, tasks: Sequence[Task]) -> list[Row]:
    """The same adapters and rule, used otherwise, and the oracle, which is told the task.

    On texts also the frozen model, without any adapter.
    """
    count = len(tasks)
    rows = [
        row(work, id, label, "baseline", tasks, {count: (memory, [way] * len(tasks))})
        for id, (label, way) in OTHER_WAYS.items()
    ]
    rows = [one.model_copy(update={"reading": True}) for one in rows]
    if work.reads == "texts":
        label = "frozen model"
        found = {count: Answering(work, None).scores(tasks, f"evaluate: {label}")}
        rows.append(answer_row("frozen", label, "baseline", tasks, found))
    told = [only(memory.tasks.index(task.number), memory.routing.owners) for task in tasks]
    oracle = row(
        work,
        "oracle",
        "oracle adapter, task given",
        "upper bound",
        tasks,
        {count: (memory, told)},
        told=True,
    )
    return [*rows, oracle]


def task_accuracy(work: Workspace, memory: RoutedMemory, tasks: Sequence[Task]) -> float:
    """Share of test samples whose own task has most of the weight; none of a task not in memory."""
    right = total = 0
    for task in tasks:
        weights = of_prompts(weights_of(work, memory, task.test))
        place = memory.tasks.index(task.number) if task.number in memory.tasks else -1
        of_task = memory.routing.owners.cpu() == place
        most = of_task[weights.argmax(dim=1)]
        right, total = right + int(most.sum()), total + len(most)
    return right / max(total, 1)
