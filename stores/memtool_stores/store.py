"""The memory on disk: open it, change it in transactions, look at any version of it.

A commit is acknowledged only when it is on the disk, and no acknowledged commit is ever lost: the
lock of the store is held around every change of a branch or tag, and a transaction that began on an
older version is run again on the newer one, never merged blindly.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from memtool_stores import cache, clock, hub, references, room, sums
from memtool_stores.arrays import CRC32C_BYTES
from memtool_stores.bucket import (
    Pace,
    empty_repository,
    is_begun,
    lies_between,
    move_branch,
    outcome_unknown,
    settled,
)
from memtool_stores.bundle import read_bundle, write_bundle
from memtool_stores.catalog import Catalog, plain_json
from memtool_stores.collect import GcReport, collect
from memtool_stores.diff import Diff, diff
from memtool_stores.errors import (
    AlreadyExistsError,
    ConflictError,
    IntegrityError,
    LockTimeoutError,
    MemtoolError,
    NotFoundError,
    StorageError,
)
from memtool_stores.files import appearing_folders
from memtool_stores.history import (
    MAIN,
    Version,
    commit_metadata,
    list_refs,
    of_snapshot,
    resolve,
    snapshots,
)
from memtool_stores.ice import (
    create_repository,
    guard_fork,
    of_os_error,
    open_repository,
    sync_to_disk,
    translated,
)
from memtool_stores.index import Pages
from memtool_stores.leftovers import Leftover, find, find_in_store, take_away
from memtool_stores.migrate import SCHEMA_VERSION, BranchMigration, Migration
from memtool_stores.move import (
    CONTENT,
    REFERENCES,
    Forwarded,
    Tell,
    begun_copy,
    copy,
    require_empty,
)
from memtool_stores.names import below, check_ref
from memtool_stores.objects import Objects, Retractable, bucket_holds, objects_at
from memtool_stores.parts import payload
from memtool_stores.printable import shown
from memtool_stores.space import Space
from memtool_stores.transaction import Transaction
from memtool_stores.tree import Root, State, Tree, seal, sha256
from memtool_stores.verify import Level, VerifyReport, verify
from memtool_stores.view import MemoryView

PAGES = 1_000
"""Pages of the index of blobs that a store remembers for the next view, about 20 KB each.

