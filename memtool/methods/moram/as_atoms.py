"""What a LoRA that was trained to act whole loses when its ranks become atoms.

Measured on the test samples of its task: the adapter alone and as it is, beside the memory that has
its atoms. Of images by accuracy, of texts by the loss in nats per answer token.
"""

from __future__ import annotations

from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues, Recall
from memtool.heads import solve_head
from memtool.learning.answers import Answering
from memtool.learning.known import head_under, is_fixed
from memtool.methods.exchange import ReadAdapter
from memtool.methods.moram.measure import AtomMeasure
from memtool.methods.moram.state import AtomSnapshot
from memtool.methods.outcome import share_right
from memtool.methods.results import AsAtoms
from memtool.streams.task import Task
from memtool.workspace import Workspace


def as_atoms(work: Workspace, adapter: ReadAdapter, snapshot: AtomSnapshot) -> AsAtoms:
    """Both figures; `snapshot` is the memory that has its atoms."""
    task, measure = work.task(str(adapter.meta["task"])), AtomMeasure(work)
    scaling = float(adapter.meta["scaling"])
    values = AdapterValues.from_flat(adapter.value[None], work.layout, scaling)
    recall = every(values.to(work.engine.device))
    if work.reads == "texts":
        encoded = work.backbone.encode(task.test.prompts, task.test.answers)
        plain, atoms = Answering(work, recall).loss(encoded), measure.loss(snapshot, task.test)
        words = "loss"
    else:
        plain = _accuracy(work, recall, task)
        atoms = measure.accuracy(snapshot, task, "til") or 0.0
        words = "accuracy"
    return AsAtoms(name=adapter.name, task=task.number, measure=words, plain=plain, atoms=atoms)


def _accuracy(work: Workspace, recall: Recall, task: Task) -> float:
    """Of an adapter alone, under a head that is solved from its own features of the task."""
    settings = work.config.head
    if is_fixed(work.config):
        head = head_under(work, recall, settings.kind).linear()
    else:
        counted = work.counted(work.features(task.train.images, recall), task.train)
        kind = settings.kind if settings.kind in ("ridge", "ncm") else "lda"
        head = solve_head(kind, counted, settings)
    scores = head.to("cpu")(work.features(task.test.images, recall), task.classes)
    return share_right(scores, task.test)
