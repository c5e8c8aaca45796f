"""--dry-run: what a verb would do, from the library's own plan."""

from __future__ import annotations

from memtool_cli.options import Call
from memtool_cli.output import Table
from memtool_cli.records import Plan


def show_plan(call: Call, verb: str) -> None:
    """Print the plan of a verb: tasks, parameters, bytes. Nothing is written."""
    from memtool.methods import open_method

    plan = open_method(call.config, seed=call.config.seed[0]).plan(verb)
    rows = [(name.replace("_", " "), _words(value)) for name, value in plan.items()]
    record = Plan(verb=verb, store=call.store_path, seeds=call.config.seed, plan=plan)
    rows.append(("seeds", _words(call.config.seed)))
    call.out.data(record, Table((), rows, title=f"{verb} would use"), ids=plan.get("tasks", ()))


def _words(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in value)
    return str(value)
