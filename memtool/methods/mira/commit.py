"""The last step of consolidation: what it came to, written as one version."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

import memtool_stores
from memtool.engine import FitResult
from memtool.heads import RecalledHead
from memtool.methods.in_store import drop, features_blob
from memtool.methods.method import require_unmoved
from memtool.methods.mira.heads import put_head
from memtool.methods.mira.inventory import Inventory
from memtool.methods.mira.keys import are_drawn
from memtool.methods.mira.measure import Measure, drift_degrees
from memtool.methods.mira.protect import Protection
from memtool.methods.mira.read import DECODERS, decoders_bytes
from memtool.methods.mira.recall import MemoryModel
from memtool.methods.mira.state import PAST_QUERIES, QUERY_MODULES, MemoryState, queries_blob
from memtool.methods.mira.sums import drop_asked, put_seen
from memtool.methods.records import in_runs, numbered
from memtool.methods.results import ConsolidateResult
from memtool.methods.subject import SUBJECT_SAMPLES
from memtool.streams.task import spread
from memtool_stores.held import Held


@dataclass(frozen=True, eq=False)
class Start:
    """Keys (memories, t, m · (dim + 1)) before they learn.

    The first `kept` were there before, and learning goes on from them. `past` is what it may not
    change, under protection dual-gpm.
    """

    keys: Tensor
    kept: int
    past: Protection | None


@dataclass(frozen=True, eq=False)
class Made:
    """What consolidation came to; `fit` where keys learned."""

    start: Start
    model: MemoryModel
    head: RecalledHead
    fit: FitResult | None

    @property
    def keys(self) -> Tensor:
        """The keys (memories, t, m · (dim + 1)), on the CPU."""
        return self.model.memory.keys().cpu()


def query_modules(parts: Mapping[str, Tensor]) -> list[str]:
    """Names of the parts of query modules among all parts of a memory."""
    return [name for name in parts if ".query." in name]


def result_of(known: Inventory, made: Made, began: float) -> ConsolidateResult:
    """What consolidation came to, at the version that it went on from."""
    work, config = known.work, known.config
    last = work.task(str((known.fresh or known.tasks)[-1]))
    shown = spread(last.train, 4 * SUBJECT_SAMPLES["images"])
    accuracy = Measure(work).accuracy(made.model, made.head.to(work.engine.device), shown)
    return ConsolidateResult(
        version=known.view.version,
        tasks=known.tasks,
        separation=config.memory.separation,
        mix=config.memory.mix,
        epochs=config.consolidate.epochs,
        seconds=time.perf_counter() - began,
        train_accuracy=accuracy,
        validation_accuracy=None if made.fit is None else made.fit.score,
        key_drift_degrees=_drift(known.before, made.keys),
        unchanged=known.unchanged,
    )


def _drift(before: Tensor | None, keys: Tensor) -> float:
    """Mean angle in degrees by which keys that were there before turned."""
    if before is None:
        return 0.0
    # A task with more classes than all before has made every adapter's row of keys longer.
    width = min(before.shape[-1], keys.shape[-1])
    return drift_degrees(before[..., :width], keys[:, : before.shape[1], :width])


def commit(
    known: Inventory, made: Made, result: ConsolidateResult, metadata: Mapping[str, Any]
) -> None:
    """One version with keys, head, moments and state; and values, where they learned."""
    work, config, view = known.work, known.config, known.view
    keys = np.ascontiguousarray(made.keys.numpy(), dtype=np.float32)
    blobs = _blobs(known, made)
    refined = None
    if config.consolidate.value_lr > 0 and made.fit is not None:
        refined = made.model.values.flat().cpu().numpy()
    kept = made.start.kept

    def change(txn: memtool_stores.Transaction) -> None:
        require_unmoved(txn, view)
        if refined is not None:
            for record, value in zip(view.adapters[kept:], refined[kept:], strict=True):
                txn.remove(record.id)
                about = {"byte_identical": False, "refined_from": record.sha256}
                txn.add(record.name, value, {**record.meta, **about})
        txn.set_keys(keys)
        MemoryState(
            memory=config.memory,
            head=config.head,
            consolidate=config.consolidate,
            tasks=known.tasks,
            adapters=tuple(record.id for record in txn.adapters),
            adapter_tasks=known.adapter_tasks,
            class_names=work.stream.class_names,
            fingerprint=work.stream.fingerprint,
            first=known.first,
        ).put(txn)
        put_head(txn, made.head)
        for name, data in blobs.items():
            txn.put_blob(name, data)
        for name in {QUERY_MODULES, DECODERS} - {*blobs}:
            drop(txn, name)
        if are_drawn(config.consolidate, config.memory):
            drop_asked(txn)
        else:
            known.asked.put(txn)
        put_seen(txn, known.seen)

    about = {
        **metadata,
        "learned": in_runs(known.tasks),
        "consolidate": config.consolidate.model_dump(mode="json"),
        "seconds": result.seconds,
        "losses": [] if made.fit is None else list(made.fit.losses),
        "train_accuracy": result.train_accuracy,
        "validation_accuracy": result.validation_accuracy,
    }
    message = f"consolidate tasks {numbered(known.tasks)}"
    work.engine.on_main(lambda: work.store.run(change, message, metadata=about))


def _blobs(known: Inventory, made: Made) -> dict[str, bytes | Held]:
    """What is written beside keys and state, by the name of its blob; moments wait in a spool."""
    blobs: dict[str, bytes | Held] = {
        **{queries_blob(number): known.queries.waiting(number) for number in known.new},
        **{features_blob(number): known.features.waiting(number) for number in known.fresh},
    }
    if made.start.past is not None:
        blobs[PAST_QUERIES] = made.start.past.to_bytes()
    parts = made.model.memory.state_dict()
    learned = {name: parts[name].detach().cpu().contiguous() for name in query_modules(parts)}
    if learned:
        blobs[QUERY_MODULES] = save(learned)
    decoders = decoders_bytes(made.model.memory)
    if decoders is not None:
        blobs[DECODERS] = decoders
    return blobs
