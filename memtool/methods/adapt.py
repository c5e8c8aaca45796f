"""Stage 1, adaptation: train the adapters of one task on a frozen backbone.

The J adapters of a task differ by seed and bootstrap sample and are trained in one pass: every
batch holds J groups, group j runs through adapter j and head j. Each ends as if it had been trained
alone: loss, clipping and optimiser of an adapter know nothing of the others. Heads start at zero: a
head that starts as a good probe of the frozen features leaves the adapters little to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.adapters.values import AdapterValues
from memtool.backbones.interface import Backbone
from memtool.config import AdapterSettings, TrainSettings
from memtool.engine import Batch, Batches, Engine, FitResult
from memtool.heads import LinearClassifier
from memtool.methods.recall import MemoryModel, every, on_top
from memtool.progress import Progress
from memtool.streams.task import Samples


@dataclass(frozen=True)
class Adapted:
    """J trained adapters: values (J, numel), one classifier each, and how training went."""

    values: Tensor
    heads: tuple[LinearClassifier, ...]
    train_accuracy: tuple[float, ...]
    fit: FitResult


class AdapterTraining(nn.Module):
    """J adapters with a linear head each, over a frozen backbone.

    `forward(images)` maps uint8 images (J · b, h, w, 3), group by group, to logits (J, b, classes);
    logits of classes that are not in the task are −inf.
    """

    def __init__(
        self,
        backbone: Backbone,
        values: AdapterValues,
        head: LinearClassifier,
        classes: Sequence[int],
        beneath: MemoryModel | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.values = values
        self._beneath = beneath
        count = len(values)
        self.weight = nn.Parameter(head.weight.unsqueeze(0).repeat(count, 1, 1))
        self.bias = nn.Parameter(head.bias.unsqueeze(0).repeat(count, 1))
        mask = torch.full((len(head.bias),), -torch.inf)
        mask[list(classes)] = 0.0
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (J, b, classes)."""
        pixels = self.backbone.preprocess(images)
        recall = every(self.values)
        if self._beneath is not None:
            recall = on_top(self._beneath.recall(pixels), self.values)
        features = self.backbone.features(pixels, recall)
        grouped = features.reshape(len(self.values), -1, features.shape[-1])
        logits = torch.baddbmm(self.bias.unsqueeze(1), grouped, self.weight.transpose(1, 2))
        return logits.float() + self.mask


def adapt(
    engine: Engine,
    backbone: Backbone,
    layout: Layout,
    samples: Samples,
    *,
    classes: Sequence[int],
    class_count: int,
    adapter: AdapterSettings,
    train: TrainSettings,
    seed: int,
    start: Tensor | None = None,
    head: LinearClassifier | None = None,
    beneath: MemoryModel | None = None,
    fingerprint: str = "",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    stage: str = "adapt",
) -> Adapted:
    """Train `adapter.per_task` adapters on `samples`.

    `start` (numel,) is the value that training starts from; none: A random, B zero.
    `head` is the classifier that it starts from; none: zero. `beneath` is a memory whose recalled
    mixture the adapters are trained on top of (residual adapters).
    """
    generator = engine.generator(seed)
    values = init_lora(layout, adapter.per_task, generator=generator)
    if start is not None:
        values = start.unsqueeze(0).repeat(adapter.per_task, 1)
    scaling = adapter.alpha / adapter.rank
    stack = AdapterValues.from_flat(values, layout, scaling, trainable=True).to(engine.device)
    if head is None:
        head = LinearClassifier(torch.zeros(class_count, backbone.dim), torch.zeros(class_count))
    module = AdapterTraining(backbone, stack, head, classes, beneath)
    batches = Batches(
        samples.images,
        samples.labels,
        train.batch_size,
        train.epochs,
        seed,
        groups=adapter.per_task,
    )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return losses(model(augmented(batch, train)), batch)

    fit = engine.fit(
        module,
        batches,
        loss,
        train,
        stage=stage,
        fingerprint=fingerprint,
        checkpoint=checkpoint,
        progress=progress,
    )
    trained = stack.flat().cpu()
    heads = tuple(
        LinearClassifier(w.detach().cpu().clone(), b.detach().cpu().clone())
        for w, b in zip(module.weight, module.bias, strict=True)
    )
    return Adapted(trained, heads, _accuracies(engine, module, samples), fit)


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy (J,) of every group of a batch, of logits (J, b, classes)."""
    each = F.cross_entropy(logits.flatten(0, 1), batch.labels, reduction="none")
    return (each * batch.weights).view(len(logits), -1).mean(dim=1)


def augmented(batch: Batch, settings: TrainSettings) -> Tensor:
    """The images as they are, or every one mirrored by chance and cropped from a padded frame.

    The copies of a bootstrap sample, which are one image of the batch, share a draw.
    """
    images = batch.inputs
    if settings.augment == "none":
        return images
    generator = torch.Generator().manual_seed(batch.seed)
    count, height, width, _ = images.shape
    pad = max(1, height // 8)
    mirrored = torch.rand(count, generator=generator) < 0.5
    offset = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator).to(images.device)
    mirrored = mirrored.to(images.device)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)
    channels_first = images.permute(0, 3, 1, 2).float()
    padded = F.pad(channels_first, (pad, pad, pad, pad), mode="reflect").to(torch.uint8)
    rows = offset[:, :1] + torch.arange(height, device=images.device)
    columns = offset[:, 1:] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]


def _accuracies(engine: Engine, module: AdapterTraining, samples: Samples) -> tuple[float, ...]:
    """Training accuracy of every adapter with its own head."""
    count = len(module.values)

    def predicted(images: Tensor) -> Tensor:
        return module(images.repeat(count, 1, 1, 1)).argmax(dim=-1).T

    size = max(1, engine.settings.eval_batch_size // count)
    classes = engine.predict(predicted, samples.images, batch_size=size)
    right = classes == torch.from_numpy(samples.labels).unsqueeze(1)
    return tuple(right.double().mean(dim=0).tolist())
