"""The head of a memory in its store: one for all tasks, or one of every task, kept apart.

head         the one for all
heads.<n>    those of the tasks, in rows: another task leaves them as they are
projection   the random projection that all of them are linear in, where there is one
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import save

from memtool.errors import CorruptError
from memtool.heads import LinearClassifier, Projection, RecalledHead
from memtool.methods.in_store import HEAD, drop, put_changed
from memtool.methods.pieces import drop_rows, put_rows, read_rows
from memtool.tensor_bytes import read_tensors
from memtool_stores import MemoryView, Transaction

HEADS, PROJECTION = "heads", "projection"


def put_head(txn: Transaction, head: RecalledHead) -> None:
    """Keep a head, on the CPU, in the version that is being written."""
    if head.owners is None:
        txn.put_blob(HEAD, head.to_bytes())
        drop_rows(txn, HEADS)
        drop(txn, PROJECTION)
        return
    drop(txn, HEAD)
    put_rows(txn, HEADS, {"weight": head.weight, "bias": head.bias})
    if head.projection is None:
        drop(txn, PROJECTION)
    else:
        put_changed(txn, PROJECTION, save({"weight": head.projection.weight.contiguous()}))


def read_head(view: MemoryView, tasks: int, owners: Sequence[int]) -> RecalledHead | None:
    """The head at a version, on the CPU; None where there is none.

    `owners` are the places of the tasks of all adapters, among so many. Raises CorruptError.
    """
    if view.has_blob(HEAD):
        return RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
    rows = read_rows(view, HEADS, weight="h c d", bias="h c")
    if not rows:
        return None
    weight, bias = rows["weight"], rows["bias"]
    if not weight.numel() or len(weight) != tasks:
        raise CorruptError(
            f"blobs {HEADS!r} hold weights of shape {tuple(weight.shape)}",
            expected=f"heads of {tasks} tasks",
        )
    projection = None
    if view.has_blob(PROJECTION):
        where = f"blob {PROJECTION!r}"
        drawn = read_tensors(view.blob(PROJECTION), where, weight="d f")["weight"]
        if drawn.shape[0] != weight.shape[2]:
            raise CorruptError(f"{where} is {tuple(drawn.shape)}", expected=f"{weight.shape[2]} …")
        projection = Projection(drawn)
    return RecalledHead(weight, bias, torch.tensor(owners), projection)


def heads_of(head: RecalledHead, tasks: Sequence[int]) -> dict[int, LinearClassifier]:
    """The heads of tasks, by number, of one that has a head of each; CorruptError for another."""
    if len(head.weight) != len(tasks):
        raise CorruptError(
            f"a memory that holds {len(head.weight)} heads", expected=f"heads of {len(tasks)} tasks"
        )
    pairs = zip(tasks, head.weight, head.bias, strict=True)
    return {task: LinearClassifier(w, b, head.projection) for task, w, b in pairs}


def drop_head(txn: Transaction) -> None:
    """Keep none."""
    for name in (HEAD, PROJECTION):
        drop(txn, name)
    drop_rows(txn, HEADS)
