"""The tour: the five steps as real commands, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from memtool.errors import AlreadyExistsError
from memtool.paths import at_home
from memtool_cli.commands import Verbs
from memtool_cli.options import YES, Call, examples, verb

app = Verbs()


class Step(NamedTuple):
    """One command, and what it is for."""

    command: str
    says: str


STEPS = (
    Step("train-adapter --task 3", "Train a small adapter on one task: digits that lie on a side."),
    Step("write", "Put it into the memory. Every change is a version, as a commit of git."),
    Step("consolidate", "The memory gets keys, by which it finds adapters, and a classifier."),
    Step("retrieve --task 3", "Ask which adapters the images of a task recall, without its name."),
    Step("eval", "Measure it on test images of every task that it holds."),
)

_PLACES = "store: memory\nruns: runs\n"
"""Settings of the folder: what is set elsewhere must not lead the tour to a memory in use."""


@app.command("tour", epilog=examples("memtool tour", "memtool tour --yes --out tour"))
@verb(YES)
def tour(
    call: Call,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Keep what is made in this new folder; else it goes at the end.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Show the five steps, one after the other, in a folder of its own; about a minute.

    In a terminal it waits for Enter before each, but with --yes.
    """
    waits = call.asks and not call.given["yes"]
    flags = [flag for flag in ("--json", "--quiet") if call.given[flag.removeprefix("--")]]
    with _folder(out) as folder:
        call.out.note(f"in {folder}, on digits that come with memtool")
        for number, step in enumerate(STEPS, start=1):
            call.out.note("")
            call.out.note(f"{number} of {len(STEPS)}  {step.says}")
            call.out.note(f"$ memtool {step.command}")
            if waits:
                call.out.note("Enter to run it, Ctrl-C to leave")
                if not sys.stdin.readline():
                    raise typer.Abort
            _run(call, folder, [*shlex.split(step.command), *flags])
    call.out.note("")
    if out is not None:
        call.out.next(f"cd {shlex.quote(str(out))} && memtool log")
    else:
        call.out.next("memtool demo, for all tasks, or the same five in a folder of yours")


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """An empty folder with settings; it goes at the end where it was not asked for."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="memtool-tour-") as made:
            (Path(made) / "memtool.yaml").write_text(_PLACES, encoding="utf-8")
            yield Path(made)
        return
    folder = at_home(out)
    if folder.exists():
        raise AlreadyExistsError(f"{folder} is there already", expected="a new folder")
    folder.mkdir(parents=True)
    (folder / "memtool.yaml").write_text(_PLACES, encoding="utf-8")
    yield folder.absolute()


def _run(call: Call, folder: Path, arguments: list[str]) -> None:
    """Run one command line in the folder. Raises typer.Exit with its exit code, unless that is 0.

    What variables say of places does not count there.
    """
    from memtool_cli.main import main

    before, line = dict(os.environ), sys.argv
    for name in ("MEMTOOL_STORE", "MEMTOOL_RUNS"):
        os.environ.pop(name, None)
    sys.argv = ["memtool", *arguments]
    try:
        with contextlib.chdir(folder), call.out.silent_hearing():
            code = main(arguments)
    finally:
        sys.argv = line
        os.environ.update(before)
    if code:
        raise typer.Exit(code)
