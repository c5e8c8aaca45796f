"""The errors of all of memtool: what was wrong, where, what was expected, and what helps.

MemtoolError
├── NotFoundError              something that is not there                   not-found
│   └── VersionExpiredError    a version that gc has taken away              version-expired
├── AlreadyExistsError         something that is there, or a taken name      already-exists
├── BusyError                  another process works in the same place       busy
│   └── LockTimeoutError       it held the lock of the store for too long    lock-timeout
├── ChangedMeanwhileError      another process changed what this one read    changed-meanwhile
│   └── ConflictError          another writer committed first                conflict
├── CorruptError               bytes that are not what was written           corrupt
│   └── IntegrityError         those of a named part of a store              integrity
├── MismatchError              two parts that do not fit                     mismatch
│   └── SpaceMismatchError     another backbone, layout or shape             space-mismatch
├── SchemaError                a value or file that does not fit the schema  schema
│   └── NewerSchemaError       a store made by a newer memtool               newer-schema
├── ForkedProcessError         used in a forked child                        forked-process
├── ClockError                 clocks that are too far apart for an order    clock
└── StorageError               the disk or the object store refused          storage

`memtool.errors` adds what only the library raises. `code` never changes for a class; programs
compare it instead of the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from memtool_stores.redacted import said


class MemtoolError(Exception):
    """Base of all errors that the store and the library raise on purpose.

    `message` says what was wrong and where; `expected` what would have been right; `remedy` is the
    command or the change that helps; each is one printable line, whatever a file put into it, and
    none holds a secret, whatever the object store answered. `exit_status` is what the command line
    exits with.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(
        self, message: str, *, expected: str | None = None, remedy: str | None = None
    ) -> None:
        self.message = said(message)
        self.expected = None if expected is None else said(expected)
        self.remedy = None if remedy is None else said(remedy)
        super().__init__(self.message)

    def __str__(self) -> str:
        parts = [self.message]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.remedy:
            parts.append(f"try: {self.remedy}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """How it goes to another process: as what it says, whatever its constructor asks for."""
        return _restored, (type(self), self.args, vars(self))


def _restored(
    kind: type[MemtoolError], args: tuple[Any, ...], told: Mapping[str, Any]
) -> MemtoolError:
    error = kind.__new__(kind, *args)
    vars(error).update(told)
    return error


class NotFoundError(MemtoolError):
    """A store, version, adapter, blob, task, preset or file that is not there."""

    code = "not-found"
    exit_status = 3


class VersionExpiredError(NotFoundError):
    """A version that `gc` has expired, or that never was."""

    code = "version-expired"


class AlreadyExistsError(MemtoolError):
    """A name that is taken, or something that would be overwritten."""

    code = "already-exists"
    exit_status = 4


class BusyError(MemtoolError):
    """Another process works in the same place; nothing was begun."""

    code = "busy"
    exit_status = 4


class LockTimeoutError(BusyError):
    """Another process held the lock of the store for longer than the timeout."""

    code = "lock-timeout"


class ChangedMeanwhileError(MemtoolError):
    """Another process changed what this one was working on; nothing was stored."""

    code = "changed-meanwhile"
    exit_status = 4


class ConflictError(ChangedMeanwhileError):
    """Another writer committed after this transaction began; `store.run` runs it again."""

    code = "conflict"


class CorruptError(MemtoolError):
    """Bytes on disk are not what was written."""

    code = "corrupt"
    exit_status = 5


class IntegrityError(CorruptError):
    """A named part of a store is not what was written.

    `what` is the kind of the damaged thing (values, keys, blob, catalog, version, branch, tag,
    store), `name` says which one, `found` what was read in its place.
    """

    code = "integrity"

    def __init__(
        self, *, what: str, name: str, expected: str, found: str, remedy: str | None = None
    ) -> None:
        super().__init__(
            f"{what} {name!r} is damaged: found {found}",
            expected=expected,
            remedy=remedy or "`memtool verify`, then `memtool rollback` or a copy of the store",
        )
        self.what = what
        self.name = said(name)
        self.found = said(found)


class SchemaError(MemtoolError):
    """A value, name or file that does not fit the schema of the store."""

    code = "schema"
    exit_status = 2


class NewerSchemaError(SchemaError):
    """The store was written by a newer memtool than this one can read."""

    code = "newer-schema"


class MismatchError(MemtoolError):
    """Two parts do not fit together: shape, rank, layout or backbone."""

    code = "mismatch"
    exit_status = 2


class SpaceMismatchError(MismatchError):
    """A store has another backbone, another adapter layout, or values of another shape or type."""

    code = "space-mismatch"


class ForkedProcessError(MemtoolError):
    """The store was used in a child made by fork, where its threads do not exist."""

    code = "forked-process"


class ClockError(MemtoolError):
    """The clocks of the machines that write to a store are too far apart; nothing was stored."""

    code = "clock"


class StorageError(MemtoolError):
    """The disk or the object store refused. `transient` says whether a retry may help."""

    code = "storage"

    def __init__(
        self,
        message: str,
        *,
        transient: bool = False,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, expected=expected, remedy=remedy)
        self.transient = transient
