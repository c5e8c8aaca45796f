"""MoRAM: a memory of rank-1 atoms that find themselves, on any stream of images.

    adapt        train r new atoms at every adapted map, through the gate, on top of those in memory
    write        append them, count the features of their task, and solve the head; a version a task
    consolidate  nothing to learn: the head again, under other head settings
    retrieve     which tasks' atoms do the tokens of this input choose?
    evaluate     accuracy on every task, at any version

Every token chooses atoms by its own response to their keys (`memtool.adapters.atoms`): there is no
router, no replay and no further loss, and older atoms are frozen. Atoms are trained with those in
memory around them, so that a task is written before the next one is trained. Head: solved from the
running moments of the features, each task's as they are when it is written (lda, ridge, ncm); or
trained with the atoms, every class by its last task (grown), or going on from the head before
(shared). With a head for each task, the gate's weight on the atoms of a task is its coefficient.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

import memtool_stores
from memtool.adapters.atoms import AtomBank, AtomGate
from memtool.adapters.layout import Layout
from memtool.adapters.values import Recall
from memtool.backbones.interface import Backbone
from memtool.config import HeadSettings, MoramSettings
from memtool.engine import Batch, Batches
from memtool.errors import (
    AlreadyThereError,
    ChangedMeanwhileError,
    ConfigError,
    CorruptError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.metrics import reuse
from memtool.evaluation.record import AtomUse, Record, Row
from memtool.heads import FeatureStatistics, LinearClassifier, RecalledHead
from memtool.memories.rank1 import Rank1Memory, init_atoms
from memtool.methods.adapt import Adapted, augmented, require_learned
from memtool.methods.atom_watch import (
    TaskShares,
    contributions,
    frozen_drift,
    task_shares,
    watched,
)
from memtool.methods.exchange import About, AdapterFolder, ReadAdapter
from memtool.methods.fixed_head import FixedHeadTraining, head_under, is_fixed
from memtool.methods.method import Method, Trained, first, task_of
from memtool.methods.results import (
    AtomsResult,
    AtomWeight,
    HeadResult,
    Prediction,
    PruneResult,
    TaskAccuracy,
    TaskShare,
    WriteResult,
)
from memtool.methods.state import (
    HEAD,
    classifier_of,
    features_blob,
    own_head_blob,
    solve_recalled_head,
)
from memtool.streams import load_image
from memtool.streams.task import Task

ATOMS = "atoms"
"""Blob of `AtomsState`."""

SUBJECT_SAMPLES = 256
"""Images of a task that `retrieve --task` and pruning look at."""

DRIFT_SAMPLES = 32
"""Test images of a task that the drift of its atoms is measured on."""

TOP_ATOMS = 10
"""Single atoms that `retrieve` names."""

SETTINGS = ("til", "cil", "dil", "xtail")
"""Settings that one bank of atoms can be measured in."""


class AtomsState(BaseModel):
    """How the atoms are read: the JSON blob `atoms`. `moram.topk` is a number here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    moram: MoramSettings
    head: HeadSettings
    class_names: tuple[str, ...]
    fingerprint: str

    @classmethod
    def load(cls, view: memtool_stores.MemoryView) -> AtomsState | None:
        """The state at a version; None before the first atoms."""
        if ATOMS not in view.blobs():
            return None
        try:
            return cls.model_validate_json(view.blob(ATOMS))
        except ValidationError as error:
            raise CorruptError(
                f"blob {ATOMS!r} at version {view.version}: {error.errors()[0]['msg']}",
                remedy="memtool verify; a newer memtool may have written it",
            ) from error


def resolved(settings: MoramSettings, rank: int) -> MoramSettings:
    """The settings with a number for topk: the rank where none is given, but at least 2."""
    return settings.model_copy(update={"topk": settings.topk or max(rank, 2)})


def gate_of(settings: MoramSettings, rank: int) -> AtomGate:
    """The gate that the settings describe."""
    return AtomGate(**resolved(settings, rank).model_dump())


def bank_of(
    view: memtool_stores.MemoryView, layout: Layout, rows: int | None = None
) -> Rank1Memory:
    """The atoms of a version, or of its first `rows` rows, frozen, on the CPU.

    The owner of an atom is the number of its task. Pruned atoms are left out.
    """
    memory = Rank1Memory(layout.sites)
    records = view.atom_records[:rows]
    if records:
        for site in memory.sites:
            stored = view.atoms(site.name)
            kept = np.flatnonzero(stored.owner < len(records))
            tasks = [task_of(records[place]) for place in stored.owner[kept].tolist()]
            memory.append(
                site.name,
                AtomBank(
                    torch.from_numpy(stored.keys[kept].copy()),
                    torch.from_numpy(np.ascontiguousarray(stored.values[:, kept].T)),
                    torch.from_numpy(stored.scaling[kept].astype(np.float32)),
                    torch.tensor(tasks, dtype=torch.int64),
                ),
            )
    return memory.eval().requires_grad_(False)


