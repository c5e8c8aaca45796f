"""What is known of prompts, and the keys of a memory of prompts that are solved from it.

    routing.<task>    the moments of the training prompts of a task
    looks.<adapter>   the moments of the example prompts that an adapter came with, by its id
    prompt-keys       how prompts were looked at, and whose keys there are

Moments are a count, a mean and a root of the scatter; all of a task's add up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

import memtool_stores
from memtool.errors import CorruptError, DataError, MismatchError
from memtool.memories.moments import Moments
from memtool.methods.in_store import StoredState
from memtool.methods.records import task_of
from memtool.methods.routed.memory import Kept, kept_blob, kept_bytes
from memtool.tensor_bytes import read_tensors

SHRINKAGE = 0.1
"""Of the covariance within tasks, toward a multiple of the identity.

Chosen on the validation prompts of TRACE, from 200 and from 30 prompts a task, among 1e-3 to 0.3.
"""


class PromptState(StoredState):
    """How prompts are looked at, and whose keys there are: the JSON blob `prompt-keys`.

    `adapters` are the ids behind the keys, in their order: those that prompts were known of;
    `moments` is the hash of what the keys were solved from.
    """

    blob: ClassVar[str] = "prompt-keys"

    schema_version: int = 1
    look_at: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    moments: str = ""


def looks_blob(adapter: str) -> str:
    """Name of the blob that holds what the example prompts of an adapter, by its id, look like."""
    return f"looks.{adapter}"


def parts_in(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> dict[int, list[Kept]]:
    """What is known of the prompts of every task of these records, by its number.

    That is what was kept of its training prompts, `new` or in a version, and of the example prompts
    of each of its adapters. Raises CorruptError.
    """
    found: dict[int, list[Kept]] = {}
    for number, name in _names(view, records, new):
        kept = new[number] if name is None else read_moments(view, name)
        found.setdefault(number, []).append(kept)
    return found


def _names(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> list[tuple[int, str | None]]:
    """Task and blob of all that is known of prompts; None for what is new."""
    blobs, found = {*view.blobs()}, dict[tuple[int, str | None], None]()
    for record in records:
        number = task_of(record)
        if number in new:
            found[number, None] = None
        elif kept_blob(number) in blobs:
            found[number, kept_blob(number)] = None
        if looks_blob(record.id) in blobs:
            found[number, looks_blob(record.id)] = None
    return [*found]


def tasks_in(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> set[int]:
    """Numbers of the tasks of these records of which prompts are known; none of them is read."""
    return {number for number, _ in _names(view, records, new)}


def digest_of(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> str:
    """The hash of all that the keys of these records are solved from."""
    parts = [
        view.state.blobs[name]
        if name is not None
        else hashlib.sha256(kept_bytes(new[number], "mira")).hexdigest()
        for number, name in _names(view, records, new)
    ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def read_moments(view: memtool_stores.MemoryView, blob: str) -> Kept:
    """What `PromptMemory.keep` gave. Raises CorruptError for anything else."""
    where = f"blob {blob!r}"
    found = read_tensors(view.blob(blob), where, count="int64 c", mean="d", root="n d")
    count = found["count"]
    finite = all(bool(found[name].isfinite().all()) for name in ("mean", "root"))
    if tuple(count.shape) != (1,) or not 1 <= int(count) <= 2**40 or not finite:
        raise CorruptError(
            f"{where} holds no moments of prompts", expected="a count, and finite numbers"
        )
    kept: Kept = found
    return kept


def solved_keys(tasks: Sequence[Sequence[Kept]]) -> Tensor:
    """Keys (tasks, d + 1), float32, of what was kept of each task, in one part or several.

    [look, 1] · key is log p(task | look) up to a term that all tasks share, of Gaussian looks of
    one covariance. Raises DataError where no task has two prompts that differ, MismatchError for
    looks of several widths.
    """
    width = tasks[0][0]["mean"].shape[0]
    moments = Moments(1, width, len(tasks))
    for place, one in ((place, one) for place, parts in enumerate(tasks) for one in parts):
        count, mean, root = float(one["count"]), one["mean"].double(), one["root"].double()
        if len(mean) != width:
            raise MismatchError(
                f"prompts that look like {len(mean)} numbers, and like {width}",
                expected="all looked at in the same places",
                remedy="memtool rollback, or another --store",
            )
        moments.counts[place] += count
        moments.sums[0, place] += count * mean
        moments.second[0] += root.T @ root + count * torch.outer(mean, mean)
    try:
        rule = moments.lda(SHRINKAGE, equal_priors=True)
    except DataError as error:
        raise DataError(
            "no adapter has two prompts that differ",
            expected="a few dozen example prompts of each",
            remedy="--prompts FILE with more of them",
        ) from error
    return torch.cat([rule.weight[0], rule.bias[0].unsqueeze(1)], dim=1).float()


def put_keys(
    txn: memtool_stores.Transaction,
    *,
    view: memtool_stores.MemoryView,
    new: Mapping[int, Kept],
    look_at: tuple[str, ...],
) -> None:
    """Give every live adapter of which prompts are known its key, solved with those of all."""
    live = txn.adapters
    parts = parts_in(view, live, new)
    keys = solved_keys(list(parts.values()))
    rows = dict(zip(parts, keys, strict=True))
    none = torch.zeros_like(keys[0])
    found = torch.stack([rows.get(task_of(record), none) for record in live])
    txn.set_keys(found.unsqueeze(0).contiguous().numpy())
    keyed = tuple(record.id for record in live if task_of(record) in rows)
    digest = digest_of(view, live, new)
    PromptState(look_at=look_at, adapters=keyed, moments=digest).put(txn)


def solve_without(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, gone: set[str]
) -> None:
    """In a transaction that takes adapters away: the keys of the others, solved without them.

    No keys where what is left of the prompts is too little to tell adapters apart.
    """
    state = PromptState.load(view)
    if state is None or view.keys() is None or not gone & {*state.adapters}:
        return
    try:
        if tasks_in(view, txn.adapters, {}):
            put_keys(txn, view=view, new={}, look_at=state.look_at)
            return
    except DataError:
        pass
    txn.set_keys(None)
    if txn.adapters:
        state.model_copy(update={"adapters": (), "moments": ""}).put(txn)
    else:
        txn.delete_blob(PromptState.blob)


def join(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> tuple[str, ...]:
    """In a transaction that took adapters of another memory in: one way to look at prompts.

    Raises MismatchError where prompts were looked at in other places.
    """
    here, there = PromptState.load(txn.base), PromptState.load(view)
    if here is not None and there is not None and here.look_at != there.look_at:
        raise MismatchError(
            f"prompts were looked at by {','.join(there.look_at)} in the other memory, and by "
            f"{','.join(here.look_at)} in this one",
            expected="two memories of one memory.look_at",
            remedy="another --store",
        )
    if here is None and there is not None:
        PromptState(look_at=there.look_at).put(txn)
    return ()
