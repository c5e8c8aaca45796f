"""Adapters in and out as PEFT directories: import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memtool_cli import records
from memtool_cli.options import (
    COMPUTE,
    CONFIGURATION,
    RANK,
    STORE,
    Call,
    TaskOfForeign,
    examples,
    verb,
)
from memtool_cli.output import Table

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    "import",
    epilog=examples(
        "memtool import adapters/my-lora --task 2",
        "memtool import adapters/* --store shared/memory -q",
    ),
)
@verb(STORE, RANK, *COMPUTE, *CONFIGURATION)
def import_adapters(
    call: Call,
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="PEFT directories that fit the backbone."),
    ],
    task: TaskOfForeign = None,
) -> None:
    """Put PEFT adapters made elsewhere into the memory, as one version."""
    from memtool.methods.exchange import import_peft

    call.refuse_version()
    result = import_peft(call.config, directories, task=task)
    rows = [(adapter.name, adapter.id) for adapter in result.added]
    table = Table(("adapter", "id"), rows, title=f"version {result.version}")
    call.out.data(result, table, ids=[adapter.id for adapter in result.added])
    call.out.next(call.command("consolidate"))


@app.command(
    "export",
    epilog=examples(
        "memtool export --out adapters",
        "memtool export inverted-0 --out adapters",
        "memtool export --store memory@v1 --out old -q",
    ),
)
@verb(STORE, RANK, *COMPUTE, *CONFIGURATION)
def export_adapters(
    call: Call,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for them.", rich_help_panel="Output"),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="Names or ids; none: all of the version."),
    ] = None,
) -> None:
    """Write adapters of the memory as PEFT directories."""
    from memtool.methods.exchange import export_peft

    view = call.view()
    directories = tuple(export_peft(call.config, adapters, out=out, version=view.version))
    record = records.Exported(version=view.version, directories=directories)
    table = Table(("directory",), [(directory,) for directory in directories])
    call.out.data(record, table, ids=directories)
