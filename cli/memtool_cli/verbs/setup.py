"""Settings and surroundings: init, config, backbones, doctor."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from memtool.atomic import write_atomic
from memtool.config import WORKING_FILE, Resolved, presets, to_yaml
from memtool.errors import MemtoolError
from memtool.paths import at_home, expand
from memtool.settings import DEFAULT_METHOD, Config, choices, get, keys
from memtool_cli.commands import Verbs
from memtool_cli.options import COMPUTE, CONFIGURATION, METHOD, STORE, YES, Call, examples, verb
from memtool_cli.output import Table, size
from memtool_cli.records import (
    BackboneRow,
    Backbones,
    Check,
    Diagnosis,
    Preset,
    Presets,
    Setting,
    Settings,
    Written,
)
from memtool_stores.files import is_special
from memtool_stores.migrate import SCHEMA_VERSION

app = Verbs()
config = Verbs(no_args_is_help=True, help="Show the settings and the presets.")
app.add_typer(config, name="config")

SHOWN = 5
"""Leftovers that are named one by one."""

PACKAGES = ("torch", "torchvision", "timm", "numpy", "zarr", "icechunk", "safetensors", "peft")


@app.command(
    "init",
    epilog=examples(
        "memtool init",
        "memtool init --preset mira-dil",
        "memtool init --preset digits-til experiments/til.yaml",
    ),
)
@verb(METHOD, *CONFIGURATION, YES)
def init(
    call: Call,
    file: Annotated[Path, typer.Argument(metavar="FILE")] = Path(WORKING_FILE),
) -> None:
    """Write a file of the settings of a method, with a comment on every one."""
    file = call.writes_to(file)
    if file.exists() and not is_special(file):
        call.confirm(f"replace {file}")
    resolved = call.resolve(ambient=False)
    write_atomic(file, commented(resolved))
    call.out.data(Written(path=file), Table((), [("written", file)]), ids=[file])
    here = "" if file == Path(WORKING_FILE) else f" --config {file}"
    call.out.next(f"memtool train-adapter --task 1{here}")


def commented(resolved: Resolved) -> str:
    """Every setting with its comment; those that have their default are commented out."""
    method = resolved.config.method
    defaults = Config(method=method).model_copy(update={"method": DEFAULT_METHOD})
    lines = [
        f"# Settings of memtool, from the preset {resolved.preset}.",
        "# A line that begins with # shows a default: remove the # to change it.",
        "# The command line and MEMTOOL_* variables win over this file.",
    ]
    section = ""
    for key, field in keys(method).items():
        head, _, name = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"{section}:"]
        value = get(resolved.config, key)
        plain = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump(
            str(plain) if isinstance(plain, Path) else plain,
            default_flow_style=True,
            allow_unicode=True,
            width=1000,
        )
        text = dumped.removesuffix("...\n").strip()  # YAML ends a lone scalar with "..."
        words = f" ({', '.join(choices(key, method))})" if choices(key, method) else ""
        mark = "# " if value == get(defaults, key) else ""
        about = f"  # {field.description or ''}{words}".rstrip(" #")
        lines.append(f"{'  ' * bool(section)}{mark}{name}: {text}{about}")
    return "\n".join(lines) + "\n"


@config.command(
    "show",
    epilog=examples(
        "memtool config show",
        "memtool config show --origin",
        "memtool config show --method mypackage.module:MyMethod",
        "memtool config show --preset mira-dil --yaml > pacs.yaml",
    ),
)
@verb(STORE, METHOD, *COMPUTE, *CONFIGURATION)
def show(
    call: Call,
    origin: Annotated[
        bool,
        typer.Option("--origin", help="Where each value is from.", rich_help_panel="Output"),
    ] = False,
    as_yaml: Annotated[
        bool,
        typer.Option("--yaml", help="A file for --config.", rich_help_panel="Output"),
    ] = False,
) -> None:
    """Show every setting in force."""
    resolved = call.resolved
    if as_yaml:
        sys.stdout.write(to_yaml(resolved.config))
        return
    settings = tuple(
        Setting(key=key, value=get(resolved.config, key), origin=resolved.origin[key])
        for key in keys(resolved.config.method)
    )
    header = ("setting", "value", "from") if origin else ("setting", "value")
    rows = [(s.key, _shown(s.value), s.origin)[: len(header)] for s in settings]
    record = Settings(preset=resolved.preset, settings=settings)
    call.out.data(record, Table(header, rows), ids=[f"{row[0]}={row[1]}" for row in rows])


@config.command("presets", epilog=examples("memtool config presets", "memtool config presets -q"))
@verb()
def list_presets(call: Call) -> None:
    """List the presets and the commands that run them."""
    found = tuple(
        Preset(name=preset.name, summary=preset.summary, launch=preset.launch)
        for preset in presets()
    )
    rows = [(preset.name, preset.summary, preset.launch) for preset in found]
    call.out.data(
        Presets(presets=found),
        Table(("preset", "what", "command"), rows),
        ids=[preset.name for preset in found],
    )


@app.command(
    "backbones",
    epilog=examples(
        "memtool backbones",
        "memtool backbones 'convnext_*o'",
        "memtool backbones swin_tiny --json",
        "memtool backbones hf:FOLDER",
    ),
)
@verb()
def backbones(
    call: Call,
    wanted: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILTER]",
            help="A word in their names, a pattern with * or ?, or hf: and a folder.",
        ),
    ] = None,
) -> None:
    """List timm's models: their targets, widths, blocks and parameters, or their names alone."""
    from memtool.backbones.listing import MOST, described, names_of

    names = names_of(wanted)
    if wanted is None or len(names) > MOST:
        rows = [BackboneRow(name=name) for name in names]
        table = Table(("backbone.name",), [(row.name,) for row in rows])
        call.out.data(Backbones(backbones=tuple(rows)), table, ids=[row.name for row in rows])
        told = f"{len(names)} models: their targets are told of {MOST} at most"
        call.out.note(f"{told}, memtool backbones FILTER")
        return
    rows = [BackboneRow(**dataclasses.asdict(one)) for one in described(names)]
    table = Table(
        ("backbone.name", "parameters", "image size", "blocks", "widths", "targets"),
        [
            (
                row.name,
                f"{row.parameters:,}",
                str(row.image_size),
                str(row.blocks),
                ",".join(map(str, row.widths)),
                row.problem or ",".join(row.targets),
            )
            for row in rows
        ],
    )
    call.out.data(Backbones(backbones=tuple(rows)), table, ids=[row.name for row in rows])


