"""What a memory is worth: the accuracy of what it recalls, beside other ways to read it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.recalls import every, same_for_all
from memtool.adapters.values import Recall
from memtool.engine import Engine
from memtool.errors import ConfigError, NotFoundError
from memtool.evaluation.course import Course
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.metrics import coefficient_drift, floor_met, mean_share
from memtool.evaluation.record import Kind, Row
from memtool.evaluation.right import Share
from memtool.heads import LinearClassifier, RecalledHead, solve_head
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.memories.separation import SeparationFunction, floored, separation
from memtool.methods.calibration import digest_of
from memtool.methods.mira.recall import MemoryModel
from memtool.methods.mira.settle import says, settled
from memtool.methods.mira.state import MemoryState, Snapshot
from memtool.methods.outcome import seen_before, share_right
from memtool.methods.records import own_head_blob, task_of
from memtool.methods.scored import TAKEN, Earlier, Taken
from memtool.settings import AT_ONCE
from memtool.streams.task import Images, Stream, Task
from memtool.workspace import Workspace
from memtool_stores import MemoryView

SIGNED = ("identity", "affine", "tanh", "normalised")
"""Separations that can give negative coefficients."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a memory scored on several tasks.

    accuracy: one a task; task_accuracy: share of samples whose task was inferred right;
    coefficients: (samples, memories, t) of every task, float32 on the CPU; ms_per_input: of
    inference, in the batches of the engine; floored: samples that met the floor of separation
    normalised in a block or more, None under another; left_out: of the softmax of all adapters, the
    mean share that separation topk leaves out, None under another; missed: of the adapters with the
    highest keys, the mean share that an index did not find, None without one.
    """

    accuracy: tuple[Share, ...]
    task_accuracy: float
    coefficients: tuple[Tensor, ...]
    ms_per_input: float
    floored: int | None = None
    left_out: float | None = None
    missed: float | None = None

    @property
    def more(self) -> dict[str, float]:
        """What a record has of them beside the accuracy, where it is known."""
        known = {name: getattr(self, name) for name in ("floored", "left_out", "missed")}
        return {name: float(value) for name, value in known.items() if value is not None}


class Measure:
    """Measurements of memories over one workspace: its engine, backbone and tasks."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def recall(
        self, model: MemoryModel, head: RecalledHead, images: npt.NDArray[np.uint8]
    ) -> tuple[Tensor, Tensor]:
        """Scores (n, classes) and coefficients (n, memories, t) of images."""

        def run(batch: Tensor) -> Tensor:
            offset = settled(model, says(head), model.backbone.preprocess(batch))
            features, coefficients = model.with_coefficients(batch, offset)
            scores = head(features, coefficients.mean(dim=1))
            return torch.cat([scores, coefficients.flatten(1).float()], dim=1)

        joined = self.workspace.engine.predict(run, images)
        memories = len(model.memory.blocks)
        return joined[:, : head.classes], joined[:, head.classes :].unflatten(1, (memories, -1))

    def left_out(self, model: MemoryModel, images: npt.NDArray[np.uint8]) -> Tensor | None:
        """The share (n,) of adapters that a cut leaves out, a mean over memories; None without one.

        Of the softmax of all scores, which are all computed.
        """
        if any(model.memory[block].uncut is None for block in model.memory.blocks):
            return None
        return self._mean_share(model, images, BlockMemory.left_out)

    def _mean_share(
        self,
        model: MemoryModel,
        images: npt.NDArray[np.uint8],
        share: Callable[[BlockMemory, Tensor], Tensor | None],
    ) -> Tensor:
        """What each memory says of the queries of images (n,), a mean over memories."""
        memories = [model.memory[block] for block in model.memory.blocks]

        def run(batch: Tensor) -> Tensor:
            _, _, queries = model.seen(model.backbone.preprocess(batch))
            bare = zip(memories, queries.unbind(dim=1), strict=True)
            shares = [share(memory, memory.query.whole(query)) for memory, query in bare]
            return torch.stack([one for one in shares if one is not None], dim=1).mean(dim=1)

        return self.workspace.engine.predict(run, images)

    def accuracy(self, model: MemoryModel, head: RecalledHead, samples: Images) -> float:
        """Share of samples that the recalled mixture classifies right."""
        return share_right(self.recall(model, head, samples.images)[0], samples)

    def scores(self, snapshot: Snapshot, tasks: Sequence[Task]) -> Scores:
        """The memory on the test images of tasks, the task inferred."""
        state, model, head = snapshot.consolidated()
        accuracy, coefficients = list[Share](), list[Tensor]()
        left, missed = list[Tensor](), list[Tensor]()
        right, total, spent = 0, 0, 0.0
        divides = model.settings.separation == "normalised"
        met = 0 if divides and model.settings.routing == "mixture" else None
        for task in tasks:
            begin = time.perf_counter()
            logits, recalled = self.recall(model, head, task.test.images)
            spent += time.perf_counter() - begin
            accuracy.append(share_right(logits, task.test))
            coefficients.append(recalled)
            some = task.test.images[:: _step(task)]
            if (out := self.left_out(model, some)) is not None:
                left.append(out)
            if model.settings.index != "exact":
                missed.append(self._mean_share(model, some, BlockMemory.missed))
            if met is not None:
                met += int(floor_met(floored(recalled).numpy()))
            if task.number in state.tasks:
                own = state.tasks.index(task.number)
                right += int((chosen_tasks(state, recalled) == own).sum())
                total += len(task.test)
        inputs = sum(len(task.test) for task in tasks)
        return Scores(
            accuracy=tuple(accuracy),
            task_accuracy=right / max(total, 1),
            coefficients=tuple(coefficients),
            ms_per_input=1000 * spent / max(inputs, 1),
            floored=met,
            left_out=mean_share(torch.cat(left).numpy()) if left else None,
            missed=mean_share(torch.cat(missed).numpy()) if missed else None,
        )

    def earlier(
        self,
        version: str,
        read: Callable[[str], Snapshot],
        tested: Sequence[Task],
        newest: int,
    ) -> tuple[list[Share], Tensor]:
        """What an earlier version scored on tasks, and the weights that the `newest` one recalled.

        The version is `read` only where nobody measured that before.
        """
        there = cache(partial(read, version))
        known = self._kept(self.workspace.store.view(version))

        def find(task: Task, weighed: bool) -> Taken:
            _, model, head = there().consolidated()
            logits, weights = self.recall(model, head, task.test.images)
            return Taken.of(share_right(logits, task.test), weights if weighed else None)

        found = [
            known[place == newest].of(task, TAKEN, partial(find, task, place == newest))
            for place, task in enumerate(tested)
        ]
        shares = [one.share(task.test) for one, task in zip(found, tested, strict=True)]
        return shares, found[newest].weights

    def keep(self, view: MemoryView, tested: Sequence[Task], found: Scores, newest: int) -> None:
        """Keep what a version scored on tasks for when it is an earlier one."""
        known = self._kept(view)
        for place, (task, score) in enumerate(zip(tested, found.accuracy, strict=True)):
            weights = found.coefficients[place] if place == newest else None
            known[place == newest].keep(task, TAKEN, Taken.of(score, weights))

    def _kept(self, view: MemoryView) -> tuple[Earlier, Earlier]:
        """What was kept of a version: without weights, and with them."""
        decides = digest_of(view)
        return Earlier(self.workspace, [decides]), Earlier(self.workspace, [decides, "weights"])

    def told(
        self,
        versions: Mapping[int, str],
        learned: Sequence[Task],
        read: Callable[[str], Snapshot],
    ) -> AccuracyMatrix:
        """The accuracy of every task's own adapters at the versions, by how many tasks each knows.

        A version is `read`, and a task measured, only where its adapters or their heads are other
        ones than in a later version.
        """
        matrix = AccuracyMatrix.empty([task.name for task in learned])
        known: dict[object, float] = {}
        for count, at in self.workspace.telling("evaluate", sorted(versions.items(), reverse=True)):
            view, there = self.workspace.store.view(at), cache(partial(read, at))
            own = []
            for task in learned[:count]:
                decides = alone(view, task)
                if decides not in known:
                    known[decides] = self.own_accuracy(there(), task)
                own.append(known[decides])
            matrix = matrix.with_row(count, [*own, *[None] * (len(learned) - count)])
        return matrix

    def generalised(
        self, snapshot: Snapshot, sources: Sequence[Task], shown: Sequence[Task]
    ) -> Row:
        """The memory on a domain that it never saw, and on the sources' validation images."""
        _, model, head = snapshot.consolidated()
        scores = self.scores(snapshot, shown)
        names = [task.name for task in shown]
        matrix = AccuracyMatrix.empty(names).with_row(len(shown), scores.accuracy)
        held = [task.validation for task in sources if len(task.validation)]
        more = scores.more
        if held:
            known = [self.accuracy(model, head, samples) for samples in held]
            more["dg.validation"] = sum(known) / len(known)
        return Row.measured("memory", "memory", "method", matrix, more=more)

    def own_accuracy(self, snapshot: Snapshot, task: Task) -> float:
        """The task's own adapters, exactly recalled, with the heads trained with them."""
        engine = self.workspace.engine
        total: Tensor | None = None
        for record in snapshot.adapters_of(task.number):
            head = snapshot.own_head(record.name)
            if head is None:
                raise NotFoundError(
                    f"adapter {record.name!r} came without a trained head",
                    remedy="memtool eval --setting dil, whose head is solved from statistics",
                )
            if "refined_from" in record.meta:
                raise ConfigError(
                    f"adapter {record.name!r} was refined after the head that came with it",
                    remedy="memtool eval without --setting til, or --store memory@VERSION from "
                    "before the consolidation",
                )
            values = snapshot.values_of([record]).to(engine.device)
            logits = self._logits(every(values), head.to(engine.device), task)
            total = logits if total is None else total + logits
        assert total is not None
        return share_right(total, task.test)

    def other_ways(
        self, snapshot: Snapshot, sources: Sequence[Task], shown: Sequence[Task]
    ) -> list[Row]:
        """Other ways to read the same memory, on the test images of `shown`.

        Hard choice, negative coefficients left out, a uniform mixture with a head of its own, and
        the oracle adapter where every task shown is one of them.
        """
        _, model, head = snapshot.consolidated()
        device = self.workspace.engine.device
        equal = torch.full((len(snapshot.records),), 1 / len(snapshot.records), device=device)
        uniform = same_for_all(model.values, equal, model.mix)
        uniform_head, named = head, "uniform mixture"
        if not head.of_directions:
            solved = self._uniform_head(snapshot, sources)
            uniform_head, named = RecalledHead.shared(solved).to(device), f"{named}, LDA head"
        hard = _with_separation(model, lambda _: separation("max"), most=1)

        def oracle(task: Task) -> Tensor:
            values = snapshot.own_values(task.number, device)
            mine = torch.tensor([task_of(r) == task.number for r in snapshot.records])
            share = (mine.float() / mine.sum()).to(device)
            alone = torch.full((len(values),), 1 / len(values), device=device)
            recall = every(values) if len(values) == 1 else same_for_all(values, alone, model.mix)
            return self._scored(model, recall, head, share, task)

        ways: list[tuple[str, str, Kind, Callable[[Task], Tensor]]] = [
            (
                "routed",
                "memory, hard choice by key",
                "baseline",
                lambda task: self.recall(hard, head, task.test.images)[0],
            ),
            (
                "uniform",
                named,
                "baseline",
                lambda task: self._scored(model, uniform, uniform_head, equal, task),
            ),
        ]
        if model.settings.routing == "mixture" and model.settings.separation in SIGNED:
            positive = _with_separation(model, _without_negative, decoded=True)
            ways.append(
                (
                    "memory-nonnegative",
                    "memory, negative coefficients set to zero",
                    "method",
                    lambda task: self.recall(positive, head, task.test.images)[0],
                )
            )
        learned = {task.number for task in sources}
        if all(task.number in learned for task in shown):
            ways.append(("oracle", "oracle adapter (task known)", "upper bound", oracle))
        rows = []
        for id, words, kind, logits in ways:
            reading = kind != "upper bound"
            course = Course(shown, self.workspace.unseen if reading else None)
            scores = [share_right(logits(task), task.test) for task in course.tested]
            course.add(len(shown), scores)
            rows.append(course.row(id, words, kind, reading=reading))
        return rows

    def _logits(self, recall: Recall, head: LinearClassifier, task: Task) -> Tensor:
        backbone = self.workspace.backbone

        cosines = self.workspace.config.head.is_fixed

        def run(images: Tensor) -> Tensor:
            features = backbone.features(backbone.preprocess(images), recall)
            return head(
                F.normalize(features.float(), dim=-1) if cosines else features, task.classes
            )

        return self.workspace.engine.predict(run, task.test.images)

    def _scored(
        self,
        model: MemoryModel,
        recall: Recall,
        head: RecalledHead,
        coefficients: Tensor,
        task: Task,
    ) -> Tensor:
        """Scores (n, classes) under one recall and coefficients (t,) for all samples."""

        def run(images: Tensor) -> Tensor:
            return head(model.under(images, recall), coefficients.expand(len(images), -1))

        return self.workspace.engine.predict(run, task.test.images)

    def _uniform_head(self, snapshot: Snapshot, tasks: Sequence[Task]) -> LinearClassifier:
        """The discriminant head of a uniform mixture, without replay, as the memory's heads are.

        The features of a task are those under the mixture of all adapters that were there when it
        was learned: all of them where tasks are learned at once, else those up to its own.
        """
        work = self.workspace
        state, model, _ = snapshot.consolidated()
        at_once = work.stream.setting in AT_ONCE
        statistics = work.statistics(model.look.features_width)
        for task in tasks:
            last = len(state.tasks) if at_once else state.tasks.index(task.number) + 1
            there = (torch.tensor(state.adapter_tasks) < last).float()
            equal = (there / there.sum()).to(work.engine.device)
            recall = same_for_all(model.values, equal, model.mix)
            features = work.engine.predict(partial(model.under, recall=recall), task.train.images)
            statistics.merge(work.counted(features, task.train))
        return solve_head("lda", statistics, work.config.head)


