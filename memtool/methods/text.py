"""Learning on a stream of texts, task after task: MoRAM's atoms, and the loop that all rules share.

A model is trained to continue each prompt with its answer: cross-entropy, the mean over the answer
tokens of what is computed at once. After every task it is measured on the test texts of all tasks:
−log p of an answer token (always), and the metric of the task on greedy answers (`text.generate`).

`TextLearner` as it stands is sequential LoRA. `AtomLearner` is MoRAM: r atoms a task, on top of the
frozen ones before; `memtool.methods.text_memory` keeps them in a memory. The other rules are in
`memtool.methods.baselines.text`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from memtool.adapters.atoms import AtomGate
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.causal_lm import PAD, CausalLM, EncodedTexts, create_causal_lm
from memtool.backbones.footprint import Footprint, footprint_of
from memtool.engine import Batch, Batches, FitResult
from memtool.errors import ConfigError, DataError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.metrics import final_average, loss_forgetting
from memtool.evaluation.record import Kind, Row
from memtool.evaluation.text import score
from memtool.memories.rank1 import Rank1Memory, init_atoms
from memtool.methods.atom_state import gate_of
from memtool.methods.past_inputs import PastInputs
from memtool.methods.recall import every
from memtool.methods.workspace import MemoryWorkspace, task_named
from memtool.streams.text import TextSamples, TextStream, TextTask, open_text_stream

SUBJECT_SAMPLES = 32
"""Texts of a task that `retrieve --task`, `explain --task` and pruning look at, one by one."""


class TextWorkspace(MemoryWorkspace[TextTask]):
    """Stream of texts, language model, engine and store of a configuration and one seed."""

    @cached_property
    def stream(self) -> TextStream:
        """The tasks. Raises ConfigError where `text.epochs` does not name one number for each."""
        stream = open_text_stream(self.config.stream)
        epochs = self.config.text.epochs
        if epochs is not None and len(epochs) != len(stream.tasks):
            raise ConfigError(
                f"text.epochs has {len(epochs)} numbers for {len(stream.tasks)} tasks",
                expected="one number a task, or none for train.epochs",
            )
        return stream

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's weights."""
        return torch.bfloat16 if self.engine.precision == "bf16" else torch.float32

    @cached_property
    def backbone(self) -> CausalLM:
        """The frozen language model, on the device; bfloat16 where the engine computes so."""
        lm = create_causal_lm(self.config.backbone, self.config.text, dtype=self.dtype)
        return lm.to(self.engine.device)

    def task(self, name: str) -> TextTask:
        """A task by number (from 1) or by name. Raises NotFoundError for another word."""
        return task_named(name, self.stream.tasks, self.stream.name)

    def require_fitting(self, tasks: Sequence[TextTask]) -> None:
        """Raise DataError for a prompt that is too long, where these are refused, before any work.

        It names the task and whether the text is for training or testing.
        """
        if self.config.text.long_prompts != "refuse":
            return
        for task in tasks:
            for part, samples in (("train", task.train), ("test", task.test)):
                try:
                    self.backbone.encode(samples.prompts)
                except DataError as error:
                    raise DataError(
                        f"task {task.number} {task.name}, {part}: {error.message}",
                        expected=error.expected,
                        remedy=error.remedy,
                    ) from error

    def footprint(self) -> Footprint:
        """Where the memory goes with the atoms of all tasks, counted without weights.

        Under score norm task it is that of norm bank, which keeps as much.
        """
        moram, rank = self.config.moram, self.config.adapter.rank
        counted = moram.model_copy(update={"score_norm": "bank", "scaled_threshold": False})
        return footprint_of(
            self.config.backbone,
            rank=rank,
            tasks=len(self.stream.tasks),
            gate=gate_of(counted, rank),
            text=self.config.text,
            dtype=self.dtype,
        )

    def epochs(self, task: TextTask) -> int:
        """Passes over the training texts of a task; over all at once (number 0), their mean."""
        epochs = self.config.text.epochs
        if epochs is None:
            at_once = 1 if task.number else len(self.stream.tasks)
            return self.config.train.epochs_for(len(task.train), at_once)
        return epochs[task.number - 1] if task.number else round(sum(epochs) / len(epochs))


