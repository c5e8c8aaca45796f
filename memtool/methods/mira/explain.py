"""Why an input is recognised as what it is: which adapters fire, with which sign, and what for.

Taking something out sets its coefficients to zero and leaves all others as they were, so that the
difference is what it contributed to this mixture. (`memtool forget` takes an adapter out for good,
and the memory then mixes the others anew.) How known an input is comes from the moments of the
queries that consolidation counted; no image is read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from memtool.adapters.recalls import given_for_each
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError
from memtool.heads import RecalledHead
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.novelty import LIMIT
from memtool.methods.mira.measure import SUBJECT_SAMPLES, seen_by
from memtool.methods.mira.method import Mira
from memtool.methods.mira.recall import MemoryModel, QueryProbe
from memtool.methods.records import task_of
from memtool.methods.results import Part, Result
from memtool.methods.subject import first
from memtool.reports.explanation import Explained, format_of, write_explained
from memtool.reports.table import Grid, percent
from memtool.sections import Mix
from memtool.streams import load_image
from memtool_stores import AdapterRecord

SHRINKAGE = 1e-2
"""Of the covariance within tasks that distances are measured by, as for keys in closed form."""

NEAREST = 3
"""Tasks whose distance a terminal and a page show; the record has all."""


class Outcome(Part):
    """What comes out of a mixture.

    `probability` is that of the class that wins with the whole mixture, `changed` the share of
    samples that another class wins; both over all samples. `label` is the class that wins for an
    image (None where nothing that is left knows a class), `accuracy` is for a task.
    """

    probability: float
    changed: float
    label: str | None = None
    accuracy: float | None = None


class AdapterPart(Part):
    """One adapter's part in a mixture.

    `coefficient` is the mean over samples and memories, `negative` the share of them below zero.
    `contribution` is the probability of the winning class less that `without` the adapter: below
    zero for an adapter that speaks against it.
    """

    name: str
    task: int
    task_name: str | None
    coefficient: float
    negative: float
    contribution: float
    without: Outcome


class Familiarity(Part):
    """How far the queries lie from those of a task that was learned.

    `distance` is Mahalanobis' from the task's mean query by the covariance within tasks, root mean
    square over samples and memories; `ratio` compares it to the task's own training images, so that
    1 is as far as one of them and several times that is unlike all that was learned.
    """

    task: int
    task_name: str | None
    distance: float
    ratio: float


class Explanation(Result):
    """Why an image, or the test images of a task, is recognised as what it is.

    `blocks[l]` are the coefficients at memory l, averaged over the samples, adapters in the order
    of `adapters`; `block_numbers` says at which block each memory looks. `without_negative` is None
    when no coefficient is negative. `familiar` has the nearest task first; it is empty when the
    memory counted no queries. `novelty` and `unlike` are those of a `Prediction`, for an image.
    """

    schema_: Literal["memtool.explain"] = Field("memtool.explain", alias="schema")
    version: str
    subject: str
    samples: int
    mix: str
    separation: str
    routing: str
    scope: str
    adapters: tuple[AdapterPart, ...]
    blocks: tuple[tuple[float, ...], ...]
    block_numbers: tuple[int, ...]
    outcome: Outcome
    negative: float
    without_negative: Outcome | None
    familiar: tuple[Familiarity, ...]
    novelty: float | None = None
    unlike: bool | None = None
    out: Path | None = None


def explain(
    mira: Mira,
    *,
    task: str | None = None,
    image: Path | None = None,
    version: str = "HEAD",
    out: Path | None = None,
) -> Explanation:
    """What the memory makes of one image, or of the test images of a task, and why.

    `out` is a plot (.svg, .png) or a page (.html). Raises ConfigError for
    anything but one subject and for another kind of file; errors as `Mira.retrieve`.
    """
    if (task is None) == (image is None):
        raise ConfigError("what should be explained?", expected="one of --task and --image")
    if out is not None:
        format_of(out)
    work = mira.workspace
    snapshot = mira.read(version) if task is None else mira.snapshot(version)
    state, model, head = snapshot.consolidated()
    shown = _shown(mira, task, image)
    far = None if image is None else seen_by(work.engine, snapshot, shown.images[0])
    seen = _see(mira, model, head, shown.images)
    judge = partial(
        _outcome, before=seen.probabilities, labels=shown.labels, class_names=state.class_names
    )
    mixed = _Mixed(mira, model.values, model.mix, head, shown.images)
    without_negative, parts = _taken_out(mixed, seen, snapshot.records, judge)
    names = {part.task: part.task_name for part in parts}
    result = Explanation(
        version=snapshot.version,
        subject=shown.subject,
        samples=len(shown.images),
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
        out=out,
    )
    if out is not None:
        work.engine.on_main(lambda: write_explained(as_shown(result), out))
    return result


@dataclass(frozen=True, eq=False)
class _Shown:
    """What is explained, in words and as images (n, h, w, 3); labels (n,) of a task's."""

    subject: str
    images: npt.NDArray[np.uint8]
    labels: Tensor | None = None


