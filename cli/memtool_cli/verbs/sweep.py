"""A grid of runs, shared by every process that is started in one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.errors import ConfigError
from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.followed import LogTo, RunNote, RunTags, to_follow
from memtool_cli.on_ray import RayAddress, Resources
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
    MEMORY,
    METHOD,
    MIX,
    ORDERS,
    RANK,
    SEED,
    SEP,
    SPLITS,
    Call,
    RetryFailed,
    examples,
    verb,
)
from memtool_cli.output import Table, percent, setting_text

if TYPE_CHECKING:
    from memtool.experiments.sweep import Sweep
    from memtool.experiments.swept import Results, SweptCell

app = Verbs()


@app.command(
    "sweep",
    epilog=examples(
        "memtool sweep --set train.lr=1e-3,3e-3,1e-2 --seed 0..4",
        "memtool sweep --set adapter.rank=2,4,8 --seed 0..2 --orders bounds --out orders",
        "memtool sweep --out orders",
        "for i in 1 2 3; do memtool sweep --set train.lr=1e-3,3e-3 -q & done; wait",
        "memtool sweep --set train.lr=1e-3,3e-3 --seed 0..4 --ray auto --resources gpu=0.5",
    ),
)
@verb(
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
def sweep(
    call: Call,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the sweep; who starts the same one there joins in.",
            rich_help_panel="Output",
        ),
    ] = Path("sweep"),
    lease: Annotated[
        float | None,
        typer.Option(
            "--lease",
            metavar="SECONDS",
            help="A process that is stopped or out of reach for so long loses its run; of whoever "
            "begins the sweep, else 120.",
            rich_help_panel="Training",
            min=2,
            max=86400,
            show_default=False,
        ),
    ] = None,
    retry_failed: RetryFailed = False,
    ray: RayAddress = None,
    resources: Resources = None,
    log: LogTo = None,
    note: RunNote = None,
    tag: RunTags = None,
) -> None:
    """Run a grid of settings by seeds; with `--set KEY=V,V`, shared by all who start it there."""
    work = _work(ray, resources)
    services, said = to_follow(log, None, note, tag)
    opened = _opened(call, out, lease)
    if call.dry_run:
        return _show_plan(call, opened)
    if retry_failed:
        call.out.note(f"{opened.retry_failed()} failed runs go again")
    done = len(opened.jobs) - len(opened.open_jobs())
    call.out.note(f"{len(opened.jobs)} runs in {out}, {done} of them done")
    with call.out.progress() as progress:
        found = work(
            opened,
            progress=progress,
            say=call.out.note,
            log=services,
            said=said,
            command=call.line,
        )
    call.out.data(found, _table(found), ids=[_best(found)])
    call.out.note(f"results: {out / 'results.json'}")
    if found.failed:
        call.out.next(f"memtool sweep --out {out} --retry-failed")
        raise typer.Exit(1)
    call.out.next(f"memtool runs {out}")
    return None


def _work(ray: str | None, resources: str | None) -> Callable[..., Results]:
    """How the runs of a sweep are worked on: by this process, or on a cluster."""
    from memtool.cluster import resources as read
    from memtool.experiments.sweep import Sweep

    each = read(resources)
    if ray is not None:
        from memtool.experiments.on_ray import work_on_ray

        return partial(work_on_ray, address=ray, resources=each)
    if each:
        raise ConfigError("--resources without --ray", expected="a cluster that reserves them")
    return Sweep.work


def _opened(call: Call, out: Path, lease: float | None) -> Sweep:
    """The sweep that the command line asks for, or the one in the folder where it asks for none."""
    from memtool.experiments.sweep import LEASE_SECONDS, Sweep, axes_of

    settings = [o for o in call.shared if o.setting or o.flag in ("--preset", "--config", "--set")]
    if all(call.given[option.name] in (None, []) for option in settings):
        return Sweep.join(out)
    texts = call.given["set"] or []
    method = replace(call, given={**call.given, "set": _of_method(texts)}).config.method
    plain, axes = axes_of(method, texts)
    asked = replace(call, given={**call.given, "set": plain})
    return Sweep.begin(
        out,
        asked.config,
        axes,
        preset=asked.resolved.preset,
        lease_seconds=LEASE_SECONDS if lease is None else lease,
        write=not call.dry_run,
    )


def _of_method(texts: list[str]) -> list[str]:
    """Of `--set` what says the method: which settings there are depends on it."""
    return [text for text in texts if text.partition("=")[0].strip() == "method"]


def _show_plan(call: Call, opened: Sweep) -> None:
    runs = tuple(job.name for job in opened.jobs)
    left = {job.name for job in opened.open_jobs()}
    record = records.SweepPlan(
        folder=opened.folder,
        cells=tuple(cell.text for cell in opened.plan.cells),
        seeds=opened.plan.asked.seeds,
        runs=runs,
        done=tuple(name for name in runs if name not in left),
    )
    rows = [
        (cell.text, len(record.seeds), sum(f"{cell.name}-seed-{s}" in left for s in record.seeds))
        for cell in opened.plan.cells
    ]
    call.out.data(record, Table(("cell", "runs", "left"), rows), ids=runs)


def _table(found: Results) -> Table:
    """A line for every cell: its values, and the memory's mean and spread over the seeds.

    Accuracy and loss have a column each, where any cell has them.
    """
    rows_of = [one for cell in found.cells if (one := cell.row()) is not None]
    scored = found.measure == "accuracy"
    lossy = any(one.loss is not None for one in rows_of)
    header = [*found.axes, *(["order"] if found.orders == "bounds" else []), "seeds"]
    others = ["final average", "forgetting"] * scored + ["loss"] * lossy
    failures = ["failed"] if found.failed else []
    rows = []
    for cell in found.cells:
        row: list[object] = [setting_text(cell.values[key]) for key in found.axes]
        row += [cell.order] if found.orders == "bounds" else []
        row += [len(cell.seeds)]
        row += [_average(cell), _forgetting(cell)] * scored + [_loss(cell)] * lossy
        row += ["; ".join(f"seed {s}: {text}" for s, text in cell.failed.items())] * len(failures)
        rows.append(row)
    spread = "mean ± standard deviation over the seeds"
    title = f"{len(found.cells)} cells by {len(found.seeds)} seeds: {spread}"
    return Table((*header, *others, *failures), rows, title=title)


def _loss(cell: SweptCell) -> str:
    row = cell.row()
    if row is None or row.loss is None:
        return "-"
    return f"{row.loss.mean:.4f}" + ("" if row.loss.std is None else f" ± {row.loss.std:.4f}")


def _average(cell: SweptCell) -> str:
    row = cell.row()
    if row is None or row.mean is None:
        return "-"
    return f"{percent(row.mean)}" + ("" if row.std is None else f" ± {100 * row.std:.1f}")


def _forgetting(cell: SweptCell) -> str:
    row = cell.row()
    return percent(None if row is None else row.metrics.get("forgetting.max"))


def _best(found: Results) -> str:
    """The name of the cell whose memory is best in the mean, the first of equal ones."""
    known: list[tuple[float, int, str]] = []
    for number, cell in enumerate(found.cells):
        row = cell.row()
        if row is None:
            continue
        if found.measure == "loss" and row.loss is not None:
            known.append((row.loss.mean, number, cell.name))
        elif found.measure == "accuracy" and row.mean is not None:
            known.append((-row.mean, number, cell.name))
    return min(known)[2] if known else "-"
