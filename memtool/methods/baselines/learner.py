"""One LoRA and one linear head that learn task after task: the loop of all trained baselines.

`Learner` as it stands is sequential LoRA. Every other method is a subclass that changes one of its
hooks (what happens before a task, the penalty of a step, what is kept after a task, which adapters
a block uses), so that backbone, start, data, order of batches, epochs and optimiser are the same
for all, and those of the memory's stage 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.values import AdapterValues, Recall
from memtool.engine import Batch, Batches
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row
from memtool.heads import CosineHead, LinearClassifier, LinearHead, both_ways
from memtool.methods.adapt import augmented, class_mask
from memtool.methods.baselines.reading import TITLES, ClosedForms, Predict, Reading, accuracies
from memtool.methods.fixed_head import PromptTokens, compared, is_fixed
from memtool.methods.recall import every
from memtool.methods.subject import joined
from memtool.methods.workspace import Workspace
from memtool.streams.task import Samples, Task

READINGS: tuple[Reading, ...] = ("linear", "ridge", "lda", "routed")

FIXED_READINGS: tuple[Reading, ...] = ("fixed", "lda")
"""Those under a head that is fixed in advance; LDA knows only the classes learned so far."""


class Learner(nn.Module):
    """Sequential LoRA: each task starts from what the one before left, nothing protects it.

    `forward(images)` maps uint8 images (b, h, w, 3) to logits (b, classes) of all classes of the
    stream. Parameters: A and B of `values`, and `head`, which starts at zero. A head that is fixed
    in advance (`methods.fixed_head`) has no parameters; that of a text tower moves with the text
    adapters: `text` holds its prompts, and `head` is as the last task left it.
    """

    id: ClassVar[str] = "sequential"
    title: ClassVar[str] = "sequential LoRA"

    def __init__(self, work: Workspace, tasks: int) -> None:
        """A fresh adapter and head, to learn so many tasks."""
        super().__init__()
        self.work = work
        self.tasks = tasks
        self.seen: list[Task] = []
        self.backbone = work.backbone
        self.values = self.fresh(1)
        self.text: PromptTokens | None = None
        self.head: LinearHead | CosineHead
        if is_fixed(work.config):
            self.head = work.fixed_head
            if work.config.head.kind == "text":
                self.text = PromptTokens(work.backbone, work.stream)
        else:
            self.head = LinearHead(work.backbone.dim, len(work.stream.class_names))
        self.to(work.engine.device)

    def fresh(self, count: int) -> AdapterValues:
        """New adapters for the next task."""
        return self.work.fresh(count, len(self.seen) + 1)

    def recall(self) -> Recall | None:
        """The adapters that a block uses."""
        return every(self.values)

    def features(self, images: Tensor) -> Tensor:
        """Features (b, dim)."""
        return self.backbone.features(self.backbone.preprocess(images), self.recall())

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (b, classes), float32.

        With `labels` (b,) a text tower reads the prompts of these classes anew, so that it learns;
        all others then have −infinity.
        """
        head = self.head
        if self.text is not None and labels is not None:
            head = self.text.head(self.backbone, self.recall(), labels.unique())
        logits: Tensor = head(self.features(images))
        return logits.float()

    def before_task(self, task: Task) -> None:
        """What changes before a task trains; `seen` holds the tasks before it."""

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor:
        """What the loss of a step has beside the cross-entropy; logits are those of the images."""
        del images
        return logits.new_zeros(())

    def after_task(self, task: Task) -> None:
        """What is kept of a task that was trained; `seen` does not hold it yet."""

    def rate_of(self, name: str) -> float:
        """The factor on the learning rate of a parameter."""
        del name
        return 1.0

    def learn(self, task: Task, stage: str) -> None:
        """Train on one task: cross-entropy over its classes (`compared`), plus the penalty.

        With a text tower, cross-entropy from images to texts and back over the classes of a batch.
        """
        work, settings = self.work, self.work.config.train
        classes = compared(work.config, work.stream, task)
        mask = class_mask(classes, self.head.classes).to(work.engine.device)
        self.before_task(task)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            images = augmented(batch, settings)
            if self.text is not None:
                logits = model(images, batch.labels)
                return both_ways(logits, batch.labels) + self.penalty(images, logits)
            logits = model(images)
            return F.cross_entropy(logits + mask, batch.labels) + self.penalty(images, logits)

        work.engine.fit(
            self,
            Batches(
                task.train.images,
                task.train.labels,
                settings.batch_size,
                settings.epochs_for(len(task.train), 1 if task.number else len(work.stream.tasks)),
                work.training_seed(task.number),
            ),
            loss,
            settings,
            stage=stage,
            rate_of=self.rate_of,
            progress=work.progress,
        )
        if self.text is not None:
            with torch.no_grad(), work.engine.autocast():
                every_class = range(len(work.stream.class_names))
                self.head = self.text.head(self.backbone, self.recall(), every_class)
        self.after_task(task)
        self.seen.append(task)

    def features_of(self, samples: Samples) -> Tensor:
        """Features (n, dim) of samples as the model is now, on the CPU."""
        return self.work.engine.predict(self.features, samples.images)

    def classifier(self) -> LinearClassifier | CosineHead:
        """A copy of the head as it is now."""
        return self.head if isinstance(self.head, CosineHead) else self.head.classifier()

    def linear(self) -> Predict:
        """The head as it is now, for features on the CPU."""
        return self.classifier().to("cpu")


def in_turn(kind: type[Learner], work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """Learn task after task; one row with the whole matrix for every way to read the features.

    A head that is fixed in advance is read before the first task, too. Seconds are those of
    learning and of counting features, without the tests.
    """
    learner = kind(work, len(tasks))
    closed = ClosedForms(work, len(tasks))
    readings = FIXED_READINGS if is_fixed(work.config) else READINGS
    matrices = {
        reading: AccuracyMatrix.empty([task.name for task in tasks]) for reading in readings
    }
    samples = [task.test for task in tasks]
    if "fixed" in matrices:
        row = accuracies(learner.linear(), [learner.features_of(each) for each in samples], samples)
        matrices["fixed"] = matrices["fixed"].with_row(0, row)
    seconds = 0.0
    for number, task in enumerate(tasks, start=1):
        begin = time.perf_counter()
        learner.learn(task, f"task {number}/{len(tasks)} {task.name}: baseline, {kind.title}")
        closed.count(learner.features_of(task.train), task)
        seconds += time.perf_counter() - begin
        test = [learner.features_of(each) for each in samples]
        for reading in readings:
            trained = reading in ("linear", "fixed")
            predict = learner.linear() if trained else closed.solve(reading)
            row = accuracies(predict, test, samples)
            matrices[reading] = matrices[reading].with_row(number, row)
    return [
        Row.measured(
            kind.id if reading in ("linear", "fixed") else f"{kind.id}-{reading}",
            f"{kind.title}, {TITLES[reading]}",
            "baseline",
            matrix,
            seconds=seconds,
        )
        for reading, matrix in matrices.items()
    ]


def pooled(tasks: Sequence[Task]) -> Task:
    """All tasks as one, its images copied into memory.

    Its number is 0. Epochs over it are as many steps as the same epochs over every task, but for
    the last and smaller batches of the tasks.
    """
    return Task(
        number=0,
        name="all tasks",
        domain=None,
        classes=tuple(sorted({one for task in tasks for one in task.classes})),
        train=joined([task.train for task in tasks]),
        validation=joined([task.validation for task in tasks]),
        test=joined([task.test for task in tasks]),
    )