Of more of them the leaves are forgotten first: the others lead to many.
"""

TRIES = 10
"""How often `run` runs a function at most; the last time with the lock held, so that it wins."""

Result = TypeVar("Result")


class MemoryStore:
    """A versioned memory of adapters: a directory, or `s3://bucket/prefix`.

    `hf://user/name` is one to read: a repository of the Hugging Face Hub, brought to a directory.

    One handle may be used by one process; a forked child must not touch it (ForkedProcessError).
    """

    def __init__(self, url: str, repository: Any, *, lock_timeout: float) -> None:
        """Use `create` or `open`."""
        self.url = url
        self._repository = repository
        self._lock_timeout = lock_timeout
        self._catalog = Catalog()
        self._pages: Pages = {}
        self._filelock: Any = None
        self._place = _place(url)

    def __repr__(self) -> str:
        return f"MemoryStore.open({self.address!r})"

    @property
    def address(self) -> str:
        """What it was opened as: `hf://user/name` for a copy of a repository, else the url."""
        return hub.address_of(self.url) or self.url

    # Opening

    @classmethod
    def create(
        cls,
        url: str | Path,
        space: Space,
        *,
        lock_timeout: float = 30.0,
        first: Callable[[MemoryStore], object] | None = None,
    ) -> MemoryStore:
        """A new store; all of it appears at once, with what `first` commits to it.

        Where `first` raises an error nothing is left; in a bucket an empty store is.

        Raises:
            AlreadyExistsError: there is a store, or a folder with something in it.
            StorageError: no permission, or no room.
        """
        from ulid import ULID

        url = _to_write(url)
        if cls.exists(url):
            raise AlreadyExistsError(
                f"there is a store at {url} already", remedy="open it, or choose another path"
            )
        root = Root(str(ULID()), space, State())
        if not _is_local(url):
            cls._create_repository(url, root)
            made = cls.open(url, lock_timeout=lock_timeout)
            if first is not None:
                first(made)
            return made
        with _appearing(Path(url)) as folder:
            cls._create_repository(str(folder), root)
            references.mark_all(str(folder))
            room.try_to_keep_reserve(str(folder))
            (folder / "lock").touch()
            if first is not None:
                first(cls.open(folder, lock_timeout=lock_timeout))
            sync_to_disk(folder)
        return cls.open(url, lock_timeout=lock_timeout)

    @staticmethod
    def _create_repository(url: str, root: Root) -> None:
        doing = "create the store"
        with translated(doing, url):
            repository = create_repository(url) if _is_local(url) else empty_repository(url)
            session = repository.writable_session(MAIN)
            base = str(session.snapshot_id)
            tree = Tree.create(session, root)
            message = "create the memory"
            metadata = _sealed(tree, parent=base, message=message, user="{}")
            version = session.flush(message, metadata=metadata)
            sums.write(url, repository, version)
        try:
            move_branch(url, repository, doing, MAIN, base, version)
        except ConflictError as error:
            raise AlreadyExistsError(
                f"another process made a store at {url} meanwhile", remedy="open it"
            ) from error

    @classmethod
    def open(cls, url: str | Path, *, lock_timeout: float = 30.0) -> MemoryStore:
        """The store at `url`. `lock_timeout` is how many seconds a writer waits for another.

        A reader waits as long for another that builds the same file of the cache, then does
        without the file.

        Raises:
            NotFoundError: no store is there.
            NewerSchemaError: only a newer memtool reads it.
            IntegrityError: the file of its branch main is damaged.
        """
        guard_fork()
        url = _plain(url)
        if not cls.exists(url):
            there = "nothing is there"
            if _is_local(url):
                there = "no such folder" if not Path(url).exists() else "it is not a store"
            remedy = "memtool write makes one, from adapters of memtool train-adapter"
            if _is_local(url) and Path(url).is_file():
                remedy = f"memtool import {url} --store DIR, if it is a bundle"
            raise NotFoundError(f"no store at {url}: {there}", remedy=remedy)
        store = cls(url, open_repository(url), lock_timeout=lock_timeout)
        # A damaged newest version says so when it is read; older ones can be, and rolled back to.
        with suppress(IntegrityError):
            store._check_schema()
        return store

    @classmethod
    def exists(cls, url: str | Path) -> bool:
        """Whether there is a store at `url`."""
        url = _plain(url)
        if _is_local(url):
            return (Path(url) / "ice" / "refs").is_dir()
        # Not by icechunk, which waits for minutes where nobody answers.
        return bucket_holds(url, "ice/refs") and not is_begun(url)

    def _check_schema(self) -> None:
        self._view(self.head()).space  # noqa: B018

    # Reading

    @property
    def space(self) -> Space:
        """Backbone and layout of everything in the store."""
        return self._view(self.head()).space

    def head(self) -> str:
        """Id of the newest version of main."""
        guard_fork()
        self._require_place()
        with translated("find the newest version", self.url):
            return str(self._repository.lookup_branch(MAIN))

    def view(self, ref: str = MAIN, *, as_of: datetime | None = None) -> MemoryView:
        """The version that `ref` names: `HEAD`, `HEAD~2`, a branch, a tag, an id or its beginning.

        With `as_of` (aware), the newest version on the line of `ref` that is not younger.

        Raises:
            NotFoundError: there is none.
            VersionExpiredError: an id that gc has expired, or that never was.
        """
        guard_fork()
        return self._view(self._resolve(ref, as_of))

    def _resolve(self, ref: str, as_of: datetime | None = None) -> str:
        guard_fork()
        self._require_place()
        return resolve(self._repository, self.url, ref, as_of)

    def _view(self, version: str) -> MemoryView:
        if len(self._pages) > PAGES:  # views have theirs
            inner = {where: page for where, page in [*self._pages.items()] if page.pages}
            self._pages = inner if len(inner) <= PAGES else {}
        return MemoryView(
            self._repository,
            self.url,
            version,
            self._newest_catalog,
            self._lock_timeout,
            self._pages,
        )

    def _newest_catalog(self, catalog: Catalog | None) -> Catalog:
        """The longest catalog parsed so far: a view extends it, or replaces it by its own."""
        if catalog is not None:
            self._catalog = catalog
        return self._catalog

    def log(self, ref: str = MAIN, limit: int | None = None) -> list[Version]:
        """The versions from `ref` back, newest first, at most `limit`.

        Raises:
            IntegrityError: one of them is damaged.
        """
        version = self._resolve(ref)
        with translated("read the history", self.url):
            line = snapshots(self._repository, version)
            picked = (
                line if limit is None else (x for x, _ in zip(line, range(limit), strict=False))
            )
            versions = []
            for snapshot, oldest in picked:
                sums.check_snapshot(self.url, snapshot.id)
                versions.append(of_snapshot(snapshot, oldest=oldest))
            return versions

    def diff(self, a: str, b: str = MAIN) -> Diff:
        """What changed from version `a` to version `b`."""
        return diff(self.view(a), self.view(b))

    def export(self, id_or_name: str, ref: str = MAIN) -> bytes:
        """One adapter as the bytes of a safetensors file; see `MemoryView.export`."""
        return self.view(ref).export(id_or_name)

    # Writing

    @contextmanager
    def transaction(
        self, message: str, metadata: Mapping[str, Any] | None = None, *, branch: str = MAIN
    ) -> Iterator[Transaction]:
        """One commit of everything done to the transaction inside the block.

        An error inside stores nothing; a block that did nothing makes no version.

        Raises:
            ConflictError: another writer committed meanwhile; nothing was stored.
            LockTimeoutError, StorageError: likewise nothing was stored.
        """
        transaction = self._begin(branch)
        yield transaction
        self._commit(transaction, message, metadata, branch)

    def run(
        self,
        function: Callable[[Transaction], Result],
        message: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        branch: str = MAIN,
    ) -> Result:
        """Commit what `function` does to a transaction; what it returns.

        When another writer commits first, all is thrown away and the function runs again on the
        newer version: it must have no other effect than on its transaction. After `TRIES - 1`
        conflicts the lock is taken before the function, so that the last try cannot lose. In a
        bucket there is no lock; there it is run again until it wins.

        Raises:
            LockTimeoutError, StorageError: nothing was stored, or the error says that it is not
                known: in a bucket that did not answer for as long as the lock timeout.
        """
        if not _is_local(self.url):
            return self._run_without_lock(function, message, metadata, branch)
        for number in range(1, TRIES):
            try:
                return self._once(function, message, metadata, branch)
            except ConflictError:
                time.sleep(random.uniform(0, 0.002 * 2**number))
        with self._lock():
            return self._once(function, message, metadata, branch)

    def _once(
        self,
        function: Callable[[Transaction], Result],
        message: str,
        metadata: Mapping[str, Any] | None,
        branch: str,
    ) -> Result:
        transaction = self._begin(branch)
        result = function(transaction)
        self._commit(transaction, message, metadata, branch)
        return result

    def _run_without_lock(
        self,
        function: Callable[[Transaction], Result],
        message: str,
        metadata: Mapping[str, Any] | None,
        branch: str,
    ) -> Result:
        pace = Pace(self._lock_timeout)
        open_tries: list[tuple[Transaction, Result]] = []
        while True:
            try:
                transaction = self._begin(branch)
                base = transaction.base.version
                for earlier, result in open_tries:
                    if self._took(earlier, base):
                        return result
                # No branch that has moved on takes what was written for it before.
                open_tries = [pair for pair in open_tries if pair[0].base.version == base]
                result = function(transaction)
                open_tries.append((transaction, result))
                self._commit(transaction, message, metadata, branch)
                return result
            except (ConflictError, StorageError) as error:
                if not pace.is_over(error):
                    pace.wait()
                elif any(earlier.written for earlier, _ in open_tries):
                    raise outcome_unknown(error) from error
                else:
                    raise

    def _took(self, transaction: Transaction, tip: str) -> bool:
        """Whether the branch with this tip took what the transaction wrote, which is then done."""
        version, base = transaction.written, transaction.base.version
        if version is None or not lies_between(self._repository, base, tip, version):
            return False
        self._done(transaction, version)
        return True

    def _done(self, transaction: Transaction, version: str) -> None:
        transaction.version = version
        if transaction.purges:
            cache.drop(transaction.base.store_id)

    def _begin(self, branch: str) -> Transaction:
        guard_fork()
        check_ref(branch, "branch")
        self._require_place()
        self._require_writable("commit")
        with translated(f"find branch {branch!r}", self.url):
            version = str(self._repository.lookup_branch(branch))
        return Transaction(self._view(version))

    def _commit(
        self,
        transaction: Transaction,
        message: str,
        metadata: Mapping[str, Any] | None,
        branch: str,
    ) -> None:
        if not transaction.changed:
            return
        user = json.dumps(plain_json(metadata or {}, "the metadata of a commit"), sort_keys=True)
        doing = f"commit {message!r}"
        base = transaction.base.version
        self._await_clock(base, branch, doing)
        with self._lock(), translated(doing, self.url):
            session = self._repository.writable_session(branch)
            if session.snapshot_id != base:
                raise ConflictError(
                    f"could not {doing}: another writer committed to {self.url} first; "
                    "nothing was stored",
                    remedy="run it again, or use store.run(function, message)",
                )
            self._check_room(doing, transaction.nbytes + room.COMMIT_BYTES)
            tree = Tree(session, write=True)
            _, catalog = transaction.write(tree)
            sealed = _sealed(tree, parent=base, message=message, user=user)
            version = transaction.written = str(session.flush(message, metadata=sealed))
            if _is_local(self.url):
                sums.write(self.url, self._repository, version)
                self._sync()
            try:
                move_branch(self.url, self._repository, doing, branch, base, version)
            except ConflictError:
                transaction.written = None
                raise
            if _is_local(self.url):
                self._sync()
                self._check_branch(branch, version)
        self._catalog = catalog
        self._done(transaction, version)

    def _check_branch(self, branch: str, version: str) -> None:
        found = str(self._repository.lookup_branch(branch))
        if found != version:
            raise StorageError(
                f"branch {branch!r} of {self.url} is at {found} after a commit of {version}: "
                "something changes the store without its lock"
            )

    def _await_clock(self, base: str, branch: str, doing: str) -> None:
        """Return when the clock of this machine is past the version that comes before a commit."""
        with translated(doing, self.url):
            moment = self._repository.lookup_snapshot(base).written_at
            clock.wait_until_after(
                moment,
                f"version {base}",
                doing,
                self.url,
                # Then the commit is a conflict, and there is nothing to wait for.
                lambda: str(self._repository.lookup_branch(branch)) != base,
            )

    def _check_room(self, doing: str, nbytes: int, files: int = 1) -> None:
        if _is_local(self.url):
            room.require(self.url, doing, nbytes, files)

    def _sync(self) -> None:
        if _is_local(self.url):
            sync_to_disk(Path(self.url) / "ice")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The kernel lock of the store; free again when its holder dies. None on object stores."""
        guard_fork()
        self._require_writable("change it")
        if not _is_local(self.url):
            yield
            return
        import filelock

        self._require_place()
        if self._filelock is None:
            self._filelock = filelock.FileLock(
                Path(self.url) / "lock", timeout=self._lock_timeout, poll_interval=0.005
            )
        try:
            self._filelock.acquire()
        except filelock.Timeout as error:
            raise LockTimeoutError(
                f"another process has held the lock of {self.url} for more than "
                f"{self._lock_timeout:g} seconds; nothing was stored",
                remedy="wait for it to end, or wait longer with --lock-timeout SECONDS",
            ) from error
        except OSError as error:
            raise of_os_error(error, "lock the store", self.url) from error
        try:
            self._require_place()
            yield
        finally:
            self._filelock.release()

    @contextmanager
    def _still(self) -> Iterator[None]:
        """While all files are read nobody writes; a copy of a repository never changes."""
        if hub.address_of(self.url) is not None:
            yield
            return
        with self._lock():
            yield

    def _require_writable(self, doing: str) -> None:
        """Raise StorageError for a copy of a repository."""
        address = hub.address_of(self.url)
        if address is not None:
            name = hub.repository_of(address)
            raise StorageError(
                f"could not {doing}: {address} can be read, not written to",
                remedy=f"memtool pull {name} --store DIR, and after the change memtool push {name}",
            )

    def _require_place(self) -> None:
        """Nothing, while the store that was opened is where it was.

        Raises:
            NotFoundError: it was moved or deleted, and perhaps another one put in its place.
        """
        found = _place(self.url)
        if found != self._place:
            there = "nothing is there" if found is None else "another store is there"
            raise NotFoundError(
                f"the store that was opened at {self.url} was moved or deleted: {there} now",
                remedy="open it where it is",
            )

    # Names of versions

    def tag(self, name: str, ref: str = MAIN) -> str:
        """Give a version a name that never moves; its id.

        Raises:
            AlreadyExistsError: the name is taken, or was used before.
        """
        return self._name(name, ref, "tag")

    def branch(self, name: str, ref: str = MAIN) -> str:
        """Begin a branch at a version; its id.

        Raises:
            AlreadyExistsError: the name is taken.
        """
        return self._name(name, ref, "branch")

    def _name(self, name: str, ref: str, kind: str) -> str:
        check_ref(name, kind)
        with self._lock():
            version = self._resolve(ref)
            for taken, known in (("branch", self.branches()), ("tag", self.tags())):
                if name in known:
                    raise self._taken(name, taken, known[name], version, kind)
            self._make_reference(kind, name, version, f"make {kind} {name!r}")
            self._sync()
        return version

    def _make_reference(self, kind: str, name: str, version: str, doing: str) -> None:
        self._check_room(doing, room.REFERENCE_BYTES, room.REFERENCE_FILES)
        look = self._repository.lookup_tag if kind == "tag" else self._repository.lookup_branch
        try:
            with settled(self.url, doing, lambda: str(look(name)) == version):
                references.make(self.url, self._repository, kind, name, version, doing)
        except ConflictError as error:
            raise AlreadyExistsError(f"{name!r} is a tag or branch already") from error

    def _taken(
        self, name: str, taken: str, points_to: str, version: str, kind: str
    ) -> AlreadyExistsError:
        """What is said where a name is a tag or a branch already: of which version, what to do."""
        there = self.log(points_to, 1)[0]
        when = there.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        here = ", the same" if points_to == version else f", and not at {version}"
        others = {*self.branches(), *self.tags()}
        free = next(n for k in itertools.count(2) if (n := f"{name}-{k}") not in others)
        tag = "a tag never moves, and a name that was one is not given again"
        rule = tag if taken == "tag" else "a branch moves by commits alone"
        return AlreadyExistsError(
            f"{name!r} is a {taken} already, at {points_to} ({there.message}, {when}){here}",
            expected=f"another name: {rule}",
            remedy=f"memtool tag {free} {version}" if kind == "tag" else f"the name {free!r}",
        )

    def tags(self) -> dict[str, str]:
        """The version id of every tag, by name."""
        guard_fork()
        with translated("list the tags", self.url):
            self._refuse_damaged("tag")
            names = list_refs(self._repository, self.url, "tag")
            return {name: str(self._repository.lookup_tag(name)) for name in names}

    def branches(self) -> dict[str, str]:
        """The version id of the tip of every branch, by name."""
        guard_fork()
        with translated("list the branches", self.url):
            self._refuse_damaged("branch")
            names = list_refs(self._repository, self.url, "branch")
            return {name: str(self._repository.lookup_branch(name)) for name in names}

    def _refuse_damaged(self, kind: str) -> None:
        for damaged, name in references.unreadable(self.url).damaged:
            if damaged == kind:
                raise references.damaged_ref(kind, name)

    def delete_tag(self, name: str) -> None:
        """Take a tag away; its name cannot be used again.

        Raises:
            NotFoundError: there is none.
        """
        with self._lock():
            if name not in self._repository.list_tags():
                raise NotFoundError(f"no tag {name!r} in {self.url}")
            doing = f"delete tag {name!r}"
            gone = lambda: name not in self._repository.list_tags()  # noqa: E731
            with settled(self.url, doing, gone), translated(doing, self.url):
                references.unmark(self.url, "tag", name)
                self._repository.delete_tag(name)
            self._sync()

    def delete_branch(self, name: str) -> None:
        """Take a branch away; the next gc takes the versions that only it led to.

        Raises:
            NotFoundError: there is none, or it is main.
        """
        with self._lock():
            if name == MAIN or name not in self.branches():
                raise NotFoundError(f"no branch {name!r} that could be deleted in {self.url}")
            doing = f"delete branch {name!r}"
            gone = lambda: name not in self._repository.list_branches()  # noqa: E731
            with settled(self.url, doing, gone), translated(doing, self.url):
                references.unmark(self.url, "branch", name)
                self._repository.delete_branch(name)
                if _is_local(self.url):
                    # Left there it would look like a branch that was never finished.
                    below(Path(self.url) / "ice" / "refs", f"branch.{name}").rmdir()
                elif not gone():
                    # icechunk does not say when a bucket did not answer to a deletion.
                    raise StorageError(f"could not {doing}: no answer", transient=True)
            self._sync()

    def rollback(self, to: str) -> str:
        """Make an older version the newest of main again; the branch that keeps what was.

        What was is not kept, and the name is empty, when its newest version is damaged.

        Raises:
            NotFoundError: there is no such version.
        """
        with self._lock():
            head, target = self.head(), self._resolve(to)
            taken = self._repository.list_branches()
            stem = f"backup-{datetime.now(UTC):%Y%m%d-%H%M%S}-{head[:6].lower()}"
            backup, number = stem, 2
            while backup in taken:
                backup, number = f"{stem}-{number}", number + 1
            doing = f"roll back to {to!r}"
            try:
                with translated(doing, self.url):
                    self._repository.lookup_snapshot(head)
            except (IntegrityError, NotFoundError):
                backup = ""  # a damaged version can be left, but not kept
            if backup:
                self._make_reference("branch", backup, head, doing)
            self._sync()
            try:
                move_branch(self.url, self._repository, doing, MAIN, head, target)
            except MemtoolError as error:
                # Where nobody can say whether main moved, the backup stays.
                with suppress(MemtoolError):
                    if backup and (isinstance(error, ConflictError) or self.head() == head):
                        self.delete_branch(backup)
                raise
            self._sync()
        return backup

    def migrate(
        self,
        *,
        dry_run: bool = False,
        metadata: Callable[[str], Mapping[str, Any]] | None = None,
    ) -> Migration:
        """Bring the tip of every branch to the schema that this code writes, by a commit on each.

        Older versions stay as they were written, and are read. `metadata` gives what the commit on
        a branch says of itself. With `dry_run` nothing is changed.

        Raises:
            NewerSchemaError: a branch holds what only a newer memtool reads.
            ConflictError, LockTimeoutError, StorageError: that branch is as it was; those before it
                in the order of names, main first, are done.
        """
        listed = list(objects_at(self.url).list())
        found = []
        for name in sorted(self.branches(), key=lambda name: (name != MAIN, name)):
            view = self.view(name)
            tip = BranchMigration(
                name, view.version, view.schema, view.state.rows, view.state.index.count
            )
            if tip.needed and not dry_run:
                message = f"migrate from schema {tip.schema} to {SCHEMA_VERSION}"
                self.run(
                    lambda txn: txn.migrate(), message, metadata and metadata(name), branch=name
                )
                tip = replace(tip, committed=self.view(name).version)
            found.append(tip)
        return Migration(tuple(found), len(listed), sum(entry.nbytes for entry in listed))

    # Care

    def verify(self, level: Level = "full") -> VerifyReport:
        """Whether everything is as it was written; see verify.py for the levels.

        Raises:
            NewerSchemaError: a branch holds what only a newer memtool reads.
        """
        guard_fork()
        return verify(self.url, level)

    def gc(
        self,
        *,
        keep_last: int | None = None,
        keep_days: float | None = None,
        dry_run: bool = False,
    ) -> GcReport:
        """Expire old versions and free what nothing needs; tips of branches and tags stay.

        `keep_last` counts versions of main, `keep_days` is an age, back from the newest version or
        from this clock's time, whichever is earlier; with both, a version stays that
        either keeps; with none, only files of no version go. Readers of an expired version get
        VersionExpiredError.
        """
        with self._lock():
            if _is_local(self.url) and not dry_run:
                references.try_to_mark_all(self.url)
            left = self._leftovers()
            if not dry_run:
                left = take_away(left)  # first: a full disk needs the room
            report = collect(
                self.url,
                local=_is_local(self.url),
                keep_last=keep_last,
                keep_days=keep_days,
                dry_run=dry_run,
            )
            if _is_local(self.url):
                room.try_to_keep_reserve(self.url)
            if not dry_run:
                self._sync()
                self._repository = open_repository(self.url)
                head = self._view(self.head())
                if report.expired and head.state.purged:
                    # A reader of an expired version may have built a file with a purged row in it.
                    cache.drop(head.store_id)
        return replace(report, leftovers=tuple(left))

    def _leftovers(self) -> list[Leftover]:
        """What killed processes left in the store, whose lock is held, beside it and in its cache.

        In the store nobody else is at work; elsewhere whoever has written within the hour may be.
        """
        found = []
        if _is_local(self.url):
            found = find_in_store(Path(self.url))
            found += (one for one in find(Path(self.url).parent, below=False) if one.is_old)
        with suppress(MemtoolError):  # a damaged newest version does not say whose cache it is
            place = cache.folder(self._view(self.head()).store_id)
            found += (one for one in find(place) if one.is_old)
        return found

    def holders(self, id: str) -> list[str]:
        """Tags and branches, other than main, that keep the bytes of this row from gc, sorted.

        Each names a version in which the row still has its bytes, or leads to one that is none of
        main's. Older versions of main are no reason: `gc(keep_last=1)` takes them.
        """
        with translated("read the history", self.url):
            on_main = {s.id for s, _ in snapshots(self._repository, self.head())}
            refs = {**self.branches(), **self.tags()}
            has: dict[str, bool] = {}

            def has_bytes(version: str) -> bool:
                if version not in has:
                    record = self._view(version).catalog.by_id(id)
                    has[version] = record is not None and record.state != "purged"
                return has[version]

            found = []
            for name in sorted(refs.keys() - {MAIN}):
                line = (s.id for s, _ in snapshots(self._repository, refs[name]))
                if any(has_bytes(v) for v in line if v == refs[name] or v not in on_main):
                    found.append(name)
            return found

    def find_bytes(self, sha256s: Collection[str]) -> dict[str, list[str]]:
        """Where bytes of these hashes lie: hash to paths inside the store, found ones only.

        Every stored object is read, whatever version it belongs to or whether it belongs to any,
        and hashed whole, without its last four bytes (the crc32c after a chunk), and without what
        frames a part (see parts.py). For the hash of a row, or of a blob of one part (4 MiB), an
        empty answer proves that its bytes are gone. A ragged row of several chunks lies in as many
        objects: they are found by the pieces of its record, which the catalog of a branch or tag
        must have, or which the caller gives instead (`AdapterRecord.pieces`).

        Raises:
            IntegrityError: a catalog is damaged.
            StorageError: an object could not be read.
        """
        guard_fork()
        wanted = self._stored_as(set(sha256s))
        found: dict[str, list[str]] = {}
        with self._still():
            objects = objects_at(self.url)
            for entry in objects.list():
                data = objects.read(entry.path)
                hashes = {sha256(data), sha256(data[:-CRC32C_BYTES]), sha256(payload(data))}
                for digest in hashes & wanted.keys():
                    for asked in wanted[digest]:
                        found.setdefault(asked, []).append(entry.path)
        return {digest: sorted(found[digest]) for digest in sorted(found)}

    def _stored_as(self, asked: set[str]) -> dict[str, set[str]]:
        """By the hash of an object, which of those asked for it holds bytes of."""
        # A row without bytes lies nowhere, though there are empty files.
        stored = {digest: {digest} for digest in asked if digest != sha256(b"")}
        for version in {*self.branches().values(), *self.tags().values()}:
            for record in self._view(version).catalog.records.values():
                if record.sha256 in asked:
                    for piece in record.pieces:
                        stored.setdefault(piece, set()).add(record.sha256)
        return stored

    def clone(
        self, url: str | Path, tell: Tell | None = None, *, resume: bool = False
    ) -> MemoryStore:
        """A copy with all versions in another directory or bucket; it appears all at once.

        `tell` is called with the files copied so far and their number. A copy that fails takes back
        what it wrote. With `resume`, a copy to a bucket goes on with what one that was killed left
        there, and when it fails it leaves that, too.

        Raises:
            AlreadyExistsError: something is there.
            StorageError: no permission, or no room.
        """
        target = _to_write(url)
        with self._still():
            files = objects_at(self.url)
            with _new_place(target, begun_by=files if resume else None) as (place, there):
                # A bucket checks its own bytes: checksums are of no use there, and commits in it
                # make none.
                checksums = _is_local(self.url) and _is_local(target)
                copy(files, place, tell, checksums=checksums, there=there)
        return MemoryStore.open(target, lock_timeout=self._lock_timeout)

    def forward_to(self, newer: MemoryStore, tell: Tell | None = None) -> Forwarded:
        """Take up what another copy of this store has beyond it, and say what that was.

        The history here is a beginning of that there, branch by branch, and tags of one name are
        the same. Files come first and references last, so that a process that is killed, and one
        that reads meanwhile, has the versions from before. A tag that was deleted here stays so.

        Raises:
            AlreadyExistsError: this is another store, or has versions or tags that are not there;
                nothing has changed.
            StorageError: no permission, or no room; or this store is in a bucket, of which nobody
                can hold the lock.
        """
        if not _is_local(self.url):
            raise StorageError(
                f"{self.url} is there, and a store in a bucket is not brought up to date",
                expected="a directory, or a bucket with nothing in it",
                remedy="another place",
            )
        with self._lock():
            self._require_beginning_of(newer)
            theirs, ours = objects_at(newer.url), objects_at(self.url)
            gone, branches = references.deleted_tags(self.url), self.branches()
            moved = [name for name, tip in newer.branches().items() if branches.get(name) != tip]
            tags = newer.tags().keys() - self.tags().keys()
            named = sorted(tags - gone)
            if moved or named:
                place = Path(self.url)
                there = _whole_files(theirs, ours) | {
                    references.file_of("tag", tag) for tag in gone
                }
                copy(theirs, ours, tell, there=there, settle=lambda: sync_to_disk(place))
                sync_to_disk(place)
                references.mark_new(self.url)
            return Forwarded(tuple(sorted(moved)), tuple(named), tuple(sorted(tags & gone)))

    def _require_beginning_of(self, newer: MemoryStore) -> None:
        """Raise AlreadyExistsError unless `newer` has all the versions and tags that are here."""
        other = f"{self.url} is there, and {{}}; nothing has changed"
        ways = {
            "expected": "the same memory, with nothing that the newer copy has not",
            "remedy": "another place, and `memtool merge` of what is new in one of the two",
        }
        if self.view().store_id != newer.view().store_id:
            raise AlreadyExistsError(other.format("is another memory"), **ways)
        tips = newer.branches()
        for name, version in self.branches().items():
            if name not in tips:
                words = f"its branch {name} is not in {newer.address}"
                raise AlreadyExistsError(other.format(words), **ways)
            if version not in {one.id for one in newer.log(tips[name])}:
                words = f"its {'HEAD' if name == MAIN else f'branch {name}'} is not in the history"
                raise AlreadyExistsError(other.format(f"{words} of {newer.address}"), **ways)
        tags = newer.tags()
        for name, version in self.tags().items():
            if name not in tags:
                words = f"its tag {name} is not in {newer.address}, or was taken away there"
                raise AlreadyExistsError(other.format(words), **ways)
            if tags[name] != version:
                words = f"its tag {name} names another version than in {newer.address}"
                raise AlreadyExistsError(other.format(words), **ways)

    def bundle(self, file: str | Path) -> int:
        """Write the whole store as one file; its size in bytes. `from_bundle` reads it.

        Raises:
            AlreadyExistsError: there is such a file.
            StorageError: no permission, or no room.
        """
        head = self.view()
        head.require_readable()
        about = {"store_id": head.store_id, "head": head.version, "adapters": len(head)}
        with self._still():
            files = objects_at(self.url)
            return write_bundle(files, Path(file), about, checksums=_is_local(self.url))

    @classmethod
    def from_bundle(
        cls,
        file: str | Path,
        url: str | Path,
        tell: Tell | None = None,
        *,
        lock_timeout: float = 30.0,
    ) -> MemoryStore:
        """The store of a bundle, in a new directory or bucket; every file is checked on the way.

        Raises:
            AlreadyExistsError: something is there.
            IntegrityError: the bundle is damaged; nothing is made.
            SchemaError: it is no bundle.
        """
        target = _to_write(url)
        with _new_place(target) as (place, _):
            read_bundle(Path(file), place, tell, checksums=_is_local(target))
        return cls.open(target, lock_timeout=lock_timeout)