class TextScores(BaseModel):
    """What a model reaches on the test texts of every task.

    `losses` are −log p in nats per answer token; `scores` the tasks' metrics, fractions 0..1, of
    generated answers, None where nothing was generated. `cut_prompts` and `cut_answers` count those
    that were longer than the limits, over all tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    cut_prompts: int = 0
    cut_answers: int = 0


@dataclass(frozen=True, eq=False)
class Dropped(Mixture):
    """A mixture whose adapters do not see a random share of their inputs, the rest scaled up.

    Every adapted layer draws for itself from `generator`, which is of the device of the inputs.
    """

    share: float = 0.0
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, mixture: Mixture, share: float, generator: torch.Generator) -> Dropped:
        """The same mixture, with inputs dropped."""
        return cls(mixture.values, mixture.kind, mixture.gate, share, generator)

    def add_to(self, y: Tensor, x: Tensor, module: str) -> Tensor:
        """As `Mixture.add_to`."""
        if module not in self.values.modules:
            return y
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.share
        return super().add_to(y, x * (kept / (1 - self.share)).to(x.dtype), module)


def dropping(recall: Recall | None, share: float, seed: int, device: torch.device) -> Recall | None:
    """The recall with inputs dropped, by a generator of this seed; as it is for a share of 0."""
    if recall is None or share == 0:
        return recall
    generator = torch.Generator(device).manual_seed(seed)

    def dropped(block: int, hidden: Tensor) -> Mixture | None:
        mixture = recall(block, hidden)
        return None if mixture is None else Dropped.of(mixture, share, generator)

    return dropped


def trimmed(tokens: Tensor) -> Tensor:
    """Tokens (b, n) without the columns on the left where all are padding."""
    return tokens[:, int((tokens != PAD).any(dim=0).int().argmax()) :]


def by_length(tokens: Tensor, batch: int) -> Sequence[Tensor]:
    """Places of samples by batches, those of like lengths together, so that little is padded."""
    return (tokens != PAD).sum(dim=1).argsort(stable=True).split(batch)


@torch.no_grad()
def answers(
    lm: CausalLM,
    prompts: Sequence[str],
    recall: Recall | None = None,
    *,
    batch: int = 16,
    most: int | None = None,
) -> list[str]:
    """The greedy answers of a language model to prompts, without white space around them.

    `most` as in `CausalLM.generate`.
    """
    if not prompts:
        return []
    tokens = lm.encode(prompts).tokens
    found = [""] * len(prompts)
    for rows in by_length(tokens, batch):
        generated = lm.generate(trimmed(tokens[rows]).to(lm.device), recall, most=most)
        for row, ids in zip(rows.tolist(), generated, strict=True):
            found[row] = lm.decode(ids).strip()
    return found


class TextLearner(nn.Module):
    """Sequential LoRA: each task starts from what the one before left, nothing protects it.

    `forward(tokens, answers, seed)` is the mean loss of a batch. Subclasses change the hooks: which
    adapters a block uses, what happens before and after a task, and the penalty of a step.
    """

    id: ClassVar[str] = "sequential"
    title: ClassVar[str] = "sequential LoRA"
    kind: ClassVar[Kind] = "baseline"

    def __init__(self, work: TextWorkspace, tasks: int) -> None:
        """Fresh adapters, to learn so many tasks."""
        super().__init__()
        self.work = work
        self.tasks = tasks
        self.seen: list[TextTask] = []
        self.lm: CausalLM = work.backbone
        self.begin()
        self.to(work.engine.device)

    def begin(self) -> None:
        """Make what learns."""
        self.values: AdapterValues = self.fresh(1)

    def fresh(self, count: int) -> AdapterValues:
        """New adapters for the next task."""
        return self.work.fresh(count, len(self.seen) + 1)

    def recall(self) -> Recall | None:
        """The adapters that a block uses."""
        return every(self.values)

    def prompts(self, task: TextTask, samples: TextSamples) -> Sequence[str]:
        """What the model is asked in a test."""
        del task
        return samples.prompts

    def before_task(self, task: TextTask) -> None:
        """What changes before a task trains; `seen` holds the tasks before it."""

    def penalty(self) -> Tensor:
        """What the loss of a step has beside the cross-entropy."""
        return torch.zeros((), device=self.work.engine.device)

    def after_task(self, task: TextTask, seconds: float) -> None:
        """What is kept of a task that was trained; `seen` does not hold it yet."""

    def stage(self, task: TextTask) -> str:
        """Where the training of a task stands among others."""
        return f"task {task.number}/{len(self.work.stream.tasks)} {task.name}"

    def rate_of(self, name: str) -> float:
        """The factor on the learning rate of a parameter."""
        del name
        return 1.0

    def forward(self, tokens: Tensor, answers: Tensor, seed: int) -> Tensor:
        """The mean −log p of the answer tokens of a batch; see `EncodedTexts`."""
        recall = dropping(self.recall(), self.work.config.text.dropout, seed, tokens.device)
        loss = self.lm.answer_loss(tokens, answers, recall)
        return loss.sum() / answers.sum()

    def learn(
        self, task: TextTask, *, fingerprint: str = "", checkpoint: Path | None = None
    ) -> FitResult:
        """Train on one task. Arguments and errors as `Engine.fit`."""
        work, settings = self.work, self.work.config.train
        begin = time.perf_counter()
        self.before_task(task)
        encoded = self.lm.encode(task.train.prompts, task.train.answers)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            mean: Tensor = model(trimmed(batch.inputs), batch.labels, batch.seed)
            return mean + self.penalty()

        self.train()
        fit = work.engine.fit(
            self,
            Batches(
                encoded.tokens.numpy(),
                encoded.answers.numpy(),
                settings.batch_size,
                work.epochs(task),
                self.work.training_seed(task.number),
            ),
            loss,
            settings,
            stage=f"{self.stage(task)}: {self.title}",
            fingerprint=fingerprint,
            checkpoint=checkpoint,
            rate_of=self.rate_of,
            progress=work.progress,
        )
        self.eval()
        self.after_task(task, time.perf_counter() - begin)
        self.seen.append(task)
        return fit

    def measure(self, tasks: Sequence[TextTask] | None = None) -> TextScores:
        """Loss, and with `text.generate` the metric, on the test texts of tasks; none: of all."""
        work = self.work
        tasks = work.stream.tasks if tasks is None else tasks
        self.eval()
        losses: list[float] = []
        scores: list[float] = []
        cut_prompts = cut_answers = 0
        for done, task in enumerate(tasks):
            prompts = self.prompts(task, task.test)
            encoded = self.lm.encode(prompts, task.test.answers)
            cut_prompts += encoded.cut_prompts
            cut_answers += encoded.cut_answers
            losses.append(self.loss(encoded))
            if work.config.text.generate:
                said = self.answers(prompts)
                scores.append(score(task.metric, said, task.test.answers, task.test.prompts))
            stage = f"after {len(self.seen)} tasks: measure {self.title}"
            work.tell(stage, done + 1, len(tasks))
        generated = tuple(scores) if work.config.text.generate else None
        return TextScores(
            losses=tuple(losses),
            scores=generated,
            cut_prompts=cut_prompts,
            cut_answers=cut_answers,
        )

    @torch.no_grad()
    def loss(self, encoded: EncodedTexts) -> float:
        """The mean −log p over all answer tokens."""
        work, total = self.work, 0.0
        tokens, answers = encoded.tokens, encoded.answers
        for rows in self._batches(tokens):
            batch = trimmed(tokens[rows]).to(work.engine.device)
            with work.engine.autocast():
                each = self.lm.answer_loss(batch, answers[rows].to(batch.device), self.recall())
            total += float(each.double().sum())
        return total / int(answers.sum())

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The greedy answers to prompts, as `answers`."""
        with self.work.engine.autocast():
            batch = self.work.config.engine.eval_batch_size
            return answers(self.lm, prompts, self.recall(), batch=batch)

    @torch.no_grad()
    def input_moments(self, past: PastInputs, samples: TextSamples) -> dict[str, Tensor]:
        """The second moment of all tokens that enter each adapted layer; padding is no input."""
        real = torch.empty(0)
        tokens = self.lm.encode(samples.prompts, samples.answers).tokens
        with past.counted(self.lm, lambda x: x[real]) as moments:
            for rows in self._batches(tokens):
                batch = trimmed(tokens[rows]).to(self.work.engine.device)
                real = batch != PAD
                with self.work.engine.autocast():
                    self.lm.hidden(batch, self.recall())
        return moments

    def _batches(self, tokens: Tensor) -> Sequence[Tensor]:
        return by_length(tokens, self.work.config.engine.eval_batch_size)


