"""The shared torch engine: the only place that knows devices, precision, compilation and processes.

A method hands it a module, batches and a loss; the engine trains (`Engine.fit`), maps
(`Engine.predict`), saves and resumes. It is built on accelerate, so the same command runs under
`torchrun` or `accelerate launch`: every process takes its share of each batch.

Resuming is exact: batch and learning rate are pure functions of (seed, step), so parameters,
optimiser moments and the step are the whole state.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from memtool.adapters.mixing import told_kernels
from memtool.checkpoints import load_checkpoint, save_checkpoint
from memtool.devices import Late, cpu_flags, cpu_multiplies_bfloat16, sent
from memtool.errors import ConfigError, DivergedError, MemtoolError, TrainingInterrupted
from memtool.progress import Progress, ProgressEvent
from memtool.settings import EngineSettings, TrainSettings

CHECKPOINT_EVERY_SECONDS = 30.0

DIVERGED_FACTOR = 10.0
"""An epoch whose mean loss is so many times that of the first one has diverged."""

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """inputs (groups * size, ...) and labels int64 (groups * size,), group by group.

    `told` are the labels on the CPU, for what depends on their numbers: of a device one would have
    to wait for them. `weights` float32 (groups * size,) say how much a sample counts; over a step
    their mean is one in every group. `seed` is for random draws on this batch: it depends on the
    step only. `share` is the part of the step's samples that it holds.
    """

    inputs: Tensor
    labels: Tensor
    told: Tensor
    weights: Tensor
    seed: int
    share: float = 1.0

    def of_process(self, rank: int, world: int, groups: int, device: torch.device) -> Batch:
        """The share of one of `world` processes, on its device: all of it when there is one.

        Shares are equal, so at most one sample less than there are processes is left out of a step.
        """
        inputs, labels, weights = self.inputs, self.told, self.weights
        if world > 1:
            by_group = torch.arange(len(labels)).reshape(groups, -1)
            if by_group.shape[1] < world:
                chosen = by_group.reshape(-1)
            else:
                chosen = by_group[:, rank::world][:, : by_group.shape[1] // world].reshape(-1)
            inputs, labels, weights = inputs[chosen], labels[chosen], weights[chosen]
        return Batch(
            sent(inputs, device),
            sent(labels, device),
            labels,
            sent(weights, device),
            self.seed + rank,
            self.share,
        )


@dataclass(frozen=True)
class Joint:
    """A batch of each of several trainings, for one step of a module that holds them all.

    The loss of a part is to be multiplied by the `share` of the part.
    """

    parts: tuple[Batch, ...]
    share: float = 1.0

    def of_process(self, rank: int, world: int, groups: int, device: torch.device) -> Joint:
        """As of every part; these have as many groups each."""
        each = groups // len(self.parts)
        return Joint(tuple(part.of_process(rank, world, each, device) for part in self.parts))


Given = TypeVar("Given", Batch, Joint)
Given_co = TypeVar("Given_co", Batch, Joint, covariant=True)


class Steps(Protocol[Given_co]):
    """What a training goes through, step by step: `Batches`, or `Together` those of several."""

    @property
    def groups(self) -> int:
        """Groups of every batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""

    def __len__(self) -> int:
        """Steps of all epochs."""

    def micro_batches(self, step: int, parts: int) -> Iterator[Given_co]:
        """What a step is given, in at most `parts` pieces."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Shuffled mini-batches of arrays in memory; batch `step` depends on (seed, step) only.

    inputs (n, ...): images uint8 (n, h, w, 3), or features; labels int64 (n,).
    A single group sees every sample once an epoch. With `groups` > 1 every batch holds that many
    contiguous groups, each with its own bootstrap sample (n draws with replacement) and order: the
    J adapters of a task, trained in one pass. The copies of a sample are in one batch and are
    computed once, weighted by their number: a batch of `batch_size` draws has about 0.63 as many
    distinct samples.

    All groups have as many distinct samples, so that batches are rectangles: they share one draw of
    how often samples come up, each with an assignment to samples of its own. A group alone is a
    plain bootstrap sample, as all assignments of a multinomial draw are equally likely. Without
    `bootstrap` every group sees every sample once an epoch, in an order of its own.

    `narrowed` is what becomes of the inputs of a batch before they leave the CPU: where numbers
    decide its shape, as of padding, one would have to wait for those of a device.
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    batch_size: int
    epochs: int
    seed: int
    groups: int = 1
    bootstrap: bool = True
    narrowed: Callable[[Tensor], Tensor] = lambda inputs: inputs

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        """How often each distinct sample of a group was drawn, in every group."""
        total = len(self.labels)
        if not self._drawn:
            return np.ones(total, dtype=np.int64)
        draws = np.random.default_rng([self.seed, 1]).integers(total, size=total)
        counts = np.bincount(draws, minlength=total)
        return counts[counts > 0]

    @cached_property
    def _members(self) -> npt.NDArray[np.int64]:
        """The distinct samples of every group, (groups, distinct), in the order of `_counts`."""
        total, distinct = len(self.labels), len(self._counts)
        if not self._drawn:
            return np.tile(np.arange(total), (self.groups, 1))
        seeds = ([self.seed, 1, group] for group in range(self.groups))
        orders = (np.random.default_rng(seed).permutation(total) for seed in seeds)
        return np.stack([order[:distinct] for order in orders])

    @property
    def _drawn(self) -> bool:
        """Whether groups have samples of their own."""
        return self.bootstrap and self.groups > 1

    @property
    def _size(self) -> int:
        """Distinct samples of a group in a full batch."""
        return math.ceil(self.batch_size * len(self._counts) / len(self.labels))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; the last one may be smaller."""
        return math.ceil(len(self._counts) / self._size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs

    def rhythm(self, parts: int) -> tuple[int, ...]:
        """Steps in all and in an epoch, and pieces of a full batch and of the last of an epoch.

        What those of several trainings have in common that go `Together`; `parts` as in
        `micro_batches`.
        """
        last = len(self._counts) - (self.steps_per_epoch - 1) * self._size
        return len(self), self.steps_per_epoch, min(parts, self._size), min(parts, last)

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The distinct samples of a step: int64 (groups, size)."""
        return np.take_along_axis(self._members, self._places(step), axis=1)

    def copies(self, step: int) -> npt.NDArray[np.int64]:
        """How often each sample of `indices` was drawn: int64 (groups, size)."""
        return self._counts[self._places(step)]

    def _places(self, step: int) -> npt.NDArray[np.int64]:
        """Where the samples of a step are in `_members`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        low = position * self._size
        rows = []
        for group in range(self.groups):
            order = np.random.default_rng([self.seed, 2, group, epoch])
            rows.append(order.permutation(len(self._counts))[low : low + self._size])
        return np.stack(rows)

    def micro_batches(self, step: int, parts: int) -> Iterator[Batch]:
        """The step's batch cut into at most `parts` pieces, every piece with all groups."""
        chosen, copies = self.indices(step), self.copies(step)
        size = chosen.shape[1]
        weights = (copies / copies.mean(axis=1, keepdims=True)).astype(np.float32)
        for number, piece in enumerate(np.array_split(np.arange(size), min(parts, size))):
            flat = chosen[:, piece].reshape(-1)
            draw = np.random.default_rng([self.seed, 3, step, number]).integers(2**62)
            labels = torch.from_numpy(self.labels[flat])
            yield Batch(
                self.narrowed(torch.from_numpy(self.inputs[flat])),
                labels,
                labels,
                torch.from_numpy(weights[:, piece].reshape(-1)),
                int(draw),
                len(piece) / size,
            )


@dataclass(frozen=True, eq=False)
class Together:
    """The batches of several trainings of one `rhythm`, whose groups are those of one module.

    Each training has as many groups, and gets the batches that it would get alone.
    """

    trainings: tuple[Batches, ...]

    @property
    def groups(self) -> int:
        """Those of the first training, then those of the second, and so on."""
        return sum(one.groups for one in self.trainings)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same for all."""
        return self.trainings[0].steps_per_epoch

    def __len__(self) -> int:
        return len(self.trainings[0])

    def micro_batches(self, step: int, parts: int) -> Iterator[Joint]:
        """The pieces of all trainings side by side."""
        each = (one.micro_batches(step, parts) for one in self.trainings)
        yield from map(Joint, zip(*each, strict=True))


@dataclass(frozen=True)
class FitResult:
    """What a training ended with. `losses` holds one mean loss per finished epoch.

    `by_group` holds such a curve for every group of the batches, and `losses` is their sum;
    `begin` is the loss of the first step of this run by group, empty where no step was left.
    `selected` is the epoch (from 1) that `select` scored best, with its `score`; None without one.
    """

    steps: int
    losses: tuple[float, ...]
    seconds: float
    resumed_at: int
    by_group: tuple[tuple[float, ...], ...]
    begin: tuple[float, ...]
    selected: int | None = None
    score: float | None = None

    def split(self, count: int) -> list[FitResult]:
        """Those of `count` trainings that went `Together`; they share the seconds equally."""
        size = len(self.by_group) // count
        found = []
        for low in range(0, len(self.by_group), size):
            mine = self.by_group[low : low + size]
            found.append(
                replace(
                    self,
                    losses=tuple(sum(epoch) for epoch in zip(*mine, strict=True)),
                    seconds=self.seconds / count,
                    by_group=mine,
                    begin=self.begin[low : low + size],
                )
            )
        return found


class _Best:
    """The parameters after the epoch with the highest score; the last of equal ones."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.score: float | None = None
        self._kept: dict[str, Tensor] = {}

    def offer(self, score: float, epoch: int, trained: Mapping[str, nn.Parameter]) -> None:
        if self.score is None or score >= self.score:
            self.score, self.epoch = score, epoch
            self._kept = {name: p.detach().clone() for name, p in trained.items()}

    def restore(self, trained: Mapping[str, nn.Parameter]) -> None:
        _copy(self._kept, trained)


class _Mean:
    """A running mean of parameters over the steps of a training, as `train.average` says.

    half   their arithmetic mean after every step of the second half (stochastic weight averaging,
           Izmailov et al. 2018, densely as in Cha et al. 2021)
    ema    m ← m + (1 − d)(θ − m) from the first step on, with d = exp(−10 / steps)

    What never moves is its own mean, bit for bit.
    """

    def __init__(self, kind: str, total: int) -> None:
        self._first = 1 if kind == "ema" else total // 2 + 1
        self._rate = 1 - math.exp(-10 / total) if kind == "ema" else None
        self.parts: dict[str, Tensor] = {}

    def add(self, step: int, trained: Mapping[str, nn.Parameter]) -> None:
        """Count the parameters after `step` (from 1)."""
        if step < self._first:
            return
        if not self.parts:
            self.parts.update({name: p.detach().clone() for name, p in trained.items()})
        rate = self._rate or 1 / (step - self._first + 1)
        for name, mean in self.parts.items():
            mean.add_(trained[name].detach() - mean, alpha=rate)

    @contextmanager
    def in_place(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """For as long as it lasts the parameters are their mean, where there is one yet."""
        last = {name: trained[name].detach().clone() for name in self.parts}
        _copy(self.parts, trained)
        try:
            yield
        finally:
            _copy(last, trained)

    def put(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Let the parameters be their mean."""
        _copy(self.parts, trained)


class _Losses:
    """The losses of the steps of a training, read so many steps `behind`.

    `running` are those of the steps of an epoch by group, `begin` that of the first step here.
    """

    def __init__(
        self,
        groups: int,
        running: list[list[float]],
        done: int,
        behind: int,
        diverged: Callable[[float, int], DivergedError],
    ) -> None:
        """`done` steps were read before; `diverged` makes the error of a loss and its step."""
        self.running = running
        self.begin: tuple[float, ...] = ()
        self._groups, self._read, self._behind = groups, done, behind
        self._diverged = diverged
        self._queued: deque[Late] = deque()
        self._news: list[tuple[int, float]] = []

    def queue(self, values: Sequence[Tensor]) -> None:
        """Take the losses (groups,) of the parts of a step; the step that is behind is read."""
        self._queued.append(Late(*values))
        while len(self._queued) > self._behind:
            self._take()

    def settle(self) -> None:
        """Read those of all steps that were queued."""
        while self._queued:
            self._take()

    def news(self) -> list[tuple[int, float]]:
        """Steps (from 1) and losses that were read since this was asked last."""
        news, self._news = self._news, []
        return news

    def _take(self) -> None:
        each = torch.zeros(self._groups, dtype=torch.float64)
        for value in self._queued.popleft().read():
            each += value.reshape(self._groups)
        self._read += 1
        whole = float(each.sum())
        if not math.isfinite(whole):
            raise self._diverged(whole, self._read)
        self.running.append(each.tolist())
        self.begin = self.begin or tuple(self.running[-1])
        self._news.append((self._read, whole))


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter]) -> None:
    for name, tensor in tensors.items():
        trained[name].copy_(tensor)


class Engine:
    """Device, precision, threads and processes of one command.

    `threads` is the default number of CPU threads when the settings name none.
    """

    def __init__(self, settings: EngineSettings, *, threads: int | None = None) -> None:
        self.settings = settings
        wanted = settings.threads or threads
        if wanted is not None:
            torch.set_num_threads(wanted)
        if settings.compile == "graphs" and settings.accumulate > 1:
            raise ConfigError(
                f"engine.compile graphs with engine.accumulate {settings.accumulate}",
                expected="one batch a step: a graph writes over the gradients of the one before",
                remedy="--set engine.compile=true, or --set engine.accumulate=1",
            )
        self._accelerator = _accelerator(settings.device)
        self.device: torch.device = self._accelerator.device
        self.precision = _precision(settings.precision, self.device)
        self.kernels: set[str] = set()  # that computed picked adapters: `mixing.told_kernels`

    @property
    def processes(self) -> int:
        """How many processes share the command: those that a launcher started."""
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self._accelerator.is_main_process)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call a function that writes in one process; all get what it returns, or its error."""
        if self._accelerator.num_processes == 1:
            return function()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = function()
            except (MemtoolError, OSError) as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        result: Result = found[0]
        return result

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 autocast, or nothing under fp32."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def generator(self, seed: int) -> torch.Generator:
        """A CPU generator; draws are made on the CPU so that they agree on every device."""
        return torch.Generator().manual_seed(seed)

    def fit(
        self,
        module: nn.Module,
        batches: Steps[Given],
        loss: Callable[[nn.Module, Given], Tensor],
        settings: TrainSettings,
        *,
        stage: str,
        fingerprint: str = "",
        checkpoint: Path | None = None,
        after_step: Callable[[], None] | None = None,
        select: Callable[[], float] | None = None,
        enough: Callable[[], bool] | None = None,
        rate_of: Callable[[str], float] | None = None,
        progress: Progress | None = None,
    ) -> FitResult:
        """Train the parameters of `module` that require gradients.

        `loss(module, batch)` gives a scalar, the mean over the batch, on tensors of the device;
        for batches of several groups one mean for every group (groups,), of a `Joint` those of one
        part after another. Parameters then have a slice for every group in their first dimension,
        and each group learns as if it were alone: its gradients are those of its own loss, clipped
        by their own norm.
        `after_step` runs after every optimiser step (projections). `rate_of` gives the factor on
        the learning rate of a parameter by its name. `select` scores the module after every epoch,
        higher is better: the parameters end as they were after the best one, which `FitResult`
        names; such a training has no checkpoint. `enough` is asked after every epoch whether it
        was the last one. With `settings.average` the parameters end as
        their mean over steps, and are scored as what it is so far. With `checkpoint` the state is
        saved every half minute, on Ctrl-C and at the end, and a file of the same `fingerprint` is
        resumed; who stores the result removes the file.

        Raises DivergedError on a loss that is not finite, on a device when the step after it is
        queued; CorruptError for a checkpoint that is not what was saved; on Ctrl-C
        TrainingInterrupted after a save, KeyboardInterrupt without a checkpoint.
        """
        start = time.perf_counter()
        module.to(self.device)
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ConfigError(f"{stage}: the module has no parameters to train")
        groups = _parameter_groups(trained, rate_of)
        optimizer = torch.optim.AdamW(
            groups, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        total = len(batches)
        planned = total
        done = 0
        losses: list[list[float]] = []
        running: list[list[float]] = []
        mean = None if settings.average == "none" else _Mean(settings.average, total)
        averaged = None if mean is None else mean.parts
        if checkpoint is not None:
            done, losses, running = load_checkpoint(
                checkpoint, fingerprint, trained, optimizer, averaged
            )
        resumed_at = done

        def diverged(loss: float, step: int) -> DivergedError:
            return DivergedError(
                f"{stage}: the loss became {loss} at step {step} of {total}",
                remedy=f"a smaller learning rate than {settings.lr:g}, "
                "or --precision fp32; nothing was written",
            )

        # On the CPU a loss is there before the optimiser moves anything by it.
        behind = 0 if self.device.type == "cpu" else 1
        found = _Losses(batches.groups, running, done, behind, diverged)
        best = _Best()
        model: nn.Module = self._accelerator.prepare_model(module)
        if self.settings.compile:
            model.compile(mode="reduce-overhead" if self._graphs else None)
        rank = self._accelerator.process_index
        saved_at = time.monotonic()
        with _interruptible() as interrupted, _compiling(bool(self.settings.compile)):
            while done < total:
                factor = rate_factor(done / planned, settings)
                rate = settings.final_lr + factor * (settings.lr - settings.final_lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                values: list[Tensor] = []
                for batch in batches.micro_batches(done, self.settings.accumulate):
                    if self._graphs:  # what the last one gave is read, and may be written over
                        torch.compiler.cudagraph_mark_step_begin()
                    mine = batch.of_process(rank, self.processes, batches.groups, self.device)
                    with self.autocast():
                        value = loss(model, mine) * batch.share
                    value.sum().backward()
                    values.append(value)
                found.queue(values)
                if settings.clip is not None:
                    _clip(trained.values(), batches.groups, settings.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if after_step is not None:
                    after_step()
                done += 1
                if mean is not None:
                    mean.add(done, trained)
                late = time.monotonic() - saved_at > CHECKPOINT_EVERY_SECONDS
                ended = done % batches.steps_per_epoch == 0
                if ended or late or interrupted.is_set():
                    found.settle()
                if ended:
                    losses.append(np.mean(found.running, axis=0).tolist())
                    found.running.clear()
                    if select is not None:
                        with nullcontext() if mean is None else mean.in_place(trained):
                            best.offer(select(), len(losses), trained)
                    if enough is not None and enough():
                        total = done
                for step, step_loss in found.news():
                    if progress is not None and self.is_main:
                        metrics = {"loss": step_loss / batches.groups}
                        event = ProgressEvent(stage=stage, step=step, total=total, metrics=metrics)
                        progress(event)
                if checkpoint is not None and self.is_main and (late or interrupted.is_set()):
                    found.settle()
                    state = (done, losses, found.running)
                    save_checkpoint(checkpoint, fingerprint, trained, optimizer, state, averaged)
                    saved_at = time.monotonic()
                if interrupted.is_set():
                    if checkpoint is None:
                        raise KeyboardInterrupt
                    raise TrainingInterrupted(checkpoint)
        first, last = sum(losses[0]), sum(losses[-1])
        if len(losses) > 1 and last > DIVERGED_FACTOR * first + 1:
            raise DivergedError(
                f"{stage}: the mean loss of an epoch rose from {first:.3g} to {last:.3g} at step "
                f"{total}, the last",
                remedy=f"a smaller learning rate than {settings.lr:g}; nothing was written",
            )
        if checkpoint is not None and self.is_main:
            final = (done, losses, found.running)
            save_checkpoint(checkpoint, fingerprint, trained, optimizer, final, averaged)
        if mean is not None:
            mean.put(trained)
        best.restore(trained)
        self._accelerator._models.clear()  # accelerate would keep every model alive
        return FitResult(
            steps=total,
            losses=tuple(sum(epoch) for epoch in losses),
            seconds=time.perf_counter() - start,
            resumed_at=resumed_at,
            by_group=tuple(zip(*losses, strict=True)),
            begin=found.begin,
            selected=best.epoch,
            score=best.score,
        )

    def predict(
        self,
        function: Callable[..., Tensor],
        images: npt.NDArray[Any],
        *along: Tensor,
        batch_size: int = 0,
        exact: bool = False,
    ) -> Tensor:
        """`function` over all images in order, without gradients; the results joined, on the CPU.

        images uint8 (n, h, w, 3); `function` maps a batch on the device, and the same rows of every
        tensor (n, ...) of `along`, to (b, ...). `exact` computes in float32 whatever the precision
        of the engine: for differences that bfloat16 would drown.
        """
        size = batch_size or self.settings.eval_batch_size
        parts: list[Tensor] = []
        late: deque[Late] = deque()  # of the batch before: it is read when this one is queued
        autocast = nullcontext() if exact else self.autocast()
        with torch.inference_mode(), autocast, told_kernels(self.kernels):
            for low in range(0, len(images), size):
                batch = torch.from_numpy(np.array(images[low : low + size]))
                beside = [sent(tensor[low : low + size], self.device) for tensor in along]
                late.append(Late(function(sent(batch, self.device), *beside).float()))
                if len(late) > 1:
                    parts += late.popleft().read()
            while late:
                parts += late.popleft().read()
        return torch.cat(parts)

    @property
    def _graphs(self) -> bool:
        """Whether kernels are started by CUDA graphs; torch has none on other devices."""
        return self.settings.compile == "graphs"


def _compiling(on: bool) -> AbstractContextManager[object]:
    """Inside, torch.compile follows the gradients that a backward pass takes (`adapters.atoms`)."""
    if not on:
        return nullcontext()
    import torch._dynamo

    known = hasattr(torch._dynamo.config, "trace_autograd_ops")
    return torch._dynamo.config.patch(trace_autograd_ops=True) if known else nullcontext()


def _parameter_groups(
    trained: Mapping[str, nn.Parameter], rate_of: Callable[[str], float] | None
) -> list[dict[str, Any]]:
    """Groups of equal weight decay and learning rate: vectors and numbers do not decay."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        factor = 1.0 if rate_of is None else rate_of(name)
        groups.setdefault((parameter.ndim > 1, factor), []).append(parameter)
    return [
        {"params": members, "factor": factor, **({} if decays else {"weight_decay": 0.0})}
        for (decays, factor), members in sorted(groups.items(), key=lambda group: group[0][1])
    ]


def _clip(parameters: Iterable[nn.Parameter], groups: int, largest: float) -> None:
    """Scale the gradients of every group to a norm of at most `largest`.

    A group has one slice of the first dimension of every parameter; a single group has them whole.
    """
    slices = [p.grad.view(groups, -1) for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in slices]).norm(dim=0)
    factor = (largest / (norms + 1e-6)).clamp(max=1).unsqueeze(1)
    for part in slices:
        part.mul_(factor)


def rate_factor(progress: float, settings: TrainSettings) -> float:
    """Factor on the learning rate at `progress` (0 … 1): one cycle, or constant after its rise."""
    if settings.schedule == "constant" and progress >= settings.warmup:
        return 1.0
    return one_cycle(progress, settings.warmup)


def one_cycle(progress: float, warmup: float) -> float:
    """Factor on the learning rate: linear rise over the share `warmup`, then cosine to zero."""
    if progress < warmup:
        return 0.04 + 0.96 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _accelerator(device: str) -> Accelerator:
    """Accelerate keeps one state per process; start it anew when the device choice changes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device", remedy="--device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: torch sees no Metal device", remedy="--device cpu")
    no_other = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    cpu = device == "cpu" or (device == "auto" and no_other)
    state = AcceleratorState._shared_state
    if state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    # Without cpu=True accelerate ignores torchrun on a machine that has no accelerator.
    return Accelerator(cpu=cpu, mixed_precision="no")


def _precision(wanted: str, device: torch.device) -> str:
    """What was asked for; when left open, bf16 where the hardware multiplies bfloat16."""
    if wanted == "bf16" and device.type == "cpu" and not _cpu_knows_bfloat16():
        _log.warning(
            "engine.precision is bf16, for which this CPU has no instructions: fp32 is exacter and "
            "faster here, often three times (--precision fp32)"
        )
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and cpu_multiplies_bfloat16()
        return "bf16" if fast else "fp32"
    return "fp32"


def _cpu_knows_bfloat16() -> bool:
    """Whether it may multiply bfloat16, ARM included; a system that does not say is believed."""
    flags = cpu_flags()
    return not flags or bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event so that the running step can end; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def first(signum: int, frame: object) -> None:
        del signum, frame
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def available_bytes(device: torch.device) -> int:
    """Bytes that a device has left for this process; of the machine for all but CUDA."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: what is installed is the only bound known
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