def _sealed(tree: Tree, *, parent: str, message: str, user: str) -> dict[str, Any]:
    """The metadata of a commit, with the seal over it and over the attributes of the tree."""
    moment = clock.now().isoformat()
    value = seal(tree.attributes, parent=parent, time=moment, message=message, user=user)
    return commit_metadata(parent=parent, time=moment, user=user, seal=value)


def _plain(url: str | Path) -> str:
    """The url as text: absolute and without `~` for a directory."""
    text = os.fspath(url)
    if text.startswith("s3:/"):
        # A bucket and names between single slashes: clients disagree on all else. A Path that was
        # made of a url has lost a slash.
        if not re.fullmatch(r"s3:/(/(?!\.{1,2}(/|$))[^/]+)+/?", text):
            raise StorageError(f"cannot keep a store at {text}", expected="s3://bucket/prefix")
        return text.rstrip("/")
    if hub.is_hub(text):
        return hub.copy_of(text)
    if "://" in text and not text.startswith("file://"):
        raise StorageError(
            f"cannot keep a store at {text}", expected="a directory, s3://… or, to read, hf://…"
        )
    try:
        folder = Path(text.removeprefix("file://")).expanduser()
    except (RuntimeError, ValueError) as error:  # ValueError: a name with NUL
        raise StorageError(
            f"cannot keep a store at {text}: there is no such user",
            expected="~ for your own home, or the name of a user of this machine",
            remedy="write the path out, or ./~ for a folder of that name",
        ) from error
    if "\0" in text:
        raise StorageError(f"cannot keep a store at {shown(text)}", expected="a path without NUL")
    return str(folder.absolute())


