"""What only the store is asked for: ls, log, show, diff, tag, rollback, verify, gc, migrate.

None of them needs torch.
"""

from __future__ import annotations

import fnmatch
import math
import shlex
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any, Literal, cast

import typer

from memtool.adapters.layout import block_in
from memtool.errors import NotFoundError, did_you_mean
from memtool.methods.records import numbered, out_of_runs
from memtool.remembered import carried_on, remembered
from memtool_cli import complete, records
from memtool_cli.commands import Verbs
from memtool_cli.options import (
    CONFIGURATION,
    DRY_RUN,
    LOCK_TIMEOUT,
    STORE,
    YES,
    Call,
    examples,
    one_of,
    verb,
)
from memtool_cli.output import Table, size
from memtool_stores import AdapterRecord, IntegrityError, MemoryView
from memtool_stores.migrate import SCHEMA_VERSION

app = Verbs()

PAGE = 100
"""Adapters that a table of `ls` shows at a time."""

LEVELS = ("heads", "checksums", "full")

Reference = Annotated[
    str,
    typer.Argument(
        metavar="VERSION",
        help="HEAD, HEAD~2, a tag, a branch, a version id or its beginning.",
        autocompletion=complete.versions,
    ),
]


@app.command(
    "ls",
    epilog=examples(
        "memtool ls",
        "memtool ls --store memory@HEAD~1",
        "memtool ls --task 3 -q",
        "memtool ls --match 'task-*' --limit 50 --page 2",
    ),
)
@verb(STORE, *CONFIGURATION)
def ls(
    call: Call,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="Only of this task, by number or name."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option("--match", metavar="PATTERN", help="Only names such as 'task-*'."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "-n",
            metavar="N",
            min=1,
            help=f"At most so many; without it {PAGE} in a terminal, else all.",
        ),
    ] = None,
    page: Annotated[
        int, typer.Option("--page", metavar="K", min=1, help="The K-th so many, from 1.")
    ] = 1,
) -> None:
    """List the adapters in the memory."""
    view = call.view()
    live = view.state.adapters + view.state.atoms
    whole = call.out.machine and limit is None and page == 1
    size = live if whole else (limit or PAGE)
    first = (page - 1) * size
    if task is None and match is None:
        total, picked = live, view.page(first, size)
    else:
        fits = [
            record
            for record in sorted(view.live, key=lambda record: record.row)
            if (task is None or task in (str(record.task), record.meta.get("task_name")))
            and (match is None or fnmatch.fnmatchcase(record.name, match))
        ]
        total, picked = len(fits), tuple(fits[first : first + size])
    if page > 1 and not picked:
        raise NotFoundError(
            f"page {page:,} of a list of {total:,} adapters, {size:,} a page",
            expected=f"--page 1 to {max(1, math.ceil(total / size))}",
            remedy="memtool ls without --page",
        )
    adapters = _adapters(picked)
    record = records.Listing(
        store=call.store_path, version=view.version, total=total, adapters=adapters
    )
    call.out.data(record, _adapter_table(adapters), ids=[adapter.id for adapter in adapters])
    if len(adapters) < total:
        last = first + len(adapters)
        call.out.note(f"{first + 1 if adapters else first} to {last} of {total:,}")
        if last < total:
            asked = {"--task": task, "--match": match, "--limit": limit, "--page": page + 1}
            options = [f"{name} {shlex.quote(str(v))}" for name, v in asked.items() if v]
            call.out.next(call.command(f"ls {' '.join(options)}"))
    if not live:
        call.out.next(call.command("train-adapter --task 1"))


@app.command(
    "log",
    epilog=examples("memtool log", "memtool log -n 5 --json", "memtool log --store memory@v1 -q"),
)
@verb(STORE, *CONFIGURATION)
def log(
    call: Call,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", metavar="N", min=1, help="At most so many.")
    ] = None,
) -> None:
    """List the versions of the memory, newest first."""
    store = call.store()
    versions = [records.Version.model_validate(v) for v in store.log(call.version, limit)]
    names: dict[str, list[str]] = {}
    for name, id in (*store.branches().items(), *store.tags().items()):
        names.setdefault(id, []).append(name)
    rows = [
        (
            v.id,
            v.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            v.message,
            ", ".join(names.get(v.id, [])),
        )
        for v in versions
    ]
    call.out.data(
        records.Log(store=call.store_path, versions=tuple(versions)),
        Table(("version", "time", "message", "names"), rows, spared=("time",)),
        ids=[version.id for version in versions],
    )


