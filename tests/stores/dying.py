"""A process that does one thing to a store and kills itself on the way, with SIGKILL.

python dying.py URL WHAT STEP
python dying.py URL WHAT each      each line of stdin is a STEP, for a process of its own

WHAT is add, consolidate, rollback or gc. A step is the moment before, or after, something that the
store does to the disk. STEP counts them from 0; with -1 the thing is done, and the steps printed.
With `each` the exit code of every process is printed; they are forked, before anything is opened,
from one that has imported all that they need.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from memtool_stores import MemoryStore, collect, ice, store, sums
from memtool_stores.testing import some_values

if version("icechunk").startswith("1."):  # 2.x has threads from then on, which no fork takes along
    import icechunk  # noqa: F401 - for those that are forked
    import zarr  # noqa: F401

steps: list[str] = []
die_at = -1


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
    global die_at
    url, what, step = sys.argv[1:]
    if step != "each":
        die_at = int(step)
        die(url, what)
        return
    for line in sys.stdin:
        child = os.fork()
        if not child:
            die_at = int(line)
            die(url, what)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def die(url: str, what: str) -> None:
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