def digest(records: Sequence[memtool_stores.AdapterRecord], head: str | None = None) -> str:
    """What atoms were trained on top of: the bytes, scalings and prunings of rows, and a head."""
    said = [
        [r.sha256, r.scaling, {site: list(ranks) for site, ranks in sorted(r.pruned.items())}]
        for r in records
    ]
    return hashlib.sha256(json.dumps([said, head]).encode()).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class AtomSnapshot:
    """The memory at one version, on the device: what retrieval and evaluation read.

    `tasks` are the numbers of the tasks whose atoms are there, in the order written.
    """

    version: str
    view: memtool_stores.MemoryView
    tasks: tuple[int, ...]
    bank: Rank1Memory
    gate: AtomGate
    state: AtomsState
    head: RecalledHead


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
        mask = torch.full((len(head.bias),), -torch.inf)
        mask[list(classes)] = 0.0
        self.mask: Tensor
        self.register_buffer("mask", mask)

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


class Moram(Method):
    """The steps over one configuration and seed."""

    kind: ClassVar[Literal["adapter", "atoms"]] = "atoms"

    @property
    def settings(self) -> MoramSettings:
        """The configured gate, with a number for topk."""
        return resolved(self.config.moram, self.config.adapter.rank)

    @property
    def gate(self) -> AtomGate:
        """The configured gate."""
        return gate_of(self.config.moram, self.config.adapter.rank)

    # Adapt ----------------------------------------------------------------------------------

    def _train(self, task: Task, fingerprint: str, checkpoint: Path) -> Trained:
        work, adapter, train = self.workspace, self.config.adapter, self.config.train
        self._require_settings()
        seed = self.training_seed(task)
        classes = len(work.stream.class_names)
        head = LinearClassifier(torch.zeros(classes, work.backbone.dim), torch.zeros(classes))
        bank, source, beneath = Rank1Memory(work.layout.sites), "zero", self._beneath_digest(task)
        if work.has_store:
            view = work.store.view("HEAD")
            self._require_own_kind(view)
            rows = self._rows_beneath(view, task)
            bank = bank_of(view, work.layout, rows)
            if rows:
                state = self._state(view)
                self._require_same_gate(state, self.settings)
                source = f"zero on top of {rows} tasks, version {view.version}"
                if self.config.head.kind == "shared":
                    head = self._going_on(view, head)
        start = init_atoms(work.layout, generator=work.engine.generator(seed))
        bank.grow(start, rank=adapter.rank, owner=task.number, scaling=adapter.alpha / adapter.rank)
        bank.check_topk(self.gate.topk)
        bank.train()
        module: AtomTraining | FixedHeadTraining
        if is_fixed(self.config):
            module = FixedHeadTraining(work, bank, lambda: bank.recall(self.gate), task)
        else:
            module = AtomTraining(work.backbone, bank, self.gate, head, task.classes)

        begin: list[Tensor] = []

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            images = augmented(batch, train)
            if isinstance(module, FixedHeadTraining):
                found = module.loss(model, images, batch)
            else:
                found = F.cross_entropy(model(images), batch.labels)
            if not begin:
                begin.append(found.detach())
            return found

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
            stage=self.stage(task),
            fingerprint=fingerprint,
            checkpoint=checkpoint,
            progress=work.progress,
        )
        module.eval()
        predicted = work.engine.predict(lambda images: module(images).argmax(1), task.train.images)
        right = (predicted == torch.from_numpy(np.asarray(task.train.labels))).double().mean()
        trained = module.classifier()
        values = bank.fresh().cpu().unsqueeze(0)
        require_learned(fit, begin, len(task.classes), [values], train.lr, self.stage(task))
        return Trained(Adapted(values, (trained,), (float(right),), fit), source, beneath)

    def _fingerprint(self, task: Task) -> str:
        decides = {
            "trained": super()._fingerprint(task),
            "moram": self.settings.model_dump(mode="json"),
            "head goes on": self.config.head.kind == "shared",
            "beneath": self._beneath_digest(task),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _rows_beneath(self, view: memtool_stores.MemoryView, task: Task) -> int:
        """How many rows of atoms the task is trained on top of: those in memory before its own."""
        for place, record in enumerate(view.atom_records):
            if task_of(record) == task.number:
                return place
        return len(view.atom_records)

    def _beneath_digest(self, task: Task) -> str:
        """What the task is, or in memory was, trained on top of."""
        if not self.workspace.has_store:
            return digest(())
        view = self.workspace.store.view("HEAD")
        rows = self._rows_beneath(view, task)
        if rows < len(view.atom_records):
            # Written: what was pruned or forgotten since does not make it another training.
            provenance = view.atom_records[rows].meta.get("provenance") or {}
            if known := provenance.get("beneath"):
                return str(known)
        return self._digest_at(view, view.atom_records[:rows])

    def _digest_at(
        self,
        view: memtool_stores.MemoryView,
        records: Sequence[memtool_stores.AdapterRecord],
    ) -> str:
        going_on = self.config.head.kind == "shared" and records
        return digest(records, view.state.blobs.get(HEAD) if going_on else None)

    def _going_on(
        self, view: memtool_stores.MemoryView, start: LinearClassifier
    ) -> LinearClassifier:
        """The head of a version where it knows a class, else `start`."""
        if HEAD not in view.blobs():
            return start
        known = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
        weight, bias = start.weight.clone(), start.bias.clone()
        seen = torch.isfinite(known.bias[0])
        weight[seen], bias[seen] = known.weight[0][seen], known.bias[0][seen]
        return LinearClassifier(weight, bias)

    # Write ----------------------------------------------------------------------------------

    def write(
        self, directories: Sequence[Path] | None = None, *, task: str | None = None
    ) -> WriteResult:
        """Append the atoms of tasks, one version a task; arguments and errors as `Method.write`.

        Raises MismatchError for atoms that were trained on top of others than those in memory.
        """
        self._require_settings()
        if directories is None:
            folder = self.workspace.adapter_folder
            directories = [found.path for found in AdapterFolder.all_in(folder)]
            if not directories:
                return super().write(None, task=task)  # which says what is missing
        results = [super(Moram, self).write([path], task=task) for path in directories]
        return WriteResult(
            version=results[-1].version,
            added=tuple(adapter for result in results for adapter in result.added),
            skipped=tuple(name for result in results for name in result.skipped),
        )

    def _append(
        self, txn: memtool_stores.Transaction, adapter: ReadAdapter
    ) -> memtool_stores.AdapterRecord:
        """Append the atoms of a task; its features are counted with all atoms in place."""
        work, view = self.workspace, txn.base
        number = int(adapter.meta["task"])
        if number in (known := [task_of(record) for record in txn.atom_records]):
            raise AlreadyThereError(
                f"the memory holds atoms of task {number} already",
                remedy=f"memtool forget {number} first, or another --store",
            )
        self._require_trained_here(view, adapter)
        settings = self._trained_through(view, adapter)
        gate = gate_of(settings, work.layout.rank)
        txn.add_atoms(adapter.name, adapter.value.numpy(), adapter.meta)
        record = txn.atom_records[-1]
        bank = bank_of(view, work.layout)
        bank.grow(adapter.value, rank=work.layout.rank, owner=number, scaling=record.scaling)
        bank.freeze()
        bank.check_topk(gate.topk)
        task = work.task(str(number))
        statistics = feature_statistics(view, known)
        bank.eval().to(work.engine.device)
        statistics[number] = self._counted(bank.recall(gate), task)
        trained = {**trained_heads(view), number: adapter.head}
        if is_fixed(self.config):
            fixed = head_under(work, bank.recall(self.gate), self.config.head.kind)
            head = RecalledHead.shared(fixed.linear())
        else:
            head = solve(self.config.head, statistics, trained)
        new = AtomsState(
            moram=settings,
            head=self.config.head,
            class_names=work.stream.class_names,
            fingerprint=work.stream.fingerprint,
        )
        txn.put_blob(features_blob(number), statistics[number].to_bytes())
        txn.put_blob(HEAD, head.to_bytes())
        txn.put_blob(ATOMS, new.model_dump_json().encode())
        return record

    def _counted(self, recall: Recall, task: Task) -> FeatureStatistics:
        """Moments of the features of a task's training images."""
        work = self.workspace
        features = work.engine.predict(
            lambda images: work.backbone.features(work.backbone.preprocess(images), recall),
            task.train.images,
        )
        statistics = FeatureStatistics(work.backbone.dim, len(work.stream.class_names))
        statistics.add(features, torch.from_numpy(np.asarray(task.train.labels)))
        return statistics

    def _about(self, adapter: ReadAdapter) -> About | None:
        """What atoms were trained on; None for a LoRA from elsewhere, whose ranks become atoms."""
        folder = AdapterFolder(adapter.path)
        about = folder.about() if folder.is_complete else None
        return about if about and about.configuration.get("method") == "moram" else None

    def _trained_through(
        self, view: memtool_stores.MemoryView, adapter: ReadAdapter
    ) -> MoramSettings:
        """The gate that atoms were trained through, which must be that of the memory."""
        about, state = self._about(adapter), AtomsState.load(view)
        settings = self.settings if state is None else state.moram
        if about is not None:
            given = MoramSettings.model_validate(about.configuration["moram"])
            settings = resolved(given, self.workspace.layout.rank)
        if state is not None:
            self._require_same_gate(state, settings)
        return settings

    def _require_trained_here(self, view: memtool_stores.MemoryView, adapter: ReadAdapter) -> None:
        """Atoms belong on top of the very atoms that they were trained on."""
        about = self._about(adapter)
        if about is not None and about.beneath != self._digest_at(view, view.atom_records):
            raise MismatchError(
                f"{adapter.path} was trained from {about.warm_start}, not on top of "
                f"the {len(view.atom_records)} tasks that are in memory now",
                expected="tasks that are trained and written one after another",
                remedy=f"memtool train-adapter --task {adapter.meta['task']} --fresh",
            )

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> HeadResult:
        """Solve the head again, under the head settings of now; atoms learn nothing here."""
        work, config = self.workspace, self.config
        view = work.store.view("HEAD")
        self._require_own_kind(view)
        state = self._state(view)
        tasks = [task_of(record) for record in view.atom_records]
        result = HeadResult(
            version=view.version,
            tasks=tuple(tasks),
            head=config.head.kind,
            scope=config.head.scope,
            unchanged=state.head == config.head,
        )
        if result.unchanged:
            return result
        head = solve(config.head, feature_statistics(view, tasks), trained_heads(view))
        new = state.model_copy(update={"head": config.head})

        def commit(txn: memtool_stores.Transaction) -> None:
            _require_unmoved(txn, view)
            txn.put_blob(HEAD, head.to_bytes())
            txn.put_blob(ATOMS, new.model_dump_json().encode())

        message = f"solve head {config.head.kind}"
        metadata = self._metadata("consolidate")
        work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
        return result.model_copy(update={"version": work.store.head()})

    # Retrieve -------------------------------------------------------------------------------

    def retrieve(
        self,
        *,
        task: str | None = None,
        image: Path | None = None,
        query: Path | None = None,
        version: str = "HEAD",
        out: Path | None = None,
    ) -> AtomsResult:
        """Which tasks' atoms an image, or the test images of a task, choose; and what comes of it.

        There is no `query` and nothing to write to `out`: every token of every layer asks for
        itself and gets a mixture of its own.
        """
        if query is not None or out is not None:
            raise ConfigError(
                f"{'--query' if query is not None else '--out'} under method moram: every token "
                "of every layer asks for itself, and gets a mixture of its own",
                expected="--task or --image",
                remedy="memtool explain --image FILE, which maps atoms to tokens",
            )
        if (task is None) == (image is None):
            raise ConfigError("what should recall?", expected="one of --task and --image")
        work = self.workspace
        snapshot = self.snapshot(version)
        accuracy, prediction = None, None
        if task is not None:
            chosen = work.task(task)
            shown = first(chosen.test, SUBJECT_SAMPLES)
            subject, images = f"task {chosen.number} {chosen.name}", shown.images
            logits = self.scores(snapshot, images)
            accuracy = _share_right(logits, shown.labels)
        else:
            assert image is not None
            subject, images = str(image), load_image(image, self.config.backbone.image_size)[None]
            prediction = self.prediction(snapshot, images)
        shares, blocks = task_shares(
            work.engine, work.backbone, snapshot.bank, snapshot.gate, snapshot.tasks, images
        )
        by_block = shares.double().mean(dim=0)
        return AtomsResult(
            version=snapshot.version,
            subject=subject,
            samples=len(images),
            score_norm=snapshot.gate.score_norm,
            topk=snapshot.gate.topk,
            tasks=tuple(
                TaskShare(
                    name=record.name,
                    task=task_of(record),
                    task_name=record.meta.get("task_name"),
                    share=float(share),
                )
                for record, share in zip(
                    snapshot.view.atom_records, by_block.mean(dim=0), strict=True
                )
            ),
            blocks=tuple(tuple(row) for row in by_block.tolist()),
            block_numbers=blocks,
            atoms=self._top_atoms(snapshot, images),
            prediction=prediction,
            accuracy=accuracy,
        )

    def _top_atoms(
        self, snapshot: AtomSnapshot, images: npt.NDArray[np.uint8]
    ) -> tuple[AtomWeight, ...]:
        """The atoms that add most, as a share of what all atoms of their site add."""
        work = self.workspace
        added = contributions(work.engine, work.backbone, snapshot.bank, snapshot.gate, [images])
        found = []
        for site, each in added.items():
            ranks = snapshot.view.atoms(site).rank
            owners = snapshot.bank.bank(site).owner.tolist()
            total = float(each.sum())
            for place in each.topk(min(TOP_ATOMS, len(each))).indices.tolist():
                share = float(each[place]) / total if total else 0.0
                found.append(
                    AtomWeight(site=site, task=owners[place], rank=int(ranks[place]), share=share)
                )
        return tuple(sorted(found, key=lambda atom: -atom.share)[:TOP_ATOMS])

    # Evaluate -------------------------------------------------------------------------------

    def evaluate(
        self,
        *,
        setting: str | None = None,
        version: str = "HEAD",
        history: bool = False,
        compare: bool = False,
        unseen: bool | None = None,
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """Accuracy on the test images of every task whose atoms are in memory.

        `setting` til compares the classes of the given task only, the others all classes. `history`
        reads the version after each task and fills the whole matrix, and says how far old atoms
        drifted and which of them later tasks use. `unseen` has a column for every task of the
        stream, learned or not (none: in xtail). `compare` adds the same atoms without a threshold.
        """
        begin = time.perf_counter()
        setting = self._setting(setting)
        work = self.workspace
        snapshot = self.snapshot(version)
        shown = [work.task(str(number)) for number in snapshot.tasks]
        if unseen or (unseen is None and setting == "xtail"):
            shown += [task for task in work.stream.tasks if task.number not in snapshot.tasks]
        rows = [self._row(snapshot, shown, setting, history=history)]
        if compare and snapshot.gate.threshold > -1:
            rows.append(self._without_threshold(snapshot, shown, setting))
        used = self.config.model_copy(
            update={"moram": snapshot.state.moram, "head": snapshot.state.head}
        )
        return self._record(
            rows,
            shown,
            setting=setting,
            version=snapshot.version,
            used=used,
            mix=None,
            separation=None,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def _row(
        self, snapshot: AtomSnapshot, shown: Sequence[Task], setting: str, *, history: bool
    ) -> Row:
        """The memory on all tasks, after each of them or after the last."""
        count = len(snapshot.tasks)
        versions = self._history(snapshot) if history else {}
        versions[count] = snapshot.version
        matrix = AccuracyMatrix.empty([task.name for task in shown])
        banks: dict[int, Rank1Memory] = {}
        for place, (learned, at) in enumerate(sorted(versions.items())):
            self.tell("evaluate", place, len(versions))
            there = snapshot if at == snapshot.version else self.snapshot(at)
            scores = [self.accuracy(there, task, setting) for task in shown]
            matrix = matrix.with_row(learned, scores)
            banks[learned] = there.bank
            self.tell("evaluate", place + 1, len(versions))
        use, more = None, {}
        if len(banks) == count > 1:
            use = self._use(snapshot, [banks[place + 1] for place in range(count)])
            more = _of_use(use)
        row = Row.measured("memory", "memory of atoms", "method", matrix, more=more)
        return row.model_copy(update={"atom_use": use})

    def _use(self, snapshot: AtomSnapshot, banks: Sequence[Rank1Memory]) -> AtomUse:
        """Drift of the atoms of every task, bank by bank, and who uses them in the last one."""
        work, count = self.workspace, len(snapshot.tasks)
        norm: list[list[float | None]] = [[None] * count for _ in range(count)]
        difference: list[list[float | None]] = [[None] * count for _ in range(count)]
        shared = []
        for place, number in enumerate(snapshot.tasks):
            self.tell("evaluate: use of atoms", place, count)
            images = first(work.task(str(number)).test, DRIFT_SAMPLES).images
            drifts = frozen_drift(
                work.engine,
                work.backbone,
                banks[place],
                banks[place:],
                snapshot.gate,
                number,
                images,
            )
            for later, drift in enumerate(drifts, start=place):
                norm[later][place], difference[later][place] = drift.norm, drift.difference
            shares, _ = task_shares(
                work.engine, work.backbone, snapshot.bank, snapshot.gate, snapshot.tasks, images
            )
            shared.append(tuple(shares.double().mean(dim=(0, 1)).tolist()))
            self.tell("evaluate: use of atoms", place + 1, count)
        return AtomUse(
            norm=tuple(map(tuple, norm)),
            difference=tuple(map(tuple, difference)),
            reuse=tuple(shared),
        )

    def _without_threshold(
        self, snapshot: AtomSnapshot, shown: Sequence[Task], setting: str
    ) -> Row:
        """The same atoms and head, all kept atoms counting."""
        settings = snapshot.state.moram.model_copy(update={"threshold": -1.0})
        gate = gate_of(settings, self.config.adapter.rank)
        there = AtomSnapshot(
            snapshot.version,
            snapshot.view,
            snapshot.tasks,
            snapshot.bank,
            gate,
            snapshot.state,
            snapshot.head,
        )
        matrix = AccuracyMatrix.empty([task.name for task in shown])
        scores = [self.accuracy(there, task, setting) for task in shown]
        matrix = matrix.with_row(len(snapshot.tasks), scores)
        return Row.measured("memory-all", "memory of atoms, no threshold", "method", matrix)

    def scores(
        self,
        snapshot: AtomSnapshot,
        images: npt.NDArray[np.uint8],
        allowed: Sequence[int] | None = None,
    ) -> Tensor:
        """Scores (n, classes) of images; classes that are not `allowed` cannot win."""
        work, head = self.workspace, snapshot.head
        backbone = work.backbone
        shares = TaskShares(snapshot.tasks, snapshot.gate, counted=False)
        plain = snapshot.bank.recall(snapshot.gate)
        seen = watched(snapshot.bank, snapshot.gate, shares)

        def run(batch: Tensor) -> Tensor:
            pixels = backbone.preprocess(batch)
            if head.owners is None:
                features = backbone.features(pixels, plain)
                return head(features, features.new_zeros(len(batch), 1), allowed)
            features = backbone.features(pixels, seen)
            return head(features, shares.taken().mean(dim=1), allowed)

        return work.engine.predict(run, images)

    def prediction(self, snapshot: AtomSnapshot, images: npt.NDArray[np.uint8]) -> Prediction:
        """The most probable class of the first image."""
        scores = self.scores(snapshot, images[:1])
        mixed = isinstance(snapshot.head, RecalledHead) and snapshot.head.owners is not None
        probabilities = snapshot.head.probabilities(scores)[0] if mixed else scores[0].softmax(0)
        best = int(probabilities.argmax())
        return Prediction(
            label=snapshot.state.class_names[best], probability=float(probabilities[best])
        )

    def accuracy(self, snapshot: AtomSnapshot, task: Task, setting: str) -> float | None:
        """Share of a task's test images that are classified right.

        None for til and a task that is not in memory: none of its classes is known.
        """
        if setting == "til" and task.number not in snapshot.tasks:
            return None
        allowed = task.classes if setting == "til" else None
        return _share_right(self.scores(snapshot, task.test.images, allowed), task.test.labels)

    def _history(self, snapshot: AtomSnapshot) -> dict[int, str]:
        """The newest version with the atoms of the first i tasks, and no more, for every i."""
        found: dict[int, str] = {}
        for version in self.workspace.store.log(snapshot.version):
            view = self.workspace.store.view(version.id)
            tasks = tuple(task_of(record) for record in view.atom_records)
            if tasks and tasks == snapshot.tasks[: len(tasks)] and len(tasks) not in found:
                found[len(tasks)] = version.id
        return found

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks that a version can be measured on."""
        view = self.workspace.store.view(version)
        return tuple(task_of(record) for record in view.atom_records)

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks: faa, task_accuracy. Errors as `evaluate`.

        A task counts as inferred right when its atoms have most of an image's weight.
        """
        setting = self._setting(setting)
        work, snapshot = self.workspace, self.snapshot(version)
        shown = [work.task(str(number)) for number in tasks]
        scores = [self.accuracy(snapshot, task, setting) or 0.0 for task in shown]
        right, total = 0, 0
        for task in shown:
            shares, _ = task_shares(
                work.engine,
                work.backbone,
                snapshot.bank,
                snapshot.gate,
                snapshot.tasks,
                task.test.images,
            )
            most = shares.mean(dim=1).argmax(dim=1).tolist()
            right += sum(snapshot.tasks[place] == task.number for place in most)
            total += len(most)
        return {"faa": sum(scores) / len(scores), "task_accuracy": right / max(total, 1)}

    # Prune ----------------------------------------------------------------------------------

    def dead_atoms(self, below: float, *, version: str = "HEAD") -> PruneResult:
        """Which atoms add next to nothing, and what taking them out does; nothing is changed.

        An atom is dead when what it adds (mean of |w s z| |B| over the tokens of training images of
        all tasks in memory, each task alike) is less than `below` times what the atoms of its site
        add on average. Accuracies are on test images. Raises ConfigError unless 0 < below < 1.
        """
        if not 0 < below < 1:
            raise ConfigError(
                f"--atoms-below {below:g}",
                expected="a number between 0 and 1: 1 is what an atom adds on average",
            )
        work, snapshot = self.workspace, self.snapshot(version)
        tasks = [work.task(str(number)) for number in snapshot.tasks]
        images = [first(task.train, SUBJECT_SAMPLES).images for task in tasks]
        added = contributions(work.engine, work.backbone, snapshot.bank, snapshot.gate, images)
        ranks: dict[str, dict[str, list[int]]] = {}
        rest = Rank1Memory(work.layout.sites)
        atoms = 0
        for site in (one.name for one in work.layout.sites):
            stored, bank = snapshot.view.atoms(site), snapshot.bank.bank(site)
            dead = torch.zeros(len(bank), dtype=torch.bool)
            if site in added:  # else no image reaches it, as in a text tower
                dead = added[site] < below * added[site].mean()
            atoms += len(bank)
            for place in torch.nonzero(dead).flatten().tolist():
                name = snapshot.view.atom_records[int(stored.owner[place])].name
                ranks.setdefault(name, {}).setdefault(site, []).append(int(stored.rank[place]))
            parts = (bank.keys, bank.values, bank.scaling, bank.owner)
            keys, values, scaling, owner = (part.cpu()[~dead] for part in parts)
            rest.append(site, AtomBank(keys, values, scaling, owner))
        pruned = AtomSnapshot(
            snapshot.version,
            snapshot.view,
            snapshot.tasks,
            rest.eval().to(work.engine.device),
            snapshot.gate,
            snapshot.state,
            snapshot.head,
        )
        setting = self._setting(None)
        effect = tuple(
            TaskAccuracy(
                task=task.number,
                task_name=task.name,
                before=self.accuracy(snapshot, task, setting) or 0.0,
                after=self.accuracy(pruned, task, setting) or 0.0,
            )
            for task in tasks
        )
        return PruneResult(
            version=snapshot.version,
            below=below,
            atoms=atoms,
            pruned=sum(len(out) for sites in ranks.values() for out in sites.values()),
            ranks=ranks,
            tasks=effect,
        )

    def prune(self, found: PruneResult) -> PruneResult:
        """Take dead atoms out of the memory, as one version; the head stays.

        Raises ChangedMeanwhileError when the memory is no longer at the version looked at.
        """
        work = self.workspace
        view = work.store.view("HEAD")
        if view.version != found.version:
            raise ChangedMeanwhileError(
                f"the memory is at version {view.version}, not {found.version}",
                remedy="the same command again; nothing was pruned",
            )

        def commit(txn: memtool_stores.Transaction) -> None:
            _require_unmoved(txn, view)
            for name, sites in found.ranks.items():
                txn.prune_atoms(name, sites)

        message = f"prune {found.pruned} of {found.atoms} atoms"
        metadata = {"verb": "forget", "atoms_below": found.below, "pruned": found.pruned}
        work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
        return found.model_copy(update={"version": work.store.head(), "done": True})

    # Shared ---------------------------------------------------------------------------------

    def snapshot(self, version: str = "HEAD") -> AtomSnapshot:
        """The memory at a version, on the device."""
        work = self.workspace
        view = work.store.view(work.version_of(version))
        self._require_own_kind(view)
        state = self._state(view)
        if state.class_names != work.stream.class_names:
            raise MismatchError(
                f"the classes of {work.stream.name} are not those of the memory's head",
                expected=", ".join(state.class_names[:8]),
                remedy="the stream that the memory was trained on, or another --store",
            )
        for record in view.atom_records:
            self._require_same_task(record)
        bank = bank_of(view, work.layout).to(work.engine.device)
        gate = gate_of(state.moram, work.layout.rank)
        head = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
        if state.head.kind == "text":  # as the atoms of this version make it: some may be pruned
            head = RecalledHead.shared(head_under(work, bank.recall(gate), "text").linear())
        return AtomSnapshot(
            version=view.version,
            view=view,
            tasks=tuple(task_of(record) for record in view.atom_records),
            bank=bank,
            gate=gate,
            state=state,
            head=head.to(work.engine.device),
        )

    def _state(self, view: memtool_stores.MemoryView) -> AtomsState:
        state = AtomsState.load(view)
        if state is None or not view.atom_records:
            raise NotFoundError(
                f"the memory holds no atoms at version {view.version}",
                remedy="memtool train-adapter --method moram --task 1 && memtool write --method "
                "moram",
            )
        return state

    def _require_same_gate(self, state: AtomsState, settings: MoramSettings) -> None:
        """All atoms of a memory are trained and read through one gate."""
        if state.moram != settings:
            raise ConfigError(
                f"the memory {self.workspace.store_path!r} has another gate: "
                f"{_differences(state.moram, settings)}",
                remedy="the options that it was begun with, or another --store",
            )

    def _require_settings(self) -> None:
        """Settings that atoms cannot follow are errors, not ignored."""
        adapter, setting = self.config.adapter, self.config.stream.setting
        if setting not in SETTINGS:
            raise ConfigError(
                f"stream.setting {setting} under method moram",
                expected=f"one of {', '.join(SETTINGS)}",
            )
        if adapter.per_task > 1:
            raise ConfigError(
                f"adapter.per_task {adapter.per_task} under method moram",
                expected="1: a task adds its atoms once",
                remedy="--rank N for more atoms a task",
            )
        if adapter.warm_start != "none" or adapter.residual:
            raise ConfigError(
                "adapter.residual and adapter.warm_start under method moram",
                expected="none of them: new atoms start at zero on top of all that are in memory",
                remedy="--warm-start none, --set adapter.residual=false",
            )

    def _setting(self, setting: str | None) -> str:
        """What is known at test time, checked; without a word, as the tasks were cut."""
        cut = self.config.stream.setting
        setting = setting or cut
        if setting not in SETTINGS or (setting not in ("til", cut)):
            raise ConfigError(
                f"setting {setting!r} on tasks that were cut for {cut!r}, under method moram",
                expected=f"til or {cut}" if cut in SETTINGS else f"one of {', '.join(SETTINGS)}",
                remedy=f"--set stream.setting={setting} and a memory that was trained so",
            )
        return setting


def feature_statistics(
    view: memtool_stores.MemoryView, tasks: Sequence[int]
) -> dict[int, FeatureStatistics]:
    """Moments of the features of tasks, each as counted when it was written."""
    return {task: FeatureStatistics.from_bytes(view.blob(features_blob(task))) for task in tasks}


def trained_heads(view: memtool_stores.MemoryView) -> dict[int, LinearClassifier | None]:
    """The classifier that was trained with the atoms of each task, where they came with one."""
    heads: dict[int, LinearClassifier | None] = {}
    for record in view.atom_records:
        name = own_head_blob(record.name)
        heads[task_of(record)] = (
            classifier_of(view.blob(name), name) if name in view.blobs() else None
        )
    return heads


def solve(
    settings: HeadSettings,
    statistics: Mapping[int, FeatureStatistics],
    trained: Mapping[int, LinearClassifier | None],
) -> RecalledHead:
    """The head of a memory of atoms: from the moments of the features, or the trained heads.

    A head that goes on from task to task (kind shared) is, for every class, that of its last task.
    """
    if settings.kind == "shared":
        settings = settings.model_copy(update={"kind": "grown", "scope": "shared"})
    return solve_recalled_head(settings, statistics, trained, range(len(statistics)))


def solve_without(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, gone: set[str]
) -> None:
    """In a transaction that takes rows of atoms away: the head of those that are left."""
    state = AtomsState.load(view)
    if state is None or not gone & {record.id for record in view.atom_records}:
        return
    left = [task_of(record) for record in view.atom_records if record.id not in gone]
    if not left:
        for name in (ATOMS, HEAD):
            txn.delete_blob(name)
        return
    if state.head.kind in ("prototype", "text"):
        return  # prototypes stay what they are, and texts are read again by the atoms that are left
    trained = {task: head for task, head in trained_heads(view).items() if task in left}
    head = solve(state.head, feature_statistics(view, left), trained)
    txn.put_blob(HEAD, head.to_bytes())


def _of_use(use: AtomUse) -> dict[str, float]:
    """The metrics of a bank that has grown: means over the tasks but the last, or but the first."""
    found = {}
    for name, table in (("atom_norm", use.norm), ("atom_drift", use.difference)):
        known = [value for value in table[-1][:-1] if value is not None]
        if known:
            found[name] = sum(known) / len(known)
    found["atom_reuse"] = reuse(use.reuse)
    return found


def _differences(one: MoramSettings, other: MoramSettings) -> str:
    """`"topk 8, here 16"` for every setting that differs."""
    there, here = one.model_dump(), other.model_dump()
    return ", ".join(
        f"{name} {there[name]}, here {here[name]}" for name in there if there[name] != here[name]
    )


def _require_unmoved(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> None:
    if txn.base.version != view.version:
        raise ChangedMeanwhileError(
            f"the memory moved on to version {txn.base.version} meanwhile",
            remedy="the same command again; nothing was changed",
        )


def _share_right(scores: Tensor, labels: npt.NDArray[np.int64]) -> float:
    return float((scores.argmax(1) == torch.from_numpy(np.asarray(labels))).double().mean())
