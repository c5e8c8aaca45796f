"""Runs that are done: listed, compared and drawn, from their records alone."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.options import Call, examples, verb
from memtool_cli.output import Table, percent, setting_text

if TYPE_CHECKING:
    from memtool.experiments.runs import FoundRun, Runs

app = Verbs()


@app.command(
    "runs",
    epilog=examples(
        "memtool runs",
        "memtool runs sweep --diff",
        "memtool runs runs sweep --tag paper --plot runs.svg",
        "memtool runs --match 'first*' --json",
    ),
)
@verb()
def runs(
    call: Call,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Where to look; runs, where nobody says."),
    ] = None,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff",
            help="The settings in which they differ, in place of what they are.",
            rich_help_panel="Output",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the accuracy after each task, a line for every run: .svg, .png or .pdf.",
            rich_help_panel="Output",
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG", help="Only with this tag; may be repeated."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option("--match", metavar="PATTERN", help="Only names or folders such as 'first*'."),
    ] = None,
) -> None:
    """List the runs in a folder, the oldest first, and compare their settings."""
    from memtool.experiments.runs import Runs
    from memtool.experiments.runs import runs as find

    found = Runs([one for folder in folders or [Path("runs")] for one in find(folder)])
    wanted = set(tag or ())
    found = found.where(
        lambda one: wanted <= set(one.record.run.tags) and (match is None or _fits(one, match))
    )
    differences = found.differences()
    lines = tuple(
        records.RunLine(
            place=one.place,
            name=one.record.run.name,
            note=one.record.run.note,
            tags=one.record.run.tags,
            method=one.record.run.method,
            setting=one.record.run.setting,
            data=one.record.run.data.name,
            seed=one.record.run.seed,
            order=one.order,
            created=one.record.run.created,
            final_average=one.final_average,
            loss=one.loss,
            differs={key: values[place] for key, values in differences.items()},
        )
        for place, one in enumerate(found)
    )
    table = _settings(found, differences) if diff else _listed(found)
    call.out.data(records.RunList(runs=lines), table, ids=[line.place for line in lines])
    if diff and not differences and len(found) > 1:
        call.out.note("all of the same settings")
    if plot is not None:
        call.out.note(f"plot: {found.plot(plot)}")


def _fits(one: FoundRun, pattern: str) -> bool:
    names = (one.place, one.record.run.name or one.place)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _listed(found: Runs) -> Table:
    """What the runs are and what they came to; a column that says nothing is left out."""
    columns: dict[str, list[object]] = {
        "run": [one.place for one in found],
        "name": [one.record.run.name for one in found],
        "method": [one.record.run.method for one in found],
        "setting": [one.record.run.setting for one in found],
        "data": [one.record.run.data.name for one in found],
        "order": [one.order for one in found],
        "seed": [one.record.run.seed for one in found],
        **_reached(found),
        "forgetting": [_share(one.row.metrics.get("forgetting.max")) for one in found],
        "made": [one.record.run.created.astimezone().strftime("%Y-%m-%d %H:%M") for one in found],
        "tags": [", ".join(one.record.run.tags) for one in found],
        "note": [one.record.run.note for one in found],
    }
    return _table({name: cells for name, cells in columns.items() if any(map(_says, cells))})


def _settings(found: Runs, differences: dict[str, list[Any]]) -> Table:
    columns: dict[str, list[object]] = {
        "run": [one.place for one in found],
        "seed": [one.record.run.seed for one in found],
    }
    columns |= {
        key: [setting_text(value) for value in values] for key, values in differences.items()
    }
    return _table(columns | _reached(found))


def _reached(found: Runs) -> dict[str, list[object]]:
    reached: dict[str, list[object]] = {
        "final average": [_share(one.final_average) for one in found],
        "loss": [None if one.loss is None else f"{one.loss:.4f}" for one in found],
    }
    return {name: cells for name, cells in reached.items() if any(map(_says, cells))}


def _table(columns: dict[str, list[object]]) -> Table:
    return Table(tuple(columns), list(zip(*columns.values(), strict=True)))


def _says(cell: object) -> bool:
    return cell not in (None, "")


def _share(value: float | None) -> str | None:
    return None if value is None else percent(value)
