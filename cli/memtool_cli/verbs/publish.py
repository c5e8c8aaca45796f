"""Whole memories on the Hugging Face Hub: push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.options import CONFIGURATION, LOCK_TIMEOUT, STORE, Call, examples, verb
from memtool_cli.output import Table, size

app = Verbs()

Repository = Annotated[
    str, typer.Argument(metavar="USER/NAME", help="A repository of the hub.", show_default=False)
]


@app.command(
    "push",
    epilog=examples(
        "memtool push user/name --private",
        "memtool push user/name --record runs",
        "memtool push user/name --store s3://bucket/memory",
        "memtool push user/name --record runs --dataset uoft-cs/cifar100",
    ),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION)
def push(
    call: Call,
    repository: Repository,
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Only you may see it; refused for a repository that is public already.",
            rich_help_panel="Output",
        ),
    ] = False,
    record: Annotated[
        list[Path] | None,
        typer.Option(
            "--record",
            metavar="RECORD",
            help="What was measured, for the card: a record or the folder of a run; may be "
            "repeated.",
            rich_help_panel="Output",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="USER/NAME",
            help="The data set of the hub that the records measured on.",
            rich_help_panel="Output",
        ),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(
            "--message", "-m", metavar="TEXT", help="Of the commit.", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Publish the memory with all its versions on the Hugging Face Hub, as one commit."""
    from memtool.evaluation.record import find_records, read_record
    from memtool.hub import push as publish

    call.store_to_change()
    measured = [read_record(file) for path in record or () for file in find_records(path)]
    with call.out.progress() as progress:
        pushed = publish(
            call.store_path,
            repository,
            private=private,
            records=measured,
            dataset=dataset,
            message=message,
            lock_timeout=call.config.lock_timeout,
            progress=progress,
        )
    made = records.Pushed.model_validate(pushed)
    rows = [
        ("repository", made.url + (" (private)" if made.private else "")),
        ("commit", made.commit),
        ("version", made.version),
        ("adapters", len(made.adapters)),
        ("files", made.files),
        ("size", size(made.nbytes)),
        ("results", made.results),
    ]
    call.out.data(made, Table((), rows), ids=[made.commit])
    for note in pushed.notes:
        call.out.note(f"note: {note}")
    if pushed.unchanged:
        call.out.note("nothing new: the repository holds this version already")
    call.out.next(f"memtool log --store hf://{made.repository}")


@app.command(
    "pull",
    epilog=examples(
        "memtool pull user/name",
        "memtool pull user/name --store copy",
        "memtool pull user/name --store s3://bucket/memory",
    ),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION)
def pull(call: Call, repository: Repository) -> None:
    """Fetch a memory with all its versions from the Hugging Face Hub, every byte checked."""
    from memtool.hub import pull as fetch
    from memtool_stores import hub

    call.refuse_version()
    with call.out.progress() as progress:
        pulled = fetch(
            repository,
            call.store_path,
            lock_timeout=call.config.lock_timeout,
            progress=progress,
        )
    store, came = pulled.store, pulled.came
    view = store.view()
    record = records.Pulled(
        source=hub.SCHEME + hub.repository_of(repository),
        target=store.url,
        version=view.version,
        adapters=len(view.live),
        branches=tuple(sorted(store.branches())) if came is None else came.branches,
        tags=tuple(sorted(store.tags())) if came is None else came.tags,
        deleted=() if came is None else came.deleted,
    )
    new = [
        *(f"branch {name}" for name in record.branches),
        *(f"tag {name}" for name in record.tags),
    ]
    rows = [
        ("from", record.source),
        ("to", record.target),
        ("version", record.version),
        ("adapters", record.adapters),
        ("new", ", ".join(new) or "-"),
    ]
    call.out.data(record, Table((), rows), ids=[record.target])
    if not new:
        call.out.note(f"nothing new: {record.target} holds all that {record.source} has")
    for name in record.deleted:
        call.out.note(f"note: tag {name} was deleted in {record.target} and stays so")
    call.out.next(f"memtool eval --store {store.url}")
