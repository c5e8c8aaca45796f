"""Why an input is recognised as what it is: which adapters fire, with which sign, and what for.

Taking something out sets its coefficients to zero, and what a decoder adds to them, and leaves all
others as they were, so that the difference is what it contributed to this mixture. (`memtool
forget` takes an adapter out for good, and the memory then mixes the others anew.) How known an
input is comes from the moments of the queries that consolidation counted; no image is read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.recalls import given_for_each
from memtool.heads import RecalledHead
from memtool.memories.closed_form import QueryStatistics, same_for_every_input
from memtool.memories.novelty import LIMIT
from memtool.methods.explanation import (
    AdapterPart,
    Explanation,
    Familiarity,
    Outcome,
    draw,
    outcome_of,
)
from memtool.methods.mira.measure import seen_by
from memtool.methods.mira.method import Mira
from memtool.methods.mira.recall import Given, MemoryModel
from memtool.methods.mira.settle import says, settled
from memtool.methods.mira.state import Snapshot
from memtool.methods.records import task_of
from memtool.methods.subject import subject_of
from memtool.reports.shown import format_of
from memtool_stores import AdapterRecord

SHRINKAGE = 1e-2
"""Of the covariance within tasks that distances are measured by, as for keys in closed form."""


def explain(
    mira: Mira,
    *,
    task: str | None = None,
    image: Path | None = None,
    prompt: str | None = None,
    version: str = "HEAD",
    out: Path | None = None,
) -> Explanation:
    """What the memory makes of one image, or of the test images of a task, and why.

    `out` is a plot (.svg, .png) or a page (.html). Raises ConfigError for anything but one subject,
    for a prompt and for another kind of file; errors as `Mira.retrieve`.
    """
    if out is not None:
        format_of(out)
    work = mira.workspace
    subject = subject_of(work, task=task, image=image, prompt=prompt)
    images = subject.images.images
    labels = None if subject.task is None else torch.from_numpy(np.asarray(subject.images.labels))
    snapshot = mira.read(version) if task is None else mira.snapshot(version)
    state, model, head = snapshot.consolidated()
    far = None if image is None else seen_by(work.engine, snapshot, images[0])
    seen = _see(mira, model, head, images)
    judge = partial(
        outcome_of, before=seen.probabilities, labels=labels, class_names=state.class_names
    )
    mixed = _Mixed(mira, model, head, images)
    without_negative, parts = _taken_out(mixed, seen, snapshot.records, judge)
    names = {part.task: part.task_name for part in parts}
    result = Explanation(
        version=snapshot.version,
        subject=subject.words,
        samples=len(subject),
        mix=state.memory.mix,
        separation=state.memory.separation,
        routing=state.memory.routing,
        scope=state.memory.scope,
        adapters=tuple(parts),
        blocks=tuple(tuple(float(a) for a in row) for row in seen.coefficients.mean(dim=0)),
        block_numbers=model.memory.blocks,
        outcome=judge(seen.probabilities),
        negative=float((seen.coefficients < 0).double().mean()),
        without_negative=without_negative,
        familiar=_familiar(seen.queries, snapshot.query_statistics(), names),
        novelty=far,
        unlike=None if far is None else far > LIMIT,
        same_for_every_input=blocks_asked_the_same(snapshot),
        out=out,
    )
    if out is not None:
        work.engine.on_main(lambda: draw(result, out))
    return result


def blocks_asked_the_same(snapshot: Snapshot) -> tuple[int, ...]:
    """The blocks whose memory was asked the same by every training image of every task."""
    _, model, _ = snapshot.consolidated()
    if model.settings.scope != "block":
        return ()
    found = same_for_every_input(list(snapshot.query_statistics().values()))
    return tuple(model.memory.blocks[place] for place in found)


def _taken_out(
    mixed: _Mixed,
    seen: _Seen,
    records: Sequence[AdapterRecord],
    judge: Callable[[Tensor], Outcome],
) -> tuple[Outcome | None, list[AdapterPart]]:
    """What comes out without negative coefficients, when there are any; every adapter's part."""
    tell, below = mixed.mira.workspace.tell, seen.coefficients < 0
    # One pass for every adapter that takes part: all others would change nothing.
    taking_part = seen.coefficients.abs().amax(dim=(0, 1)) > 0
    if mixed.model.settings.read == "decoder":  # which also adds to a weight of zero
        taking_part = torch.ones_like(taking_part)
    total = int(taking_part.sum()) + 1
    tell("explain", 0, total)
    clamped = seen.coefficients.clamp_min(0)
    without_negative = judge(mixed(clamped)) if bool(below.any()) else None
    tell("explain", 1, total)
    whole = judge(seen.probabilities)
    parts = []
    for place, record in enumerate(records):
        without = whole
        if bool(taking_part[place]):
            others = torch.arange(len(records)) != place
            without = judge(mixed(seen.coefficients * others, place))
            tell("explain", 1 + int(taking_part[: place + 1].sum()), total)
        parts.append(
            AdapterPart(
                name=record.name,
                task=task_of(record),
                task_name=record.meta.get("task_name"),
                coefficient=float(seen.coefficients[..., place].mean()),
                negative=float(below[..., place].double().mean()),
                contribution=whole.probability - without.probability,
                without=without,
            )
        )
    return without_negative, parts