class AtomLearner(TextLearner):
    """MoRAM: r new atoms a task at every adapted map; the older ones are frozen.

    `bank` holds the atoms of the tasks `seen`, frozen, and is read through `gate`. With a `past`
    the keys of new atoms are not random: they lie where it has no inputs, and do not learn.
    """

    id: ClassVar[str] = "moram"
    title: ClassVar[str] = "MoRAM"
    kind: ClassVar[Kind] = "method"

    def __init__(
        self,
        work: TextWorkspace,
        bank: Rank1Memory,
        gate: AtomGate,
        seen: Sequence[TextTask] = (),
        past: PastInputs | None = None,
    ) -> None:
        super().__init__(work, len(work.stream.tasks))
        self.gate = gate
        self.past = past
        self.bank = bank.to(work.engine.device)
        self.seen = list(seen)

    def begin(self) -> None:
        """The atoms are given."""

    def recall(self) -> Recall | None:
        """All atoms, for every token to choose among."""
        return self.bank.recall(self.gate)

    def before_task(self, task: TextTask) -> None:
        """Add atoms that learn and change nothing yet.

        Raises MismatchError where `moram.topk` asks for more atoms than there are then.
        """
        work = self.work
        if self.past is None:
            generator = work.engine.generator(work.training_seed(task.number))
            flat = init_atoms(work.layout, generator=generator)
        else:
            flat = self.past.free_branch(self.input_moments(self.past, task.train))[0]
        self.bank.grow(
            flat.to(work.engine.device),
            rank=work.config.adapter.rank,
            owner=task.number,
            scaling=work.scaling,
            keys_learn=self.past is None,
        )
        if work.config.moram.topk is not None:
            self.bank.check_topk(self.gate.topk)


