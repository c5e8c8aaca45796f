"""What a memory of atoms is worth: accuracy or loss, which atoms do it, and how they drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from memtool import __version__
from memtool.evaluation.course import Course
from memtool.evaluation.inside import Inside
from memtool.evaluation.metrics import reuse
from memtool.evaluation.record import AtomUse, Row
from memtool.evaluation.right import Share
from memtool.learning.answers import Answering, AnswerScores, answer_row
from memtool.learning.known import frozen_scores, is_fixed
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.calibration import digest_of
from memtool.methods.inside import recalled
from memtool.methods.kept import fingerprint_of, kept
from memtool.methods.moram.state import AtomSnapshot, digest
from memtool.methods.moram.watch import (
    Drift,
    TaskShares,
    contributions,
    frozen_drift,
    task_shares,
    watched,
)
from memtool.methods.outcome import predicted, seen_before, share_right
from memtool.methods.results import AtomWeight, Prediction
from memtool.methods.scored import Earlier, Taken
from memtool.methods.subject import SUBJECT_SAMPLES, Subject
from memtool.streams.task import Images, Task, Texts, spread
from memtool.workspace import Workspace
from memtool_stores import MemoryView

DRIFT_SAMPLES = 32
INSIDE_SAMPLES = {"images": 64, "texts": 16}
"""Test samples of a task whose atoms a report shows."""
"""Test samples of a task that the drift of its atoms is measured on."""

TOP_ATOMS = 10
"""Single atoms that `strongest` names."""

_SCORES = TypeAdapter(AnswerScores)
_TAKEN: TypeAdapter[Taken | None] = TypeAdapter(Taken | None)


class AtomMeasure:
    """Measurements of memories of atoms over one workspace: its engine, backbone and tasks."""

    def __init__(self, work: Workspace) -> None:
        self.work = work

    # Of images ------------------------------------------------------------------------------

    def scores(
        self, snapshot: AtomSnapshot, images: Images, allowed: Sequence[int] | None = None
    ) -> Tensor:
        """Scores (n, classes) of images; classes that are not `allowed` cannot win."""
        backbone = self.work.backbone
        state, head = snapshot.of_images()
        shares = TaskShares(snapshot.tasks, snapshot.gate, counted=False)
        plain = snapshot.recall
        seen = watched(snapshot.bank, snapshot.gate, shares)
        by_cosine = state.head.kind in ("prototype", "text")

        def run(batch: Tensor) -> Tensor:
            pixels = backbone.preprocess(batch)
            if head.owners is None:
                features = backbone.features(pixels, plain)
                if by_cosine:  # the head has scaled directions: those logits, and probabilities
                    features = F.normalize(features.float(), dim=-1)
                return head(features, features.new_zeros(len(batch), 1), allowed)
            features = backbone.features(pixels, seen)
            return head(features, shares.taken().mean(dim=1), allowed)

        return self.work.engine.predict(run, images.images)

    def prediction(self, snapshot: AtomSnapshot, image: Images) -> Prediction:
        """The most probable class of one image."""
        state, head = snapshot.of_images()
        scores = self.scores(snapshot, image)
        mixed = head.owners is not None
        probabilities = head.probabilities(scores)[0] if mixed else scores[0].softmax(0)
        shares = TaskShares(snapshot.tasks, snapshot.gate)
        recall = watched(snapshot.bank, snapshot.gate, shares)
        features = self.work.features(image.images, recall).unsqueeze(0)
        weights = shares.taken().mean(dim=1).cpu()
        far = seen_before(snapshot.reaches(), (features,), weights)
        return predicted(probabilities, state.class_names, far)

    def accuracy(self, snapshot: AtomSnapshot, task: Task, setting: str) -> Share | None:
        """Share of a task's test images that are classified right.

        None for til and a task that is not in memory: none of its classes is known.
        """
        if setting == "til" and task.number not in snapshot.tasks:
            return None
        allowed = task.classes if setting == "til" else None
        return share_right(self.scores(snapshot, task.test, allowed), task.test)

    def zero_shot(self, task: Task, setting: str) -> float:
        """Share of a task's test images that the frozen model has right, under a fixed head."""
        allowed = task.classes if setting == "til" else None
        return share_right(frozen_scores(self.work, task.test.images, allowed), task.test)

    # Of texts -------------------------------------------------------------------------------

    def answering(self, snapshot: AtomSnapshot) -> Answering:
        """The language model with the atoms of a version."""
        return Answering(self.work, snapshot.recall)

    def answer_scores(self, snapshot: AtomSnapshot, tasks: Sequence[Task]) -> AnswerScores:
        """What atoms reach on tasks of texts; measured once, and kept under `runs`."""
        work, count = self.work, len(snapshot.tasks)
        decides = [
            __version__,
            digest(snapshot.view.atom_records[:count]),
            work.backbone.sha256,
            work.stream.fingerprint,
            [task.number for task in tasks],
            snapshot.settings.decides(),
            work.config.text.model_dump(mode="json"),
            work.config.backbone.targets,
            work.engine.precision,
            str(work.engine.device),
            *([] if snapshot.gate.scores == "exact" else [snapshot.gate.scores]),
        ]
        name = f"moram-after-{count}-{fingerprint_of(decides)[:16]}.json"
        file = work.config.runs / "scores" / name
        stage = f"after {count} tasks: measure MoRAM"
        return kept(
            file, _SCORES, work.engine, lambda: self.answering(snapshot).scores(tasks, stage)
        )

    def loss(self, snapshot: AtomSnapshot, texts: Texts) -> float:
        """−log p in nats per answer token."""
        answering = self.answering(snapshot)
        return answering.loss(answering.lm.encode(texts.prompts, texts.answers))

    # Of both --------------------------------------------------------------------------------

    def row(
        self,
        id: str,
        label: str,
        there: Mapping[int, AtomSnapshot],
        shown: Sequence[Task],
        setting: str,
        *,
        before: bool = False,
    ) -> Row:
        """The row of versions `there`, by how many tasks each knows, on tasks.

        `before` adds what is known before the first task, where anything is.
        """
        if self.work.reads == "texts":
            found = {count: self.answer_scores(there[count], shown) for count in sorted(there)}
            return answer_row(id, label, "method", shown, found)
        course = Course(shown, self.work.unseen)
        if before and is_fixed(self.work.config):
            course.add(0, [self.zero_shot(task, setting) for task in course.tested])
        for count in self.work.telling("evaluate", sorted(there)):
            course.add(count, self._scored(there, count, course.tested, setting))
        return course.row(id, label, "method")

    def _scored(
        self, there: Mapping[int, AtomSnapshot], count: int, tasks: Sequence[Task], setting: str
    ) -> list[Share | None]:
        """The accuracy on tasks after so many; of an earlier version where nobody measured it."""
        snapshot = there[count]
        if len(there) == 1:
            return [self.accuracy(snapshot, task, setting) for task in tasks]
        known = Earlier(self.work, [digest_of(snapshot.view), setting])

        def taken(task: Task) -> Taken | None:
            score = self.accuracy(snapshot, task, setting)
            return None if score is None else Taken.of(score)

        found = [
            (task, known.of(task, _TAKEN, partial(taken, task), anew=count == max(there)))
            for task in tasks
        ]
        return [None if one is None else one.share(task.test) for task, one in found]

    def figures(
        self, snapshot: AtomSnapshot, tasks: Sequence[Task], setting: str
    ) -> dict[str, float]:
        """Means over tasks: faa (of texts: where answers are generated), and the loss of texts."""
        if self.work.reads == "texts":
            scores = self.answer_scores(snapshot, tasks)
            found = {"loss": sum(scores.losses) / len(tasks)}
            if scores.scores is not None:
                found["faa"] = sum(scores.scores) / len(tasks)
            return found
        each = [self.accuracy(snapshot, task, setting) or 0.0 for task in tasks]
        return {"faa": sum(each) / len(each)}

    def worth(self, snapshot: AtomSnapshot, tasks: Sequence[Task], setting: str) -> list[float]:
        """The accuracy of each task, or of texts the loss, measured anew."""
        if self.work.reads == "texts":
            return [*self.answering(snapshot).scores(tasks, "measure").losses]
        return [self.accuracy(snapshot, task, setting) or 0.0 for task in tasks]

    def outcome(
        self, snapshot: AtomSnapshot, samples: Images | Texts
    ) -> tuple[Prediction | None, str | None]:
        """What comes of one input: of an image a prediction, of a prompt the answer."""
        if isinstance(samples, Images):
            return self.prediction(snapshot, samples), None
        return None, self.answering(snapshot).answers(samples.prompts)[0]

    def of_subject(
        self, snapshot: AtomSnapshot, subject: Subject
    ) -> tuple[Prediction | None, str | None, float | None, float | None]:
        """Prediction and answer of one input; accuracy and loss on the samples of a task."""
        samples = subject.samples
        if subject.task is None:
            return *self.outcome(snapshot, samples), None, None
        if isinstance(samples, Images):
            return None, None, share_right(self.scores(snapshot, samples), samples), None
        return None, None, None, self.loss(snapshot, samples)

    def shares(
        self, snapshot: AtomSnapshot, samples: Images | Texts
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The counted shares (n, blocks, tasks) of samples, as in `TaskShares`, and the blocks."""
        return task_shares(self.work, snapshot.bank, snapshot.gate, snapshot.tasks, samples)

    def inside(self, snapshot: AtomSnapshot, tasks: Sequence[Task]) -> Inside:
        """The gate's weight on the atoms of every task, for test samples of each, and examples."""
        samples = [spread(task.test, INSIDE_SAMPLES[self.work.reads]) for task in tasks]
        found = [self.shares(snapshot, some) for some in samples]
        names = [record.name for record in snapshot.view.atom_records]
        return recalled(
            tasks,
            samples,
            [shares for shares, _ in found],
            names,
            blocks=found[0][1],
            what="share of the gate",
            class_names=() if self.work.reads == "texts" else self.work.stream.class_names,
        )

    def task_accuracy(self, snapshot: AtomSnapshot, tasks: Sequence[Task]) -> float:
        """Share of test samples in which the atoms of their own task have most of the weight."""
        right, total = 0, 0
        for task in tasks:
            samples = task.test
            if self.work.reads == "texts":  # one by one
                samples = spread(samples, SUBJECT_SAMPLES["texts"])
            shares, _ = self.shares(snapshot, samples)
            most = shares.mean(dim=1).argmax(dim=1).tolist()
            right += sum(snapshot.tasks[index] == task.number for index in most)
            total += len(most)
        return right / max(total, 1)

    def contributions(
        self, snapshot: AtomSnapshot, samples: Sequence[Images | Texts]
    ) -> Mapping[str, Tensor]:
        """What every atom adds on average, by site, as in `watch.contributions`."""
        return contributions(self.work, snapshot.bank, snapshot.gate, samples)

    def top_atoms(self, snapshot: AtomSnapshot, samples: Images | Texts) -> tuple[AtomWeight, ...]:
        """The atoms that add most, as in `strongest`."""
        return strongest(snapshot.view, snapshot.bank, self.contributions(snapshot, [samples]))

    def use(self, snapshot: AtomSnapshot, banks: Sequence[Rank1Memory]) -> AtomUse:
        """Drift of the atoms of every task, bank by bank, and who uses them in the last one."""
        work, shared, drifts = self.work, [], []
        told = work.telling("evaluate: use of atoms", snapshot.tasks)
        for index, number in enumerate(told):
            samples = spread(work.task(str(number)).test, DRIFT_SAMPLES)
            drifts.append(
                frozen_drift(work, banks[index], banks[index:], snapshot.gate, number, samples)
            )
            shared.append(self.shares(snapshot, samples)[0])
        return used(drifts, shared)


def used(drifts: Sequence[Sequence[Drift]], shares: Sequence[Tensor]) -> AtomUse:
    """How atoms are used, tasks in the order learned.

    `drifts[j][i]` is that of the atoms of task j in the bank after task j + i, `shares[j]` the
    shares (n, blocks, tasks) of the samples of task j in the last bank.
    """
    count = len(drifts)

    def table(name: str) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(
                getattr(drifts[task][after - task], name) if task <= after else None
                for task in range(count)
            )
            for after in range(count)
        )

    reused = tuple(tuple(each.double().mean(dim=(0, 1)).tolist()) for each in shares)
    return AtomUse(norm=table("norm"), difference=table("difference"), reuse=reused)


def strongest(
    view: MemoryView, bank: Rank1Memory, added: Mapping[str, Tensor]
) -> tuple[AtomWeight, ...]:
    """The atoms of a version that add most, as a share of what all atoms of their site add.

    `added` by site is what every atom adds, (n,).
    """
    found = []
    for site, each in added.items():
        ranks = view.atoms(site).rank
        owners = bank.bank(site).owner.tolist()
        total = float(each.sum())
        for place in each.topk(min(TOP_ATOMS, len(each))).indices.tolist():
            share = float(each[place]) / total if total else 0.0
            found.append(
                AtomWeight(site=site, task=owners[place], rank=int(ranks[place]), share=share)
            )
    return tuple(sorted(found, key=lambda atom: -atom.share)[:TOP_ATOMS])


def use_metrics(use: AtomUse) -> dict[str, float]:
    """The metrics of a bank that has grown: means over the tasks but the last, or but the first."""
    found = {}
    for name, table in (("atom_norm", use.norm), ("atom_drift", use.difference)):
        known = [value for value in table[-1][:-1] if value is not None]
        if known:
            found[name] = sum(known) / len(known)
    found["atom_reuse"] = reuse(use.reuse)
    return found