def distances(
    queries: Tensor, statistics: Mapping[int, QueryStatistics]
) -> tuple[Tensor, Tensor] | None:
    """Squared Mahalanobis distances (tasks,) of queries (n, memories, d), and the typical ones.

    From the mean query of every task, by the covariance within tasks, averaged over samples and
    memories; typical (tasks,) is the same average over the task's own training queries. Memories
    that every input asks the same are left out. None where no queries were counted, or only equal
    ones.
    """
    if not statistics:
        return None
    parts = [part.pooled() for part in statistics.values()]
    same = same_for_every_input(parts)
    told_apart = [place for place in range(queries.shape[1]) if place not in same]
    if not told_apart:
        return None
    queries = queries[:, told_apart]
    counts = torch.stack([part.counts[0] for part in parts])
    means = torch.stack([part.sums[told_apart, 0] / part.counts[0] for part in parts], dim=1)
    scatters = torch.stack([part.second[told_apart] / part.counts[0] for part in parts], dim=1)
    scatters = scatters - means.unsqueeze(-1) * means.unsqueeze(-2)
    within = torch.einsum("t,ltij->lij", counts / counts.sum(), scatters)
    size = within.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    if not bool((size > 0).all()):
        return None
    identity = torch.eye(within.shape[-1], dtype=within.dtype)
    shrunk = (1 - SHRINKAGE) * within + SHRINKAGE * size[:, None, None] * identity
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shrunk))
    away = queries.double().transpose(0, 1).unsqueeze(1) - means.unsqueeze(2)
    squared = torch.einsum("ltni,lij,ltnj->ltn", away, inverse, away)
    typical = torch.einsum("lij,ltji->lt", inverse, scatters)
    return squared.mean(dim=(0, 2)), typical.mean(dim=0)


def _familiar(
    queries: Tensor, statistics: Mapping[int, QueryStatistics], names: Mapping[int, str | None]
) -> tuple[Familiarity, ...]:
    found = distances(queries, statistics)
    if found is None:
        return ()
    squared, typical = found
    tasks = [
        Familiarity(
            task=task,
            task_name=names.get(task),
            distance=float(squared[place].sqrt()),
            ratio=float((squared[place] / typical[place]).sqrt()),
        )
        for place, task in enumerate(statistics)
    ]
    return tuple(sorted(tasks, key=lambda one: one.ratio))


@dataclass(frozen=True, eq=False)
class _Seen:
    """probabilities (n, classes), coefficients (n, memories, t), queries (n, memories, d)."""

    probabilities: Tensor
    coefficients: Tensor
    queries: Tensor


def _see(
    mira: Mira, model: MemoryModel, head: RecalledHead, images: npt.NDArray[np.uint8]
) -> _Seen:
    """What the memory is asked for images, what it answers, and what comes of it."""
    memories, adapters = len(model.memory.blocks), len(model.values)

    def run(batch: Tensor) -> Tensor:
        pixels = model.backbone.preprocess(batch)
        features, coefficients, queries = model.seen(pixels, settled(model, says(head), pixels))
        scores = head(features, coefficients.mean(dim=1))
        parts = (head.probabilities(scores), coefficients.flatten(1), queries.flatten(1))
        return torch.cat([part.float() for part in parts], dim=1)

    # Exact: the difference that one adapter makes may be less than bfloat16 can show.
    joined = mira.workspace.engine.predict(run, images, exact=True)
    probabilities, coefficients, queries = joined.split(
        [head.classes, memories * adapters, joined.shape[1] - head.classes - memories * adapters],
        dim=1,
    )
    return _Seen(
        probabilities,
        coefficients.unflatten(1, (memories, adapters)),
        queries.unflatten(1, (memories, -1)),
    )


@dataclass(frozen=True, eq=False)
class _Mixed:
    """The probabilities (n, classes) of images under given coefficients (n, memories, t).

    A decoder is asked again, and says nothing of the adapter that is gone.
    """

    mira: Mira
    model: MemoryModel
    head: RecalledHead
    images: npt.NDArray[np.uint8]

    def __call__(self, coefficients: Tensor, gone: int | None = None) -> Tensor:
        model = self.model

        def run(batch: Tensor, given: Tensor) -> Tensor:
            if model.settings.read == "decoder":
                features = model.given(batch, Given(given, gone))
            else:
                blocks = None if model.settings.blocks is None else model.memory.blocks
                recall = given_for_each(model.values, given, model.mix, blocks)
                features = model.under(batch, recall)
            return self.head.probabilities(self.head(features, given.mean(dim=1)))

        engine = self.mira.workspace.engine
        return engine.predict(run, self.images, coefficients, exact=True)