def _to_write(url: str | Path) -> str:
    """As `_plain`, of a place that is to be written to.

    Raises:
        StorageError: it is a repository of the hub.
    """
    text = os.fspath(url)
    if hub.is_hub(text):
        name = hub.repository_of(text)
        raise StorageError(
            f"a store at {hub.SCHEME}{name} can be read, not written to",
            expected="a directory or s3://…",
            remedy=f"memtool push {name} publishes a memory there",
        )
    return _plain(text)


def _is_local(url: str) -> bool:
    return not url.startswith("s3://")


def _place(url: str) -> tuple[int, int] | None:
    """What tells the files of a store in a directory from all others, wherever links lead."""
    if not _is_local(url):
        return None
    try:
        found = (Path(url) / "ice").stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise of_os_error(error, "look at the store", url) from error
    return found.st_dev, found.st_ino


@contextmanager
def _new_place(
    url: str, *, begun_by: Objects | None = None
) -> Iterator[tuple[Objects, frozenset[str]]]:
    """Where a copy goes. It appears when the block ends well and its heads hold, else nothing does.

    In a bucket the copy is no store until its references, the last files, are there; a process that
    is killed before leaves the other files. With `begun_by`, the source, those that a copy of it
    left are the second that is given, and what is copied to them stays when the block fails.
    """
    if _is_local(url):
        with _appearing(Path(url)) as folder:
            yield objects_at(str(folder)), frozenset()
            _require_heads(str(folder))
            references.mark_all(str(folder))
            room.try_to_keep_reserve(str(folder))
            (folder / "lock").touch()
            sync_to_disk(folder)
    else:
        place = Retractable(objects_at(url))
        there: frozenset[str] = frozenset()
        if begun_by is None:
            require_empty(place, url)
        else:
            there = begun_copy(begun_by, place, url)
        try:
            yield place, there
            _require_heads(url)
        except BaseException:
            place.take_back("" if begun_by is None else REFERENCES)
            raise


