"""What the shell offers after Tab: presets, settings, tasks, versions. Nothing here loads torch.

A completion that cannot know (no store yet, a broken memtool.yaml) offers nothing: an error text
in the middle of a half-typed line would help nobody.
"""

from __future__ import annotations

from pathlib import Path

import typer

from memtool.config import parse_assignment, presets, resolve
from memtool.errors import MemtoolError
from memtool.paths import split_store
from memtool.settings import Config, choices, keys


def preset_names(incomplete: str) -> list[str]:
    """Presets."""
    return [preset.name for preset in presets() if preset.name.startswith(incomplete)]


def settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """Dotted keys of the method with `=`, and after it the words that the setting can take."""
    try:
        method = _config(ctx).method
        known_keys = keys(method)
    except MemtoolError:
        method, known_keys = None, keys()
    key, equals, start = incomplete.partition("=")
    if not equals:
        return [f"{known}=" for known in known_keys if known.startswith(key)]
    known_words = choices(key, method) if key in known_keys else ()
    return [f"{key}={word}" for word in known_words if word.startswith(start)]


def tasks(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the tasks that are known without reading a sample: domains, or as configured."""
    try:
        names = _task_names(_config(ctx))
    except MemtoolError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def remembered(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the tasks and adapters in memory."""
    try:
        store = split_store(_config(ctx, of_store=True).store)[0]
    except MemtoolError:
        return []
    return _named_in(store, incomplete)


def of_other(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the tasks and adapters in the other memory that merge names."""
    other = ctx.params.get("other")
    return _named_in(other, incomplete) if other else []


def _named_in(store: str, incomplete: str) -> list[str]:
    from memtool_stores import MemoryStore

    place, version = split_store(store)
    try:
        live = MemoryStore.open(place).view(version).live
    except MemtoolError:
        return []
    names = [name for r in live for name in (r.meta.get("task_name"), r.name) if name]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tags and branches that can be deleted; a new name is for its owner to find."""
    from memtool_stores import MemoryStore

    if not ctx.params.get("delete"):
        return []
    try:
        store = MemoryStore.open(split_store(_config(ctx, of_store=True).store)[0])
        known = {**store.tags(), **store.branches()}
    except MemtoolError:
        return []
    return [name for name in sorted(known) if name != "main" and name.startswith(incomplete)]


def fixed_set_metrics(incomplete: str) -> list[str]:
    """Metrics that bisect can follow."""
    from memtool.experiments.bisect import METRICS

    return [name for name in METRICS if name.startswith(incomplete)]


def versions(ctx: typer.Context, incomplete: str) -> list[str]:
    """HEAD, tags, branches and the version ids of the store."""
    try:
        store = split_store(_config(ctx, of_store=True).store)[0]
        return [ref for ref in _versions(store) if ref.startswith(incomplete)]
    except MemtoolError:
        return []


def stores(incomplete: str) -> list[str]:
    """Folders, and after `@` the versions of the store before it."""
    store, at, version = incomplete.rpartition("@")
    if not at or "/" in version:
        folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
        found = [str(path) for path in sorted(folder.glob("*")) if path.is_dir()]
        return [path for path in found if path.startswith(incomplete)]
    try:
        return [f"{store}@{ref}" for ref in _versions(store) if ref.startswith(version)]
    except MemtoolError:
        return []


def _config(ctx: typer.Context, *, of_store: bool = False) -> Config:
    given = ctx.params
    overrides = {key: given[key] for key in ("store", "method") if given.get(key)}
    overrides |= dict(parse_assignment(text) for text in given.get("set") or () if "=" in text)
    preset, file = given.get("preset"), given.get("config")
    return resolve(preset=preset, file=file, overrides=overrides, of_store=of_store).config


def _task_names(config: Config) -> tuple[str, ...]:
    from memtool.streams.sources import task_names  # it needs numpy

    return tuple(task_names(config.stream))


def _versions(store: str) -> list[str]:
    """HEAD, the names that versions were given, and their ids, the newest first."""
    from memtool_stores import MemoryStore

    found = MemoryStore.open(store)
    names = (*found.tags(), *found.branches(), *(version.id for version in found.log()))
    return ["HEAD", *dict.fromkeys(names)]