@app.command(
    "show",
    epilog=examples("memtool show", "memtool show HEAD~2", "memtool show v1 --json"),
)
@verb(STORE, *CONFIGURATION)
def show(call: Call, version: Reference = "") -> None:
    """Show one version and what is in it."""
    view = call.view(version or None)
    found = call.store().log(view.version, 1)[0]
    keys = view.keys()
    space = view.space
    every_block = remembered(call.store(), view.version).get("adapter.blocks", "all") == "all"
    record = records.Show(
        store=call.store_path,
        version=records.Version.model_validate(found),
        backbone=space.backbone.name,
        backbone_sha256=space.backbone.sha256,
        rank=space.layout.rank,
        alpha=space.layout.alpha,
        targets=space.layout.targets,
        adapters_from=block_in(space.layout.segments[0].name),
        numbers_per_adapter=space.numel,
        dtype=space.layout.dtype,
        adapters=_adapters(view.live),
        keys=None if keys is None else tuple(keys.shape),
        blobs=view.blobs(),
    )
    rows = [
        ("version", record.version.id),
        ("parent", record.version.parent or "none"),
        ("time", record.version.time.astimezone().isoformat(sep=" ", timespec="seconds")),
        ("message", record.version.message),
        *_said(record.version.metadata),
        ("backbone", f"{record.backbone} ({record.backbone_sha256[:12]})"),
        *_shapes(record, view, every_block=every_block),
        ("keys", "none" if record.keys is None else " x ".join(map(str, record.keys))),
        ("blobs", ", ".join(record.blobs) or "none"),
    ]
    tables = Table((), rows), _adapter_table(record.adapters)
    call.out.data(record, *tables, ids=[record.version.id])


def _shapes(record: records.Show, view: MemoryView, *, every_block: bool) -> list[tuple[str, str]]:
    """What the adapters of a version have in common, and how many have a shape of their own."""
    own = sum(one.ragged for one in view.adapters)
    shapes = [("shapes of their own", f"{own} adapters")] if own else []
    if not view.live or own < len(view.live):
        targets = ",".join(record.targets)
        if not every_block:
            targets += f" from {record.adapters_from} on"
        shapes += [
            ("adapters", f"rank {record.rank}, alpha {record.alpha:g}, {targets}"),
            ("size", f"{record.numbers_per_adapter:,} numbers each, {record.dtype}"),
        ]
    return shapes


@app.command(
    "diff",
    epilog=examples("memtool diff HEAD~1", "memtool diff v1 v2", "memtool diff HEAD~1 --json"),
)
@verb(STORE, *CONFIGURATION)
def diff(call: Call, a: Reference, b: Reference = "HEAD") -> None:
    """Show what changed from one version to another; -q prints the names of what did."""
    found = call.store().diff(a, b)
    record = records.Diff(
        a=found.a,
        b=found.b,
        added=_adapters((*found.added, *found.added_atoms)),
        removed=_adapters((*found.removed, *found.removed_atoms)),
        changed=_adapters((*found.changed, *found.changed_atoms)),
        key_drift_degrees=dict(found.key_drift_degrees),
        changed_blobs=found.changed_blobs,
        pruned_atoms=dict(found.pruned_atoms),
    )
    rows: list[tuple[str, str, str]] = []
    for change, adapters in (
        ("added", record.added),
        ("removed", record.removed),
        ("changed", record.changed),
    ):
        rows += [(change, adapter.kind, adapter.name) for adapter in adapters]
    rows += [(f"lost {count}", "atoms", name) for name, count in record.pruned_atoms.items()]
    rows += [
        (f"turned {degrees:.2f} degrees", "key", name)
        for name, degrees in record.key_drift_degrees.items()
        if degrees > 0
    ]
    rows += [("changed", "blob", name) for name in record.changed_blobs]
    table = Table(("change", "what", "name"), rows, title=f"{record.a} to {record.b}")
    call.out.data(record, table, ids=[row[2] for row in rows])


@app.command(
    "tag",
    epilog=examples(
        "memtool tag v1", "memtool tag before-art HEAD~2", "memtool tag --delete backup-… --yes"
    ),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION, YES)
def tag(
    call: Call,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The name.", autocompletion=complete.names)
    ],
    version: Reference = "HEAD",
    delete: Annotated[
        bool,
        typer.Option(
            "--delete",
            help="Take a tag, or a branch such as backup-…, away; gc may then free its versions.",
            rich_help_panel="Dangerous",
        ),
    ] = False,
) -> None:
    """Name a version; the name never moves: for another version, another name."""
    if delete:
        return _untag(call, name)
    id = call.store_to_change().tag(name, version)
    record = records.Tagged(name=name, version=id)
    call.out.data(record, Table((), [("tag", name), ("version", id)]), ids=[name])
    return None


