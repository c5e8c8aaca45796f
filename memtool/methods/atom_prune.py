"""Pruning: atoms that add next to nothing leave the memory, after their effect was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import memtool_stores
from memtool.adapters.atoms import AtomBank
from memtool.errors import ChangedMeanwhileError, ConfigError
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.atom_measure import AtomMeasure
from memtool.methods.atom_state import AtomSnapshot
from memtool.methods.atom_watch import alike
from memtool.methods.method import require_unmoved
from memtool.methods.results import PruneResult, TaskAccuracy
from memtool.methods.subject import first
from memtool.methods.text import some
from memtool.methods.text_memory import TextMoram, TextSnapshot

if TYPE_CHECKING:
    from memtool.methods.moram import Moram

Ranks = dict[str, dict[str, list[int]]]

SAMPLES = 256
"""Training images of a task that what its atoms add is measured on."""


def dead_atoms(moram: Moram, below: float, *, version: str = "HEAD") -> PruneResult:
    """Which atoms add next to nothing, and what taking them out does; nothing is changed.

    An atom is dead when what it adds (mean of |w s z| |B| over the tokens of training images of
    all tasks in memory, each task alike) is less than `below` times what the atoms of its site
    add on average. Accuracies are on test images. Raises ConfigError unless 0 < below < 1.
    """
    _require_share(below)
    work, snapshot = moram.workspace, moram.snapshot(version)
    measure = AtomMeasure(work)
    tasks = [work.task(str(number)) for number in snapshot.tasks]
    added = measure.contributions(snapshot, [first(task.train, SAMPLES).images for task in tasks])
    ranks, rest = _parted(snapshot, added, below)
    pruned = replace(snapshot, bank=rest.to(work.engine.device))
    setting = moram.test_setting()
    effect = tuple(
        TaskAccuracy(
            task=task.number,
            task_name=task.name,
            before=measure.accuracy(snapshot, task, setting) or 0.0,
            after=measure.accuracy(pruned, task, setting) or 0.0,
        )
        for task in tasks
    )
    return _result(snapshot, below, ranks, effect)


def dead_text_atoms(moram: TextMoram, below: float, *, version: str = "HEAD") -> PruneResult:
    """As `dead_atoms`, by the training prompts of the tasks and with losses instead of accuracies.

    A task counts by at most `SUBJECT_SAMPLES` of its prompts.
    """
    _require_share(below)
    work, snapshot = moram.workspace, moram.snapshot(version)
    tasks = [work.task(str(number)) for number in snapshot.tasks]
    added = alike([moram.contributions(snapshot, some(task.train).prompts) for task in tasks])
    ranks, rest = _parted(snapshot, added, below)
    pruned = replace(snapshot, bank=rest.to(work.engine.device))
    before, after = (moram.measured(one, tasks).losses for one in (snapshot, pruned))
    effect = tuple(
        TaskAccuracy(task=task.number, task_name=task.name, before=one, after=other)
        for task, one, other in zip(tasks, before, after, strict=True)
    )
    return _result(snapshot, below, ranks, effect).model_copy(update={"measure": "loss"})


def _require_share(below: float) -> None:
    if not 0 < below < 1:
        raise ConfigError(
            f"--atoms-below {below:g}",
            expected="a number between 0 and 1: 1 is what an atom adds on average",
        )


def _parted(
    snapshot: AtomSnapshot | TextSnapshot, added: Mapping[str, Tensor], below: float
) -> tuple[Ranks, Rank1Memory]:
    """The numbers of the dead atoms, by row and site, and a bank of all others, on the CPU."""
    ranks: Ranks = {}
    rest = Rank1Memory(snapshot.bank.sites)
    for site in (one.name for one in snapshot.bank.sites):
        stored, bank = snapshot.view.atoms(site), snapshot.bank.bank(site)
        dead = torch.zeros(len(bank), dtype=torch.bool)
        if site in added:  # else no image reaches it, as in a text tower
            dead = added[site] < below * added[site].mean()
        for place in torch.nonzero(dead).flatten().tolist():
            name = snapshot.view.atom_records[int(stored.owner[place])].name
            ranks.setdefault(name, {}).setdefault(site, []).append(int(stored.rank[place]))
        parts = (bank.keys, bank.values, bank.scaling, bank.owner)
        keys, values, scaling, owner = (part.cpu()[~dead] for part in parts)
        rest.append(site, AtomBank(keys, values, scaling, owner))
    return ranks, rest.eval()


def _result(
    snapshot: AtomSnapshot | TextSnapshot,
    below: float,
    ranks: Ranks,
    effect: tuple[TaskAccuracy, ...],
) -> PruneResult:
    return PruneResult(
        version=snapshot.version,
        below=below,
        atoms=sum(len(snapshot.bank.bank(site.name)) for site in snapshot.bank.sites),
        pruned=sum(len(out) for sites in ranks.values() for out in sites.values()),
        ranks=ranks,
        tasks=effect,
    )


def prune(moram: Moram | TextMoram, found: PruneResult) -> PruneResult:
    """Take dead atoms out of the memory, as one version; a head stays.

    Raises ChangedMeanwhileError when the memory is no longer at the version looked at.
    """
    work = moram.workspace
    view = work.store.view("HEAD")
    if view.version != found.version:
        raise ChangedMeanwhileError(
            f"the memory is at version {view.version}, not {found.version}",
            remedy="the same command again; nothing was pruned",
        )

    def commit(txn: memtool_stores.Transaction) -> None:
        require_unmoved(txn, view)
        for name, sites in found.ranks.items():
            txn.prune_atoms(name, sites)

    message = f"prune {found.pruned} of {found.atoms} atoms"
    metadata = {"verb": "forget", "atoms_below": found.below, "pruned": found.pruned}
    work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
    return found.model_copy(update={"version": work.store.head(), "done": True})