def _whole_files(theirs: Objects, ours: Objects) -> frozenset[str]:
    """Files that need not be copied from another copy: none of another length, and no reference."""
    sizes = {entry.path: entry.nbytes for entry in theirs.list(CONTENT.rstrip("/"))}
    return frozenset(
        entry.path
        for entry in ours.list()
        if not entry.path.startswith(REFERENCES)
        and entry.nbytes == sizes.get(entry.path, entry.nbytes)
    )


def _require_heads(url: str) -> None:
    report = verify(url, "heads")
    for unread in report.unchecked:
        raise StorageError(f"the copy, which was not kept, could not be checked: {unread.why}")
    for damage in report.damages:
        raise IntegrityError(
            what=damage.what,
            name=damage.name,
            expected=damage.expected,
            found=f"{damage.found} in the copy, which was not kept",
            remedy="`memtool verify` of what was copied",
        )
    # What a catalog says is no damage, and may still be what nobody should take in.
    copied = MemoryStore.open(url)
    for ref in (*copied.branches(), *copied.tags()):
        copied.view(ref).require_readable()


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it when the block ends well, else is gone."""
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise AlreadyExistsError(f"{target} is there and not empty", remedy="another path")
        with appearing_folders(target) as (folder,):
            yield folder
        sync_to_disk(target.parent)
    except OSError as error:
        raise of_os_error(error, "create the store", str(target)) from error