def _untag(call: Call, name: str) -> None:
    store = call.store_to_change()
    tags, branches = store.tags(), store.branches()
    known = {**branches, **tags}
    if name not in known or name == "main":
        raise NotFoundError(
            f"no tag or branch {name!r} that could be deleted",
            expected=did_you_mean(name, [one for one in known if one != "main"]),
        )
    kind = "tag" if name in tags else "branch"
    call.confirm(f"delete {kind} {name} at {known[name]}")
    if kind == "tag":
        store.delete_tag(name)
    else:
        store.delete_branch(name)
    record = records.Untagged(name=name, version=known[name])
    call.out.data(
        record, Table((), [(f"deleted {kind}", name), ("it was", known[name])]), ids=[name]
    )


@app.command(
    "rollback",
    epilog=examples("memtool rollback HEAD~1", "memtool rollback v1 --yes", "memtool log"),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION, YES)
def rollback(call: Call, version: Reference) -> None:
    """Go back to a version; what came after is kept on a backup branch."""
    store = call.store_to_change()
    before, target = store.head(), store.view(version).version
    call.confirm(f"roll {call.store_path} back to {target}")
    backup = store.rollback(target)
    record = records.RolledBack(version=target, before=before, backup=backup)
    rows = [
        ("version", target),
        ("before", before),
        ("kept as", backup or "nothing: it is damaged"),
    ]
    call.out.data(record, Table((), rows), ids=[target])
    if backup:
        call.out.note(f"to undo: {call.command(f'rollback {backup}')}")


@app.command(
    "verify",
    epilog=examples(
        "memtool verify", "memtool verify --level heads", "memtool verify -q && echo ok"
    ),
)
@verb(STORE, *CONFIGURATION)
def verify(
    call: Call,
    level: Annotated[
        str,
        typer.Option(
            "--level",
            metavar="|".join(LEVELS),
            help="How much is read.",
            rich_help_panel="Memory",
        ),
    ] = "full",
) -> None:
    """Check every stored byte; exit with 1 when something is damaged or cannot be read."""
    checked = cast(Literal["heads", "checksums", "full"], one_of("--level", level, LEVELS))
    try:
        store = call.store()
    except IntegrityError:
        # What opening needs is damaged itself; to say so is what this verb is for.
        from memtool_stores.verify import verify as verify_store

        report = verify_store(call.store_path, checked)
    else:
        report = store.verify(checked)
    damages = tuple(records.Damage.model_validate(damage) for damage in report.damages)
    unchecked = tuple(records.Unchecked.model_validate(one) for one in report.unchecked)
    record = records.Verified(
        store=call.store_path,
        level=report.level,
        ok=report.ok,
        versions=report.versions,
        rows=report.rows,
        blobs=report.blobs,
        damages=damages,
        unchecked=unchecked,
        unfinished=report.unfinished,
    )
    state = "damaged" if damages else "could not be checked" if unchecked else "intact"
    facts = [
        ("state", state),
        ("looked at", f"{report.versions} versions, {report.rows} values, {report.blobs} blobs"),
    ]
    wrong = [(d.what, d.name, d.expected, d.found) for d in damages]
    unread = [(one.what, one.name, one.why) for one in unchecked]
    tables = [Table((), facts)]
    if wrong:
        tables.append(Table(("damaged", "name", "expected", "found"), wrong))
    if unread:
        tables.append(Table(("could not be checked", "name", "why"), unread))
    call.out.data(record, *tables, ids=[f"{what} {name}" for what, name, *_ in [*wrong, *unread]])
    for one in report.unfinished:
        call.out.note(f"{one} was never finished and names no version: memtool gc takes it away")
    if damages:
        call.out.next(call.command("log"))
    if not report.ok:
        raise typer.Exit(1)


@app.command(
    "gc",
    epilog=examples(
        "memtool gc --dry-run", "memtool gc --keep-last 10 --yes", "memtool gc --keep-days 30 --yes"
    ),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION, DRY_RUN, YES)
