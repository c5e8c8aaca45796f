"""What was written into a memory, as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool_cli.output import Table, percent

if TYPE_CHECKING:
    from memtool.methods.results import WriteResult
    from memtool_cli.options import Call


def show_written(call: Call, result: WriteResult) -> None:
    """Print the adapters that were added, and on stderr what is doubtful, and what comes next."""
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
    if not result.added:
        out.note(f"nothing new to write; in memory already: {', '.join(result.skipped)}")
    # Atoms find themselves: writing them is all.
    out.next(call.command("eval" if call.config.method == "moram" else "consolidate"))
