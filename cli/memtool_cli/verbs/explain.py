"""explain: which adapters fire for an input, with which sign, and what each of them adds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memtool.errors import ConfigError
from memtool_cli import complete
from memtool_cli.options import (
    COMPUTE,
    CONFIGURATION,
    MEMORY,
    RANK,
    SEED,
    SPLITS,
    STORE,
    Call,
    examples,
    verb,
)
from memtool_cli.output import Table

UNLIKE = 2.0
"""Times the usual distance from the nearest task beyond which an input is called unknown."""

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    "explain",
    epilog=examples(
        "memtool explain --image photo.png",
        "memtool explain --image photo.png --out explain.html",
        "memtool explain --task 3 --store memory@HEAD~1 --json",
    ),
)
@verb(STORE, MEMORY, RANK, SPLITS, SEED, *COMPUTE, *CONFIGURATION)
def explain(
    call: Call,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="The test images of a task, by number or name.",
            rich_help_panel="Memory",
            autocompletion=complete.tasks,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE", help="A picture.", rich_help_panel="Memory"),
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
    """Show which adapters fire for an image or a task, and what each of them adds."""
    if (task is None) == (image is None):
        raise ConfigError(
            "explain needs one subject",
            expected="one of --task and --image",
            remedy=call.command("explain --task 1"),
        )
    from memtool.methods.explain import as_shown
    from memtool.methods.explain import explain as explained
    from memtool.reports.explanation import coefficient_grid

    with call.out.progress() as progress:
        result = explained(
            call.method(progress), task=task, image=image, version=call.version, out=out
        )
    view = as_shown(result)
    facts = Table((), view.facts, title=f"{view.title}: {view.about}")
    best = sorted(result.adapters, key=lambda part: -part.contribution)
    call.out.data(
        result, facts, view.parts, coefficient_grid(view), ids=[part.name for part in best[:1]]
    )
    if result.familiar and result.familiar[0].ratio > UNLIKE:
        call.out.note("this is unlike all that the memory learned; what it says may mean little")
    if out is not None:
        call.out.note(f"drawn in {out}")
