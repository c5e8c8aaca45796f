"""A process that makes a store as only a stranger would: with no name checked, and all seals right.

python hostile.py FOLDER KIND NAME

KIND says what has this name: an adapter, a blob, or the store itself (its id). Beside the store
lies its bundle, FOLDER.bundle.
"""

from __future__ import annotations

import sys

import numpy as np
import ulid

import memtool_stores
from memtool_stores import Backbone, Layout, MemoryStore, Segment, Space

folder, kind, name = sys.argv[1:]

for module in [m for n, m in sys.modules.items() if n.startswith(memtool_stores.__name__)]:
    for check in ("check_name", "check_ref", "check_id", "check_path"):
        if hasattr(module, check):
            setattr(module, check, lambda name, *_: name)
    if hasattr(module, "below"):
        module.below = lambda folder, *names: folder.joinpath(*names)  # type: ignore[attr-defined]

if kind == "store":
    ulid.ULID = lambda: name  # type: ignore[misc, assignment]
layout = Layout(
    (Segment("a.lora_A", (2, 8), 0), Segment("a.lora_B", (8, 2), 16)), "float32", 2, 4.0, ("q",)
)
store = MemoryStore.create(folder, Space(Backbone("nano", "", "ab" * 32), layout))
with store.transaction("write") as txn:
    txn.add(name if kind == "adapter" else "a", np.zeros(32, np.float32), {"task": 1})
    if kind == "blob":
        txn.put_blob(name, b"1")
store.bundle(f"{folder}.bundle")
