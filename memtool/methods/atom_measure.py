"""What a memory of atoms is worth: its accuracy, which atoms do it, and how they drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional as F

from memtool.evaluation.metrics import reuse
from memtool.evaluation.record import AtomUse
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.atom_state import AtomSnapshot
from memtool.methods.atom_watch import (
    Drift,
    TaskShares,
    contributions,
    frozen_drift,
    task_shares,
    watched,
)
from memtool.methods.measure import share_right
from memtool.methods.results import AtomWeight, Prediction
from memtool.methods.seen import predicted, seen_before
from memtool.methods.state import feature_statistics
from memtool.methods.subject import first
from memtool.methods.workspace import Workspace
from memtool.streams.task import Task
from memtool_stores import MemoryView

DRIFT_SAMPLES = 32
"""Test images of a task that the drift of its atoms is measured on."""

TOP_ATOMS = 10
"""Single atoms that `strongest` names."""

Images = npt.NDArray[np.uint8]


class AtomMeasure:
    """Measurements of memories of atoms over one workspace: its engine, backbone and tasks."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def scores(
        self, snapshot: AtomSnapshot, images: Images, allowed: Sequence[int] | None = None
    ) -> Tensor:
        """Scores (n, classes) of images; classes that are not `allowed` cannot win."""
        work, head = self.workspace, snapshot.head
        backbone = work.backbone
        shares = TaskShares(snapshot.tasks, snapshot.gate, counted=False)
        plain = snapshot.bank.recall(snapshot.gate)
        seen = watched(snapshot.bank, snapshot.gate, shares)
        by_cosine = snapshot.state.head.kind in ("prototype", "text")

        def run(batch: Tensor) -> Tensor:
            pixels = backbone.preprocess(batch)
            if head.owners is None:
                features = backbone.features(pixels, plain)
                if by_cosine:  # the head has scaled directions: those logits, and probabilities
                    features = F.normalize(features.float(), dim=-1)
                return head(features, features.new_zeros(len(batch), 1), allowed)
            features = backbone.features(pixels, seen)
            return head(features, shares.taken().mean(dim=1), allowed)

        return work.engine.predict(run, images)

    def prediction(self, snapshot: AtomSnapshot, images: Images) -> Prediction:
        """The most probable class of the first image."""
        scores, head = self.scores(snapshot, images[:1]), snapshot.head
        mixed = head.owners is not None
        probabilities = head.probabilities(scores)[0] if mixed else scores[0].softmax(0)
        features = self.workspace.features(images[:1], snapshot.bank.recall(snapshot.gate))
        statistics = feature_statistics(snapshot.view, snapshot.tasks)
        return predicted(
            probabilities, snapshot.state.class_names, seen_before(features, statistics)
        )

    def accuracy(self, snapshot: AtomSnapshot, task: Task, setting: str) -> float | None:
        """Share of a task's test images that are classified right.

        None for til and a task that is not in memory: none of its classes is known.
        """
        if setting == "til" and task.number not in snapshot.tasks:
            return None
        allowed = task.classes if setting == "til" else None
        return share_right(self.scores(snapshot, task.test.images, allowed), task.test)

    def zero_shot(self, task: Task, setting: str) -> float:
        """Share of a task's test images that the frozen model has right, under a fixed head."""
        head = self.workspace.fixed_head.to("cpu")
        allowed = task.classes if setting == "til" else None
        scores = head(self.workspace.features(task.test.images), allowed)
        return share_right(scores, task.test)

    def shares(self, snapshot: AtomSnapshot, images: Images) -> tuple[Tensor, tuple[int, ...]]:
        """The counted shares (n, blocks, tasks) of images, as in `TaskShares`, and the blocks."""
        work = self.workspace
        return task_shares(
            work.engine, work.backbone, snapshot.bank, snapshot.gate, snapshot.tasks, images
        )

    def task_accuracy(self, snapshot: AtomSnapshot, tasks: Sequence[Task]) -> float:
        """Share of test images in which the atoms of their own task have most of the weight."""
        right, total = 0, 0
        for task in tasks:
            shares, _ = self.shares(snapshot, task.test.images)
            most = shares.mean(dim=1).argmax(dim=1).tolist()
            right += sum(snapshot.tasks[place] == task.number for place in most)
            total += len(most)
        return right / max(total, 1)

    def contributions(
        self, snapshot: AtomSnapshot, images: Sequence[Images]
    ) -> Mapping[str, Tensor]:
        """What every atom adds on average, by site, as in `atom_watch.contributions`."""
        work = self.workspace
        return contributions(work.engine, work.backbone, snapshot.bank, snapshot.gate, images)

    def top_atoms(self, snapshot: AtomSnapshot, images: Images) -> tuple[AtomWeight, ...]:
        """The atoms that add most, as in `strongest`."""
        return strongest(snapshot.view, snapshot.bank, self.contributions(snapshot, [images]))

    def use(self, snapshot: AtomSnapshot, banks: Sequence[Rank1Memory]) -> AtomUse:
        """Drift of the atoms of every task, bank by bank, and who uses them in the last one."""
        work, shared, drifts = self.workspace, [], []
        told = work.telling("evaluate: use of atoms", snapshot.tasks)
        for place, number in enumerate(told):
            images = first(work.task(str(number)).test, DRIFT_SAMPLES).images
            drifts.append(
                frozen_drift(
                    work.engine,
                    work.backbone,
                    banks[place],
                    banks[place:],
                    snapshot.gate,
                    number,
                    images,
                )
            )
            shared.append(self.shares(snapshot, images)[0])
        return used(drifts, shared)


def used(drifts: Sequence[Sequence[Drift]], shares: Sequence[Tensor]) -> AtomUse:
    """How atoms are used, tasks in the order learned.

    `drifts[j][i]` is that of the atoms of task j in the bank after task j + i, `shares[j]` the
    shares (n, blocks, tasks) of the samples of task j in the last bank.
    """
    count = len(drifts)

    def table(name: str) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(
                getattr(drifts[task][after - task], name) if task <= after else None
                for task in range(count)
            )
            for after in range(count)
        )

    reused = tuple(tuple(each.double().mean(dim=(0, 1)).tolist()) for each in shares)
    return AtomUse(norm=table("norm"), difference=table("difference"), reuse=reused)


def strongest(
    view: MemoryView, bank: Rank1Memory, added: Mapping[str, Tensor]
) -> tuple[AtomWeight, ...]:
    """The atoms of a version that add most, as a share of what all atoms of their site add.

    `added` by site is what every atom adds, (n,).
    """
    found = []
    for site, each in added.items():
        ranks = view.atoms(site).rank
        owners = bank.bank(site).owner.tolist()
        total = float(each.sum())
        for place in each.topk(min(TOP_ATOMS, len(each))).indices.tolist():
            share = float(each[place]) / total if total else 0.0
            found.append(
                AtomWeight(site=site, task=owners[place], rank=int(ranks[place]), share=share)
            )
    return tuple(sorted(found, key=lambda atom: -atom.share)[:TOP_ATOMS])


def use_metrics(use: AtomUse) -> dict[str, float]:
    """The metrics of a bank that has grown: means over the tasks but the last, or but the first."""
    found = {}
    for name, table in (("atom_norm", use.norm), ("atom_drift", use.difference)):
        known = [value for value in table[-1][:-1] if value is not None]
        if known:
            found[name] = sum(known) / len(known)
    found["atom_reuse"] = reuse(use.reuse)
    return found