@app.command("doctor", epilog=examples("memtool doctor", "memtool doctor --device cuda --json"))
@verb(STORE, *COMPUTE, *CONFIGURATION)
def doctor(call: Call) -> None:
    """Check versions, device, data, cache and memory; exit with 1 when something is wrong."""
    checks = (
        *_versions(),
        _device(call.config),
        _data(),
        _weights(call.config),
        _cache(),
        _store(call),
        *_queries(call),
        _leftovers(call),
    )
    record = Diagnosis(ok=all(check.ok for check in checks), checks=checks)
    rows = [
        (check.name, "ok" if check.ok else "wrong", check.found, check.remedy or "")
        for check in checks
    ]
    wrong = [check.name for check in checks if not check.ok]
    call.out.data(record, Table(("check", "state", "found", "try"), rows), ids=wrong)
    if wrong:
        raise typer.Exit(1)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)


_OPTIONAL = {
    "peft": "only for tests",
    "open_clip_torch": "only for backbones open_clip:<name>, pip install 'memtool[clip]'",
    "transformers": "only for backbones hf:<name>, pip install 'memtool[llm]'",
    "usearch": "only for memory.index=usearch, pip install 'memtool[usearch]'",
}
"""Packages that a plain installation does without, and what they are for."""


def _versions() -> list[Check]:
    python = ".".join(str(part) for part in sys.version_info[:3])
    checks = [
        Check(name="memtool", ok=True, found=importlib.metadata.version("memtool"))
        if _installed("memtool")
        else Check(name="memtool", ok=True, found="from its source folder, not installed"),
        Check(name="python", ok=sys.version_info >= (3, 11), found=python),
    ]
    for name in PACKAGES:
        if _installed(name):
            checks.append(Check(name=name, ok=True, found=importlib.metadata.version(name)))
        else:
            optional = name in _OPTIONAL
            checks.append(
                Check(
                    name=name,
                    ok=optional,
                    found="not installed" + (f" ({_OPTIONAL[name]})" if optional else ""),
                    remedy=None if optional else f"pip install {name}",
                )
            )
    return checks


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _device(config: Config) -> Check:
    from memtool.engine import Engine

    try:
        engine = Engine(config.engine)
    except MemtoolError as error:
        return Check(name="device", ok=False, found=error.message, remedy=error.remedy)
    return Check(name="device", ok=True, found=f"{engine.device}, {engine.precision}")


