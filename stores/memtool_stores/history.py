"""Versions and how they are named: `HEAD`, `HEAD~2`, a tag, a branch, a version id or a prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import MAXYEAR, datetime
from pathlib import Path
from typing import Any

from memtool_stores.errors import (
    IntegrityError,
    NewerSchemaError,
    NotFoundError,
    SchemaError,
    VersionExpiredError,
)
from memtool_stores.ice import looking_up, translated
from memtool_stores.names import check_ref, is_version_id
from memtool_stores.printable import shown
from memtool_stores.references import SUMS, damaged_ref, unfinished, unreadable
from memtool_stores.tree import Tree, seal

MAIN = "main"
"""The branch that HEAD is the tip of."""

SHORTEST_PREFIX = 4

TRIES = 3
"""How often what gc takes from under a reader is looked for again."""

_STEPS = re.compile(r"[0-9]{1,15}")
_OURS = frozenset({"parent", "time", "user", "seal"})


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
    if not _OURS & metadata.keys():
        raise SchemaError(f"version {snapshot.id} was not committed by memtool")
    try:
        moment = datetime.fromisoformat(metadata["time"])
        user = json.loads(metadata["user"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(snapshot.id, "what a commit notes", str(error)) from error
    if moment.tzinfo is None or not 1 < moment.year < MAXYEAR:
        raise _damaged(snapshot.id, "a time with its zone", metadata["time"])
    if not isinstance(user, dict):
        raise _damaged(snapshot.id, "metadata as a mapping", shown(user))
    parent = None if oldest else snapshot.parent_id
    return Version(snapshot.id, parent, moment, snapshot.message, user)


def _damaged(version: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(what="version", name=version, expected=expected, found=found)


def check_seal(snapshot: Any, tree: Tree) -> None:
    """Nothing, when the attributes and the metadata of a version are those that were sealed.

    Raises:
        IntegrityError: they are not.
    """
    metadata = snapshot.metadata
    if not metadata.keys() >= _OURS:
        missing = ", ".join(sorted(_OURS - metadata.keys()))
        raise _damaged(snapshot.id, "what a commit notes", f"no {missing}")
    found = seal(
        tree.attributes,
        parent=metadata["parent"],
        time=metadata["time"],
        message=snapshot.message,
        user=metadata["user"],
    )
    if found != metadata["seal"]:
        raise _damaged(snapshot.id, f"seal {metadata['seal']}", found)


def sealed_tree(repository: Any, version: str) -> Tree:
    """The tree of a version, its seal checked where it has one: no changed attribute is believed.

    Raises:
        IntegrityError: they are not as they were written.
        SchemaError: there is no memory in this version, and memtool did not commit it.
    """
    snapshot = repository.lookup_snapshot(version)
    ours = bool(_OURS & snapshot.metadata.keys())
    try:
        with looking_up(repository, version):
            tree = Tree(repository.readonly_session(snapshot_id=version))
    except SchemaError as error:
        if not ours or isinstance(error, NewerSchemaError):
            raise
        raise _damaged(version, "a memory", error.message) from error
    if ours:
        check_seal(snapshot, tree)
    return tree


def snapshots(repository: Any, version: str) -> Iterator[tuple[Any, bool]]:
    """A snapshot and its ancestors, newest first, each with whether it is our oldest.

    The empty snapshot that icechunk itself puts first is not one of ours.

    Raises:
        IntegrityError: one of them is lost or damaged; it names that one.
    """
    with _reading_snapshot(repository, version):
        ancestry = iter(repository.ancestry(snapshot_id=version))
        current = checked_snapshot(next(ancestry, None), version)
    met = set()
    while current is not None and current.parent_id is not None:
        met.add(current.id)
        if current.parent_id in met:
            raise _damaged(current.id, "a version before it", "one that comes after it")
        with _reading_snapshot(repository, current.parent_id):
            older = checked_snapshot(next(ancestry, None), current.parent_id)
        yield current, older is None or older.parent_id is None
        current = older


def checked_snapshot(snapshot: Any, version: str) -> Any:
    """The snapshot, if it says that it is that of the version.

    Raises:
        IntegrityError: it is that of another.
    """
    if snapshot is not None and snapshot.id != version:
        raise _damaged(version, f"snapshot {version}", f"snapshot {snapshot.id}")
    return snapshot


@contextmanager
def _reading_snapshot(repository: Any, version: str) -> Iterator[None]:
    try:
        with translated("read the history", "the store"), looking_up(repository, version):
            yield
    except NotFoundError as error:
        raise _damaged(version, "a snapshot", error.message) from error
    except IntegrityError as error:
        raise _damaged(version, "a snapshot", error.found) from error


def resolve(repository: Any, where: str, ref: str, as_of: datetime | None = None) -> str:
    """The version id that `ref` names; with `as_of`, its newest ancestor not younger than that.

    Raises:
        NotFoundError: nothing has that name, or a prefix fits several versions.
        VersionExpiredError: a whole version id that is no longer, or never was, in the store.
    """
    for _ in range(TRIES):
        try:
            return _resolved(repository, where, ref, as_of)
        except IntegrityError as error:
            # gc may take a version between the branch that named it and its snapshot.
            if error.what != "version" or not is_expired(repository, where, error.name):
                raise
    return _resolved(repository, where, ref, as_of)


def _resolved(repository: Any, where: str, ref: str, as_of: datetime | None) -> str:
    with translated(f"find version {shown(ref)}", where):
        name, tilde, steps = ref.partition("~")
        if tilde and steps and not _STEPS.fullmatch(steps):
            raise NotFoundError(f"{shown(ref)} names no version", expected="for example HEAD~2")
        version = _resolve_name(repository, where, name)
        back = int(steps or 1) if tilde else 0
        for index, (snapshot, oldest) in enumerate(snapshots(repository, version)):
            if index < back:
                continue
            if as_of is None or of_snapshot(snapshot, oldest=oldest).time <= as_of:
                return str(snapshot.id)
    if as_of is not None:
        raise NotFoundError(f"no version of {ref!r} is as old as {as_of.isoformat()}")
    raise NotFoundError(
        f"{shown(name)} has fewer than {back} versions before it", remedy="`memtool log` lists them"
    )


def _resolve_name(repository: Any, where: str, name: str) -> str:
    if name in {"HEAD", MAIN, ""}:
        return str(repository.lookup_branch(MAIN))
    if name in list_refs(repository, where, "branch"):
        return str(repository.lookup_branch(name))
    if name in repository.list_tags():
        return str(repository.lookup_tag(name))
    prefix = name.upper()
    if is_version_id(prefix):
        return _whole_id(repository, where, prefix)
    found = set()
    if len(prefix) >= SHORTEST_PREFIX and is_version_id(prefix.ljust(20, "0")):
        found = {v for v in reachable(repository, where) if v.startswith(prefix)}
    if len(found) == 1:
        return found.pop()
    for kind, damaged in unreadable(where).damaged:
        # icechunk knows nothing of a tag that it cannot read.
        if not found and damaged == name:
            raise damaged_ref(kind, name)
    several = f"fits {len(found)} versions: {', '.join(sorted(found))}"
    raise NotFoundError(
        f"{shown(name)} {several if found else 'is no branch, tag or version'}",
        expected="HEAD, HEAD~2, a branch, a tag, or a version id (its first four letters or more)",
        remedy="`memtool log` lists the versions",
    )


def _whole_id(repository: Any, where: str, version: str) -> str:
    try:
        with translated(f"find version {version}", "the store"):
            snapshot = repository.lookup_snapshot(version)
    except (NotFoundError, IntegrityError) as error:
        if isinstance(error, IntegrityError) and "not found" not in error.found:
            raise _damaged(version, "a snapshot", error.found) from error
        if not is_expired(repository, where, version):
            raise _damaged(version, "a snapshot", "no file") from error
        raise VersionExpiredError(
            f"version {version} is not in the store: gc has expired it, or it never was",
            remedy="`memtool log` lists the versions",
        ) from error
    if snapshot.id != version or snapshot.parent_id is None:
        raise NotFoundError(f"no version {version}")
    return version


def is_expired(repository: Any, where: str, version: str) -> bool:
    """Whether a version whose snapshot is not there was taken by gc, and not lost.

    What gc takes, no branch or tag names, and its checksums go with it.
    """
    with translated("list the branches and tags", where):
        named = set(tips(repository, where).values())
    return version not in named and not (Path(where) / SUMS / version).exists()


def list_refs(repository: Any, where: str, kind: str) -> list[str]:
    """The names of the branches or the tags of a store, sorted; none that was never finished."""
    names = repository.list_tags() if kind == "tag" else repository.list_branches()
    half = unfinished(where)
    return sorted(check_ref(name, kind) for name in names if (kind, name) not in half)


def tips(repository: Any, where: str) -> dict[str, str]:
    """Every branch and tag with the version that it names, branches first."""
    branches = list_refs(repository, where, "branch")
    refs = {name: str(repository.lookup_branch(name)) for name in branches}
    for name in list_refs(repository, where, "tag"):
        refs.setdefault(name, str(repository.lookup_tag(name)))
    return refs


def reachable(repository: Any, where: str) -> dict[str, Version]:
    """Every version that some branch or tag leads to, newest first along each."""
    found: dict[str, Version] = {}
    for tip in tips(repository, where).values():
        for snapshot, oldest in snapshots(repository, tip):
            if snapshot.id in found:
                break
            found[snapshot.id] = of_snapshot(snapshot, oldest=oldest)
    return found