def gc(
    call: Call,
    keep_last: Annotated[
        int | None,
        typer.Option(
            "--keep-last",
            metavar="N",
            min=1,
            help="Versions to keep, counted from the newest.",
            rich_help_panel="Dangerous",
        ),
    ] = None,
    keep_days: Annotated[
        float | None,
        typer.Option(
            "--keep-days",
            metavar="DAYS",
            min=0,
            help="Keep what is younger.",
            rich_help_panel="Dangerous",
        ),
    ] = None,
) -> None:
    """Remove old versions and free their space; tags and branches stay.

    What killed processes left half made goes, too: in the memory, and beside it, in the cache and
    under `runs` when nobody has written to it for an hour.
    """
    from memtool.streams.table import cache_folder
    from memtool_stores.leftovers import find, take_away

    store = call.store_to_change()
    if not call.dry_run and (keep_last is not None or keep_days is not None):
        found = store.gc(keep_last=keep_last, keep_days=keep_days, dry_run=True)
        if found.expired:
            call.confirm(f"remove {len(found.expired)} versions for good")
    report = store.gc(keep_last=keep_last, keep_days=keep_days, dry_run=call.dry_run)
    left = [one for place in (call.config.runs.absolute(), cache_folder()) for one in find(place)]
    left = [one for one in left if one.is_old and one not in report.leftovers]
    left = [*report.leftovers, *(left if report.dry_run else take_away(left))]
    record = records.Collected(
        dry_run=report.dry_run,
        expired=report.expired,
        freed_bytes=report.freed_bytes,
        deleted_files=report.deleted_files,
        notes=report.notes,
        leftovers=tuple(one.path for one in left),
    )
    would = "would be " if report.dry_run else ""
    rows = [
        (f"versions {would}removed", len(report.expired)),
        (f"files {would}deleted", report.deleted_files),
        (f"space {would}freed", size(report.freed_bytes)),
        *((f"left by a killed process, {would}deleted", one.path) for one in left),
    ]
    call.out.data(record, Table((), rows), ids=[report.freed_bytes])
    for note in report.notes:
        call.out.note(note)


@app.command(
    "migrate",
    epilog=examples("memtool migrate --dry-run", "memtool migrate", "memtool migrate -q"),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION, DRY_RUN)
def migrate(call: Call) -> None:
    """Bring every branch to the newest schema of the store; older versions stay as they are.

    Every commit does so for its branch: nobody has to migrate. -q prints the new versions.
    """
    store = call.store_to_change()
    done = store.migrate(dry_run=call.dry_run, metadata=partial(carried_on, store))
    record = records.Migrated(
        store=call.store_path,
        dry_run=call.dry_run,
        schema_to=SCHEMA_VERSION,
        files=done.files,
        nbytes=done.nbytes,
        branches=tuple(
            records.BranchSchema(
                branch=tip.branch,
                version=tip.version,
                schema_from=tip.schema,
                rows=tip.rows,
                blobs=tip.blobs,
                committed=tip.committed,
            )
            for tip in done.branches
        ),
    )
    rows = [
        (
            tip.branch,
            tip.version,
            tip.schema,
            max(tip.schema, SCHEMA_VERSION),
            tip.rows,
            tip.blobs,
            tip.committed or ("one commit" if tip.needed else "nothing"),
        )
        for tip in done.branches
    ]
    header = ("branch", "version", "schema", "to", "rows", "blobs", "would do", "did")
    table = Table((*header[:6], header[6 if call.dry_run else 7]), rows)
    call.out.data(record, table, ids=[tip.committed for tip in done.branches if tip.committed])
    needed = sum(tip.needed for tip in done.branches)
    said = f"the {done.files} files of the memory, {size(done.nbytes)}, stay as they are"
    if not needed:
        call.out.note(f"all is of schema {SCHEMA_VERSION} or newer: there is nothing to do")
    elif call.dry_run:
        call.out.note(f"nothing was changed; {said}, and {needed} commits are added")
        call.out.next(call.command("migrate"))
    else:
        call.out.note(said)


def _said(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """What the committer recorded, in short: whole configurations are for --json."""

    def said(name: str, value: object) -> str:
        if name == "learned" and isinstance(value, list):
            return numbered(out_of_runs(value))
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return [
        (f"  {name}", said(name, value))
        for name, value in metadata.items()
        if not isinstance(value, dict)
    ]


def _adapters(found: Iterable[AdapterRecord]) -> tuple[records.Adapter, ...]:
    return tuple(records.Adapter.model_validate(adapter) for adapter in found)


def _adapter_table(adapters: Iterable[records.Adapter]) -> Table:
    rows = [
        (
            a.id,
            a.name,
            a.kind,
            a.task,
            a.meta.get("task_name") or "",
            a.domain or "",
            ",".join(str(c) for c in a.classes),
            a.scaling,
        )
        for a in adapters
    ]
    header = ("id", "name", "kind", "task", "task name", "domain", "classes", "scaling")
    return Table(header, rows, spared=("scaling", "classes", "id", "domain", "kind"))
