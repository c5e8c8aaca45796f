"""Care for what is remembered: forget on purpose, find the commit that made it worse."""

from __future__ import annotations

from typing import Annotated

import typer

from memtool.config import choices
from memtool_cli import complete
from memtool_cli.options import (
    COMPUTE,
    CONFIGURATION,
    DRY_RUN,
    MEMORY,
    RANK,
    SEED,
    SPLITS,
    STORE,
    YES,
    Call,
    examples,
    one_of,
    verb,
)
from memtool_cli.output import Table, percent, size
from memtool_cli.records import ForgetPlan

app = typer.Typer(rich_markup_mode="rich")


@app.command(
    "forget",
    epilog=examples(
        "memtool forget inverted",
        "memtool forget 3 --dry-run",
        "memtool forget task-2-seed-0 --purge --yes",
    ),
)
@verb(STORE, SEED, *CONFIGURATION, DRY_RUN, YES)
def forget(
    call: Call,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK|ADAPTER",
            help="Tasks (number or name), or adapters.",
            autocompletion=complete.tasks,
        ),
    ],
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Also take the bytes out of the history, and prove it; older versions go.",
            rich_help_panel="Dangerous",
        ),
    ] = False,
) -> None:
    """Take tasks or adapters out of the memory; the rest is re-normalised."""
    from memtool.methods.forget import chosen
    from memtool.methods.forget import forget as forget_now

    store = call.store_to_change()
    view = store.view()
    records = chosen(view, names, removed=purge)
    found = ", ".join(record.name for record in records)
    if call.dry_run:
        holders = sorted({name for r in records for name in store.holders(r.id)}) if purge else []
        plan = ForgetPlan(
            store=call.store_path,
            adapters=tuple(record.name for record in records),
            purge=purge,
            holders=tuple(holders),
            versions=len(store.log()) if purge else 0,
        )
        rows = [("adapters", found), ("left", len(view) - len(plan.adapters))]
        if purge:
            rows += [
                ("versions that would go", plan.versions),
                ("kept by", ", ".join(holders) or "nothing"),
            ]
        call.out.data(plan, Table((), rows, title="forget would take"), ids=plan.adapters)
        return
    if purge:
        call.confirm(f"purge {found} and remove all older versions of main for good")
    result = forget_now(call.config, names, seed=call.seed, purge=purge)
    facts: list[tuple[str, str | int]] = [
        ("version", result.version),
        ("forgotten", ", ".join(result.adapters)),
        ("adapters left", result.left),
    ]
    gone = True
    if result.purged is not None:
        purged = result.purged
        gone = not purged.left
        looked = f"{purged.hashes_looked_for} hashes looked for in every stored object"
        facts += [
            ("versions removed", purged.versions_removed),
            ("space freed", size(purged.freed_bytes)),
            ("bytes", f"gone: {looked}, none found" if gone else f"NOT gone: {looked}"),
        ]
        facts += [(what, ", ".join(paths)) for what, paths in purged.left.items()]
    call.out.data(result, Table((), facts), ids=[result.version])
    if result.purged is None:
        call.out.note("older versions still hold it: memtool rollback brings it back")
    elif not gone:
        call.out.note(
            "on an object store, files younger than an hour are left: memtool gc --keep-last 1 then"
        )
        raise typer.Exit(1)


@app.command(
    "bisect",
    epilog=examples(
        "memtool bisect --drop 2",
        "memtool bisect --metric task_accuracy --drop 5 --good v1",
        "memtool rollback $(memtool bisect --drop 2 -q)~1 --yes",
    ),
)
@verb(STORE, MEMORY, RANK, SPLITS, SEED, *COMPUTE, *CONFIGURATION)
def bisect(
    call: Call,
    drop: Annotated[
        float,
        typer.Option(
            "--drop", metavar="POINTS", help="Percentage points.", rich_help_panel="Memory"
        ),
    ],
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="faa|task_accuracy",
            help="What is measured.",
            rich_help_panel="Memory",
        ),
    ] = "faa",
    good: Annotated[
        str | None,
        typer.Option(
            "--good",
            metavar="VERSION",
            help="Where it was good; none: the oldest version that can be measured.",
            rich_help_panel="Memory",
            autocompletion=complete.versions,
        ),
    ] = None,
    bad: Annotated[
        str,
        typer.Option(
            "--bad",
            metavar="VERSION",
            help="Where it is bad.",
            rich_help_panel="Memory",
            autocompletion=complete.versions,
        ),
    ] = "HEAD",
    setting: Annotated[
        str | None,
        typer.Option(
            "--setting",
            metavar="|".join(choices("stream.setting")),
            help="What is known at test time; without it, that of the stream.",
            rich_help_panel="Memory",
        ),
    ] = None,
) -> None:
    """Find the commit after which the memory got worse, by halving; 1 when it never did."""
    from memtool.methods.bisect import bisect as halve

    if setting is not None:
        one_of("--setting", setting, choices("stream.setting"))
    with call.out.progress() as progress:
        result = halve(
            call.method(progress),
            metric=metric,
            drop=drop / 100,
            good=good,
            bad=call.version if bad == "HEAD" else bad,
            setting=setting,
        )
    rows = [
        (
            probe.version,
            probe.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            probe.message,
            "not measurable" if probe.value is None else percent(probe.value),
            {True: "fell", False: "good", None: "skipped"}[probe.fell],
        )
        for probe in result.probes
    ]
    title = f"{result.metric} on {', '.join(result.tasks)}"
    table = Table(("version", "time", "message", result.metric, ""), rows, title=title)
    call.out.data(result, table, ids=[result.culprit.version] if result.culprit else [])
    if result.culprit is None:
        call.out.note(
            f"it never fell by {drop:g} points: {percent(result.good_value)} at {result.good}, "
            f"{percent(result.bad_value)} at {result.bad}"
        )
        raise typer.Exit(1)
    call.out.note(f"first bad: {result.culprit.version} ({result.culprit.message})")
    if result.suspects:
        between = ", ".join(probe.version for probe in result.suspects)
        call.out.note(f"or one of those that cannot be measured, just before it: {between}")
    call.out.next(call.command(f"show {result.culprit.version}"))
