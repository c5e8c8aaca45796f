"""Stage 1, adaptation: train the adapters of a task, with a head, on a frozen backbone.

The J adapters of a task differ by seed, and perhaps by bootstrap sample (`adapter.differ_by`), and
are trained in one pass: every batch holds J groups, group j runs through adapter j and head j. Each
ends as if it had been trained alone: loss, clipping and optimiser of an adapter know nothing of the
others. So the adapters of K tasks can be trained in one pass as well: a step holds the batches that
each task would have alone, and the K · J groups run through the model together. Heads start at
zero: a head that starts as a good probe of the frozen features leaves the adapters little to learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.adapters.recalls import every, on_top
from memtool.adapters.values import AdapterValues, Recall
from memtool.engine import Batch, Batches, Engine, FitResult, Joint, Together, available_bytes
from memtool.errors import CapacityError, DivergedError
from memtool.heads import CosineHead, LinearClassifier
from memtool.learning.augment import augmented
from memtool.learning.looks import FeatureModel, Labelled, narrowed_for
from memtool.learning.mixup import mixing
from memtool.learning.onward import from_block
from memtool.progress import Progress
from memtool.settings import AdapterSettings, TrainSettings
from memtool.streams.task import Images

BYTES_TO_TRAIN = 16
"""Of a parameter in float32: itself, its gradient and the two moments of AdamW."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the adapters of one task learn from.

    `classes` are those that an image is told apart from, `seed` is that of all draws. `start`
    (numel,) is the value that training starts from; none: A random, B zero. `stage` is what
    progress and errors call it.
    """

    samples: Images | Labelled
    classes: Sequence[int]
    seed: int
    start: Tensor | None = None
    stage: str = "adapt"


@dataclass(frozen=True)
class Adapted:
    """J trained adapters: values (J, numel), one classifier each, and how training went.

    `heads` and `train_accuracy` are empty where answers were learned.
    """

    values: Tensor
    heads: tuple[LinearClassifier, ...]
    train_accuracy: tuple[float, ...]
    fit: FitResult


class Beneath(Protocol):
    """What residual adapters are trained on top of: a memory."""

    def recall(self, inputs: Tensor) -> Recall:
        """What it recalls for preprocessed images."""


class AdapterTraining(nn.Module):
    """Adapters with a linear head each, over a frozen backbone: J of each of K tasks, J K in all.

    `forward(images)` maps uint8 images (J K · b, h, w, 3), or prompts (J K · b, n), group by group,
    to logits (J K, b, classes); logits of classes that are not in the task are −inf.
    """

    def __init__(
        self,
        backbone: FeatureModel,
        values: AdapterValues,
        head: LinearClassifier,
        classes: Sequence[Sequence[int]],
        beneath: Beneath | None = None,
        known: CosineHead | None = None,
        *,
        biased: bool = True,
    ) -> None:
        """`classes` are those of every task, and `values` the adapters of one task after another.

        `head` is what the classifier of an adapter begins as: one for all, or stacked one each.
        `known` stands for the heads where all classes are known in advance: none learns. Heads that
        are not `biased` keep their bias of zero.
        """
        super().__init__()
        self.backbone = backbone
        self.values = values
        self._beneath = beneath
        self._known = known
        count, learns = len(values), known is None
        weight = head.weight.expand(count, -1, -1).clone()
        bias = head.bias.expand(count, -1).clone()
        self.weight = nn.Parameter(weight, requires_grad=learns)
        self.bias = nn.Parameter(bias, requires_grad=learns and biased)
        self.mask: Tensor
        masks = torch.stack([class_mask(some, bias.shape[1]) for some in classes])
        each = masks.repeat_interleave(count // len(classes), dim=0)
        self.register_buffer("mask", each.unsqueeze(1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (J K, b, classes)."""
        pixels = self.backbone.preprocess(images)
        recall = every(self.values)
        if self._beneath is not None:
            recall = on_top(self._beneath.recall(pixels), self.values)
        features = self.backbone.features(pixels, recall)
        grouped = features.reshape(len(self.values), -1, features.shape[-1])
        if self._known is not None:
            return self._known(grouped) + self.mask
        logits = torch.baddbmm(self.bias.unsqueeze(1), grouped, self.weight.transpose(1, 2))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.mask


