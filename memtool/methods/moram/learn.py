"""New atoms learn a task, on top of the frozen atoms before."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

import memtool_stores
from memtool.adapters.atoms import AtomGate
from memtool.adapters.values import Recall
from memtool.evaluation.record import Kind
from memtool.heads import LinearClassifier, RecalledHead
from memtool.heads.solve import grown
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.learning.past_inputs import PastInputs
from memtool.memories.rank1 import Rank1Memory, init_atoms
from memtool.methods.in_store import HEAD
from memtool.pictured import as_json
from memtool.streams.task import Task
from memtool.workspace import Workspace


class AtomLearner(Learner):
    """r new atoms a task at every adapted map; the older ones are frozen.

    `bank` holds the atoms of the tasks before, frozen, and is read through `gate`. With a `past`
    the keys of new atoms are not random: they lie where it has no inputs, and do not learn.
    """

    id: ClassVar[str] = "moram"
    title: ClassVar[str] = "MoRAM"
    kind: ClassVar[Kind] = "method"

    def __init__(
        self,
        work: Workspace,
        bank: Rank1Memory,
        gate: AtomGate,
        *,
        objective: Objective | None = None,
        past: PastInputs | None = None,
    ) -> None:
        super().__init__(work, 1, objective)
        self.gate = gate
        self.past = past
        self.bank = bank.to(work.engine.device)

    def begin(self) -> None:
        """The atoms are given."""

    def recall(self) -> Recall | None:
        """All atoms, for every token to choose among; nothing before the first."""
        return self.bank.recall(self.gate) if len(self.bank) else None

    def before_task(self, task: Task) -> None:
        """Add atoms that learn and change nothing yet.

        Raises MismatchError where `moram.topk` asks for more atoms than there are then.
        """
        work = self.work
        if self.past is None:
            generator = work.engine.generator(work.training_seed(task.number))
            start = init_atoms(work.layout, generator=generator)
        else:
            moments = self.objective.input_moments(self.past, task.train, self.recall())
            start = self.past.free_branch(moments)[0]
        self.bank.grow(
            start.to(work.engine.device),
            rank=work.config.adapter.rank,
            owner=task.number,
            scaling=work.scaling,
            keys_learn=self.past is None,
        )
        if work.config.moram.topk is not None:
            self.bank.check_topk(self.gate.topk)


def head_to_go_on_from(work: Workspace, view: memtool_stores.MemoryView) -> LinearClassifier | None:
    """The head of the tasks before, where it learns on (head.kind shared); of images."""
    if work.reads == "texts" or work.config.head.kind != "shared" or not view.has_blob(HEAD):
        return None
    classes = len(work.stream.class_names)
    zero = LinearClassifier(torch.zeros(classes, work.backbone.dim), torch.zeros(classes))
    known = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
    return grown([zero, LinearClassifier(known.weight[0], known.bias[0])])


def decides_of_texts(work: Workspace, task: Task, beneath: str) -> dict[str, Any]:
    """All that decides what training a task of texts on top of `beneath` gives. JSON values."""
    config = work.config
    return {
        "backbone": work.backbone.sha256,
        "task": [task.number, task.name, as_json(task.train.prompts), task.train.answers],
        "epochs": work.epochs(task),
        "targets": config.backbone.targets,
        "settings": {
            part: getattr(config, part).decides() for part in ("adapter", "train", "moram")
        },
        "text": work.text_settings(),
        "seed": work.seed,
        "beneath": beneath,
    }
