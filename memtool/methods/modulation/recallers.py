"""The memories of Modulation over one version of the store: opened, and kept up to date.

A Hopfield memory needs no state of its own: its patterns are the stored adapters. A BayesPCN memory
keeps what it believes in a blob `recall.<memory>`, which changes in the same version as the
adapters; the patterns that it speaks of are the stored adapters, too.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import memtool_stores
from memtool.errors import MismatchError
from memtool.memories.bayes_pcn import PRESETS, BayesPCN, BayesPCNSettings, names_in
from memtool.memories.hopfield import PUBLISHED_BETA, HopfieldMemory, key_length
from memtool.memories.recalled import Recalled
from memtool.sections import ModulationSettings, Recaller


class AdapterMemory(Protocol):
    """A memory of whole adapters (numel,), each recalled from its first `key_length` numbers."""

    @property
    def numel(self) -> int:
        """Numbers in an adapter."""

    @property
    def key_length(self) -> int:
        """Numbers in a key."""

    def key_of(self, patterns: Tensor) -> Tensor:
        """The keys (..., key_length) of adapters (..., numel)."""

    def recall(self, keys: Tensor) -> Recalled:
        """Complete keys (n, key_length)."""


STATE = "recall."
"""How the name of a blob begins that holds the state of a memory."""


def blob_of(name: Recaller) -> str:
    """Name of the blob that holds the state of a memory."""
    return f"{STATE}{name}"


def open_memory(
    name: Recaller, view: memtool_stores.MemoryView, settings: ModulationSettings
) -> AdapterMemory:
    """The memory `name` at a version. Raises MismatchError when it was never written there."""
    if name in ("hopfield", "hopfield-published"):
        published = name == "hopfield-published"
        return HopfieldMemory.of(
            [record.name for record in view.adapters],
            _mapped(view.values()),
            fraction=settings.key_share,
            similarity="dot" if published else settings.similarity,
            separation="softmax" if published else settings.separation,
            beta=PUBLISHED_BETA if published else (settings.beta or "auto"),
            steps=1 if published else settings.steps,
        )
    blob = blob_of(name)
    names = names_in(view.blob(blob), f"blob {blob!r}") if view.has_blob(blob) else ()
    stored = tuple(record.id for record in view.adapters)
    if set(names) != set(stored):
        raise MismatchError(
            f"the {name} memory at version {view.version} holds {len(names)} adapters",
            expected=f"the {len(stored)} that are stored",
            remedy=f"memtool consolidate --memory {name}, which brings it up to date",
        )
    patterns = _mapped(view.values(names))
    return BayesPCN.from_bytes(view.blob(blob), patterns, f"blob {blob!r}")


def recall_all(
    name: Recaller, view: memtool_stores.MemoryView, values: Tensor, settings: ModulationSettings
) -> Tensor:
    """Adapters (t, numel), each recalled from its own key: (t, numel) float32."""
    memory = open_memory(name, view, settings)
    return memory.recall(memory.key_of(values)).patterns.float()


def _mapped(values: npt.NDArray[np.float32]) -> Tensor:
    """Read-only values as a tensor without a copy; nothing here writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def synchronise(
    txn: memtool_stores.Transaction, name: Recaller, settings: ModulationSettings, *, seed: int
) -> None:
    """Make the state of a memory speak of exactly the adapters that are live in a transaction.

    Raises CapacityError, AlreadyExistsError (two adapters with one key) and DataError.
    """
    if name in ("hopfield", "hopfield-published"):
        return
    base, blob = txn.base, blob_of(name)
    live = {record.id: record for record in txn.adapters}
    wanted = _settings(name, settings)
    numel = base.space.numel
    length = key_length(settings.key_share, numel)
    memory = BayesPCN(numel, length, wanted, seed=seed)
    if base.has_blob(blob):
        # Removed adapters are still in the base version: the memory needs them to unlearn them.
        stored = _stored(base, blob)
        if (stored.settings, stored.key_length) == (wanted, length):
            memory = stored
    if set(memory.names) == set(live) and base.has_blob(blob):
        return
    for id in memory.names:
        if id not in live:
            memory.delete(id)
    for id in live:
        if id not in memory.names:
            memory.write(id, torch.from_numpy(np.array(txn.value(id))).float())
    txn.put_blob(blob, memory.to_bytes())


def solve_without(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, gone: set[str]
) -> None:
    """In a transaction that takes adapters away: the memories without them, whatever they are."""
    for blob in view.blobs():
        if not blob.startswith(STATE):
            continue
        ids = set(names_in(view.blob(blob), f"blob {blob!r}"))
        if ids and gone >= ids:
            txn.delete_blob(blob)
        elif gone & ids:
            memory = _stored(view, blob)
            for id in memory.names:
                if id in gone:
                    memory.delete(id)
            txn.put_blob(blob, memory.to_bytes())


def _stored(view: memtool_stores.MemoryView, blob: str) -> BayesPCN:
    """The BayesPCN memory of a version, over the adapters that its blob speaks of."""
    data, where = view.blob(blob), f"blob {blob!r}"
    names = names_in(data, where)
    rows = [view.value(id) for id in names]
    values = np.stack(rows) if rows else np.zeros((0, view.space.numel), np.float32)
    return BayesPCN.from_bytes(data, torch.from_numpy(values), where)


def _settings(name: Recaller, settings: ModulationSettings) -> BayesPCNSettings:
    preset = PRESETS["published" if name == "bayes-pcn-published" else "default"]
    return BayesPCNSettings(**{**preset.__dict__, "hidden": settings.hidden})
