"""Studies: one question about a memory, answered by resumable runs, a table and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.config import COMMAND_LINE, split_values
from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.options import (
    ADAPTERS,
    COMPUTE,
    CONFIGURATION,
    DRY_RUN,
    KEYS,
    METHOD,
    MIX,
    RANK,
    SEED,
    SEP,
    SPLITS,
    Call,
    RetryFailed,
    examples,
    verb,
)
from memtool_cli.output import Table, duration, size

if TYPE_CHECKING:
    from memtool.experiments.studies.study import OpenStudy

app = Verbs()
study = Verbs(no_args_is_help=True, help="Answer a question about a memory by runs that differ.")
app.add_typer(study, name="study")

SHARED = (METHOD, SEP, MIX, *KEYS, RANK, *ADAPTERS, SPLITS, SEED, *COMPUTE, *CONFIGURATION, DRY_RUN)

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder of the study, else study-NAME; who starts the same one there joins in.",
        rich_help_panel="Output",
    ),
]
Points = Annotated[
    list[str] | None,
    typer.Option(
        "--points",
        metavar="POINT,POINT",
        help="What is asked at, in place of the points of the study.",
        rich_help_panel="Training",
    ),
]


@study.command(
    "capacity",
    epilog=examples(
        "memtool study capacity --dry-run",
        "memtool study capacity --points 1,2,5 --seed 0..2",
        "memtool study capacity --preset mira-cil --seed 0..2 --out cil-capacity",
    ),
)
@verb(*SHARED)
def capacity(
    call: Call, out: Out = None, points: Points = None, retry_failed: RetryFailed = False
) -> None:
    """Ask what more adapters a task bring, and what they cost: 1, 2, 5, 10, 25 and 50."""
    _do(call, "capacity", out, points, retry_failed)


@study.command(
    "similarity",
    epilog=examples(
        "memtool study similarity --dry-run",
        "memtool study similarity --points 0,0.5,duplicate,revisited --seed 0..2",
        "memtool study similarity --points 0,0.5,1 --set stream.alike_by=looks --out looks",
    ),
)
@verb(*SHARED)
def similarity(
    call: Call, out: Out = None, points: Points = None, retry_failed: RetryFailed = False
) -> None:
    """Ask what tasks that become alike do: shares, duplicate, revisited."""
    _do(call, "similarity", out, points, retry_failed)


@study.command(
    "interference",
    epilog=examples(
        "memtool study interference --dry-run",
        "memtool study interference --seed 0..2",
        "memtool study interference --points configured,random,learned,dual-gpm --out keys",
    ),
)
@verb(*SHARED)
def interference(
    call: Call, out: Out = None, points: Points = None, retry_failed: RetryFailed = False
) -> None:
    """Ask what later tasks do to the keys and weights of earlier inputs, after every task."""
    _do(call, "interference", out, points, retry_failed)


def _do(
    call: Call, name: str, out: Path | None, points: list[str] | None, retry_failed: bool
) -> None:
    """Any study: plan it, or join the one in the folder; do what is left, and show it."""
    from memtool.experiments.studies.cost import require_room
    from memtool.experiments.studies.known import study_of
    from memtool.experiments.studies.study import SIZES, STUDY, OpenStudy, studied
    from memtool.reports.study import study_figures, study_grid, write_study_page

    folder = out or Path(f"study-{name}")
    on_purpose = {key for key in SIZES if call.resolved.origin[key] == COMMAND_LINE}
    opened = OpenStudy.begin(
        study_of(name),
        folder,
        studied(call.config, frozenset(on_purpose)),
        [word for text in points or () for word in split_values(text)],
        preset=call.resolved.preset,
        write=not call.dry_run,
    )
    if call.dry_run:
        return _show_cost(call, opened)
    require_room(opened)
    if retry_failed:
        call.out.note(f"{opened.sweep.retry_failed()} failed runs go again")
    jobs = opened.sweep.jobs
    done = len(jobs) - len(opened.sweep.open_jobs())
    call.out.note(f"{len(jobs)} runs in {folder}, {done} of them done")
    with call.out.progress() as progress:
        found = opened.work(progress=progress, say=call.out.note, command=call.line)
    call.out.data(found, study_grid(found), ids=[folder / STUDY])
    write_study_page(found, folder / "study.html")
    for figure in study_figures(found):
        figure.save(folder / f"{figure.name}.svg")
    call.out.note(f"{STUDY}, study.html and a figure of every measure: {folder}")
    if found.failed:
        call.out.next(f"memtool study {name} --out {folder} --retry-failed, and as before")
        raise typer.Exit(1)
    call.out.next(f"memtool runs {folder}")
    return None


def _show_cost(call: Call, opened: OpenStudy) -> None:
    from memtool.experiments.studies.cost import MOST_SECONDS, cost_of

    cost = cost_of(opened)
    stream = opened.sweep.base.stream
    record = records.StudyPlan(
        study=opened.study.name,
        folder=opened.folder,
        seeds=opened.sweep.plan.asked.seeds,
        train_per_task=stream.train_per_task,
        test_per_task=stream.test_per_task,
        points=tuple(records.StudyPoint.model_validate(point) for point in cost.points),
        steps=cost.steps,
        seconds=cost.seconds,
        bytes=cost.bytes,
        free_bytes=cost.free,
    )
    facts = [
        ("question", opened.study.question),
        (
            "images a task",
            f"{_at_most(stream.train_per_task)} to learn from, "
            f"{_at_most(stream.test_per_task)} to test on",
        ),
        ("runs", f"{sum(point.left for point in cost.points)} of {len(opened.sweep.jobs)} left"),
        ("steps of training", f"{cost.steps:,}"),
        (
            "time",
            f"about {duration(cost.seconds)} of the processor, scaled from steps and passes with "
            "few adapters that were timed now",
        ),
        ("disk", f"at most about {size(cost.bytes)}; {size(cost.free)} free"),
        ("folder", opened.folder),
    ]
    rows = [
        (
            point.label,
            point.runs,
            point.left,
            f"{point.steps:,}",
            duration(point.seconds),
            size(point.bytes),
        )
        for point in cost.points
    ]
    table = Table(("point", "runs", "left", "steps", "time", "disk"), rows)
    title = f"study {opened.study.name} would take"
    call.out.data(record, Table((), facts, title=title), table, ids=[round(cost.seconds)])
    if cost.seconds > MOST_SECONDS:
        call.out.note(
            f"note: longer than {duration(MOST_SECONDS)}; fewer --points or seeds, or --set "
            "stream.train_per_task=N, make it shorter"
        )


def _at_most(count: int | None) -> str:
    return "all" if count is None else f"at most {count}"
