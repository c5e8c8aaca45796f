"""The errors of the store: what was wrong, where, what was expected, and what helps.

StoreError
├── NotFoundError            no such store, version, adapter or blob        not-found
│   └── VersionExpiredError  a version that gc has taken away               version-expired
├── AlreadyExistsError       a store, name, tag or branch that is taken     already-exists
├── ConflictError            another writer committed first                 conflict
├── LockTimeoutError         another process holds the lock for too long    lock-timeout
├── IntegrityError           stored bytes are not what was written          integrity
├── SchemaError              a value or file that does not fit the schema   schema
│   └── NewerSchemaError     a store made by a newer memtool                newer-schema
├── SpaceMismatchError       another backbone, layout or shape              space-mismatch
├── ForkedProcessError       used in a forked child                         forked-process
├── ClockError               clocks that are too far apart for an order      clock
└── StorageError             the disk or the object store refused           storage

`code` never changes for a class; programs compare it instead of the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from memtool_stores.redacted import said


class StoreError(Exception):
    """Base of all errors that the store raises on purpose.

    `message` says what was wrong and where; `expected` what would have been right; `remedy` is the
    command or the change that helps; each is one printable line, whatever a file put into it, and
    none holds a secret, whatever the object store answered. `exit_status` is what the command line
    exits with.
    """

    code: ClassVar[str] = "store"
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


def _restored(kind: type[StoreError], args: tuple[Any, ...], told: Mapping[str, Any]) -> StoreError:
    error = kind.__new__(kind, *args)
    vars(error).update(told)
    return error


class NotFoundError(StoreError):
    """A store, version, adapter or blob that is not there."""

    code = "not-found"
    exit_status = 3


class VersionExpiredError(NotFoundError):
    """A version that `gc` has expired, or that never was."""

    code = "version-expired"


class AlreadyExistsError(StoreError):
    """A store, live adapter name, tag or branch that is taken."""

    code = "already-exists"
    exit_status = 4


class ConflictError(StoreError):
    """Another writer committed after this transaction began; nothing of it was stored."""

    code = "conflict"
    exit_status = 4


class LockTimeoutError(StoreError):
    """Another process held the lock of the store for longer than the timeout."""

    code = "lock-timeout"
    exit_status = 4


class IntegrityError(StoreError):
    """Stored bytes are not what was written.

    `what` is the kind of the damaged thing (values, keys, blob, catalog, version, branch, tag,
    store), `name` says which one, `found` what was read in its place.
    """

    code = "integrity"
    exit_status = 5

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


class SchemaError(StoreError):
    """A value, name or file that does not fit the schema of the store."""

    code = "schema"
    exit_status = 2


class NewerSchemaError(SchemaError):
    """The store was written by a newer memtool than this one can read."""

    code = "newer-schema"


class SpaceMismatchError(StoreError):
    """Another backbone, another adapter layout, or a value of another shape or type."""

    code = "space-mismatch"
    exit_status = 2


class ForkedProcessError(StoreError):
    """The store was used in a child made by fork, where its threads do not exist."""

    code = "forked-process"


class ClockError(StoreError):
    """The clocks of the machines that write to a store are too far apart; nothing was stored."""

    code = "clock"


class StorageError(StoreError):
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
