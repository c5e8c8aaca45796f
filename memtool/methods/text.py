"""Learning on a stream of texts, task after task: MoRAM's atoms, and the loop that all rules share.

A model is trained to continue each prompt with its answer: cross-entropy, the mean over the answer
tokens of a batch. After every task it is measured on the test texts of all tasks: −log p of an
answer token (always), and the metric of the task on greedy answers (`text.generate`).

`TextLearner` as it stands is sequential LoRA. `AtomLearner` is MoRAM: r atoms a task, on top of the
frozen ones before, written to the memory as one version a task, from where a run goes on. The other
rules are in `memtool.methods.baselines.text`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

import memtool_stores
from memtool.adapters.lora import init_lora
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, Recall
from memtool.atomic import write_atomic
from memtool.backbones.causal_lm import PAD, CausalLM, create_causal_lm
from memtool.engine import Batch, Batches
from memtool.errors import ConfigError, MismatchError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.metrics import final_average, loss_forgetting
from memtool.evaluation.record import Kind, Row
from memtool.evaluation.text import score
from memtool.memories.rank1 import Rank1Memory, init_atoms
from memtool.methods.moram import bank_of, digest, gate_of
from memtool.methods.recall import every
from memtool.methods.workspace import MemoryWorkspace
from memtool.progress import ProgressEvent
from memtool.streams.text import TextSamples, TextStream, TextTask, open_text_stream


class TextWorkspace(MemoryWorkspace):
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

    @cached_property
    def backbone(self) -> CausalLM:
        """The frozen language model, on the device; bfloat16 where the engine computes so."""
        half = self.engine.precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        lm = create_causal_lm(self.config.backbone, self.config.text, dtype=dtype)
        return lm.to(self.engine.device)

    def epochs(self, task: TextTask) -> int:
        """Passes over the training texts of a task; over all at once (number 0), their mean."""
        epochs = self.config.text.epochs
        if epochs is None:
            return self.config.train.epochs_for(len(task.train))
        return epochs[task.number - 1] if task.number else round(sum(epochs) / len(epochs))


class TextScores(BaseModel):
    """What a model reaches on the test texts of every task.

    `losses` are −log p in nats per answer token; `scores` the tasks' metrics, fractions 0..1, of
    generated answers, None where nothing was generated. `cut_prompts` counts the prompts that were
    longer than the limit, over all tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    cut_prompts: int = 0


