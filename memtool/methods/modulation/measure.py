"""What recalled adapters are worth beside the exact ones: accuracy, or loss, and distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.recalls import chosen, every
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.answering import RecallOf
from memtool.evaluation.inside import Inside
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Kind, Row
from memtool.evaluation.right import Share
from memtool.heads import RecalledHead, solve_head
from memtool.heads.solve import merged
from memtool.learning.answers import Answering, AnswerScores, answer_row
from memtool.methods.inside import recalled
from memtool.methods.modulation.predictor import Predictor
from memtool.methods.modulation.recallers import recall_all
from memtool.methods.modulation.stored import Stored
from memtool.methods.outcome import share_right
from memtool.methods.subject import SUBJECT_SAMPLES
from memtool.sections import Recaller
from memtool.streams.task import Images, Task, spread
from memtool.workspace import Workspace

Numbers = npt.NDArray[np.float64]

LABELS: Mapping[Recaller, str] = {
    "hopfield": "Hopfield",
    "hopfield-published": "Hopfield, as published (dot, beta 25)",
    "bayes-pcn": "BayesPCN",
    "bayes-pcn-published": "BayesPCN, as published",
}


@dataclass(eq=False)
class _Way:
    """Adapters in use: what was measured of them after so many tasks, by that number."""

    label: str
    kind: Kind
    found: dict[int, Any] = field(default_factory=dict)
    errors: Numbers | None = None


def rows(
    work: Workspace,
    tasks: Sequence[Task],
    history: Iterable[Stored],
    *,
    given: bool,
) -> list[Row]:
    """Every memory, then the exact adapters: with the task given, or predicted.

    A version of `history` holds adapters of the first of `tasks`, the last one those of all. Where
    tasks are predicted, every version has a predictor of its own, and the exact adapters come
    twice: under its predictions, and with the task given.
    """
    settings = work.config.modulation
    ways = {
        name: _Way(LABELS[name], "method", errors=np.full((len(tasks) + 1, len(tasks)), np.nan))
        for name in settings.memory
    }
    if not given:
        ways["exact-predicted"] = _Way("exact adapters, task predicted", "upper bound")
    label = "exact adapters from the store" if given else "exact adapters, task given"
    exact, more = _Way(label, "upper bound"), {}
    newest, counts = None, []
    for there in history:
        newest, known = there, len(there)
        counts.append(known)
        seen = None if given else Seen.of(work, there, tasks[:known])
        if seen is not None:
            more["task_accuracy"] = share_predicted(seen.places, range(known))
        for name, way in ways.items():
            values = there.values
            if way.errors is not None:
                values = recall_all(name, there.view, there.values, settings)
                way.errors[known, :known] = relative_errors(values, there.values)
            way.found[known] = _scored(work, there, values, tasks[:known], way.label, seen)
    assert newest is not None
    # The exact adapters and their heads are the same at every version.
    once = _scored(work, newest, newest.values, tasks, label)
    exact.found = {known: _first(once, known) for known in counts}
    best = _row(work, "exact", exact, tasks)
    return [*(_row(work, name, way, tasks, best, more) for name, way in ways.items()), best]


@dataclass(frozen=True, eq=False)
class Seen:
    """Whose adapters inputs get: what a predictor says.

    `place_of` tells a batch of prompts, `places` the test samples of tasks, a tensor a task.
    """

    place_of: Callable[[Tensor], Tensor]
    places: Sequence[Tensor]

    @classmethod
    def of(cls, work: Workspace, stored: Stored, tasks: Sequence[Task]) -> Seen:
        """By the predictor of a version. Raises as `Predictor.fitting`."""
        tells = Predictor.fitting(stored)
        logits = tells.logits(work)
        places = [tells.predict(work, task.test) for task in tasks]
        return cls(lambda inputs: logits(inputs).argmax(1), places)


def _scored(
    work: Workspace,
    stored: Stored,
    values: Tensor,
    tasks: Sequence[Task],
    label: str,
    seen: Seen | None = None,
) -> Any:
    """What adapters (t, numel) reach on tasks: shares of right answers, or `AnswerScores`.

    Without `seen`, task i goes through the adapter at place i.
    """
    if work.reads == "images":
        shown = [task.test for task in tasks]
        return accuracies(work, stored, values, shown, None if seen is None else seen.places)
    stage = f"after {len(stored)} tasks: {label}"
    if seen is not None:
        return answering(work, stored, values, seen.place_of).scores(tasks, stage)
    parts = [
        answering(work, stored.only(place), values[place : place + 1]).scores([task], stage)
        for place, task in enumerate(tasks)
    ]
    return AnswerScores.joined(parts)


def _first(scored: Any, known: int) -> Any:
    """What was reached on the first tasks."""
    return scored.first(known) if isinstance(scored, AnswerScores) else scored[:known]


def _row(
    work: Workspace,
    id: str,
    way: _Way,
    tasks: Sequence[Task],
    exact: Row | None = None,
    more: Mapping[str, float] | None = None,
) -> Row:
    """The row of a way; errors of recall (T+1, T), and how far it ends below an `exact` row."""
    if work.reads == "texts":
        row = answer_row(id, way.label, way.kind, tasks, way.found)
    else:
        matrix = AccuracyMatrix.empty([task.name for task in tasks])
        for known, scores in way.found.items():
            matrix = matrix.with_row(known, [*scores, *[None] * (len(tasks) - known)])
        row = Row.measured(id, way.label, way.kind, matrix)
    metrics = {**row.metrics, **(more or {})}
    if exact is not None and "faa" in exact.metrics:
        metrics["recall_drop"] = exact.metrics["faa"] - row.metrics["faa"]
    errors: list[list[float | None]] = []
    if way.errors is not None:
        metrics["recall_error"] = float(way.errors[-1].mean())
        errors = [[None if np.isnan(e) else float(e) for e in line] for line in way.errors]
    changes = {"metrics": metrics, "recall_error": tuple(map(tuple, errors))}
    return row.model_copy(update=changes)


def predictions(work: Workspace, stored: Stored, tasks: Sequence[Task]) -> Inside:
    """The share of the tasks' test samples that each adapter is predicted for, and examples."""
    tells = Predictor.fitting(stored)
    samples = [spread(task.test, SUBJECT_SAMPLES[work.reads]) for task in tasks]
    places = [tells.predict(work, some).cpu() for some in samples]
    weights = [torch.nn.functional.one_hot(each, len(stored)).double() for each in places]
    return recalled(
        tasks,
        samples,
        weights,
        [record.name for record in stored.records],
        what="share of samples",
        class_names=() if work.reads == "texts" else work.stream.class_names,
    )


