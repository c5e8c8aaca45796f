"""The versioned memory on disk: adapters in, any past version out, every byte checked.

>>> from memtool_stores import MemoryStore                      # doctest: +SKIP
>>> store = MemoryStore.open("memory")                          # doctest: +SKIP
>>> store.view("HEAD~2").adapters                               # doctest: +SKIP

Names are imported on first use: `import memtool_stores` loads neither numpy nor icechunk.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtool_stores.atoms import AtomBank
    from memtool_stores.catalog import AdapterRecord
    from memtool_stores.collect import GcReport
    from memtool_stores.diff import Diff
    from memtool_stores.errors import (
        AlreadyExistsError,
        BusyError,
        ChangedMeanwhileError,
        ClockError,
        ConflictError,
        CorruptError,
        ForkedProcessError,
        IntegrityError,
        LockTimeoutError,
        MemtoolError,
        MismatchError,
        NewerSchemaError,
        NotFoundError,
        SchemaError,
        SpaceMismatchError,
        StorageError,
        VersionExpiredError,
    )
    from memtool_stores.history import Version
    from memtool_stores.space import Backbone, Layout, Segment, Space
    from memtool_stores.store import MemoryStore
    from memtool_stores.transaction import Transaction
    from memtool_stores.verify import Damage, VerifyReport
    from memtool_stores.view import MemoryView

__all__ = [
    "AdapterRecord",
    "AlreadyExistsError",
    "AtomBank",
    "Backbone",
    "BusyError",
    "ChangedMeanwhileError",
    "ClockError",
    "ConflictError",
    "CorruptError",
    "Damage",
    "Diff",
    "ForkedProcessError",
    "GcReport",
    "IntegrityError",
    "Layout",
    "LockTimeoutError",
    "MemoryStore",
    "MemoryView",
    "MemtoolError",
    "MismatchError",
    "NewerSchemaError",
    "NotFoundError",
    "SchemaError",
    "Segment",
    "Space",
    "SpaceMismatchError",
    "StorageError",
    "Transaction",
    "VerifyReport",
    "Version",
    "VersionExpiredError",
]

_HOMES = {
    "AdapterRecord": "catalog",
    "AtomBank": "atoms",
    "GcReport": "collect",
    "Diff": "diff",
    "Version": "history",
    "Backbone": "space",
    "Layout": "space",
    "Segment": "space",
    "Space": "space",
    "MemoryStore": "store",
    "Transaction": "transaction",
    "Damage": "verify",
    "VerifyReport": "verify",
    "MemoryView": "view",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return list(__all__)
