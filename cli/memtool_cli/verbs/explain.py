"""explain: which adapters fire for an input, with which sign, and what each of them adds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memtool_cli.commands import Verbs
from memtool_cli.options import (
    COMPUTE,
    CONFIGURATION,
    MEMORY,
    METHOD,
    RANK,
    SEED,
    SPLITS,
    STORE,
    Call,
    ImageSubject,
    PromptSubject,
    TaskSubject,
    examples,
    verb,
)
from memtool_cli.output import Table, brief
from memtool_cli.predictions import predicted, say_unlike, unlike
from memtool_cli.unread import say_decided

if TYPE_CHECKING:
    from memtool.methods.explanation import AtomMap, Explanation

app = Verbs()


@app.command(
    "explain",
    epilog=examples(
        "memtool explain --image photo.png --out explain.html",
        "memtool explain --task 3 --store memory@HEAD~1 --json",
        "memtool explain --preset moram-digits --image digit.png --layer fc1 --block 2",
        "memtool explain --preset moram-trace --prompt 'Once upon a time' --out atoms.html",
    ),
)
@verb(STORE, METHOD, MEMORY, RANK, SPLITS, SEED, *COMPUTE, *CONFIGURATION, remembers=True)
def explain(
    call: Call,
    task: TaskSubject = None,
    image: ImageSubject = None,
    prompt: PromptSubject = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="q|k|v|…",
            help="MoRAM: the adapted map to look at, one of backbone.targets; none: the first.",
            rich_help_panel="Memory",
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            "--block",
            metavar="N",
            min=0,
            help="MoRAM: its block, from 0; none: the last. memory.scope token: the block whose "
            "tokens are shown; none: the mean over all.",
            rich_help_panel="Memory",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Draw it: a plot (.svg, .png) or a page (.html).",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Show which adapters fire for an image, a prompt or a task, and what each of them adds."""
    call.require_one_subject("explain", task=task, image=image, prompt=prompt)
    out = out and call.writes_to(out)
    say_decided(call)
    with call.out.progress() as progress:
        result = call.method(progress).explain(
            task=task,
            image=image,
            prompt=prompt,
            layer=layer,
            block=block,
            version=call.version,
            out=out,
        )
    if result.schema_ == "memtool.explain-atoms":
        _show_atoms(call, result)
    else:
        _show_mixture(call, result)
    if out is not None:
        call.out.note(f"drawn in {out}")


def _show_mixture(call: Call, result: Explanation) -> None:
    """What comes out, and what every adapter does for it."""
    from memtool.methods.explanation import as_shown, token_grid
    from memtool.reports.shown import coefficient_grid

    view = as_shown(result)
    facts = Table((), view.facts, title=f"{brief(view.title)}: {view.about}")
    best = sorted(result.adapters, key=lambda part: -part.contribution)
    grids = [view.parts, coefficient_grid(view)]
    if result.columns:
        grids.append(token_grid(result))
    call.out.data(result, facts, *grids, ids=[part.name for part in best[:1]])
    if result.unlike:
        call.out.note(unlike(result.novelty, "prompts" if call.reads_texts else "images"))


def _show_atoms(call: Call, result: AtomMap) -> None:
    """The map of atoms at one adapted map."""
    from memtool.methods.moram.explain import task_grid

    best = sorted(result.tasks, key=lambda one: -one.share)
    first = predicted(result.prediction, result.answer)
    call.out.data(result, *first, task_grid(result), ids=[one.name for one in best[:1]])
    say_unlike(call.out, result.prediction)
