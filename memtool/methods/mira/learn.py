"""Keys that learn (stage 2 of the paper): cross-entropy through the recalled mixture.

Backbone and values stay frozen, but for `consolidate.value_lr`; what was learned before is kept by
`consolidate.protect`. Tasks that are new together, as all sources of domain generalisation, learn
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.engine import Batch, Batches, Engine, FitResult
from memtool.heads import RecalledHead
from memtool.learning.adapt import require_learned
from memtool.learning.augment import augmented
from memtool.learning.mixup import mixing
from memtool.methods.mira.protect import Protection
from memtool.methods.mira.recall import MemoryModel
from memtool.methods.outcome import share_right
from memtool.progress import Progress
from memtool.sections import ConsolidateSettings
from memtool.settings import TrainSettings
from memtool.streams.task import Images


def learn(
    engine: Engine,
    model: MemoryModel,
    head: RecalledHead,
    samples: Images,
    settings: ConsolidateSettings,
    *,
    kept: int,
    classes: Sequence[int],
    seed: int,
    epochs: int | None = None,
    head_learns: bool = False,
    biased: bool = True,
    past: Protection | None = None,
    validation: Images | None = None,
    stage_1: TrainSettings | None = None,
    progress: Progress | None = None,
    stage: str = "consolidate",
) -> tuple[RecalledHead, FitResult]:
    """Learn keys, query modules, decoders, perhaps the head by cross-entropy of what is recalled.

    The first `kept` keys were learned before. What of the past may not change says
    `settings.protect`: under "freeze" these keys and the query modules stay, and of a decoder its
    hidden layer and the rows of these adapters, under "dual-gpm"
    nothing moves in the span of `past`, under "none" all learn. With a `settings.value_lr` the
    values of the other adapters learn, too. With `validation` samples the parameters are those of
    the epoch that was right about most of them. Images are augmented and mixed, and parameters
    averaged, as in `stage_1`, for so many `epochs`, none: those of the settings; a head that is not
    `biased` keeps its bias. Returns the head. Raises DivergedError as `require_learned`.
    """
    module = _Scored(model, head, classes, head_learns=head_learns, biased=biased)
    model.memory.requires_grad_(True)
    for block in model.memory.blocks:
        model.memory[block].keys.requires_grad_(settings.lr > 0)
    model.values.requires_grad_(settings.value_lr > 0)
    put_back = _protected(model, settings, kept, past)
    like = stage_1 or TrainSettings()
    train = TrainSettings(
        epochs=settings.epochs if epochs is None else epochs,
        batch_size=settings.batch_size,
        lr=_fastest(settings),
        weight_decay=settings.weight_decay,
        augment=like.augment,
        mixup=like.mixup if settings.mixup is None else settings.mixup,
        mixup_of=like.mixup_of,
        average=like.average,
    )

    def loss(scored: nn.Module, batch: Batch) -> Tensor:
        mixed = mixing(batch, train.mixup, of_class=train.mixup_of == "class")
        said = scored(mixed.inputs(augmented(batch.inputs, batch.seed, train)))
        return mixed.loss(lambda labels: F.nll_loss(said, labels), batch.labels)

    select = None
    if validation is not None and len(validation):
        select = partial(_accuracy, engine, module, validation)
    free = None
    if settings.guard == "gradient" and settings.protect == "dual-gpm" and past is not None:
        free = past.project_gradients(model.memory, module.weight)
    try:
        fit = engine.fit(
            module,
            Batches(samples.images, samples.labels, settings.batch_size, train.epochs, seed),
            loss,
            train,
            stage=stage,
            after_step=put_back,
            select=select,
            rate_of=partial(_rate_of, settings),
            progress=progress,
        )
    finally:
        if free is not None:
            free()
        model.memory.requires_grad_(False)
        model.values.requires_grad_(False)
    parts = [*model.memory.state_dict().values(), *model.values.state_dict().values()]
    require_learned(fit, len(classes), parts, max(train.lr, settings.value_lr), stage)
    return module.head(), fit


def _fastest(settings: ConsolidateSettings) -> float:
    """The learning rate that the others are multiples of: that of the keys, where they learn."""
    return settings.lr or settings.head_lr or settings.module_lr


def _rate_of(settings: ConsolidateSettings, name: str) -> float:
    """The learning rate of a parameter, as a multiple of `_fastest`."""
    if name.endswith(".keys"):
        wanted = settings.lr
    elif name.startswith("model.values."):
        wanted = settings.value_lr
    elif name.startswith("model."):
        wanted = settings.module_lr
    else:
        wanted = settings.head_lr or settings.module_lr
    return wanted / _fastest(settings)


def _protected(
    model: MemoryModel, settings: ConsolidateSettings, kept: int, past: Protection | None
) -> Callable[[], None]:
    """What follows every step, so that what was learned before stays as it is."""
    calls: list[Callable[[], None]] = []
    memories = [model.memory[block] for block in model.memory.blocks]
    if kept and settings.protect == "freeze":
        for here in memories:
            here.query.requires_grad_(False)
        calls.append(_keeping([here.keys for here in memories], kept))
        for decoder in [here.decoder for here in memories if here.decoder is not None]:
            decoder.inner.requires_grad_(False)
            calls.append(_keeping([*decoder.outer.parameters()], kept * decoder.rows_each))
    elif settings.protect == "dual-gpm" and past is not None and settings.guard == "step":
        calls.append(past.guard(model.memory))
    if kept and settings.value_lr > 0:
        calls.append(_keeping(list(model.values.parameters()), kept))

    def put_back() -> None:
        for call in calls:
            call()

    return put_back


def _accuracy(engine: Engine, module: nn.Module, samples: Images) -> float:
    """Share of samples that the module, as it is, classifies right."""
    return share_right(engine.predict(module, samples.images), samples)


def _keeping(parameters: Sequence[nn.Parameter], count: int) -> Callable[[], None]:
    """A call that puts the first `count` rows of parameters back to what they are now.

    It undoes momentum as well, which goes on where there is no gradient.
    """
    old = [parameter.detach()[:count].clone() for parameter in parameters]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, rows in zip(parameters, old, strict=True):
            parameter[:count] = rows

    return put_back


class _Scored(nn.Module):
    """The recalled mixture under a head, only the given classes in play."""

    def __init__(
        self,
        model: MemoryModel,
        head: RecalledHead,
        classes: Sequence[int],
        *,
        head_learns: bool,
        biased: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.classes = tuple(classes)
        self.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head_learns)
        bias = head.bias.detach().clone()
        self.bias = nn.Parameter(bias, requires_grad=head_learns and biased)
        self._head = head

    def head(self) -> RecalledHead:
        """The head as it is now, without gradients."""
        weight, bias = self.weight.detach().clone(), self.bias.detach().clone()
        return replace(self._head, weight=weight, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (batch, classes)."""
        features, coefficients = self.model.with_coefficients(images)
        head = replace(self._head, weight=self.weight, bias=self.bias)
        return head.log_probabilities(features, coefficients.mean(dim=1), self.classes)
