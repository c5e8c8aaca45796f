"""New atoms learn a task, on top of the frozen atoms before."""

from __future__ import annotations

from typing import ClassVar

from memtool.adapters.atoms import AtomGate
from memtool.adapters.values import Recall
from memtool.evaluation.record import Kind
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.learning.past_inputs import PastInputs
from memtool.memories.rank1 import Rank1Memory, init_atoms
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
