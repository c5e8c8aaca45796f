"""A process that begins to make something and kills itself, with SIGKILL, before it is in place.

python left.py URL WHAT TARGET

WHAT is commit, create, clone, bundle, cache or dry-run. With STOP in the environment it stops
itself instead, with SIGSTOP, and goes on when it is told to.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from memtool_stores import MemoryStore
from memtool_stores.testing import fill, small_space

url, what, target = sys.argv[1:]
store = MemoryStore.open(url)


def _die(*_: Any, **__: Any) -> Any:
    if "STOP" not in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    Path.replace = replace  # type: ignore[method-assign]
    print("stopped", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return replace(*_, **__)


replace = Path.replace
Path.replace = Path.rename = _die  # type: ignore[method-assign]
match what:
    case "commit":
        with store.transaction("cut short") as txn:
            fill(txn, small_space(), "cut", 9)
    case "create":
        MemoryStore.create(target, small_space())
    case "clone":
        store.clone(target)
    case "bundle":
        store.bundle(target)
    case "cache":
        store.view().values()
    case _:
        shutil.rmtree = _die  # type: ignore[assignment]
        store.gc(keep_last=1, dry_run=True)