def class_mask(classes: Sequence[int], count: int) -> Tensor:
    """What leaves only some of `count` classes when it is added to logits: 0, or −inf (count,)."""
    mask = torch.full((count,), -torch.inf)
    mask[list(classes)] = 0.0
    return mask


def adapt(
    engine: Engine,
    backbone: FeatureModel,
    layout: Layout,
    lessons: Sequence[Lesson],
    *,
    class_count: int,
    adapter: AdapterSettings,
    train: TrainSettings,
    beneath: Beneath | None = None,
    known: CosineHead | None = None,
    biased: bool = True,
    fingerprint: str = "",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> list[Adapted]:
    """Train `adapter.per_task` adapters of every task in one pass: each as if it were alone.

    The batches of several tasks have one `rhythm`, and their images one size. `train.stop_at` is
    for one task.
    The blocks before the first adapter run once for each image where that pays, see `from_block`.
    The classifier starts at zero; not `biased`, it is linear without a bias. `beneath` is a memory
    whose recalled mixture the adapters are trained on top of (residual adapters). With a `known`
    head, on the device of the engine, none learns, and the classes of a lesson are those that an
    image is told apart from.

    Raises CapacityError before anything is trained where the memory of the machine cannot hold it,
    and DivergedError, which names the stage, where training ended worse than it began.
    """
    head = LinearClassifier(torch.zeros(class_count, backbone.dim), torch.zeros(class_count))
    if known is not None:
        head = known.linear()
    one = AdapterValues.from_flat(torch.zeros(1, layout.numel), layout, 1.0, trainable=True).to(
        engine.device
    )
    first, count = lessons[0], adapter.per_task
    trial = AdapterTraining(backbone, one, head, [first.classes], beneath, known).to(engine.device)
    each = layout.numel + head.weight.numel()
    stage = first.stage + (f" and {len(lessons) - 1} more" if len(lessons) > 1 else "")
    samples = [lesson.samples for lesson in lessons]
    left = require_room(engine, trial, samples, each, adapter, train, stage)
    values = torch.cat([_begin(engine, layout, lesson, adapter) for lesson in lessons])
    scaling = adapter.alpha / adapter.rank
    stack = AdapterValues.from_flat(values, layout, scaling, trainable=True).to(engine.device)
    seen: FeatureModel = backbone
    given: Sequence[Images | Labelled] = samples
    if beneath is None:
        seen, given = from_block(engine, backbone, stack.begin, samples, train, left)
    narrowed = narrowed_for(backbone)
    batches = Together(
        tuple(
            replace(batches_of(lesson, adapter, train), inputs=some.inputs, narrowed=narrowed)
            for lesson, some in zip(lessons, given, strict=True)
        )
    )
    classes = [lesson.classes for lesson in lessons]
    module = AdapterTraining(seen, stack, head, classes, beneath, known, biased=biased)
    right = _Right(count)

    def loss(model: nn.Module, batch: Joint) -> Tensor:
        of_class = train.mixup_of == "class"
        mixed = [mixing(part, train.mixup, count, of_class=of_class) for part in batch.parts]
        inputs = [
            one.inputs(augmented(part.inputs, part.seed, train))
            for one, part in zip(mixed, batch.parts, strict=True)
        ]
        logits = model(_as_wide(inputs, count))
        if train.stop_at is not None:
            right.count(logits.detach(), batch.parts[0])
        each = []
        for one, part, wide in zip(mixed, batch.parts, logits.split(count), strict=True):
            own = wide[:, : len(part.labels) // count]
            of = partial(losses, own, weights=part.weights)
            each.append(one.loss(of, part.labels) * part.share)
        return torch.cat(each)

    fit = engine.fit(
        module,
        batches,
        loss,
        train,
        stage=stage,
        fingerprint=fingerprint,
        checkpoint=checkpoint,
        enough=None if train.stop_at is None else partial(right.all_above, train.stop_at),
        progress=progress,
    )
    values, found = stack.flat().cpu(), list[Adapted]()
    for place, (lesson, part) in enumerate(zip(lessons, fit.split(len(lessons)), strict=True)):
        own = slice(place * count, (place + 1) * count)
        require_learned(part, len(lesson.classes), [values[own]], train.lr, lesson.stage)
        adapters = AdapterValues.from_flat(values[own], layout, scaling)
        learned = LinearClassifier(module.weight.detach()[own], module.bias.detach()[own])
        alone = AdapterTraining(backbone, adapters, learned, [lesson.classes], beneath, known)
        accuracies = _accuracies(engine, alone.to(engine.device), lesson.samples)
        heads = zip(learned.weight.cpu(), learned.bias.cpu(), strict=True)
        own_heads = tuple(LinearClassifier(w.clone(), b.clone()) for w, b in heads)
        found.append(Adapted(values[own].clone(), own_heads, accuracies, part))
    return found


def batches_of(lesson: Lesson, adapter: AdapterSettings, train: TrainSettings) -> Batches:
    """The batches of the adapters of a task, in groups."""
    return Batches(
        lesson.samples.inputs,
        lesson.samples.labels,
        train.batch_size,
        train.epochs_for(len(lesson.samples)),
        lesson.seed,
        groups=adapter.per_task,
        bootstrap=adapter.differ_by == "bootstrap",
    )


def _begin(engine: Engine, layout: Layout, lesson: Lesson, adapter: AdapterSettings) -> Tensor:
    """What the adapters of a task begin as: flat values (J, numel)."""
    if lesson.start is not None:
        return lesson.start.unsqueeze(0).repeat(adapter.per_task, 1)
    generator = engine.generator(lesson.seed)
    return init_lora(layout, adapter.per_task, generator=generator, draw=adapter.draw)


def _as_wide(inputs: Sequence[Tensor], groups: int) -> Tensor:
    """Batches (J · b, ...) of several tasks as one whose groups are all as wide as the widest.

    Narrower ones repeat their last sample, whose logits nobody reads.
    """
    grouped = [some.unflatten(0, (groups, -1)) for some in inputs]
    widest = max(some.shape[1] for some in grouped)
    wide = []
    for some in grouped:
        missing = widest - some.shape[1]
        last = some[:, -1:].expand(-1, missing, *some.shape[2:])
        wide.append(torch.cat([some, last], dim=1) if missing else some)
    return torch.cat(wide).flatten(0, 1)


class _Right:
    """How many training samples of an epoch every adapter was right about, as it learned."""

    def __init__(self, groups: int) -> None:
        self._right: Tensor | None = None  # where the logits are
        self._groups, self._seen = groups, 0.0

    def count(self, logits: Tensor, batch: Batch) -> None:
        """Logits (J, b, classes) of a batch, before its step."""
        hit = logits.argmax(dim=-1).flatten() == batch.labels
        each = (hit * batch.weights).view(len(logits), -1)
        right = each.sum(dim=1)
        self._right = right if self._right is None else self._right + right
        self._seen += each.shape[1]

    def all_above(self, share: float) -> bool:
        """Whether all adapters were right about more than this share; what was counted is gone."""
        right = torch.zeros(self._groups) if self._right is None else self._right.cpu()
        enough = bool((right > share * self._seen).all())
        self._right, self._seen = None, 0.0
        return enough


def require_room(
    engine: Engine,
    trial: AdapterTraining,
    samples: Sequence[Images | Labelled],
    parameters: int,
    adapter: AdapterSettings,
    train: TrainSettings,
    stage: str,
) -> int:
    """Bytes that are left while J adapters of every task are trained in one pass.

    Each has so many parameters; `samples` are those of the tasks. Raises CapacityError where they
    cannot be.

    What an image keeps for its backward pass is measured on `trial`, which holds one adapter.
    """
    count = adapter.per_task * len(samples)
    kept = _bytes_kept(engine, trial, samples[0], 2) - _bytes_kept(engine, trial, samples[0], 1)
    world, most = PartialState().num_processes, max(len(some) for some in samples)
    images = math.ceil(min(train.batch_size, most) / engine.settings.accumulate / world)
    needed = count * (BYTES_TO_TRAIN * parameters + images * kept)
    available = available_bytes(engine.device)
    if needed <= available:
        return available - needed
    each = needed // count
    fit = max(1, available // each)
    if count == 1:
        remedy = "a smaller train.batch_size or adapter.rank, or engine.accumulate"
    elif fit < adapter.per_task or len(samples) == 1:
        remedy = f"--adapters-per-task {fit}, a smaller train.batch_size, or engine.accumulate"
    else:
        tasks = fit // adapter.per_task
        remedy = f"--parallel-tasks {tasks}, a smaller train.batch_size, or engine.accumulate"
    raise CapacityError(
        f"{stage}: training {count} adapters in one pass takes about {needed:,} bytes: "
        f"{count} x ({BYTES_TO_TRAIN * parameters:,} for parameters, gradients and moments, and "
        f"{images} images of {kept:,})",
        expected=f"at most the {available:,} bytes that {engine.device} has left",
        remedy=remedy,
    )


def _bytes_kept(
    engine: Engine, trial: AdapterTraining, samples: Images | Labelled, count: int
) -> int:
    """Bytes of all that a forward pass of `count` samples keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    zeros = np.zeros((count, *samples.inputs.shape[1:]), dtype=samples.inputs.dtype)
    inputs = torch.from_numpy(zeros).to(engine.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), engine.autocast():
        logits = trial(inputs)
    del logits  # until here nothing was freed: an address stands for one storage
    return sum(kept.values())


def require_learned(
    fit: FitResult,
    classes: int,
    learned: Sequence[Tensor],
    lr: float,
    stage: str,
) -> None:
    """Raise DivergedError where a training by cross-entropy ended worse than it began.

    That is a mean loss of the last epoch above twice the loss of the first step and above that of
    guessing among the classes, in any group; or a number that is not finite among the `learned`.
    """
    remedy = f"a smaller learning rate than {lr:g}; nothing was written"
    guessing = math.log(classes)
    for start, curve in zip(fit.begin, fit.by_group, strict=True) if fit.begin else ():
        allowed = max(2 * (max(start, guessing) if fit.resumed_at else start), guessing)
        if curve[-1] > allowed:
            raise DivergedError(
                f"{stage}: the loss was {start:.3g} at step 1 and {curve[-1]:.3g} on average in "
                f"the last epoch, which ended at step {fit.steps}; guessing among {classes} "
                f"classes has {guessing:.3g}",
                remedy=remedy,
            )
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in learned])
    if not bool(finite.all()):
        raise DivergedError(
            f"{stage}: a learned number is not finite at step {fit.steps}, the last", remedy=remedy
        )


def losses(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean cross-entropy (J,) of every group of a batch, of logits (J, b, classes).

    Labels and weights (J · b,), group by group.
    """
    each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    return (each * weights).view(len(logits), -1).mean(dim=1)


def _accuracies(
    engine: Engine, module: AdapterTraining, samples: Images | Labelled
) -> tuple[float, ...]:
    """Training accuracy of every adapter with its own head."""
    count = len(module.values)

    def predicted(inputs: Tensor) -> Tensor:
        return module(torch.cat([inputs] * count)).argmax(dim=-1).T

    size = max(1, engine.settings.eval_batch_size // count)
    classes = engine.predict(predicted, samples.inputs, batch_size=size)
    right = classes == torch.from_numpy(samples.labels).unsqueeze(1)
    return tuple(right.double().mean(dim=0).tolist())
