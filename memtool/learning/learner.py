"""Adapters that learn task after task under an objective: the loop of everything that is trained.

`Learner` as it stands is sequential LoRA. Every other way to learn is a subclass that changes one
of its hooks (what happens before a task, the penalty of a step, what is kept after a task, which
adapters a block uses), so that backbone, start, data, order of batches, epochs and optimiser are
the same for all. It knows nothing of images or texts: its objective does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtool.adapters.recalls import dropping, every
from memtool.adapters.values import AdapterValues, Recall
from memtool.engine import Batch, Batches, FitResult
from memtool.evaluation.record import Kind
from memtool.learning.mixup import mixing
from memtool.learning.objective import Objective, objective_of
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Learner(nn.Module):
    """Sequential LoRA: each task starts from what the one before left, nothing protects it.

    `values` are the adapters, `objective` has the head, `seen` the tasks that were learned, `label`
    is what its rows are called.
    `forward(inputs, targets, seed)` gives the logits of `Objective.logits`.
    """

    id: ClassVar[str] = "sequential"
    title: ClassVar[str] = "sequential LoRA"
    kind: ClassVar[Kind] = "baseline"
    replay: ClassVar[bool] = False
    """Whether it keeps samples of earlier tasks."""

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        """Fresh adapters, to learn so many tasks; `objective`: none for that of the workspace."""
        super().__init__()
        self.work = work
        self.tasks = tasks
        self.seen: list[Task] = []
        self.label = self.title
        self.begin()
        self.objective: Any = objective or objective_of(work)
        self.to(work.engine.device)

    def begin(self) -> None:
        """Make the adapters that learn."""
        self.values: AdapterValues = self.fresh(1)

    def fresh(self, count: int) -> AdapterValues:
        """New adapters for the next task."""
        return self.work.fresh(count, len(self.seen) + 1)

    def recall(self) -> Recall | None:
        """The adapters that a block uses."""
        return every(self.values)

    def before_task(self, task: Task) -> None:
        """What changes before a task trains; `seen` holds the tasks before it."""

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """What the loss of a step has beside that of the objective; logits are those of inputs."""
        del inputs, targets
        return logits.new_zeros(())

    def after_step(self) -> None:
        """What a step changes after its optimiser."""

    def after_task(self, task: Task) -> None:
        """What is kept of a task that was trained; `seen` does not hold it yet."""

    def rate_of(self, name: str) -> float:
        """The factor on the learning rate of a parameter."""
        del name
        return 1.0

    def asked(self, task: Task) -> Sequence[str]:
        """What a language model is asked in a test of a task of texts."""
        prompts: Sequence[str] = task.test.prompts
        return prompts

    def forward(self, inputs: Tensor, targets: Tensor | None = None, seed: int = 0) -> Tensor:
        """Logits of inputs; targets are on the CPU, `seed` is that of the dropout of adapters."""
        recall = dropping(self.recall(), self.objective.dropout, seed, inputs.device)
        logits: Tensor = self.objective.logits(inputs, targets, recall)
        return logits

    def learn(
        self,
        task: Task,
        stage: str,
        *,
        fingerprint: str = "",
        checkpoint: Path | None = None,
    ) -> FitResult:
        """Train on one task: the loss of the objective plus the penalty.

        Arguments and errors as `Engine.fit`.
        """
        work, settings = self.work, self.work.config.train
        self.before_task(task)
        self.objective.begin(task)
        inputs, targets = self.objective.arrays(task.train)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            mixed = mixing(batch, settings.mixup, of_class=settings.mixup_of == "class")
            prepared = mixed.inputs(self.objective.prepared(batch))
            logits = model(prepared, batch.told, batch.seed)
            targets = self.objective.targets(batch)
            found = mixed.loss(lambda each: self.objective.loss(logits, prepared, each), targets)
            return found + self.penalty(prepared, targets, logits)

        self.train()
        fit = work.engine.fit(
            self,
            Batches(
                inputs,
                targets,
                settings.batch_size,
                work.epochs(task),
                work.training_seed(task.number),
                narrowed=self.objective.narrowed,
            ),
            loss,
            settings,
            stage=stage,
            fingerprint=fingerprint,
            checkpoint=checkpoint,
            after_step=self.after_step,
            rate_of=self.rate_of,
            progress=work.progress,
        )
        self.eval()
        self.objective.end(self.recall())
        self.after_task(task)
        self.seen.append(task)
        return fit

    @torch.no_grad()
    def features_of(self, samples: Any) -> Tensor:
        """Features (n, dim) of images as the model is now, on the CPU."""
        recall = self.recall()
        return self.work.engine.predict(
            lambda images: self.objective.features(images, recall), samples.images
        )
