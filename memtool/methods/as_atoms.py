"""What a LoRA that was trained to act whole loses when its ranks become atoms.

Measured on the test samples of its task: the adapter alone and as it is, beside the memory that has
its atoms.
"""

from __future__ import annotations

from memtool.adapters.values import AdapterValues
from memtool.heads import solve_head
from memtool.methods.atom_measure import AtomMeasure
from memtool.methods.atom_state import AtomSnapshot
from memtool.methods.exchange import ReadAdapter
from memtool.methods.fixed_head import head_under, is_fixed
from memtool.methods.measure import share_right
from memtool.methods.recall import every
from memtool.methods.results import AsAtoms
from memtool.methods.text import AtomLearner, TextLearner, TextWorkspace
from memtool.methods.workspace import Workspace


def accuracy_as_atoms(work: Workspace, adapter: ReadAdapter, snapshot: AtomSnapshot) -> AsAtoms:
    """Accuracies, of the adapter under a head solved from its own features of the task."""
    task, settings = work.task(str(adapter.meta["task"])), work.config.head
    recall = every(_values(work, adapter))
    if is_fixed(work.config):
        head = head_under(work, recall, settings.kind).linear()
    else:
        counted = work.counted(work.features(task.train.images, recall), task.train)
        kind = settings.kind if settings.kind in ("ridge", "ncm") else "lda"
        head = solve_head(kind, counted, settings)
    scores = head.to("cpu")(work.features(task.test.images, recall), task.classes)
    return AsAtoms(
        name=adapter.name,
        task=task.number,
        measure="accuracy",
        plain=share_right(scores, task.test),
        atoms=AtomMeasure(work).accuracy(snapshot, task, "til") or 0.0,
    )


def loss_as_atoms(work: TextWorkspace, adapter: ReadAdapter, memory: AtomLearner) -> AsAtoms:
    """Losses in nats per answer token."""
    task = work.task(str(adapter.meta["task"]))
    plain = TextLearner(work, len(work.stream.tasks))
    plain.values = _values(work, adapter)
    encoded = work.backbone.encode(task.test.prompts, task.test.answers)
    return AsAtoms(
        name=adapter.name,
        task=task.number,
        measure="loss",
        plain=plain.loss(encoded),
        atoms=memory.loss(encoded),
    )


def _values(work: Workspace | TextWorkspace, adapter: ReadAdapter) -> AdapterValues:
    scaling = float(adapter.meta["scaling"])
    values = AdapterValues.from_flat(adapter.value[None], work.layout, scaling)
    return values.to(work.engine.device)
