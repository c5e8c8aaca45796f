"""Whole experiments: demo, run, report, pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtool.config import COMMAND_LINE
from memtool.errors import ConfigError
from memtool.paths import expand
from memtool.progress import ProgressEvent
from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.followed import LogTo, RunName, RunNote, RunTags, to_follow
from memtool_cli.options import (
    ADAPTERS,
    BASELINES,
    BUFFER,
    COMPUTE,
    CONFIGURATION,
    DRY_RUN,
    GATE,
    HELD_OUT,
    KEYS,
    LOCK_TIMEOUT,
    MEMORY,
    METHOD,
    MIX,
    ORDERS,
    RANK,
    SEED,
    SEP,
    SPLITS,
    STORE,
    YES,
    Call,
    ReportFile,
    examples,
    one_of,
    verb,
)
from memtool_cli.output import Table, duration, size
from memtool_cli.plan import show_plan
from memtool_cli.scores import show

if TYPE_CHECKING:
    from memtool.backbones.pretrain import PretrainProgress
    from memtool.methods.method import Method

app = Verbs()

WORDS = ("separation", "query", "adapters", "keys", "authors", "protect", "read", "memory")
"""The ablations of `memtool.experiments.ablations`, here so that help needs no torch."""


@app.command("demo", epilog=examples("memtool demo", "memtool demo --out try --json"))
@verb()
def demo(
    call: Call,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder for everything.", rich_help_panel="Output"
        ),
    ] = Path("runs/demo"),
) -> None:
    """Run everything on the embedded data, in about a minute."""
    from memtool.experiments.run import demo as run_demo

    with call.out.progress() as progress:
        record, report = run_demo(out, progress=progress)
    show(call.out, [record], history=True)
    call.out.note(f"report: {report}")
    call.out.next(f"memtool log --store {out / 'memory'}")


@app.command(
    "run",
    epilog=examples(
        "memtool run",
        "memtool run --preset mira-dil --seed 0..2 --log csv,tensorboard --name first --tag paper",
        "memtool run --baselines ewc,lwf --select train.lr=1e-3,3e-3,1e-2 --seed 0,1",
        "memtool run --config runs/seed-0/record.json --store again/memory --set runs=again/runs",
    ),
)
@verb(
    STORE,
    LOCK_TIMEOUT,
    METHOD,
    SEP,
    MIX,
    *KEYS,
    MEMORY,
    *GATE,
    RANK,
    *ADAPTERS,
    SPLITS,
    HELD_OUT,
    BASELINES,
    BUFFER,
    SEED,
    *ORDERS,
    *COMPUTE,
    *CONFIGURATION,
    DRY_RUN,
)
def run(
    call: Call,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--fresh",
            help="Go on at the first step that is not committed, or begin anew.",
            rich_help_panel="Training",
        ),
    ] = True,
    select: Annotated[
        list[str] | None,
        typer.Option(
            "--select",
            metavar="KEY=V,V",
            help="Choose a setting of every row on validation samples, from these values; may be "
            "repeated.",
            rich_help_panel="Training",
        ),
    ] = None,
    select_seed: Annotated[
        int | None,
        typer.Option(
            "--select-seed",
            metavar="N",
            min=0,
            help="The seed to choose on, which is not reported.",
            rich_help_panel="Training",
        ),
    ] = None,
    parallel_tasks: Annotated[
        int,
        typer.Option(
            "--parallel-tasks",
            metavar="K",
            min=1,
            help="Train the adapters of so many tasks at once, where a task needs none before it.",
            rich_help_panel="Compute",
        ),
    ] = 1,
    report: ReportFile = None,
    log: LogTo = None,
    name: RunName = None,
    note: RunNote = None,
    tag: RunTags = None,
) -> None:
    """Run a whole experiment, tasks by seeds; goes on where an earlier run was stopped."""
    from memtool.experiments import run as experiment
    from memtool.experiments import select as choosing
    from memtool.experiments.at_once import plan_at_once, require_independent
    from memtool.methods import open_method

    services, said = to_follow(log, name, note, tag)
    call.refuse_version()
    method = open_method(call.config, seed=call.config.seed[0])
    require_independent(method, parallel_tasks)
    _note_without_effect(call, method)
    if select_seed is not None and not select:
        raise ConfigError(
            f"--select-seed {select_seed} without --select", remedy="--select train.lr=1e-3,3e-3"
        )
    cells = choosing.cells_of(call.config, select) if select else ()
    tuning_seed = choosing.tuning_seed(call.config, select_seed)
    if call.dry_run:
        passes = plan_at_once(method, parallel_tasks)
        return show_plan(call, "run", cells, tuning_seed, parallel=(parallel_tasks, passes))
    report = report and call.writes_to(report)
    how: dict[str, Any] = {
        "resume": resume,
        "command": call.line,
        "preset": call.resolved.preset,
    }
    with call.out.progress() as progress:
        how["progress"] = progress
        selection = call.selected
        if cells:
            selection = choosing.select(
                call.config, cells, seed=tuning_seed, say=call.out.note, **how
            )
        found = experiment.run(
            call.config,
            selection=selection,
            log=services,
            said=said,
            say=call.out.note,
            parallel_tasks=parallel_tasks,
            **how,
        )
    show(call.out, found, report=report)
    for seed in call.config.seed:
        for folder in experiment.folders_of(call.config, seed):
            call.out.note(f"record.json and report.html of seed {seed}: {folder}")
    return None


def _note_without_effect(call: Call, method: Method) -> None:
    """Say which baselines that were asked for are not there, and what no baseline reads."""
    from memtool.experiments.baselines import (
        chosen_baselines,
        known_baselines,
        readers_of,
        where_known,
    )

    known, chosen = known_baselines(method), chosen_baselines(method)
    absent = [name for name in call.config.baselines if name not in ("all", "none", *chosen)]
    if absent and known:
        call.out.note(
            f"note: no baseline {', '.join(absent)} {where_known(method)}, so that there will be "
            f"no row; there are {', '.join(known)}"
        )
    readers = readers_of("replay.buffer")
    if call.resolved.origin["replay.buffer"] == COMMAND_LINE and not {*readers} & {*chosen}:
        named = " and ".join(readers)
        call.out.note(f"note: replay.buffer has no effect without the baselines {named}")


@app.command(
    "ablate",
    epilog=examples(
        "memtool ablate separation --dry-run",
        "memtool ablate protect --preset mira-dil --seed 0..2",
        "memtool ablate read --preset mira-dil --set stream.train_per_task=200",
        "memtool ablate adapters --preset mira-dg --report adapters.html",
    ),
)
@verb(
    STORE,
    LOCK_TIMEOUT,
    SEP,
    MIX,
    *KEYS,
    RANK,
    *ADAPTERS,
    SPLITS,
    HELD_OUT,
    SEED,
    *COMPUTE,
    *CONFIGURATION,
    DRY_RUN,
    YES,
)
def ablate(
    call: Call,
    what: Annotated[
        str,
        typer.Argument(
            metavar="|".join(WORDS),
            help="The choice to change.",
            autocompletion=lambda incomplete: [
                word for word in WORDS if word.startswith(incomplete)
            ],
        ),
    ],
    report: ReportFile = None,
) -> None:
    """Run one experiment with one choice changed, everything else equal; goes on as `run` does."""
    one_of("the choice", what, WORDS)
    call.refuse_version()
    if call.dry_run:
        return _show_extent(call, what)
    report = report and call.writes_to(report)
    from memtool.experiments.ablations import ablate as run_ablation

    _say_besides(call, what)
    with call.out.progress() as progress:
        found = run_ablation(
            call.config,
            what,
            progress=progress,
            command=call.line,
            preset=call.resolved.preset,
        )
    show(call.out, found, report=report)
    return None


def _show_extent(call: Call, what: str) -> None:
    """Say what an ablation would run."""
    from memtool.experiments.ablations import extent

    found = extent(call.config, what)
    record = records.AblationPlan(
        ablation=what,
        variants=found.variants,
        besides=dict(found.besides),
        seeds=call.config.seed,
        trainings=found.trainings,
        steps=found.steps,
        seconds=found.seconds,
    )
    facts = [
        ("variants", ", ".join(found.variants)),
        *(
            (f"{key}, in all", f"{now} in place of {was}")
            for key, (was, now) in found.besides.items()
        ),
        ("seeds", ", ".join(map(str, call.config.seed))),
        (
            "trainings of adapters",
            f"{found.trainings:,} of {found.steps:,} steps together, at most",
        ),
        ("time of these", f"about {duration(found.seconds)}; keys and evaluations come on top"),
    ]
    call.out.data(
        record, Table((), facts, title=f"ablation {what} would run"), ids=[found.trainings]
    )


LONG_SECONDS = 600
"""An ablation that trains longer asks first, where somebody is there."""


def _say_besides(call: Call, what: str) -> None:
    """Say what an ablation changes besides its choice; ask before one that takes long."""
    from memtool.experiments.ablations import besides, extent

    for key, (was, now) in besides(call.config, what).items():
        call.out.note(f"note: besides the choice, for all variants: {key} {now} in place of {was}")
    if call.given["yes"] or not call.asks:
        return
    found = extent(call.config, what)
    if found.seconds > LONG_SECONDS:
        call.confirm(
            f"{len(found.variants) or 1} variants, {found.trainings} trainings of adapters, "
            f"{found.steps:,} steps: about {duration(found.seconds)} of training alone, less what "
            "is on disk. Begin"
        )


@app.command(
    "report",
    epilog=examples(
        "memtool report runs",
        "memtool report runs/seed-0 runs/seed-2 --out report.html",
        "memtool eval --json > before.json && memtool report before.json",
    ),
)
@verb()
def report(
    call: Call,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORD",
            help="Records, or folders of runs; several experiments come side by side.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The page.", rich_help_panel="Output"),
    ] = Path("report.html"),
) -> None:
    """Make an HTML page from evaluation records."""
    from memtool.evaluation.record import find_records, read_record
    from memtool.reports.html import write_report

    out = call.writes_to(out)
    found = [read_record(file) for path in files for file in find_records(path)]
    path = write_report(found, out)
    call.out.data(records.Written(path=path), Table((), [("report", path)]), ids=[path])


@app.command(
    "pretrain",
    epilog=examples(
        "memtool pretrain --data ${MEMTOOL_DATA} --out nano.safetensors",
        "memtool pretrain --data ${MEMTOOL_DATA} --out quick.safetensors --steps 200",
    ),
)
@verb()
def pretrain(
    call: Call,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Folder of omniglot, fashion_mnist and eurosat.",
            rich_help_panel="Training",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The weights.", rich_help_panel="Output"),
    ],
    steps: Annotated[
        int,
        typer.Option("--steps", metavar="N", min=1, help="Steps.", rich_help_panel="Training"),
    ] = 3200,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed.", rich_help_panel="Training")
    ] = 0,
    threads: Annotated[
        int,
        typer.Option("--threads", metavar="N", min=1, help="Threads.", rich_help_panel="Compute"),
    ] = 1,
) -> None:
    """Train the embedded backbone from its data; about ten minutes on one core."""
    from memtool.backbones.pretrain import pretrain_nano

    with call.out.progress() as progress:

        def tell(now: PretrainProgress) -> None:
            numbers = {"loss": now.loss, "images/s": now.images_per_second}
            progress(ProgressEvent("pretrain", now.step, now.steps, numbers))

        made = pretrain_nano(
            expand(data), out, steps=steps, seed=seed, threads=threads, progress=tell
        )
    record = records.Pretrained(
        path=made.path,
        sha256=made.sha256,
        parameters=made.parameters,
        steps=made.steps,
        seed=made.seed,
        seconds=made.seconds,
    )
    rows = [
        ("weights", made.path),
        ("sha256", made.sha256),
        ("parameters", f"{made.parameters:,}"),
        ("size", size(made.path.stat().st_size)),
        ("time", duration(made.seconds)),
    ]
    call.out.data(record, Table((), rows), ids=[made.path])
