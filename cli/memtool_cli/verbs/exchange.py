"""Adapters in and out, of files and of other memories: import, export, merge, clone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.errors import ConfigError
from memtool.methods.about import said_by
from memtool.paths import split_store
from memtool.progress import ProgressEvent
from memtool_cli import complete, records, written
from memtool_cli.commands import Verbs
from memtool_cli.options import (
    BASE,
    COMPUTE,
    CONFIGURATION,
    LOCK_TIMEOUT,
    METHOD,
    RANK,
    STORE,
    Call,
    TaskOfForeign,
    examples,
    one_of,
    verb,
)
from memtool_cli.output import Table, size

if TYPE_CHECKING:
    from memtool.progress import Progress
    from memtool_stores import MemoryStore

app = Verbs()


@app.command(
    "clone",
    epilog=examples(
        "memtool clone backup",
        "memtool clone s3://bucket/memory",
        "memtool clone s3://bucket/memory here",
        "memtool clone --resume s3://bucket/memory",
    ),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION)
def clone(
    call: Call,
    places: Annotated[
        list[str],
        typer.Argument(metavar="[FROM] TO", help="Folders, or s3://bucket/prefix."),
    ],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a copy to a bucket that was cut short."),
    ] = False,
) -> None:
    """Copy a whole memory, with all its versions, to another place."""
    from memtool_stores import MemoryStore

    if len(places) > 2:
        raise ConfigError(f"{len(places)} places", expected="where to, or from where and where to")
    if len(places) == 2:
        source = MemoryStore.open(places[0], lock_timeout=call.config.lock_timeout)
        target = places[1]
    else:
        source, target = call.store(), places[0]
    with call.out.progress() as progress:
        copied = source.clone(target, partial(_tell, progress, "clone"), resume=resume)
    _report_copy(call, source.url, copied)


@app.command(
    "merge",
    epilog=examples(
        "memtool merge ../theirs",
        "memtool merge ../theirs poems letters",
        "memtool merge s3://bucket/memory@v1 --store both",
        "memtool merge ../theirs poems && memtool forget poems --store ../theirs",
    ),
)
@verb(STORE, LOCK_TIMEOUT, *CONFIGURATION)
def merge(
    call: Call,
    other: Annotated[
        str,
        typer.Argument(
            metavar="OTHER",
            help="Another memory of the same model: FOLDER, FOLDER@VERSION or s3://….",
            autocompletion=complete.stores,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK|ADAPTER]...",
            help="Tasks (number or name), or adapters, of the other memory; none: all of them.",
            autocompletion=complete.of_other,
        ),
    ] = None,
) -> None:
    """Take the adapters of another memory in, with all that is kept of them, as one version."""
    from memtool.methods.merge import merge as join

    call.refuse_version()
    result = join(call.store_path, other, names or (), lock_timeout=call.config.lock_timeout)
    rows = [(adapter.name, adapter.id) for adapter in result.added]
    table = Table(("adapter", "id"), rows, title=f"version {result.version}")
    call.out.data(result, table, ids=[one.id for one in (*result.known, *result.added)])
    for name, number in result.renumbered.items():
        call.out.note(f"task {name!r} has number {number} in this memory")
    for note in result.notes:
        call.out.note(f"warning: {note}")
    if result.known:
        known = ", ".join(one.name for one in result.known)
        call.out.note(f"{'nothing new; ' if result.unchanged else ''}in memory already: {known}")
    if not result.unchanged:
        call.out.next(call.command("eval" if result.kind == "atoms" else "consolidate"))


@app.command(
    "import",
    epilog=examples(
        "memtool import adapters/my-lora --task 2",
        "memtool import adapters/my-lora --task 1 --method moram --as atoms",
        "memtool import adapters/* --base hf:MODEL --prompts prompts.jsonl",
        "memtool import memory.bundle --store copy",
    ),
)
@verb(STORE, LOCK_TIMEOUT, METHOD, RANK, BASE, *COMPUTE, *CONFIGURATION)
def import_adapters(
    call: Call,
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR|BUNDLE",
            help="PEFT directories that fit the backbone, folders of them, or DIR:TASK; or one "
            "bundle, for a new memory.",
        ),
    ],
    task: TaskOfForeign = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="With --base: a few dozen example prompts of each adapter, one a line as "
            '{"adapter": "poems", "prompt": "…"}; or a stream of texts.',
            rich_help_panel="Memory",
        ),
    ] = None,
    keep_prompts: Annotated[
        bool,
        typer.Option(
            "--keep-prompts",
            help="Keep the example prompts too, not only what they look like to the model.",
            rich_help_panel="Memory",
        ),
    ] = False,
    given_as: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="atoms",
            help="MoRAM: let the ranks of a LoRA that acts whole become atoms; says what it loses.",
            rich_help_panel="Memory",
        ),
    ] = None,
) -> None:
    """Put PEFT adapters made elsewhere into the memory, or make a memory of a bundle."""
    call.refuse_version()
    if given_as is not None:
        one_of("--as", given_as, ("atoms",))
    if call.given["base"] is None and task is None and given_as is None:
        call = _with_base_of_memory(call, places)
    if call.given["base"] is not None:
        return _collect(call, places, task, prompts, keep_prompts)
    if prompts is not None or keep_prompts:
        raise ConfigError(
            "--prompts without a language model",
            expected="--base, the model that the adapters belong to",
            remedy=_base_of(call.store_path) or "--base hf:MODEL, a folder or an id on the hub",
        )
    directories = [Path(place) for place in places]
    bundles = [path for path in directories if path.is_file()]
    if bundles:
        if len(directories) > 1:
            raise ConfigError(
                f"{bundles[0]} is a file beside {len(directories) - 1} others",
                expected="PEFT directories, or one bundle",
            )
        for option, value in (("--task", task), ("--as", given_as)):
            if value is not None:
                raise ConfigError(
                    f"{option} with {bundles[0]}, a whole memory",
                    expected="nothing that is said of a single adapter",
                    remedy=f"the same without {option}",
                )
        return _import_bundle(call, bundles[0])
    written.write(call, places, task=task, as_atoms=given_as is not None)
    return None


def _base_of(store: str) -> str | None:
    """The option that names the language model of a memory; None where there is none."""
    from memtool_stores import MemoryStore

    name = MemoryStore.open(store).space.backbone.name if MemoryStore.exists(store) else ""
    return f"--base {name}" if name.startswith("hf:") else None


def _with_base_of_memory(call: Call, places: list[str]) -> Call:
    """The call with the language model of the collection that is there, where it has no other."""
    config = call.resolve().config
    as_it_is = config.stream.setting == "trace" or not said_by(config.method).collects
    if as_it_is or any(Path(place).is_file() for place in places):
        return call
    option = _base_of(split_store(config.store)[0])
    if option is None:
        return call
    call.out.note(f"note: {option}, the model of the memory")
    return replace(call, given={**call.given, "base": option.removeprefix("--base ")})


def _collect(
    call: Call, places: list[str], task: str | None, prompts: Path | None, keep_prompts: bool
) -> None:
    """Take a collection of adapters of one language model in."""
    from memtool.methods.mira.prompts import PromptMemory

    if task is not None:
        raise ConfigError("--task with --base", expected="DIR:TASK, for each adapter its own")
    with call.out.progress() as progress:
        method = call.method(progress)
        if not isinstance(method, PromptMemory):
            raise ConfigError(
                f"--base under method {call.config.method}",
                expected="method mira, whose memory of prompts takes any LoRA",
            )
        result = method.collect(places, prompts, keep_prompts=keep_prompts)
    written.show(call, result)


def _import_bundle(call: Call, file: Path) -> None:
    from memtool_stores import MemoryStore

    with call.out.progress() as progress:
        tell = partial(_tell, progress, "import")
        store = MemoryStore.from_bundle(file, call.store_path, tell)
    _report_copy(call, str(file), store)


def _report_copy(call: Call, source: str, copied: MemoryStore) -> None:
    view = copied.view()
    record = records.Cloned(
        source=source, target=copied.url, version=view.version, adapters=len(view.live)
    )
    rows = [
        ("from", record.source),
        ("to", record.target),
        ("version", record.version),
        ("adapters", record.adapters),
    ]
    call.out.data(record, Table((), rows), ids=[record.target])
    call.out.next(f"memtool verify --store {copied.url}")


def _tell(progress: Progress, stage: str, step: int, total: int) -> None:
    progress(ProgressEvent(stage=stage, step=step, total=total))


@app.command(
    "export",
    epilog=examples(
        "memtool export --out adapters",
        "memtool export inverted-0 --out adapters",
        "memtool export --bundle memory.bundle",
        "memtool export --store memory@v1 --model memory.pt2",
    ),
)
@verb(STORE, LOCK_TIMEOUT, RANK, *COMPUTE, *CONFIGURATION, remembers=True)
def export_adapters(
    call: Call,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="Names or ids; none: all of the version."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for them.", rich_help_panel="Output"),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="FILE",
            help="Instead, the whole memory with all its versions in one file.",
            rich_help_panel="Output",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="FILE",
            help="Instead, the memory on its model as a program that torch.export.load reads.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Write adapters of the memory as PEFT directories, or all of it as one file."""
    if sum(place is not None for place in (out, bundle, model)) != 1:
        raise ConfigError(
            "where to?",
            expected="one of --out DIR for PEFT directories, --bundle FILE for all versions and "
            "--model FILE for a program of torch",
        )
    if model is not None:
        return _export_model(call, adapters, model)
    if bundle is not None:
        if adapters:
            raise ConfigError(
                "a bundle holds the whole memory", expected="no adapter names beside --bundle"
            )
        store = call.store_to_change()
        view = store.view()
        bundle = call.writes_to(bundle)
        nbytes = store.bundle(bundle)
        made = records.Bundled(
            path=bundle, version=view.version, adapters=len(view.live), nbytes=nbytes
        )
        rows = [
            ("bundle", bundle),
            ("version", made.version),
            ("adapters", made.adapters),
            ("size", size(nbytes)),
        ]
        call.out.data(made, Table((), rows), ids=[bundle])
        return None
    assert out is not None
    from memtool.methods.export import export_peft
    from memtool.methods.home import stored_home

    view = call.view()
    home = stored_home(call.config, seed=call.seed) or call.method().workspace
    directories = tuple(export_peft(home, adapters, out=out, version=view.version))
    record = records.Exported(version=view.version, directories=directories)
    table = Table(("directory",), [(directory,) for directory in directories])
    call.out.data(record, table, ids=directories)
    return None


def _export_model(call: Call, adapters: list[str] | None, file: Path) -> None:
    """Write the attached model as a file of torch.export."""
    if adapters:
        raise ConfigError(
            "a program holds the whole memory", expected="no adapter names beside --model"
        )
    from memtool.program import export_model

    call.store()
    file = call.writes_to(file)
    program = export_model(call.config.store, file)
    made = records.ExportedModel.model_validate(program)
    rows = [
        ("program", file),
        ("version", made.version),
        ("input", _shape(made.input)),
        *((name, _shape(shape)) for name, shape in made.outputs.items()),
        ("classes", made.classes),
        ("size", size(made.nbytes)),
    ]
    call.out.data(made, Table((), rows), ids=[file])


def _shape(shape: tuple[str | int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
