"""A memory of atoms attached to its model: it classifies images, or answers prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.atoms import AtomGate, ModuleAtoms
from memtool.adapters.values import Recall
from memtool.backbones.causal_lm import CausalLM
from memtool.backbones.interface import Backbone
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.attached import (
    AttachedImages,
    AttachedTexts,
    HeadModule,
    Output,
    finite,
    require_texts,
    unknown,
)
from memtool.methods.moram.state import AtomSnapshot
from memtool.methods.moram.watch import TaskShares, watched
from memtool.methods.records import task_of


class AttachedAtoms(AttachedImages):
    """A bank of rank-1 atoms that activate themselves (MoRAM)."""

    def __init__(self, backbone: Backbone, snapshot: AtomSnapshot, precision: str) -> None:
        super().__init__(backbone, precision)
        self.bank: Rank1Memory = snapshot.bank
        self.gate: AtomGate = snapshot.gate
        self.tasks = snapshot.tasks
        state, head = snapshot.of_images()
        self.head = HeadModule(head)
        self.by_cosine = state.head.kind in ("prototype", "text")
        self.reaches = snapshot.reaches()

    def hold_all(self) -> None:
        """As `AttachedImages.hold_all`."""
        self.reaches.hold_all()

    def seen(self, pixels: Tensor) -> Output:
        """As `AttachedImages.seen`, in one pass."""
        counted = TaskShares(self.tasks, self.gate)
        whole = TaskShares(self.tasks, self.gate, counted=False)

        def watch(atoms: ModuleAtoms, x: Tensor) -> None:
            counted(atoms, x)
            if self.head.owners is not None:
                whole(atoms, x)

        features = self.backbone.features(pixels, watched(self.bank, self.gate, watch))
        weights = counted.taken().mean(dim=1)
        asked = F.normalize(features.float(), dim=-1) if self.by_cosine else features
        shares = weights if self.head.owners is None else whole.taken().mean(dim=1)
        logits, probabilities = self.head(asked, shares)
        far = self.reaches((features.float().unsqueeze(0),), weights)
        novelty = unknown(features) if far is None else finite(far, features)
        return Output(logits, probabilities, weights, novelty)


class AttachedAnswers(AttachedTexts):
    """A bank of rank-1 atoms on a language model: it answers prompts."""

    def __init__(self, lm: CausalLM, snapshot: AtomSnapshot, precision: str) -> None:
        super().__init__(lm, precision)
        self.bank: Rank1Memory = snapshot.bank
        self.gate: AtomGate = snapshot.gate
        self.tasks = snapshot.tasks
        rows = {task_of(record): record.name for record in snapshot.view.atom_records}
        self._names = tuple(rows[task] for task in snapshot.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """The rows of atoms, one a task, in the order of their weights."""
        return self._names

    def recall(self, prompts: Tensor) -> Recall:
        """What the model recalls, token by token, whatever the prompts are."""
        del prompts
        return self.bank.recall(self.gate)

    @torch.no_grad()
    def weights(self, prompts: Sequence[str]) -> Tensor:
        """Whose atoms prompts choose: (n, tasks), mean over tokens, sites and blocks."""
        require_texts(prompts)
        shares = TaskShares(self.tasks, self.gate)
        recall = watched(self.bank, self.gate, shares)
        found = []
        for prompt in prompts:  # one by one: padding is no token
            tokens = self.backbone.encode([prompt]).tokens.to(self.backbone.device)
            with self.computing():
                self.backbone.hidden(tokens, recall)
            found.append(shares.taken().mean(dim=1))
        return torch.cat(found) if found else torch.zeros(0, len(self.tasks))
