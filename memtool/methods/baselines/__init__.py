"""Baselines: the same backbone, adapted layers, rank, data, epochs and optimiser, without a memory.

    frozen       the backbone as it is, under every kind of head
    sequential   one LoRA, task after task
    ewc, lwf     the same under a penalty that holds parameters, or answers
    o-lora       a LoRA per task, summed, pressed to be orthogonal
    inf-lora     a LoRA per task, summed, its A fixed where old tasks do not see it
    moe-lora     as many LoRA as tasks, mixed by a learned router
    joint        one LoRA on all tasks at once: an upper bound

Under a head that knows all classes in advance (`methods.fixed_head`, setting xtail) these are
FIXED_HEAD_BASELINES: without EWC, and with

    zero-shot    the backbone as it is
    fine-tune    all weights, task after task

Each sees a task's images only while it learns that task, as the memory does (joint excepted). The
trained ones are read four ways (`reading.py`): by the linear head trained along, by a ridge or an
LDA head from running moments, and by an LDA head per task. Domain generalisation has no order and
its own baselines (`sources.py`). Hard choice, uniform mixture and oracle adapter read the memory
itself and are in `Mira.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from memtool.evaluation.record import Row
from memtool.methods.baselines.ewc import Ewc
from memtool.methods.baselines.fine_tune import FineTune
from memtool.methods.baselines.frozen import frozen, zero_shot
from memtool.methods.baselines.inf_lora import InfLora
from memtool.methods.baselines.joint import joint
from memtool.methods.baselines.learner import Learner, in_turn
from memtool.methods.baselines.lwf import Lwf
from memtool.methods.baselines.moe_lora import MoeLora
from memtool.methods.baselines.o_lora import OLora
from memtool.methods.baselines.sources import DG_BASELINES, HeldOut
from memtool.methods.workspace import Workspace
from memtool.streams.task import Task

__all__ = [
    "BASELINES",
    "DG_BASELINES",
    "FIXED_HEAD_BASELINES",
    "HeldOut",
    "frozen",
    "joint",
    "sequential",
]


def sequential(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """One LoRA and one linear head, each task starting from what the one before left."""
    return in_turn(Learner, work, tasks)


BASELINES: dict[str, Callable[[Workspace, Sequence[Task]], list[Row]]] = {
    "frozen": frozen,
    "sequential": sequential,
    **{kind.id: partial(in_turn, kind) for kind in (Ewc, Lwf, OLora, InfLora, MoeLora)},
    "joint": joint,
}
"""Every baseline that is trained apart from the memory, by the name of its result file."""

FIXED_HEAD_BASELINES: dict[str, Callable[[Workspace, Sequence[Task]], list[Row]]] = {
    "zero-shot": zero_shot,
    "fine-tune": partial(in_turn, FineTune),
    **{name: run for name, run in BASELINES.items() if name not in ("frozen", "ewc")},
}
"""Those under a head that is fixed in advance."""