def _shown(mira: Mira, task: str | None, image: Path | None) -> _Shown:
    if task is not None:
        chosen = mira.workspace.task(task, held_out=True)
        some = first(chosen.test, SUBJECT_SAMPLES)
        labels = torch.from_numpy(np.asarray(some.labels))
        return _Shown(f"task {chosen.number} {chosen.name}", some.images, labels)
    assert image is not None
    return _Shown(str(image), load_image(image, mira.config.backbone.image_size)[None])


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
            without = judge(mixed(seen.coefficients * others))
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
    memories; typical (tasks,) is the same average over the task's own training queries. None where
    no queries were counted, or only equal ones.
    """
    if not statistics:
        return None
    parts = [part.pooled() for part in statistics.values()]
    counts = torch.stack([part.counts[0] for part in parts])
    means = torch.stack([part.sums[:, 0] / part.counts[0] for part in parts], dim=1)
    scatters = torch.stack([part.second / part.counts[0] for part in parts], dim=1)
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
        recall = model.recall(pixels)
        probe = QueryProbe(model.memory, recall, model.look_at)
        if model.look_at is not None:
            probe.look(model.look_at, model.backbone.hidden(pixels, model.look_at))
        features = model.backbone.features(pixels, probe)
        blocks = model.memory.blocks
        coefficients = torch.stack([recall.coefficients[block] for block in blocks], dim=1)
        queries = torch.stack([probe.queries[block] for block in blocks], dim=1)
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
    """The probabilities (n, classes) of images under given coefficients (n, memories, t)."""

    mira: Mira
    values: AdapterValues
    mix: Mix
    head: RecalledHead
    images: npt.NDArray[np.uint8]

    def __call__(self, coefficients: Tensor) -> Tensor:
        backbone = self.mira.workspace.backbone

        def run(batch: Tensor, given: Tensor) -> Tensor:
            recall = given_for_each(self.values, given, self.mix)
            features = backbone.features(backbone.preprocess(batch), recall)
            return self.head.probabilities(self.head(features, given.mean(dim=1)))

        engine = self.mira.workspace.engine
        return engine.predict(run, self.images, coefficients, exact=True)


def _outcome(
    now: Tensor, before: Tensor, labels: Tensor | None, class_names: tuple[str, ...]
) -> Outcome:
    """The probabilities (n, classes) of a changed mixture beside those of the whole one."""
    won, wins = before.argmax(dim=1), now.argmax(dim=1)
    known = now.amax(dim=1) > 0
    label = None
    if labels is None and bool(known[0]):
        label = class_names[int(wins[0])]
    return Outcome(
        probability=float(now.gather(1, won[:, None]).double().mean()),
        changed=float(((wins != won) | ~known).double().mean()),
        label=label,
        accuracy=None if labels is None else float(((wins == labels) & known).double().mean()),
    )


def as_shown(result: Explanation) -> Explained:
    """What a terminal, a plot and a page show of an explanation."""
    whole, rest = result.outcome, result.without_negative
    facts = [("what comes out", _words(whole))]
    if rest is None:
        facts.append(("negative coefficients", "none"))
    else:
        share = f"{100 * result.negative:.1f} % of the coefficients"
        facts += [("negative coefficients", share), ("with those at zero", _words(rest))]
    if result.unlike:
        facts.append(("unlike all that was learned", f"novelty {result.novelty:.2f}"))
    for place, near in enumerate(result.familiar[:NEAREST]):
        name = f"{near.task} {near.task_name}" if near.task_name else str(near.task)
        far = f"{near.ratio:.2f} x as far from task {name} as its own images"
        facts.append(("" if place else "distance", far))
    mixture = result.routing == "mixture"
    how = result.separation if mixture else f"hard choice by {result.routing}"
    return Explained(
        title=result.subject,
        about=f"{how}, {result.mix}, version {result.version}",
        facts=tuple(facts),
        blocks=result.block_numbers if result.scope == "block" else (),
        adapters=tuple(part.name for part in result.adapters),
        values=np.array(result.blocks),
        contributions=np.array([part.contribution for part in result.adapters]),
        parts=_parts(result),
        winner=whole.label,
    )


def _parts(result: Explanation) -> Grid:
    """What every adapter did, the largest coefficient first."""
    order = sorted(result.adapters, key=lambda part: -abs(part.coefficient))
    return Grid(
        title="Adapters",
        header=("adapter", "task", "coefficient", "negative %", "adds points", "without it"),
        rows=tuple(
            (
                part.name,
                f"{part.task} {part.task_name}" if part.task_name else str(part.task),
                f"{round(part.coefficient, 3) + 0.0:.3f}",
                percent(part.negative),
                percent(part.contribution),
                _short(part.without),
            )
            for part in order
        ),
        bold=frozenset((i, 2) for i, part in enumerate(order) if round(part.coefficient, 3) < 0),
        notes=(
            "coefficient: mean over images and blocks, of which negative % are below 0; adds: "
            "percentage points of the winning class's probability that go when this adapter is "
            "left out and all others stay; without it: what then comes out.",
        ),
    )


def _short(outcome: Outcome) -> str:
    if outcome.accuracy is not None:
        return f"accuracy {percent(outcome.accuracy)} %"
    return outcome.label or "no class"


def _words(outcome: Outcome) -> str:
    chance = f"{100 * outcome.probability:.1f} %"
    if outcome.accuracy is not None:
        changed = f", {100 * outcome.changed:.1f} % of the classes change" * (outcome.changed > 0)
        return f"accuracy {100 * outcome.accuracy:.1f} %{changed}"
    if outcome.label is None:
        return "no class: nothing that is left knows one"
    if outcome.changed:
        return f"{outcome.label}; the class that won before has {chance}"
    return f"{outcome.label} ({chance})"
