"""Stage 2, consolidation: the memory learns its keys; backbone and values stay frozen.

Task by task, on the task's own images only: its queries and features are counted into running
moments, from which keys and head follow in closed form, exact over tasks without replay. With
epochs the keys (and the query modules, and a shared head) then learn by cross-entropy through the
recalled mixture, as in MIRA, without losing what was learned before (`consolidate.protect`).
Tasks that are new together, as all sources of domain generalisation, learn together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.recalls import every, on_top, same_for_all
from memtool.adapters.values import AdapterValues
from memtool.backbones.interface import Backbone
from memtool.config import Augment, ConsolidateSettings, MemorySettings, TrainSettings
from memtool.engine import Batch, Batches, Engine, FitResult
from memtool.errors import ConfigError
from memtool.heads import RecalledHead
from memtool.learning.adapt import augmented, require_learned
from memtool.memories.closed_form import QueryStatistics, for_similarity
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.methods.protect import Protection
from memtool.methods.recall import MemoryModel, features_and_queries
from memtool.progress import Progress
from memtool.streams.task import Images

LINEAR = ("identity", "affine", "relu", "tanh", "power")
"""Separations that pass a score on: their closed-form scores are one-hot, not log posteriors."""

SHRINKAGE = 1e-3
"""Of the queries' covariance toward a multiple of the identity; ridge of the linear keys."""


