"""Adapters are written into a memory, and a person is told which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtool_cli.output import Table, percent

if TYPE_CHECKING:
    from memtool.methods.results import WriteResult
    from memtool_cli.options import Call


def write(
    call: Call,
    places: Sequence[str | Path] | None,
    *,
    task: str | None,
    as_atoms: bool = False,
) -> None:
    """Write adapters, with the model only where the memory alone does not tell how; and show it.

    `places` are their folders, folders of them, or FOLDER:TASK; none: all that were trained here.
    """
    from memtool.adapters.peft_config import CONFIG_NAME
    from memtool.methods.folders import places_of
    from memtool.methods.foreign import require_of_images
    from memtool.methods.writing import write_stored
    from memtool.outside import is_file

    for place in places or ():
        if call.config.stream.setting != "trace" and not is_file(Path(place) / CONFIG_NAME):
            require_of_images(Path(place))  # of one that is an adapter itself it is said later
    found, tasks = (None, {}) if places is None else places_of(places)
    given: dict[str, Any] = {"task": task, "tasks": tasks, "as_atoms": as_atoms}
    result = write_stored(call.config, seed=call.seed, directories=found, **given)
    if result is None:
        with call.out.progress() as progress:
            method = call.method(progress)
            result = method.write(found, **given)
    show(call, result)


def show(call: Call, result: WriteResult) -> None:
    """Print the adapters that were added, and on stderr what is doubtful, and what comes next."""
    from memtool.methods.about import said_by

    out = call.out
    rows = [(adapter.name, adapter.id) for adapter in result.added]
    table = Table(("adapter", "id"), rows, title=f"version {result.version}")
    out.data(result, table, ids=[adapter.id for adapter in (*result.known, *result.added)])
    for one in result.as_atoms:
        if one.measure == "loss":
            worth = f"loss {one.atoms:.3f} nats per answer token, {one.plain:.3f} as plain adapter"
        else:
            worth = f"accuracy {percent(one.atoms)}, {percent(one.plain)} as plain adapter"
        out.note(f"{one.name} as atoms: {worth} (test samples of task {one.task})")
    for note in result.notes:
        out.note(f"warning: {note}")
    if result.unchanged:
        out.note(f"nothing new to write; in memory already: {', '.join(result.skipped)}")
    # Atoms find themselves: writing them is all.
    atoms = said_by(call.config.method).kind == "atoms"
    out.next(call.command("eval" if atoms else "consolidate"))
