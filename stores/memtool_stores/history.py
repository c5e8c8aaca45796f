"""Versions and how they are named: `HEAD`, `HEAD~2`, a tag, a branch, a version id or a prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from memtool_stores.errors import IntegrityError, NotFoundError, SchemaError, VersionExpiredError
from memtool_stores.ice import translated

MAIN = "main"
"""The branch that HEAD is the tip of."""

SHORTEST_PREFIX = 4

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION_ID = re.compile(r"[0-9A-HJKMNP-TV-Z]{20}")


@dataclass(frozen=True)
class Version:
    """One committed state of the memory.

    `parent` is None for the oldest version that is kept; `time` is aware (UTC); `metadata` is what
    the committer gave.
    """

    id: str
    parent: str | None
    time: datetime
    message: str
    metadata: Mapping[str, Any] = field(hash=False)


def commit_metadata(*, parent: str, time: str, user: str, seal: str) -> dict[str, Any]:
    """What we keep beside the message of an icechunk snapshot."""
    return {"parent": parent, "time": time, "user": user, "seal": seal}


def of_snapshot(snapshot: Any, *, oldest: bool) -> Version:
    """The version that an icechunk snapshot holds."""
    metadata = snapshot.metadata
    if "time" not in metadata:
        raise SchemaError(f"version {snapshot.id} was not committed by memtool")
    return Version(
        snapshot.id,
        None if oldest else snapshot.parent_id,
        datetime.fromisoformat(metadata["time"]),
        snapshot.message,
        json.loads(metadata["user"]),
    )


def snapshots(repository: Any, version: str) -> Iterator[tuple[Any, bool]]:
    """A snapshot and its ancestors, newest first, each with whether it is our oldest.

    The empty snapshot that icechunk itself puts first is not one of ours.
    """
    ancestry = iter(repository.ancestry(snapshot_id=version))
    current = next(ancestry, None)
    while current is not None and current.parent_id is not None:
        older = next(ancestry, None)
        yield current, older is None or older.parent_id is None
        current = older


def check_name(name: str, kind: str) -> None:
    """Nothing, when `name` can be a tag, branch or blob.

    Raises:
        SchemaError: it has other characters, or reads as another way to name a version.
    """
    if not _NAME.fullmatch(name) or name == "HEAD" or _VERSION_ID.fullmatch(name):
        raise SchemaError(
            f"{name!r} cannot be the name of a {kind}",
            expected="letters, digits, '.', '_' and '-', at most 100, beginning with one of the "
            "first two; not HEAD, not a version id",
        )


def resolve(repository: Any, where: str, ref: str, as_of: datetime | None = None) -> str:
    """The version id that `ref` names; with `as_of`, its newest ancestor not younger than that.

    Raises:
        NotFoundError: nothing has that name, or a prefix fits several versions.
        VersionExpiredError: a whole version id that is no longer, or never was, in the store.
    """
    with translated(f"find version {ref!r}", where):
        name, tilde, steps = ref.partition("~")
        if tilde and steps and not steps.isdigit():
            raise NotFoundError(f"{ref!r} names no version", expected="for example HEAD~2")
        version = _resolve_name(repository, name)
        back = int(steps or 1) if tilde else 0
        for index, (snapshot, oldest) in enumerate(snapshots(repository, version)):
            if index < back:
                continue
            if as_of is None or of_snapshot(snapshot, oldest=oldest).time <= as_of:
                return str(snapshot.id)
    if as_of is not None:
        raise NotFoundError(f"no version of {ref!r} is as old as {as_of.isoformat()}")
    raise NotFoundError(
        f"{name} has fewer than {back} versions before it", remedy="`memtool log` lists them"
    )


def _resolve_name(repository: Any, name: str) -> str:
    if name in {"HEAD", MAIN, ""}:
        return str(repository.lookup_branch(MAIN))
    if name in repository.list_branches():
        return str(repository.lookup_branch(name))
    if name in repository.list_tags():
        return str(repository.lookup_tag(name))
    prefix = name.upper()
    if _VERSION_ID.fullmatch(prefix):
        return _whole_id(repository, prefix)
    found = set()
    if len(prefix) >= SHORTEST_PREFIX and _VERSION_ID.fullmatch(prefix.ljust(20, "0")):
        found = {v for v in reachable(repository) if v.startswith(prefix)}
    if len(found) == 1:
        return found.pop()
    several = f"fits {len(found)} versions: {', '.join(sorted(found))}"
    raise NotFoundError(
        f"{name!r} {several if found else 'is no branch, tag or version'}",
        expected="HEAD, HEAD~2, a branch, a tag, or a version id (its first four letters or more)",
        remedy="`memtool log` lists the versions",
    )


def _whole_id(repository: Any, version: str) -> str:
    try:
        with translated(f"find version {version}", "the store"):
            snapshot = repository.lookup_snapshot(version)
    except (NotFoundError, IntegrityError) as error:
        if isinstance(error, IntegrityError) and "not found" not in error.found:
            raise
        raise VersionExpiredError(
            f"version {version} is not in the store: gc has expired it, or it never was",
            remedy="`memtool log` lists the versions",
        ) from error
    if snapshot.id != version or snapshot.parent_id is None:
        raise NotFoundError(f"no version {version}")
    return version


def tips(repository: Any) -> dict[str, str]:
    """Every branch and tag with the version that it names, branches first."""
    refs = {
        name: str(repository.lookup_branch(name)) for name in sorted(repository.list_branches())
    }
    for name in sorted(repository.list_tags()):
        refs.setdefault(name, str(repository.lookup_tag(name)))
    return refs


def unreadable_refs(repository: Any, url: str) -> list[tuple[str, str]]:
    """Kind and name of the branches and tags of a directory whose files cannot be read.

    icechunk leaves them out of its lists without a word, and gc would take their versions.
    """
    folder = Path(url) / "ice" / "refs"
    if not folder.is_dir():
        return []
    listed = {("branch", name) for name in repository.list_branches()}
    listed |= {("tag", name) for name in repository.list_tags()}
    stored = {
        (kind, name)
        for kind, _, name in (place.name.partition(".") for place in folder.iterdir())
        if (folder / f"{kind}.{name}" / "ref.json").exists()
        and not (folder / f"{kind}.{name}" / "ref.json.deleted").exists()
    }
    return sorted(stored - listed)


def reachable(repository: Any) -> dict[str, Version]:
    """Every version that some branch or tag leads to, newest first along each."""
    found: dict[str, Version] = {}
    for tip in tips(repository).values():
        for snapshot, oldest in snapshots(repository, tip):
            if snapshot.id in found:
                break
            found[snapshot.id] = of_snapshot(snapshot, oldest=oldest)
    return found