def in_turn(learner: TextLearner) -> Row:
    """Learn task after task, measured before the first and after each; one row."""
    tasks = learner.work.stream.tasks
    found = [learner.measure()]
    seconds = 0.0
    for task in tasks:
        begin = time.perf_counter()
        learner.learn(task)
        seconds += time.perf_counter() - begin
        found.append(learner.measure())
    return text_row(learner, dict(enumerate(found)), seconds=seconds)


def text_row(
    learner: TextLearner,
    found: Mapping[int, TextScores],
    *,
    seconds: float | None,
    tasks: Sequence[TextTask] | None = None,
) -> Row:
    """The row of what was measured on `tasks` (none: on all) after so many of them.

    Where the last ones were not learned, its metrics are those of a stream that ended before them.
    """
    tasks = learner.work.stream.tasks if tasks is None else tasks
    matrix = AccuracyMatrix.empty([task.name for task in tasks])
    losses = np.full((len(tasks) + 1, len(tasks)), np.nan)
    for number, scores in found.items():
        losses[number] = scores.losses
        if scores.scores is not None:
            matrix = matrix.with_row(number, scores.scores)
    learned = max(found)
    ended = losses[: learned + 1, :learned]
    more = {"loss.final": final_average(ended)}
    if learned > 1 and not np.isnan(np.diagonal(ended[1:])).any():
        more["loss.forgetting"] = loss_forgetting(ended)
    row = Row.measured(
        learner.id,
        learner.title,
        learner.kind,
        matrix.up_to(learned),
        more=more,
        seconds=seconds,
    )
    cells = tuple(tuple(None if np.isnan(x) else float(x) for x in line) for line in losses)
    changes = {
        "accuracy": matrix.cells,
        "loss": cells,
        "cut_prompts": found[learned].cut_prompts,
        "cut_answers": found[learned].cut_answers,
    }
    return row.model_copy(update=changes)


def some(samples: TextSamples) -> TextSamples:
    """At most `SUBJECT_SAMPLES` of them, spread evenly."""
    count = min(SUBJECT_SAMPLES, len(samples))
    return samples.chosen(np.linspace(0, len(samples) - 1, count).astype(np.int64).tolist())