def alone(view: MemoryView, task: Task) -> object:
    """What the accuracy of a task's own adapters follows from: their values, and their heads."""
    own = [record for record in view.adapters if record.meta.get("task") == task.number]
    return task.number, *(
        (one.sha256, one.header, one.scaling, view.blob_sha256(own_head_blob(one.name)))
        for one in own
    )


SOME = 100
"""Images of a task, evenly spread, of which is counted what a cut leaves out."""


def _step(task: Task) -> int:
    """Every so many-th test image makes `SOME` or fewer."""
    return max(1, math.ceil(len(task.test) / SOME))


def chosen_tasks(state: MemoryState, coefficients: Tensor) -> Tensor:
    """Of coefficients (samples, memories, t): the place (samples,) in `state.tasks` with the most.

    -1 where no adapter has a weight: what is left to the frozen model.
    """
    owners = torch.tensor(state.adapter_tasks, device=coefficients.device)
    shares = coefficients.new_zeros(len(coefficients), len(state.tasks))
    shares = shares.index_add(1, owners, coefficients.mean(dim=1))
    return shares.argmax(dim=1).masked_fill(~shares.any(dim=1), -1)


def drift(then: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
    """How the coefficients of earlier tasks' inputs changed since the tasks were learned.

    then[j] (samples, memories, t_j) just after task j, now[j] (samples, memories, t) at the end,
    all tasks but the last: the metrics coefficient_drift, of the adapters that were there, and
    new_coefficients, of those that came later. A task whose inputs had no weight is left out.
    """
    moved, new = [], []
    for before, after in zip(then, now, strict=True):
        if not before.any():
            continue
        known = before.shape[-1]
        moved.append(coefficient_drift(after[..., :known].numpy(), before.numpy()))
        new.append(float(after[..., known:].norm() / before.norm()))
    if not moved:
        return {}
    return {
        "coefficient_drift": sum(moved) / len(moved),
        "new_coefficients": sum(new) / len(new),
    }


def drift_degrees(before: Tensor, after: Tensor) -> float:
    """Mean angle in degrees between keys (memories, t, d_k) before and after.

    A key without length has no direction and is left out; 0 when there is no other.
    """
    long = (before.norm(dim=-1) > 0) & (after.norm(dim=-1) > 0)
    if not long.any():
        return 0.0
    cosine = F.cosine_similarity(before[long].double(), after[long].double(), dim=-1)
    return math.degrees(float(torch.arccos(cosine.clamp(-1, 1)).mean()))


def seen_by(engine: Engine, snapshot: Snapshot, image: npt.NDArray[np.uint8]) -> float | None:
    """The novelty of an image (h, w, 3) to a memory of whole adapters that is consolidated."""
    _, model, head = snapshot.consolidated()

    def run(batch: Tensor) -> Tensor:
        pixels = model.backbone.preprocess(batch)
        features, found, queries = model.seen(pixels, settled(model, says(head), pixels))
        return torch.cat([features.float(), found.mean(dim=1), queries.flatten(1)], dim=1)

    found = engine.predict(run, image[None])
    sizes = (model.look.features_width, len(snapshot.records))
    features, weights, flat = found.tensor_split([sizes[0], sum(sizes)], dim=1)
    queries = flat.unflatten(1, (len(model.memory.blocks), -1)).transpose(0, 1)
    return seen_before(snapshot.reaches(), (features.unsqueeze(0), queries), weights)


def _with_separation(
    model: MemoryModel,
    changed: Callable[[SeparationFunction], SeparationFunction],
    *,
    most: int | None = None,
    decoded: bool = False,
) -> MemoryModel:
    """The same memory under another separation, whose weights do not move at test time.

    Queries that settle do so as before, and are then read under the other one; `most` is as in
    `BlockMemory`. Only where it is `decoded` a decoder adds to them; else adapters are recalled
    whole.
    """
    memories = [
        BlockMemory(
            here.keys,
            here.query,
            here.similarity,
            changed(here.separation),
            reaches=here.reaches,
            most=most,
            normed=here.normed,
            steps=here.steps,
            rate=here.rate,
            settles=here.settles,
        )
        for here in (model.memory[block] for block in model.memory.blocks)
    ]
    memory = KeyedMemory(model.memory.blocks, memories)
    for block in memory.blocks if decoded else ():
        memory[block].decoder = model.memory[block].decoder
    settings = model.settings.model_copy(update={"test_time": "none"})
    return MemoryModel(model.backbone, model.values, memory, settings, model.look)


def _without_negative(separate: SeparationFunction) -> SeparationFunction:
    return lambda scores: separate(scores).clamp_min(0)


def held_out_of(stream: Stream) -> Task:
    """The domain that is held out. Raises ConfigError when none is."""
    if stream.held_out is None:
        raise ConfigError(
            "setting dg measures a domain that nothing was learned from; none is held out",
            expected="one of " + ", ".join(task.name for task in stream.tasks),
            remedy="--held-out DOMAIN for every step of one memory, or memtool run for all",
        )
    return stream.held_out
