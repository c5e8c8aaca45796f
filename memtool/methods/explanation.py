"""What an explanation of a mixture says: what came out, and what every adapter did for it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from memtool.methods.results import Part, Prediction, Result, TaskShare
from memtool.reports.shown import Explained
from memtool.reports.table import Grid, percent

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
    memory counted no queries. `novelty` and `unlike` are those of a `Prediction`, for an image or a
    prompt. `same_for_every_input` are blocks whose memory was asked the same by all training
    images: their coefficients do not depend on the input. Where every token of a prompt has weights
    of its own, `columns` are its tokens, and `tokens[n]` the weights of the adapters at token n:
    means over the blocks, or of one that was asked for.
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
    columns: tuple[str, ...] = ()
    tokens: tuple[tuple[float, ...], ...] = ()
    same_for_every_input: tuple[int, ...] = ()
    out: Path | None = None


class AtomPlace(Part):
    """One atom: number `rank` of those of its task."""

    task: int
    rank: int


class AtomMap(Result):
    """The gate's weights at one adapted map, mean over the samples.

    `weights[i][n]` is that of atom i, in the order of `atoms`, for token n. Of images these are
    `prefix_tokens` that are no patch (the class token), then the patches row by row, `side` a row.
    Of texts `columns` names them: the tokens of a prompt, or the texts of a task, each with the
    mean over its tokens. `tasks` are means over all columns; what is missing to one fell below the
    threshold.
    """

    schema_: Literal["memtool.explain-atoms"] = Field("memtool.explain-atoms", alias="schema")
    version: str
    subject: str
    samples: int
    site: str
    block: int
    score_norm: str
    topk: int
    prefix_tokens: int = 0
    side: int = 0
    columns: tuple[str, ...] = ()
    tasks: tuple[TaskShare, ...]
    atoms: tuple[AtomPlace, ...]
    weights: tuple[tuple[float, ...], ...]
    prediction: Prediction | None = None
    answer: str | None = None
    out: Path | None = None


AnyExplanation = Explanation | AtomMap
"""What an explanation says, told apart by its `schema`."""


def outcome_of(
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
    if result.same_for_every_input:
        facts.append(("the same for every input", "block " + _listed(result.same_for_every_input)))
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
        blocks=() if result.scope == "model" else result.block_numbers,
        adapters=tuple(part.name for part in result.adapters),
        values=np.array(result.blocks),
        contributions=np.array([part.contribution for part in result.adapters]),
        parts=_parts(result),
        winner=whole.label,
        columns=result.columns,
        by_token=np.array(result.tokens).T,
    )


def token_grid(result: Explanation) -> Grid:
    """The strongest adapters at every token of a prompt."""
    rows = []
    for column, weights in zip(result.columns, result.tokens, strict=True):
        best = sorted(zip(result.adapters, weights, strict=True), key=lambda one: -one[1])
        told = [f"{part.name} {weight:.2f}" for part, weight in best[:NEAREST]]
        rows.append((column if column.strip() else "␣", " ".join(told)))
    return Grid(
        title="Weights at every token",
        header=("token", "adapters"),
        rows=tuple(rows),
        notes=(f"The {NEAREST} strongest of each token.",),
    )


def draw(result: Explanation, path: Path) -> Path:
    """Write the plot (.svg, .png) or the page (.html) of an explanation; returns `path`."""
    from memtool.reports.explanation import write_explained  # loads the plotter

    return write_explained(as_shown(result), path)


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
            "coefficient: mean over samples and blocks, of which negative % are below 0; adds: "
            "percentage points of the probability, of the class that wins or of an answer token, "
            "that go when this adapter is left out and all others stay; without it: what then "
            "comes out.",
        ),
    )


def _listed(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))


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