@dataclass(frozen=True, eq=False)
class Dropped(Mixture):
    """A mixture whose adapters do not see a random share of their inputs, the rest scaled up.

    Every adapted layer draws for itself from `generator`, on the CPU, alike on every device.
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
        kept = torch.rand(x.shape, generator=self.generator) >= self.share
        return super().add_to(y, x * (kept.to(x.device) / (1 - self.share)).to(x.dtype), module)


def dropping(recall: Recall | None, share: float, seed: int) -> Recall | None:
    """The recall with inputs dropped, by a generator of this seed; as it is for a share of 0."""
    if recall is None or share == 0:
        return recall
    generator = torch.Generator().manual_seed(seed)

    def dropped(block: int, hidden: Tensor) -> Mixture | None:
        mixture = recall(block, hidden)
        return None if mixture is None else Dropped.of(mixture, share, generator)

    return dropped


def trimmed(tokens: Tensor) -> Tensor:
    """Tokens (b, n) without the columns on the left where all are padding."""
    return tokens[:, int((tokens != PAD).any(dim=0).int().argmax()) :]


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
        """New adapters that learn: A random, by the seed and the number of the task; B zero."""
        work = self.work
        generator = work.engine.generator(self.training_seed(len(self.seen) + 1))
        return self.stacked(init_lora(work.layout, count, generator=generator), trainable=True)

    def stacked(self, flat: Tensor, *, trainable: bool = False) -> AdapterValues:
        """Adapters of flat values (t, numel), on the device, scaled by the settings' alpha / r."""
        layout = self.work.layout
        values = AdapterValues.from_flat(flat, layout, self.scaling, trainable=trainable)
        return values.to(self.work.engine.device)

    @property
    def scaling(self) -> float:
        """Alpha / r."""
        return self.work.config.adapter.alpha / self.work.config.adapter.rank

    def training_seed(self, number: int) -> int:
        """The seed of the start and of the order of batches of task `number`."""
        return self.work.seed * 1000 + number

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

    def checkpoint(self, task: TextTask) -> tuple[Path | None, str]:
        """Where an interrupted training goes on from, and the fingerprint of what may do so."""
        del task
        return None, ""

    def identity(self) -> str | None:
        """What says which model this is, when it is kept on disk; None when it is not."""
        return None

    def forward(self, tokens: Tensor, answers: Tensor, seed: int) -> Tensor:
        """The mean −log p of the answer tokens of a batch; see `EncodedTexts`."""
        recall = dropping(self.recall(), self.work.config.text.dropout, seed)
        loss = self.lm.answer_loss(tokens, answers, recall)
        return loss.sum() / answers.sum()

    def learn(self, task: TextTask) -> None:
        """Train on one task. Errors as `Engine.fit`."""
        work, settings = self.work, self.work.config.train
        begin = time.perf_counter()
        self.before_task(task)
        encoded = self.lm.encode(task.train.prompts, task.train.answers)
        checkpoint, fingerprint = self.checkpoint(task)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            mean: Tensor = model(trimmed(batch.inputs), batch.labels, batch.seed)
            return mean + self.penalty()

        self.train()
        work.engine.fit(
            self,
            Batches(
                encoded.tokens.numpy(),
                encoded.answers.numpy(),
                settings.batch_size,
                work.epochs(task),
                self.training_seed(task.number),
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

    def measure(self) -> TextScores:
        """Loss, and with `text.generate` the metric, on the test texts of every task."""
        identity = self.identity()
        if identity is None:
            return self._measured()
        file = self.work.config.runs / "scores" / f"{self.id}-{identity}.json"
        if file.is_file():
            try:
                return TextScores.model_validate_json(file.read_bytes())
            except ValidationError:
                file.unlink()  # cut short by a full disk: measure again
        found = self._measured()
        text = found.model_dump_json(indent=2) + "\n"
        self.work.engine.on_main(lambda: write_atomic(file, text))
        return found

    def _measured(self) -> TextScores:
        work = self.work
        self.eval()
        losses: list[float] = []
        scores: list[float] = []
        cut = 0
        for done, task in enumerate(work.stream.tasks):
            prompts = self.prompts(task, task.test)
            encoded = self.lm.encode(prompts, task.test.answers)
            cut += encoded.cut_prompts
            losses.append(self._loss(encoded.tokens, encoded.answers))
            if work.config.text.generate:
                said = self.answers(prompts)
                scores.append(score(task.metric, said, task.test.answers, task.test.prompts))
            if work.progress is not None and work.engine.is_main:
                stage = f"after {len(self.seen)} tasks: measure {self.title}"
                work.progress(ProgressEvent(stage, done + 1, len(work.stream.tasks)))
        generated = tuple(scores) if work.config.text.generate else None
        return TextScores(losses=tuple(losses), scores=generated, cut_prompts=cut)

    @torch.no_grad()
    def _loss(self, tokens: Tensor, answers: Tensor) -> float:
        """The mean −log p over all answer tokens."""
        work, total = self.work, 0.0
        for rows in self._batches(tokens):
            batch = trimmed(tokens[rows]).to(work.engine.device)
            with work.engine.autocast():
                each = self.lm.answer_loss(batch, answers[rows].to(batch.device), self.recall())
            total += float(each.double().sum())
        return total / int(answers.sum())

    @torch.no_grad()
    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The greedy answers to prompts, without white space around them."""
        work = self.work
        tokens = self.lm.encode(prompts).tokens
        found = [""] * len(prompts)
        for rows in self._batches(tokens):
            batch = trimmed(tokens[rows]).to(work.engine.device)
            with work.engine.autocast():
                generated = self.lm.generate(batch, self.recall())
            for row, ids in zip(rows.tolist(), generated, strict=True):
                found[row] = self.lm.decode(ids).strip()
        return found

    def _batches(self, tokens: Tensor) -> Sequence[Tensor]:
        """Places of samples, those of like lengths together, so that little is padded."""
        order = (tokens != PAD).sum(dim=1).argsort(stable=True)
        return order.split(self.work.config.engine.eval_batch_size)


class AtomLearner(TextLearner):
    """MoRAM: r new atoms a task at every adapted map; the older ones are frozen.

    The atoms of a task are a row of the memory. A task whose atoms are there is not trained again:
    they are loaded, after a check that they were trained with the same settings, texts and model.
    """

    id: ClassVar[str] = "moram"
    title: ClassVar[str] = "MoRAM"
    kind: ClassVar[Kind] = "method"

    def begin(self) -> None:
        """An empty bank."""
        config = self.work.config
        self.gate = gate_of(config.moram, config.adapter.rank)
        self.bank = Rank1Memory(self.work.layout.sites)

    def recall(self) -> Recall | None:
        """All atoms, for every token to choose among."""
        return self.bank.recall(self.gate)

    def learn(self, task: TextTask) -> None:
        """Load the atoms of the task, or train them and write them to the memory."""
        work, place = self.work, len(self.seen)
        records = work.store.view("HEAD").atom_records if work.has_store else ()
        if place >= len(records):
            super().learn(task)
            return
        self._require_same(records[place], task)
        self.bank = bank_of(work.store.view("HEAD"), work.layout, place + 1)
        self.to(work.engine.device)
        self.seen.append(task)

    def before_task(self, task: TextTask) -> None:
        """Add atoms that learn and change nothing yet."""
        work = self.work
        generator = work.engine.generator(self.training_seed(task.number))
        flat = init_atoms(work.layout, generator=generator)
        rank = work.config.adapter.rank
        self.bank.grow(
            flat.to(work.engine.device), rank=rank, owner=task.number, scaling=self.scaling
        )

    def after_task(self, task: TextTask, seconds: float) -> None:
        """Write the new atoms as one version of the memory, and freeze them."""
        work = self.work
        flat = self.bank.fresh().float().cpu().numpy()
        checkpoint, fingerprint = self.checkpoint(task)
        place = len(self.seen)
        meta = {
            "task": task.number,
            "task_name": task.name,
            "seed": work.seed,
            "setting": "trace",
            "scaling": self.scaling,
            "hyperparameters": work.config.model_dump(
                mode="json", include={"adapter", "train", "moram", "text"}
            ),
            "provenance": {
                "fingerprint": fingerprint,
                "beneath": self._beneath(),
                "data": work.stream.fingerprint,
                "seconds": seconds,
            },
        }

        def append(txn: memtool_stores.Transaction) -> None:
            if len(txn.atom_records) != place:
                raise MismatchError(
                    f"the memory {work.store_path!r} has atoms of {len(txn.atom_records)} tasks",
                    expected=f"{place}, on top of which those of {task.name} were trained",
                    remedy="run again: what is written is not trained again",
                )
            txn.add_atoms(f"task-{task.number}-seed-{work.seed}", flat, meta)

        def write() -> None:
            work.store_or_new().run(
                append,
                f"write atoms of task {task.number} {task.name}",
                metadata={
                    "verb": "write",
                    "seed": work.seed,
                    "seconds": seconds,
                    "configuration": work.config.model_dump(mode="json"),
                },
            )
            if checkpoint is not None:
                checkpoint.unlink(missing_ok=True)

        work.engine.on_main(write)
        self.bank.freeze()

    def checkpoint(self, task: TextTask) -> tuple[Path | None, str]:
        """A file beside the adapters, for each set of settings."""
        fingerprint = self._fingerprint(task)
        name = f".task-{task.number}-seed-{self.work.seed}-{fingerprint[:8]}.checkpoint"
        return self.work.adapter_folder / name, fingerprint

    def identity(self) -> str | None:
        """The atoms, the gate, the model and the texts."""
        work = self.work
        decides = [
            self._beneath(),
            work.backbone.sha256,
            work.stream.fingerprint,
            work.config.model_dump(mode="json", include={"moram", "text"}),
            work.config.backbone.targets,
            work.engine.precision,
        ]
        text = json.dumps(decides, sort_keys=True)
        return f"after-{len(self.seen)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _beneath(self) -> str:
        """The rows of the tasks seen so far."""
        if not self.seen:
            return digest(())
        return digest(self.work.store.view("HEAD").atom_records[: len(self.seen)])

    def _fingerprint(self, task: TextTask) -> str:
        work = self.work
        learning = {"prompt_tokens", "answer_tokens", "long_prompts", "dropout"}
        decides: dict[str, Any] = {
            "backbone": work.backbone.sha256,
            "task": [task.number, task.name, task.train.prompts, task.train.answers],
            "epochs": work.epochs(task),
            "targets": work.config.backbone.targets,
            "settings": work.config.model_dump(mode="json", include={"adapter", "train", "moram"}),
            "text": work.config.text.model_dump(mode="json", include=learning),
            "seed": work.seed,
            "beneath": self._beneath(),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _require_same(self, record: memtool_stores.AdapterRecord, task: TextTask) -> None:
        known = (record.meta.get("provenance") or {}).get("fingerprint")
        if known != self._fingerprint(task):
            raise ConfigError(
                f"the memory {self.work.store_path!r} holds atoms {record.name!r} that were "
                f"trained with other settings, texts or model than task {task.number} {task.name}",
                remedy="another --store and --set runs=DIR, or --fresh to begin this one anew",
            )


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


def text_row(learner: TextLearner, found: dict[int, TextScores], *, seconds: float) -> Row:
    """The row of what was measured after so many tasks."""
    tasks = [task.name for task in learner.work.stream.tasks]
    matrix = AccuracyMatrix.empty(tasks)
    losses = np.full((len(tasks) + 1, len(tasks)), np.nan)
    for number, scores in found.items():
        losses[number] = scores.losses
        if scores.scores is not None:
            matrix = matrix.with_row(number, scores.scores)
    more = {"loss.final": final_average(losses)}
    if len(tasks) > 1 and len(found) == len(tasks) + 1:
        more["loss.forgetting"] = loss_forgetting(losses)
    row = Row.measured(learner.id, learner.title, learner.kind, matrix, more=more, seconds=seconds)
    cells = tuple(tuple(None if np.isnan(x) else float(x) for x in line) for line in losses)
    return row.model_copy(update={"loss": cells})