def count_task(
    engine: Engine,
    backbone: Backbone,
    memory: KeyedMemory,
    settings: MemorySettings,
    own: AdapterValues,
    samples: Images,
    beneath: MemoryModel | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (n, dim) and queries (memories, n, dim) of a task under its own adapters.

    Several adapters of one task are mixed with equal coefficients. Residual ones are added to what
    the memory `beneath` recalls.
    """
    count = len(own)
    equal = torch.full((count,), 1 / count, device=engine.device)
    alone = every(own) if count == 1 else same_for_all(own, equal, settings.mix)
    look_at = settings.look_at if settings.scope == "model" else None

    def run(images: Tensor) -> Tensor:
        recall = alone
        if beneath is not None:
            recall = on_top(beneath.recall(backbone.preprocess(images)), own, equal)
        return features_and_queries(backbone, memory, recall, look_at, images)

    joined = engine.predict(run, samples.images)
    features, *queries = joined.split(backbone.dim, dim=1)
    return features, torch.stack(queries)


def count_queries(
    asked: Tensor, labels: npt.NDArray[np.int64], *, by_class: bool
) -> QueryStatistics:
    """Moments of a task's queries (memories, n, dim), all at once or by class of `labels` (n,).

    With their reach.
    """
    statistics = QueryStatistics(len(asked), asked.shape[-1])
    places = np.unique(labels, return_inverse=True)[1] if by_class else np.zeros_like(labels)
    for place in range(int(places.max(initial=-1)) + 1):
        statistics.add(place, asked[:, torch.from_numpy(places == place)])
    statistics.keep_reach(asked, torch.from_numpy(places))
    return statistics


def start_keys(
    settings: ConsolidateSettings,
    memory: MemorySettings,
    statistics: Sequence[QueryStatistics],
    adapter_tasks: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    """Keys (memories, t, m · (dim + 1)) of all adapters before any learning by gradient.

    `statistics` has the queries of every task, counted class by class where adapters have a key
    for every class (`memory.keys_of`); m is then the largest number of classes of a task, else 1.

    closed-form   separations that normalise (softmax, topk) get discriminant keys: the score is
                  the log posterior of the task. The others get ridge keys: the score is close to
                  1 for the task of the query and to 0 for the rest.
    mean-query    the mean query of the task
    random        N(0, key_std²)

    A hard routing has keys of its own, whatever the settings say: discriminant ones for "lda", the
    mean query for "prototype". The adapters of one task share its key, and its weight.

    Raises ConfigError for a choice of keys that does not go with the separation, the similarity or
    the protection.
    """
    tasks = torch.tensor(adapter_tasks)
    if settings.protect == "dual-gpm" and _solved(settings, memory):
        raise ConfigError(
            "keys in closed form under --protect dual-gpm",
            expected="keys that learn: all of those in closed form are solved anew together, and "
            "their part outside the past finds nothing",
            remedy="--protect freeze, or --set consolidate.keys=random with consolidate.epochs",
        )
    if memory.keys_of == "class":
        return _keys_of_classes(settings, memory, statistics, tasks)
    whole = QueryStatistics.joined([part.pooled() for part in statistics])
    shares = torch.bincount(tasks)[tasks].float()
    if memory.routing == "prototype":
        return whole.mean_keys()[:, tasks]
    if memory.routing == "lda":
        return for_similarity(whole.lda_keys(SHRINKAGE)[:, tasks], "scaled-dot")
    if settings.keys == "random":
        width = whole.dim + 1
        drawn = torch.randn(whole.blocks, len(tasks), width, generator=generator)
        return drawn * settings.key_std
    if settings.keys == "mean-query":
        return whole.mean_keys()[:, tasks]
    if memory.separation in LINEAR and memory.similarity == "euclidean":
        raise ConfigError(
            f"closed-form keys for similarity euclidean and separation {memory.separation}",
            expected="scores that are right to the last constant, which distances are not",
            remedy="--set memory.similarity=scaled-dot, or --sep softmax",
        )
    if memory.separation not in LINEAR:
        keys = whole.lda_keys(SHRINKAGE)[:, tasks]
        keys[..., -1] -= shares.log() / memory.beta
    else:
        keys = whole.ridge_keys(SHRINKAGE)[:, tasks] / shares[:, None]
    return for_similarity(keys, memory.similarity)


def _solved(settings: ConsolidateSettings, memory: MemorySettings) -> bool:
    """Whether keys are solved from moments of the queries; those of a hard routing always are."""
    return settings.keys == "closed-form" or memory.routing != "mixture"


def _keys_of_classes(
    settings: ConsolidateSettings,
    memory: MemorySettings,
    statistics: Sequence[QueryStatistics],
    tasks: Tensor,
) -> Tensor:
    """Closed-form keys (memories, t, m · (dim + 1)), m for every adapter.

    A task with fewer classes than m has some of its keys several times, each with a part of the
    weight: under softmax the adapter's coefficient is the posterior of its task all the same.
    """
    if settings.keys != "closed-form" or settings.epochs:
        raise ConfigError(
            "memory.keys_of class with keys that learn",
            expected="keys in closed form: consolidate.keys closed-form, consolidate.epochs 0",
            remedy="--set memory.keys_of=task",
        )
    mixes = memory.routing == "mixture"
    posterior = memory.separation == "softmax" and memory.similarity in ("dot", "scaled-dot")
    if mixes and not posterior:
        raise ConfigError(
            f"memory.keys_of class with separation {memory.separation} and similarity "
            f"{memory.similarity}",
            expected="a posterior of the classes: softmax, and dot or scaled-dot",
            remedy="--sep softmax, or --set memory.keys_of=task",
        )
    whole = QueryStatistics.joined(statistics)
    nearest = memory.routing == "prototype"
    keys = whole.mean_keys() if nearest else whole.lda_keys(SHRINKAGE)
    sizes = [part.tasks for part in statistics]
    most, found = max(sizes), []
    for own in keys.split(sizes, dim=1):
        places = torch.arange(most) % own.shape[1]
        repeated = own[:, places]
        if mixes:  # a hard choice shares between equal keys by itself
            repeated[..., -1] -= torch.bincount(places)[places].float().log() / memory.beta
        found.append(repeated)
    each = torch.stack(found, dim=1)[:, tasks]
    if mixes:
        sharing = torch.bincount(tasks)[tasks].float().log() / memory.beta
        each[..., -1] -= sharing.unsqueeze(-1)
    if not nearest:
        each = for_similarity(each, memory.similarity if mixes else "scaled-dot")
    return each.flatten(2)


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
    head_learns: bool = False,
    past: Protection | None = None,
    validation: Images | None = None,
    augment: Augment = "none",
    progress: Progress | None = None,
    stage: str = "consolidate",
) -> tuple[RecalledHead, FitResult]:
    """Learn keys, query modules and perhaps the head by cross-entropy of the recalled mixture.

    The first `kept` keys were learned before. What of the past may not change says
    `settings.protect`: under "freeze" these keys and the query modules stay, under "dual-gpm"
    nothing moves in the span of `past`, under "none" all learn. With a `settings.value_lr` the
    values of the other adapters learn, too. With `validation` samples the parameters are those of
    the epoch that was right about most of them. Returns the head. Raises DivergedError as
    `require_learned`.
    """
    module = _Scored(model, head, classes, head_learns=head_learns)
    memory = model.memory
    memory.requires_grad_(True)
    model.values.requires_grad_(settings.value_lr > 0)
    after_step: list[Callable[[], None]] = []
    if kept and settings.protect == "freeze":
        for here in _memories(model):
            here.query.requires_grad_(False)
        after_step.append(_keeping([here.keys for here in _memories(model)], kept))
    elif settings.protect == "dual-gpm" and past is not None:
        after_step.append(past.guard(memory))
    if kept and settings.value_lr > 0:
        after_step.append(_keeping(list(model.values.parameters()), kept))

    def accuracy() -> float:
        assert validation is not None
        predicted = engine.predict(module, validation.images).argmax(1)
        return float((predicted == torch.from_numpy(validation.labels)).double().mean())

    train = TrainSettings(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        weight_decay=0.0,
        augment=augment,
    )

    def loss(scored: nn.Module, batch: Batch) -> Tensor:
        return F.nll_loss(scored(augmented(batch, train)), batch.labels)

    def all_of_them() -> None:
        for each in after_step:
            each()

    def rate_of(name: str) -> float:
        if name.endswith(".keys"):
            return 1.0
        wanted = settings.value_lr if name.startswith("model.values.") else settings.module_lr
        return wanted / settings.lr

    try:
        fit = engine.fit(
            module,
            Batches(samples.images, samples.labels, settings.batch_size, settings.epochs, seed),
            loss,
            train,
            stage=stage,
            after_step=all_of_them,
            select=accuracy if validation is not None and len(validation) else None,
            rate_of=rate_of,
            progress=progress,
        )
    finally:
        memory.requires_grad_(False)
        model.values.requires_grad_(False)
    parts = [*memory.state_dict().values(), *model.values.state_dict().values()]
    fastest = max(settings.lr, settings.value_lr)
    require_learned(fit, len(classes), parts, fastest, stage)
    return module.head(), fit


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


def features_recalled(engine: Engine, model: MemoryModel, samples: Images) -> Tensor:
    """Features (n, dim) of samples under the mixtures that the memory recalls for them."""
    return engine.predict(model, samples.images)


def drift_degrees(before: Tensor, after: Tensor) -> float:
    """Mean angle in degrees between keys (memories, t, d_k) before and after.

    A key without length has no direction and is left out; 0 when there is no other.
    """
    long = (before.norm(dim=-1) > 0) & (after.norm(dim=-1) > 0)
    if not long.any():
        return 0.0
    cosine = F.cosine_similarity(before[long].double(), after[long].double(), dim=-1)
    return math.degrees(float(torch.arccos(cosine.clamp(-1, 1)).mean()))


class _Scored(nn.Module):
    """The recalled mixture under a head, only the given classes in play."""

    def __init__(
        self,
        model: MemoryModel,
        head: RecalledHead,
        classes: Sequence[int],
        *,
        head_learns: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.classes = tuple(classes)
        self.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head_learns)
        self.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=head_learns)
        self._owners = head.owners

    def head(self) -> RecalledHead:
        """The head as it is now, without gradients."""
        weight, bias = self.weight.detach().clone(), self.bias.detach().clone()
        return RecalledHead(weight, bias, self._owners)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (batch, classes)."""
        features, coefficients = self.model.with_coefficients(images)
        head = RecalledHead(self.weight, self.bias, self._owners)
        return head.log_probabilities(features, coefficients.mean(dim=1), self.classes)


def _memories(model: MemoryModel) -> list[BlockMemory]:
    return [model.memory[block] for block in model.memory.blocks]
