"""What methods whose memory is made of rank-1 atoms do alike, on images and on texts.

Atoms are trained with those in memory around them, which decide with them what a token chooses: a
task is written before the next one is trained, one version a task, and only on top of the very
atoms that it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import memtool_stores
from memtool.adapters.atoms import AtomGate
from memtool.config import MoramSettings
from memtool.errors import AlreadyThereError, ConfigError, MismatchError, NotFoundError
from memtool.methods.atom_state import digest, gate_of, past_inputs_of, resolved
from memtool.methods.exchange import About, ReadAdapter
from memtool.methods.method import MemoryMethod, newest_after_each
from memtool.methods.past_inputs import PastInputs
from memtool.methods.records import task_of
from memtool.methods.workspace import T


class AtomMethod(MemoryMethod[T]):
    """The steps of a memory of atoms over one configuration and seed."""

    kind: ClassVar[Literal["adapter", "atoms"]] = "atoms"
    version_each: ClassVar[bool] = True

    @property
    def settings(self) -> MoramSettings:
        """The configured gate, with a number for topk."""
        return resolved(self.config.moram, self.config.adapter.rank)

    @property
    def gate(self) -> AtomGate:
        """The configured gate."""
        return gate_of(self.config.moram, self.config.adapter.rank)

    def _refuse_task(self, task: str | None) -> None:
        """Raise ConfigError for a task that an attached memory is told."""
        if task is not None:
            raise ConfigError(
                f"task {task!r} for a memory of atoms, which find themselves",
                remedy="attach without a task",
            )

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks whose atoms a version has, in the order written."""
        view = self.workspace.store.view(version)
        return tuple(task_of(record) for record in view.atom_records)

    def _history(self, version: str, tasks: Sequence[int]) -> dict[int, str]:
        """The newest version, up to `version`, with the atoms of the first i tasks, for every i."""
        versions = self.workspace.store.log(version)
        history = ((one.id, self.known_tasks(one.id)) for one in versions)
        return newest_after_each(history, tasks)

    def _rows_beneath(self, view: memtool_stores.MemoryView, task: T) -> int:
        """How many rows of atoms the task is trained on top of: those in memory before its own."""
        for place, record in enumerate(view.atom_records):
            if task_of(record) == task.number:
                return place
        return len(view.atom_records)

    def _past_inputs(self, view: memtool_stores.MemoryView, rows: int) -> PastInputs:
        """What entered the adapted maps in the tasks of the first `rows` rows of atoms.

        Of a task that is trained anew though it is in memory, as the version before it has it.
        """
        if rows < len(view.atom_records):
            tasks = [task_of(record) for record in view.atom_records]
            before = self._history(view.version, tasks).get(rows)
            if before is None:
                raise NotFoundError(
                    f"no version of {self.workspace.store_path!r} holds the {rows} tasks before "
                    "that one: what their inputs leave free is not known any more",
                    remedy="another --store, to learn the tasks anew",
                )
            view = self.workspace.store.view(before)
        return past_inputs_of(view, self.workspace.layout, self.config.past.energy)

    def _beneath_digest(self, task: T) -> str:
        """What the task is, or in memory was, trained on top of."""
        if not self.workspace.has_store:
            return digest(())
        view = self.workspace.store.view("HEAD")
        rows = self._rows_beneath(view, task)
        if rows < len(view.atom_records):
            # Written: what was pruned or forgotten since does not make it another training.
            provenance = view.atom_records[rows].meta.get("provenance") or {}
            if known := provenance.get("beneath"):
                return str(known)
        return self._digest_at(view, view.atom_records[:rows])

    def _digest_at(
        self,
        view: memtool_stores.MemoryView,
        records: Sequence[memtool_stores.AdapterRecord],
    ) -> str:
        """The digest of rows of a version, and of all else that new atoms are trained on."""
        del view
        return digest(records)

    def _about(self, adapter: ReadAdapter) -> About | None:
        """What atoms were trained on; None for those that were not trained here."""
        return adapter.about if adapter.trained_as == "atoms" else None

    def _require_new_task(self, txn: memtool_stores.Transaction, adapter: ReadAdapter) -> None:
        """A task adds its atoms once."""
        number = int(adapter.meta["task"])
        if number in [task_of(record) for record in txn.atom_records]:
            raise AlreadyThereError(
                f"the memory holds atoms of task {number} already",
                remedy=f"memtool forget {number} first, or another --store",
            )

    def _require_trained_here(self, view: memtool_stores.MemoryView, adapter: ReadAdapter) -> None:
        """Atoms belong on top of the very atoms that they were trained on."""
        about = self._about(adapter)
        if about is not None and about.beneath != self._digest_at(view, view.atom_records):
            raise MismatchError(
                f"{adapter.path} was trained from {about.warm_start}, not on top of "
                f"the {len(view.atom_records)} tasks that are in memory now",
                expected="tasks that are trained and written one after another",
                remedy=f"memtool train-adapter --task {adapter.meta['task']} --fresh",
            )

    def _require_same_gate(self, there: MoramSettings, settings: MoramSettings) -> None:
        """All atoms of a memory are trained and read through one gate."""
        if there != settings:
            raise ConfigError(
                f"the memory {self.workspace.store_path!r} has another gate: "
                f"{_differences(there, settings)}",
                remedy="the options that it was begun with, or another --store",
            )

    def _require_settings(self) -> None:
        """Settings that atoms cannot follow are errors, not ignored."""
        adapter = self.config.adapter
        if adapter.per_task > 1:
            raise ConfigError(
                f"adapter.per_task {adapter.per_task} under method moram",
                expected="1: a task adds its atoms once",
                remedy="--rank N for more atoms a task",
            )
        if adapter.warm_start != "none" or adapter.residual:
            raise ConfigError(
                "adapter.residual and adapter.warm_start under method moram",
                expected="none of them: new atoms start at zero on top of all that are in memory",
                remedy="--warm-start none, --set adapter.residual=false",
            )


def _differences(one: MoramSettings, other: MoramSettings) -> str:
    """`"topk 8, here 16"` for every setting that differs."""
    there, here = one.model_dump(), other.model_dump()
    return ", ".join(
        f"{name} {there[name]}, here {here[name]}" for name in there if there[name] != here[name]
    )
