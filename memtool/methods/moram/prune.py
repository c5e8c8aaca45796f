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
from memtool.methods.method import require_unmoved
from memtool.methods.moram.measure import AtomMeasure
from memtool.methods.moram.state import AtomSnapshot
from memtool.methods.results import PruneResult, TaskAccuracy
from memtool.remembered import carried_on
from memtool.streams.task import spread

if TYPE_CHECKING:
    from memtool.methods.moram.method import Moram

Ranks = dict[str, dict[str, list[int]]]

SAMPLES = {"images": 256, "texts": 32}
"""Training samples of a task that what its atoms add is measured on."""


def dead_atoms(moram: Moram, below: float) -> PruneResult:
    """Which atoms add next to nothing, and what taking them out does; nothing is changed.

    An atom is dead when what it adds (mean of |w s z| |B| over the tokens of training samples of
    all tasks in memory, each task alike) is less than `below` times what the atoms of its site
    add on average. What it does is said by accuracies on test images, by losses on test texts.
    Raises ConfigError unless 0 < below < 1.
    """
    _require_share(below)
    work, snapshot = moram.workspace, moram.snapshot()
    measure, setting = AtomMeasure(work), moram.test_setting()
    tasks = [work.task(str(number)) for number in snapshot.tasks]
    samples = [spread(task.train, SAMPLES[work.reads]) for task in tasks]
    ranks, rest = _parted(snapshot, measure.contributions(snapshot, samples), below)
    pruned = replace(snapshot, bank=rest.to(work.engine.device))
    before, after = (measure.worth(one, tasks, setting) for one in (snapshot, pruned))
    return PruneResult(
        version=snapshot.version,
        below=below,
        atoms=sum(len(snapshot.bank.bank(site.name)) for site in snapshot.bank.sites),
        pruned=sum(len(out) for sites in ranks.values() for out in sites.values()),
        ranks=ranks,
        tasks=tuple(
            TaskAccuracy(task=task.number, task_name=task.name, before=one, after=other)
            for task, one, other in zip(tasks, before, after, strict=True)
        ),
        measure="loss" if work.reads == "texts" else "accuracy",
    )


def _require_share(below: float) -> None:
    if not 0 < below < 1:
        raise ConfigError(
            f"--atoms-below {below:g}",
            expected="a number between 0 and 1: 1 is what an atom adds on average",
        )


def _parted(
    snapshot: AtomSnapshot, added: Mapping[str, Tensor], below: float
) -> tuple[Ranks, Rank1Memory]:
    """The numbers of the dead atoms, by row and site, and a bank of all others, on the CPU."""
    ranks: Ranks = {}
    rest = Rank1Memory(snapshot.bank.sites)
    for site in (one.name for one in snapshot.bank.sites):
        stored, bank = snapshot.view.atoms(site), snapshot.bank.bank(site)
        dead = torch.zeros(len(bank), dtype=torch.bool)
        if site in added:  # else no sample reaches it, as images a text tower
            dead = added[site] < below * added[site].mean()
        for place in torch.nonzero(dead).flatten().tolist():
            name = snapshot.view.atom_records[int(stored.owner[place])].name
            ranks.setdefault(name, {}).setdefault(site, []).append(int(stored.rank[place]))
        parts = (bank.keys, bank.values, bank.scaling, bank.owner)
        keys, values, scaling, owner = (part.cpu()[~dead] for part in parts)
        rest.append(site, AtomBank(keys, values, scaling, owner))
    return ranks, rest.eval()


def prune(moram: Moram, found: PruneResult) -> PruneResult:
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
    metadata = {
        **carried_on(work.store),
        "verb": "forget",
        "atoms_below": found.below,
        "pruned": found.pruned,
    }
    work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
    return found.model_copy(update={"version": work.store.head(), "done": True})
