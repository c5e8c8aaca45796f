"""What recalled adapters are worth: accuracy and distance beside the exact ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.recalls import chosen
from memtool.adapters.values import AdapterValues
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Kind, Row
from memtool.evaluation.right import Share
from memtool.heads import RecalledHead, solve_head
from memtool.heads.solve import merged
from memtool.methods.modulation.predictor import Predictor
from memtool.methods.modulation.recallers import recall_all
from memtool.methods.modulation.stored import Stored
from memtool.methods.outcome import share_right
from memtool.sections import Recaller
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace

Numbers = npt.NDArray[np.float64]

LABELS: Mapping[Recaller, str] = {
    "hopfield": "Hopfield",
    "hopfield-published": "Hopfield, as published (dot, beta 25)",
    "bayes-pcn": "BayesPCN",
    "bayes-pcn-published": "BayesPCN, as published",
}


def til_rows(
    work: Workspace, stored: Stored, tasks: Sequence[Task], history: Iterable[Stored]
) -> list[Row]:
    """Every memory, then the exact adapters, with the task given; at every version of `history`.

    A version of `history` holds the first adapters of `stored`; the last one holds all.
    """
    settings, shown = work.config.modulation, [task.test for task in tasks]
    accuracy = {name: AccuracyMatrix.empty(_names(tasks)) for name in ("exact", *settings.memory)}
    errors = {name: _unmeasured(tasks) for name in settings.memory}
    # The exact adapters and their heads are the same at every version.
    exact = accuracies(work, stored, stored.values, shown)
    for there in history:
        known = len(there)
        later = [None] * (len(tasks) - known)
        accuracy["exact"] = accuracy["exact"].with_row(known, [*exact[:known], *later])
        for name in settings.memory:
            recalled = recall_all(name, there.view, there.values, settings)
            errors[name][known, :known] = relative_errors(recalled, there.values)
            scores = accuracies(work, there, recalled, shown[:known])
            accuracy[name] = accuracy[name].with_row(known, [*scores, *later])
    rows = [
        _row(name, LABELS[name], "method", accuracy[name], float(np.mean(exact)), error)
        for name, error in errors.items()
    ]
    label = "exact adapters from the store"
    return [*rows, Row.measured("exact", label, "upper bound", accuracy["exact"])]


def mts_rows(work: Workspace, stored: Stored, tasks: Sequence[Task]) -> list[Row]:
    """Every memory under predicted tasks; the exact adapters, task predicted and task given."""
    settings, shown = work.config.modulation, [task.test for task in tasks]
    predictor = Predictor.fitting(stored)
    predicted = [predictor.predict(work, samples.images) for samples in shown]
    more = {"task_accuracy": share_predicted(predicted, range(len(tasks)))}
    given = accuracies(work, stored, stored.values, shown)
    exact = float(np.mean(given))

    def final(scores: Sequence[float]) -> AccuracyMatrix:
        return AccuracyMatrix.empty(_names(tasks)).with_row(len(tasks), scores)

    rows = []
    for name in settings.memory:
        recalled = recall_all(name, stored.view, stored.values, settings)
        scores = final(accuracies(work, stored, recalled, shown, predicted))
        errors = _unmeasured(tasks)
        errors[-1] = relative_errors(recalled, stored.values)
        rows.append(_row(name, LABELS[name], "method", scores, exact, errors, more))
    scores = final(accuracies(work, stored, stored.values, shown, predicted))
    label = "exact adapters, task predicted"
    rows.append(_row("exact-predicted", label, "upper bound", scores, exact, None, more))
    label = "exact adapters, task given"
    return [*rows, Row.measured("exact", label, "upper bound", final(given))]


def frozen_row(work: Workspace, tasks: Sequence[Task], *, given: bool) -> Row:
    """No adapter: frozen features, with an LDA head per task (`given`), or one over all classes."""
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
    matrix = AccuracyMatrix.empty(_names(tasks)).with_row(len(tasks), scores)
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
    labels = torch.from_numpy(np.concatenate([samples.labels for samples in shown]))
    # A recalled adapter differs by 1e-4 or less, and bfloat16 by more: it would be measured.
    scores = engine.predict(logits, images, torch.cat(list(places)), exact=True)
    right = (scores.argmax(1) == labels).split([len(samples) for samples in shown])
    return [Share(part.numpy()) for part in right]


def share_predicted(predicted: Sequence[Tensor], own: Sequence[int]) -> float:
    """Share of samples, over all sets, whose predicted place is the own one of their set."""
    hits = sum(int((p == place).sum()) for place, p in zip(own, predicted, strict=True))
    return hits / max(1, sum(len(p) for p in predicted))


def relative_errors(recalled: Tensor, exact: Tensor) -> Numbers:
    """|recalled − exact| / |exact| of every row (t, numel): (t,) float64."""
    difference = (recalled.double() - exact.double()).norm(dim=1)
    errors: Numbers = (difference / exact.double().norm(dim=1)).numpy()
    return errors


def _row(
    id: str,
    label: str,
    kind: Kind,
    accuracy: AccuracyMatrix,
    exact: float,
    errors: Numbers | None,
    more: Mapping[str, float] | None = None,
) -> Row:
    """Accuracies, errors of recall (T+1, T), and how far below `exact` the last accuracies are."""
    measured = {**(more or {}), "recall_drop": exact - float(accuracy.values[-1].mean())}
    if errors is not None:
        measured["recall_error"] = float(errors[-1].mean())
    return Row.measured(
        id,
        label,
        kind,
        accuracy,
        more=measured,
        recall_error=()
        if errors is None
        else [[None if np.isnan(e) else float(e) for e in row] for row in errors],
    )


def _names(tasks: Sequence[Task]) -> tuple[str, ...]:
    return tuple(task.name for task in tasks)


def _unmeasured(tasks: Sequence[Task]) -> Numbers:
    """(T+1, T) without numbers."""
    return np.full((len(tasks) + 1, len(tasks)), np.nan)
