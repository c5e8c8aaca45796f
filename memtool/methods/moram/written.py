"""The atoms of a task on their way into the store, with what is kept beside them.

Of images that are the moments of the task's features, with all atoms in place, and the head; of
texts the settings that they were trained with. Where keys begin free of earlier inputs, both keep
what entered the adapted maps.
"""

from __future__ import annotations

from functools import cached_property

import memtool_stores
from memtool.adapters.atoms import AtomGate
from memtool.errors import MismatchError
from memtool.heads import RecalledHead
from memtool.learning.known import head_under, is_fixed, learned_under
from memtool.learning.objective import objective_of
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.exchange import ReadAdapter
from memtool.methods.in_store import HEAD, feature_statistics, features_blob
from memtool.methods.moram.beneath import about_atoms, require_same_gate, tasks_of
from memtool.methods.moram.state import (
    PAST_INPUTS,
    AtomsState,
    bank_of,
    gate_of,
    gate_settings,
    past_inputs_of,
    resolved,
    solve,
    trained_heads,
)
from memtool.sections import MoramSettings, Settings
from memtool.settings import HeadSettings
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Written:
    """One adapter that a transaction appends; `configured` is the gate of the configuration."""

    def __init__(
        self,
        work: Workspace,
        configured: MoramSettings,
        txn: memtool_stores.Transaction,
        adapter: ReadAdapter,
    ) -> None:
        self.work = work
        self.txn = txn
        self.adapter = adapter
        self.about = about_atoms(adapter)
        self.settings = self._settings(configured)
        self.gate: AtomGate = gate_of(self.settings, work.layout.rank)

    def append(self) -> memtool_stores.AdapterRecord:
        """Append the atoms and what is kept beside them; the record of the atoms."""
        txn, adapter, images = self.txn, self.adapter, self.work.reads == "images"
        if images:
            self._require_same_head()
        meta = adapter.meta if images else {**adapter.meta, "hyperparameters": self._trained_with()}
        if self.settings.frozen_scaling == "one":
            meta = {**meta, "scaling": 1.0}
        txn.add_atoms(adapter.name, adapter.value.numpy(), meta)
        if images:
            self._put_head()
        if self.settings.keys == "free":
            self._put_past_inputs()
        return txn.atom_records[-1]

    def _settings(self, configured: MoramSettings) -> MoramSettings:
        """The gate that the atoms were trained through, which must be that of the memory."""
        rank = self.work.layout.rank
        there = gate_settings(self.txn.base, rank)
        settings = configured if there is None else there
        if self.about is not None:
            settings = resolved(self.about.section("moram", MoramSettings), rank)
        if there is not None:
            require_same_gate(self.work, there, settings)
        return settings

    def _trained_with(self) -> dict[str, object]:
        """The settings that atoms were trained with, as the store keeps them."""
        parts = ("adapter", "train", "moram", "text")
        used: dict[str, Settings] = {part: getattr(self.work.config, part) for part in parts}
        if self.about is not None:
            used = {part: self.about.section(part, type(one)) for part, one in used.items()}
        elif self.txn.base.atom_records:  # of which only the values came: read as the memory is
            used["moram"] = self.settings
        return {part: one.model_dump(mode="json") for part, one in used.items()}

    @cached_property
    def _task(self) -> Task:
        return self.work.task(str(self.adapter.meta["task"]))

    @cached_property
    def _bank(self) -> Rank1Memory:
        """All atoms, those of the adapter too, frozen and on the device."""
        work, number = self.work, int(self.adapter.meta["task"])
        bank, record = bank_of(self.txn.base, work.layout), self.txn.atom_records[-1]
        bank.grow(self.adapter.value, rank=work.layout.rank, owner=number, scaling=record.scaling)
        bank.freeze()
        if work.config.moram.topk is not None:
            bank.check_topk(self.gate.topk)
        return bank.eval().to(work.engine.device)

    def _put_head(self) -> None:
        """The moments of the task's features, and the head that follows from those of all."""
        work, view, txn = self.work, self.txn.base, self.txn
        number, head_settings = self._task.number, work.config.head
        recall = self._bank.recall(self.gate)
        features = work.features(self._task.train.images, recall)
        counted = work.counted(features, self._task.train)
        statistics = feature_statistics(view, tasks_of(view)).beside(number, counted)
        if is_fixed(work.config):
            head = RecalledHead.shared(head_under(work, recall, head_settings.kind).linear())
        else:
            trained = {**trained_heads(view), number: self.adapter.head}
            head = solve(head_settings, statistics, trained)
        txn.put_blob(features_blob(number), counted.to_bytes())
        txn.put_blob(HEAD, head.to_bytes())
        AtomsState(
            moram=self.settings,
            head=head_settings,
            class_names=work.stream.class_names,
            fingerprint=work.stream.fingerprint,
        ).put(txn)

    def _put_past_inputs(self) -> None:
        """Add the inputs of the task, as the model has them with its atoms, to the past."""
        work, view = self.work, self.txn.base
        past = past_inputs_of(view, work.layout, work.config.past)
        recall = self._bank.recall(self.gate)
        moments = objective_of(work).input_moments(past, self._task.train, recall)
        past.add(moments, len(view.atom_records) / len(work.stream.tasks))
        self.txn.put_blob(PAST_INPUTS, past.to_bytes())

    def _require_same_head(self) -> None:
        """Atoms that learned under a fixed head belong under it, and others not."""
        if self.about is None:
            return
        config, stream = self.work.config, self.work.stream
        given = self.about.section("head", HeadSettings)
        trained = config.model_copy(update={"head": given})
        if learned_under(trained, stream) != learned_under(config, stream):
            raise MismatchError(
                f"{self.adapter.path} learned under head {given.kind} "
                f"{given.model_dump(include={'scale', 'rivals', 'texts'})}",
                expected=f"head {config.head.kind}, as configured",
                remedy=f"memtool train-adapter --task {self.adapter.meta['task']} --fresh",
            )