def _data() -> Check:
    folder = os.environ.get("MEMTOOL_DATA")
    if not folder:
        return Check(
            name="data", ok=True, found="MEMTOOL_DATA is not set; the embedded digits need none"
        )
    try:
        there = expand(folder).is_dir()
    except (MemtoolError, OSError):
        there = False
    return Check(
        name="data",
        ok=there,
        found=f"MEMTOOL_DATA={folder}" + ("" if there else ", which is no folder"),
        remedy=None if there else "export MEMTOOL_DATA=FOLDER",
    )


def _weights(config: Config) -> Check:
    if config.backbone.weights is None:
        return Check(name="backbone", ok=True, found=config.backbone.name)
    if config.backbone.weights == "random":
        found = f"{config.backbone.name}, with random weights"
        return Check(name="backbone", ok=True, found=found)
    try:
        path = expand(config.backbone.weights)
    except MemtoolError as error:
        return Check(name="backbone", ok=False, found=error.message, remedy=error.remedy)
    there = path.is_file()
    return Check(
        name="backbone",
        ok=there,
        found=f"{config.backbone.name}, {config.backbone.weights}"
        + ("" if there else ", which is not there"),
        remedy=None if there else "--set backbone.weights=FILE",
    )


def _cache() -> Check:
    from memtool.streams.table import cache_folder

    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Check(
        name="cache",
        ok=writable,
        found=f"{folder}, {size(used)}" + ("" if writable else ", which cannot be written to"),
        remedy=None if writable else "export MEMTOOL_CACHE=FOLDER",
    )


def _store(call: Call) -> Check:
    from memtool_stores import MemoryStore

    path = call.store_path
    try:
        if not MemoryStore.exists(path):
            return Check(name="memory", ok=True, found=f"none yet at {path}")
        view = call.view()
    except MemtoolError as error:
        return Check(name="memory", ok=False, found=error.message, remedy=error.remedy)
    found = f"{path}: {len(view.live)} adapters at {view.version} ({view.message})"
    if view.schema < SCHEMA_VERSION:
        found += f", schema {view.schema}: the next commit brings it to {SCHEMA_VERSION}"
    return Check(name="memory", ok=True, found=found)


def _queries(call: Call) -> tuple[Check, ...]:
    """Blocks of a memory of images whose coefficients do not depend on the input, if any."""
    from memtool_stores import MemoryStore

    try:
        if not MemoryStore.exists(call.store_path):
            return ()
        view = call.view()
        if not view.has_blob("memory"):  # no memory of MIRA over images
            return ()
        from memtool.methods.mira.doctor import asked_the_same

        same = asked_the_same(view)
    except MemtoolError as error:
        return (Check(name="queries", ok=False, found=error.message, remedy=error.remedy),)
    if not same.memories:
        return ()
    named = ", ".join(map(str, same.memories if same.blocks is None else same.blocks))
    what = f"memory {named} (from 0)" if same.blocks is None else f"block {named}"
    found = f"{what} is asked the same by every input: its coefficients depend on none"
    return (Check(name="queries", ok=True, found=found, remedy=same.remedy),)


def _leftovers(call: Call) -> Check:
    """What lies half made in the memory, beside it, in the cache and under `runs`."""
    from memtool.streams.table import cache_folder
    from memtool_stores.leftovers import find

    found = [*find(call.config.runs.absolute()), *find(cache_folder())]
    if not call.store_path.startswith("s3:"):
        store = at_home(Path(call.store_path)).absolute()
        found += [*find(store), *find(store.parent, below=False)]
    found = list({one.path: one for one in found}.values())
    if not found:
        return Check(name="leftovers", ok=True, found="none")
    told = ", ".join(str(one.path) for one in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return Check(
        name="leftovers",
        ok=True,
        found=f"{told}{more}: of a process at work, or killed "
        f"({size(sum(one.nbytes for one in found))})",
        remedy="memtool gc",
    )
