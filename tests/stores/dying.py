"""A process that does one thing to a store and kills itself on the way, with SIGKILL.

python dying.py URL WHAT STEP

WHAT is add, consolidate, rollback or gc. A step is the moment before, or after, something that the
store does to the disk. STEP counts them from 0; with -1 the thing is done, and the steps printed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from memtool_stores import MemoryStore, collect, ice, store, sums
from memtool_stores.testing import some_values

steps: list[str] = []
die_at = int(sys.argv[3])


def _step(name: str) -> None:
    if len(steps) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(name)


def _stepping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        _step(f"before {name}")
        result = function(*args, **kwargs)
        _step(f"after {name}")
        return result

    return called


class _Stepping:
    """An object of icechunk whose methods that write are steps."""

    METHODS = frozenset(
        [
            "flush",
            "reset_branch",
            "create_branch",
            "create_tag",
            "expire_snapshots",
            "garbage_collect",
        ]
    )

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name in self.METHODS:
            return _stepping(name, found)
        if name == "writable_session":
            return lambda *args: _Stepping(found(*args))
        return found


def main() -> None:
    url, what = sys.argv[1:3]
    for module, name in (
        (store, "sync_to_disk"),
        (sums, "write"),
        (sums, "before_expiry"),
        (sums, "after_expiry"),
    ):
        setattr(module, name, _stepping(name, getattr(module, name)))
    for module in (store, collect):
        real = ice.open_repository
        module.open_repository = lambda url, real=real: _Stepping(real(url))
    memory = MemoryStore.open(url)
    if what == "rollback":
        memory.rollback("HEAD~1")
    elif what == "gc":
        memory.gc(keep_last=2)
    else:
        with memory.transaction(what) as txn:
            if what == "add":
                txn.add("new", some_values(memory.space, 9), {"number": 9})
            else:
                shape = (2, len(txn.adapters), 4)
                keys = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
                txn.set_keys(keys)
                txn.put_blob("query-modules", bytes(range(100)))
                txn.put_blob("head", bytes(300))
    print(*steps, sep="\n")


if __name__ == "__main__":
    main()
