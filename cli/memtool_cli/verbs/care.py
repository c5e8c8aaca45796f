"""Care for what is remembered: forget on purpose, find the commit that made it worse."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.errors import ConfigError
from memtool.settings import choices
from memtool_cli import complete
from memtool_cli.commands import Verbs
from memtool_cli.options import (
    COMPUTE,
    CONFIGURATION,
    DRY_RUN,
    LOCK_TIMEOUT,
    MEMORY,
    METHOD,
    RANK,
    SEED,
    SPLITS,
    STORE,
    TEXTS,
    YES,
    Call,
    examples,
    one_of,
    share,
    verb,
)
from memtool_cli.output import Table, percent, size
from memtool_cli.records import ForgetPlan

if TYPE_CHECKING:
    from memtool.methods.results import ForgetResult, Purged
    from memtool_stores import AdapterRecord, MemoryStore

app = Verbs()


@app.command(
    "forget",
    epilog=examples(
        "memtool forget inverted",
        "memtool forget 3 --dry-run",
        "memtool forget task-2-seed-0 --purge --yes",
        "memtool forget --atoms-below 0.05 --preset moram-digits --dry-run",
    ),
)
@verb(STORE, LOCK_TIMEOUT, *COMPUTE, *CONFIGURATION, DRY_RUN, YES)
def forget(
    call: Call,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK|ADAPTER",
            help="Tasks (number or name), or adapters.",
            autocompletion=complete.remembered,
        ),
    ] = None,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Also take the bytes out of the history, and prove it; older versions go.",
            rich_help_panel="Dangerous",
        ),
    ] = False,
    atoms_below: Annotated[
        str | None,
        typer.Option(
            "--atoms-below",
            metavar="SHARE",
            help="MoRAM: instead, single atoms that add less than this share of what an atom of "
            "the same place adds on average.",
            rich_help_panel="Dangerous",
        ),
    ] = None,
) -> None:
    """Take tasks or adapters out of the memory; the rest is re-normalised."""
    if (atoms_below is None) == (not names):
        raise ConfigError(
            "forget needs to know what",
            expected="tasks or adapters, or --atoms-below SHARE",
            remedy="memtool ls",
        )
    if atoms_below is not None:
        return _prune(call, share("--atoms-below", atoms_below), purge)
    assert names is not None
    from memtool.methods import forget as forgetting

    store = call.store_to_change()
    view = store.view()
    records = forgetting.chosen(view, names, purge=purge)
    found = ", ".join(record.name for record in records)
    if call.dry_run:
        return _show_plan(call, store, records, purge)
    if purge:
        forgetting.require_no_holder(store, records)
        keys = ", keys and head," if forgetting.looked_under(view, records) else ""
        call.confirm(f"purge {found}{keys} and remove all older versions of main for good")
    looked = forgetting.looked_under(view, records)
    result = forgetting.forget(store, names, purge=purge)
    facts: list[tuple[str, str | int]] = [
        ("version", result.version),
        ("forgotten", ", ".join(result.adapters)),
        ("adapters left", result.left),
    ]
    purged = result.purged
    if purged is not None:
        word = "NOT gone" if purged.left else "gone"
        facts += [
            ("versions removed", purged.versions_removed),
            ("space freed", size(purged.freed_bytes)),
            ("bytes", f"{word}: {purged.objects} objects looked at, {_holding(purged)} hold it"),
        ]
        facts += [(what, ", ".join(paths)) for what, paths in purged.left.items()]
    call.out.data(result, Table((), facts), ids=[result.version])
    if purged is None:
        call.out.note("older versions still hold it: memtool rollback brings it back")
    if looked and result.left:
        call.out.note(
            "keys and head went with it, as the memory looked under it: memtool consolidate makes "
            "new ones, from the images of the tasks that are left"
        )
    _say_what_else_holds_it(call, result)
    if purged is not None and purged.left:
        call.out.note("an object store keeps files that are younger than an hour; after that")
        call.out.next(call.command(f"forget {shlex.join(names)} --purge"))
        raise typer.Exit(1)
    return None


def _prune(call: Call, below: float, purge: bool) -> None:
    """Take dead atoms out, after saying what that does."""
    if purge:
        raise ConfigError(
            "--purge with --atoms-below",
            expected="one of them: the bytes of single atoms stay in the row of their task",
        )
    call.store_to_change()
    with call.out.progress() as progress:
        method = call.method(progress)
        found = method.dead_atoms(below)
    shown = percent if found.measure == "accuracy" else "{:.3f}".format
    rows = [
        (f"{one.task} {one.task_name}", shown(one.before), shown(one.after)) for one in found.tasks
    ]
    title = f"{found.pruned} of {found.atoms} atoms add less than {below:g} of the average"
    table = Table(("task", found.measure, "without them"), rows, title=title)
    if call.dry_run or not found.pruned:
        call.out.data(found, table, ids=[found.pruned])
        if not found.pruned:
            call.out.note("there is nothing to prune: no new version")
        return
    call.out.note(f"{title}; {found.measure} by task, before and without them:")
    for row in rows:
        call.out.note("  " + "  ".join(row))
    call.confirm(f"take {found.pruned} atoms out of the memory")
    done = method.prune(found)
    table = Table(table.header, rows, title=f"{title}; version {done.version}")
    call.out.data(done, table, ids=[done.version])
    call.out.note("the version before still holds them: memtool rollback brings them back")


def _show_plan(
    call: Call, store: MemoryStore, records: Sequence[AdapterRecord], purge: bool
) -> None:
    from memtool.methods.forget import holders, looked_under

    held_by = holders(store, records) if purge else ()
    plan = ForgetPlan(
        store=call.store_path,
        adapters=tuple(record.name for record in records),
        purge=purge,
        holders=held_by,
        versions=len(store.log()) if purge else 0,
    )
    view = store.view()
    live = sum(record.live for record in records)
    rows: list[tuple[str, str | int]] = [
        ("adapters", ", ".join(plan.adapters)),
        ("left", len(view.live) - live),
    ]
    if looked_under(view, records):
        rows.append(("keys and head", "go along: the memory looks under it"))
    if purge:
        rows += [
            ("versions that would go", plan.versions),
            ("kept by", ", ".join(held_by) or "nothing"),
        ]
    call.out.data(plan, Table((), rows, title="forget would take"), ids=plan.adapters)


def _holding(purged: Purged) -> int:
    return len({path for paths in purged.left.values() for path in paths})


def _say_what_else_holds_it(call: Call, result: ForgetResult) -> None:
    """Folders of `train-adapter` lie outside the memory, and `memtool write` would read them."""
    folders = [call.config.runs / "adapters" / name for name in result.adapters]
    if there := [str(folder) for folder in folders if folder.is_dir()]:
        call.out.note(f"{', '.join(there)}: still there, and memtool write would put it back")


@app.command(
    "bisect",
    epilog=examples(
        "memtool bisect --drop 2",
        "memtool bisect --metric task_accuracy --drop 5 --good v1",
        "memtool bisect --texts texts.jsonl --drop 0.2",
        "memtool rollback $(memtool bisect --drop 2 -q)~1 --yes",
    ),
)
@verb(STORE, METHOD, MEMORY, RANK, SPLITS, TEXTS, SEED, *COMPUTE, *CONFIGURATION, remembers=True)
def bisect(
    call: Call,
    drop: Annotated[
        float,
        typer.Option(
            "--drop",
            metavar="POINTS",
            help="Percentage points; of a loss nats.",
            rich_help_panel="Memory",
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="faa|task_accuracy|loss",
            help="What is measured, on the tasks that the good version knows; none: faa, of texts "
            "loss.",
            rich_help_panel="Memory",
            autocompletion=complete.fixed_set_metrics,
        ),
    ] = None,
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
    from memtool.experiments.bisect import LOSS
    from memtool.experiments.bisect import bisect as halve

    if setting is not None:
        one_of("--setting", setting, choices("stream.setting"))
    with call.out.progress() as progress:
        of_loss = metric == LOSS or (metric is None and call.reads_texts)
        result = halve(
            call.method(progress),
            metric=metric,
            drop=drop if of_loss else drop / 100,
            good=good,
            bad=call.version if bad == "HEAD" else bad,
            setting=setting,
        )
    shown = (lambda value: f"{value:.3f}") if of_loss else percent
    word = "rose" if of_loss else "fell"
    rows = [
        (
            probe.version,
            probe.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            probe.message,
            "" if probe.value is None else shown(probe.value),
            {True: word, False: "good", None: f"skipped: {probe.reason}"}[probe.fell],
        )
        for probe in result.probes
    ]
    title = f"{result.metric} on {', '.join(result.tasks)}"
    table = Table(("version", "time", "message", result.metric, ""), rows, title=title)
    call.out.data(result, table, ids=[result.culprit.version] if result.culprit else [])
    if result.culprit is None:
        call.out.note(
            f"it never {word} by {drop:g} {'nats' if of_loss else 'points'}: "
            f"{shown(result.good_value)} at {result.good}, {shown(result.bad_value)} at "
            f"{result.bad}"
        )
        raise typer.Exit(1)
    call.out.note(f"first bad: {result.culprit.version} ({result.culprit.message})")
    if result.suspects:
        between = ", ".join(probe.version for probe in result.suspects)
        call.out.note(f"or one of those that cannot be measured, just before it: {between}")
    call.out.next(call.command(f"show {result.culprit.version}"))