def frozen_row(work: Workspace, tasks: Sequence[Task], *, given: bool) -> Row:
    """No adapter: the language model as it is, or frozen features with an LDA head.

    A head per task (`given`), or one over all classes.
    """
    if work.reads == "texts":
        found = Answering(work, None).scores(tasks, "frozen model")
        return answer_row("frozen", "frozen model", "baseline", tasks, {len(tasks): found})
    own = {
        task.number: work.counted(work.features(task.train.images), task.train) for task in tasks
    }
    if not given:
        own = dict.fromkeys(own, merged(own))
    scores = []
    for task in tasks:
        head = solve_head("lda", own[task.number], work.config.head)
        allowed = task.classes if given else None
        scores.append(share_right(head(work.features(task.test.images), allowed), task.test))
    matrix = AccuracyMatrix.empty([task.name for task in tasks]).with_row(len(tasks), scores)
    head_of = "LDA head per task, task given" if given else "one LDA head, no task"
    return Row.measured("frozen", f"frozen backbone, {head_of}", "baseline", matrix)


def accuracies(
    work: Workspace,
    stored: Stored,
    values: Tensor,
    shown: Sequence[Images],
    places: Sequence[Tensor] | None = None,
) -> list[Share]:
    """Share of right answers on each set of samples, all of them in one stream of batches.

    `values` (t, numel) are the adapters of `stored`, exact or recalled. Sample i of set s goes
    through the adapter and the head at place `places[s][i]`; without `places`, set s through that
    at place s.
    """
    if not shown:
        return []
    engine, backbone = work.engine, work.backbone
    if places is None:
        places = [torch.full((len(samples),), place) for place, samples in enumerate(shown)]
    stack = AdapterValues.from_flat(values, work.layout, stored.scaling).to(engine.device)
    head = RecalledHead.of_tasks(stored.heads, range(len(stored))).to(engine.device)

    def logits(images: Tensor, rows: Tensor) -> Tensor:
        features = backbone.features(backbone.preprocess(images), chosen(stack, rows))
        return head(features, torch.nn.functional.one_hot(rows, len(stored)).float())

    images = np.concatenate([samples.images for samples in shown])
    # A recalled adapter differs by 1e-4 or less, and bfloat16 by more: it would be measured.
    scores = engine.predict(logits, images, torch.cat(list(places)), exact=True)
    said = scores.argmax(1).split([len(samples) for samples in shown])
    return [
        Share.of_classes(part.numpy(), samples.labels)
        for part, samples in zip(said, shown, strict=True)
    ]


def answering(
    work: Workspace,
    stored: Stored,
    values: Tensor,
    place_of: Callable[[Tensor], Tensor] | None = None,
) -> Answering:
    """The language model, each prompt under one of the adapters `values` (t, numel) of `stored`.

    `place_of` maps prompts (b, n) to the places (b,) of their adapters; none: the only one.
    """
    stack = AdapterValues.from_flat(values, work.layout, stored.scaling).to(work.engine.device)

    def choose(prompts: Tensor) -> Recall:
        if place_of is None:
            return every(stack)
        with torch.no_grad():
            return chosen(stack, place_of(prompts))

    return Answering(work, RecallOf(choose))


def share_predicted(predicted: Sequence[Tensor], own: Sequence[int]) -> float:
    """Share of samples, over all sets, whose predicted place is the own one of their set."""
    hits = sum(int((p == place).sum()) for place, p in zip(own, predicted, strict=True))
    return hits / max(1, sum(len(p) for p in predicted))


def relative_errors(recalled: Tensor, exact: Tensor) -> Numbers:
    """|recalled − exact| / |exact| of every row (t, numel): (t,) float64."""
    difference = (recalled.double() - exact.double()).norm(dim=1)
    errors: Numbers = (difference / exact.double().norm(dim=1)).numpy()
    return errors
