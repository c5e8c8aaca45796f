"""Stage 1 of MoRAM: new atoms and a head learn a task, on top of the frozen atoms before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.atoms import AtomGate
from memtool.backbones.interface import Backbone
from memtool.engine import Batch, Batches
from memtool.heads import LinearClassifier
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.adapt import Adapted, augmented, class_mask, require_learned
from memtool.methods.fixed_head import FixedHeadTraining, is_fixed
from memtool.methods.measure import share_right
from memtool.methods.workspace import Workspace
from memtool.streams.task import Task


class AtomTraining(nn.Module):
    """The newest atoms of a bank with a linear head, over a frozen backbone.

    `forward(images)` maps uint8 images (b, h, w, 3) to logits (b, classes); logits of classes that
    are not in the task are −inf.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: Rank1Memory,
        gate: AtomGate,
        head: LinearClassifier,
        classes: Sequence[int],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.bank = bank
        self.gate = gate
        self.weight = nn.Parameter(head.weight.clone())
        self.bias = nn.Parameter(head.bias.clone())
        self.mask: Tensor
        self.register_buffer("mask", class_mask(classes, len(head.bias)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes)."""
        pixels = self.backbone.preprocess(images)
        features = self.backbone.features(pixels, self.bank.recall(self.gate))
        return F.linear(features, self.weight, self.bias).float() + self.mask

    def classifier(self) -> LinearClassifier:
        """A copy of the head as it is now, on the CPU."""
        return LinearClassifier(
            self.weight.detach().cpu().clone(), self.bias.detach().cpu().clone()
        )


def train_atoms(
    work: Workspace,
    task: Task,
    bank: Rank1Memory,
    gate: AtomGate,
    head: LinearClassifier,
    *,
    seed: int,
    fingerprint: str,
    checkpoint: Path,
    stage: str,
) -> Adapted:
    """Train the atoms of `bank` that learn, with a head that starts as `head`, on a task.

    A head that is fixed in advance stands in its place. Raises DivergedError where training ended
    worse than it began.
    """
    train = work.config.train
    module: AtomTraining | FixedHeadTraining
    if is_fixed(work.config):
        module = FixedHeadTraining(work, bank, lambda: bank.recall(gate), task)
    else:
        module = AtomTraining(work.backbone, bank, gate, head, task.classes)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images = augmented(batch, train)
        if isinstance(module, FixedHeadTraining):
            found: Tensor = model(images, batch.labels)
            return found
        return F.cross_entropy(model(images), batch.labels)

    fit = work.engine.fit(
        module,
        Batches(
            task.train.images,
            task.train.labels,
            train.batch_size,
            train.epochs_for(len(task.train)),
            seed,
        ),
        loss,
        train,
        stage=stage,
        fingerprint=fingerprint,
        checkpoint=checkpoint,
        progress=work.progress,
    )
    module.eval()
    accuracy = share_right(work.engine.predict(module, task.train.images), task.train)
    values = bank.fresh().cpu().unsqueeze(0)
    require_learned(fit, len(task.classes), [values], train.lr, stage)
    return Adapted(values, (module.classifier(),), (accuracy,), fit)
