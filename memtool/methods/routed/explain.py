"""What comes out of a routed memory, and what without each of its adapters.

Of images the probability of the class that wins. Of texts that of an answer token, exp(−loss): of
the right answers to the test prompts of a task, or of the answer that the memory gives to a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from memtool.methods.explanation import AdapterPart, Explanation, Outcome, draw, outcome_of
from memtool.methods.in_store import classes_of
from memtool.methods.outcome import told_of
from memtool.methods.records import task_of
from memtool.methods.routed.measure import (
    answering,
    as_they_are,
    by_memory,
    memories_of,
    scores,
    weights_of,
)
from memtool.methods.routed.memory import LEAST, RoutedMemory, Way
from memtool.methods.subject import Subject, subject_of
from memtool.reports.shown import format_of
from memtool.streams.task import Images
from memtool.workspace import Workspace

if TYPE_CHECKING:
    from memtool.methods.routed.method import Routed


def explain(
    method: Routed,
    *,
    task: str | None = None,
    image: Path | None = None,
    prompt: str | None = None,
    block: int | None = None,
    version: str = "HEAD",
    out: Path | None = None,
) -> Explanation:
    """What the memory makes of an input, or of test samples of a task, and why.

    `block` is that whose tokens are shown, where every token of a prompt has weights; none: all.
    `out` is a plot (.svg, .png) or a page (.html). Raises ConfigError for anything but one subject
    and for another kind of file.
    """
    if out is not None:
        format_of(out)
    work = method.workspace
    subject = subject_of(work, task=task, image=image, prompt=prompt)
    memory = method.read(version) if subject.task is None else method.snapshot(version)
    weights = weights_of(work, memory, subject.samples)
    judge = _judge(work, memory, subject)
    whole = judge(as_they_are)
    parts = []
    for index in work.telling("explain", range(len(memory.records))):
        record, without = memory.records[index], whole
        if bool((weights[..., index].abs() > LEAST).any()):
            without = judge(_leaving_out(index))
        parts.append(
            AdapterPart(
                name=record.name,
                task=task_of(record),
                task_name=record.meta.get("task_name"),
                coefficient=float(weights[..., index].mean()),
                negative=float((weights[..., index] < 0).double().mean()),
                contribution=whole.probability - without.probability,
                without=without,
            )
        )
    told: dict[str, Any] = {}
    if prompt is not None:
        brought = subject.samples.prompts[0]  # type: ignore[union-attr]
        told = told_of(method.novelty(memory.view, brought))
        told["columns"], told["tokens"] = method.by_token(memory, brought, block)
    result = Explanation(
        version=memory.version,
        subject=subject.words,
        samples=len(subject),
        mix="delta",
        separation=method.name,
        routing="mixture",
        scope=method.scope,
        adapters=tuple(parts),
        blocks=by_memory(weights),
        block_numbers=memories_of(work, memory),
        outcome=whole,
        negative=float((weights < 0).double().mean()),
        without_negative=None,
        familiar=(),
        out=out,
        **told,
    )
    if out is not None:
        work.engine.on_main(lambda: draw(result, out))
    return result


def _leaving_out(index: int) -> Way:
    """The weights with that of one adapter at zero, all others as they are."""

    def without(weights: Tensor) -> Tensor:
        others = torch.arange(weights.shape[-1], device=weights.device) != index
        return weights * others

    return without


def _judge(work: Workspace, memory: RoutedMemory, subject: Subject) -> Callable[[Way], Outcome]:
    """What comes out under another use of the weights, beside the rule's own."""
    samples, task = subject.samples, subject.task
    if isinstance(samples, Images):
        head = memory.head
        assert head is not None
        before = head.probabilities(scores(work, memory, samples)[0])
        labels = None if task is None else torch.from_numpy(np.asarray(samples.labels))
        names = classes_of(memory.view)
        return lambda way: outcome_of(
            head.probabilities(scores(work, memory, samples, way)[0]), before, labels, names
        )
    alone = not samples.answers
    said = samples.answers or tuple(answering(work, memory).answers(samples.prompts))
    encoded = work.backbone.encode(samples.prompts, said)

    def of_texts(way: Way) -> Outcome:
        under = answering(work, memory, way)
        label = under.answers(samples.prompts)[0] if alone else None
        changed = float(alone and label != said[0])
        return Outcome(
            probability=float(np.exp(-under.loss(encoded))), changed=changed, label=label
        )

    return of_texts
