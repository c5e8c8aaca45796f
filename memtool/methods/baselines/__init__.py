"""Baselines: the same backbone, adapted layers, rank, data, epochs and optimiser, without a memory.

    zero-shot    the model as it is, where it knows classes or can answer before it learns
    in-context   a language model as it is, with examples before each prompt
    frozen       an image model as it is, under every kind of head
    fine-tune    all weights, task after task
    sequential   one LoRA, task after task
    ewc, lwf     the same under a penalty that holds parameters, or answers
    o-lora       a LoRA per task, summed, pressed to be orthogonal
    inf-lora     a LoRA per task, summed, its A fixed where old tasks do not see it
    moe-lora     as many LoRA as tasks, mixed by a learned router
    text-keys    a LoRA per task, mixed by keys that are its class names (xtail); where it is named
    joint        one LoRA on all tasks at once: an upper bound; under setting mtl a rival, with as
                 many parameters as all adapters of the memory

Rivals, measured where they are named (`RIVALS`):

    ranpac       an adapter of the first task, ridge on a random projection of its features
    aper         the same adapter beside the frozen model, nearest class mean by cosine
    fsa          the same adapter, linear discriminant analysis
    l2p          prompts of a pool before the image, found by keys
    dual-prompt  keys and values in attention, of all tasks and of each
    coda-prompt  keys and values in attention, a sum that the image weighs
    s-prompts    a prompt and a head a domain, which is found by centroids (dil)
    rail         ridge on projected frozen features, fused with zero-shot scores (known classes)
    slca         all weights slowly, the head fast and aligned by class Gaussians
    ease         an adapter per task, features side by side, prototypes completed by likeness
    mos          adapters merged toward earlier ones, found again by what they predict
    tuna         the adapter of least entropy beside a universal one merged of all
    sd-lora      a LoRA per task, old directions fixed, their magnitudes learning on
    treelora     one LoRA, each block drawn to the old task that it is most like, found in a tree
    er, der++    replay of kept samples, and of what was said of them: marked, no other keeps data

Each is written once, on `Learner`, and learns images and texts alike. It sees a task's samples only
while it learns that task, as the memory does (joint excepted). Of images the features are read four
ways (`reading.py`): by the linear head trained along, by a ridge or an LDA head from running
moments, and by an LDA head per task. Domain generalisation has no order and its own baselines
(`sources.py`). Hard choice, uniform mixture and oracle adapter read the memory itself and are in
`Mira.evaluate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from memtool.errors import ConfigError
from memtool.evaluation.record import Row
from memtool.learning.learner import Learner
from memtool.methods.baselines.aper import APER
from memtool.methods.baselines.coda_prompt import CodaPrompt
from memtool.methods.baselines.der import DerPlusPlus
from memtool.methods.baselines.dual_prompt import DualPrompt
from memtool.methods.baselines.ease import Ease
from memtool.methods.baselines.ewc import Ewc
from memtool.methods.baselines.fine_tune import FineTune
from memtool.methods.baselines.frozen import frozen, frozen_at_once
from memtool.methods.baselines.fsa import FSA
from memtool.methods.baselines.in_turn import in_turn
from memtool.methods.baselines.inf_lora import InfLora
from memtool.methods.baselines.joint import Wide, at_once, joint, joint_rank
from memtool.methods.baselines.l2p import L2p
from memtool.methods.baselines.lwf import Lwf
from memtool.methods.baselines.moe_lora import MoeLora
from memtool.methods.baselines.mos import Mos
from memtool.methods.baselines.o_lora import OLora
from memtool.methods.baselines.prompted import require_prompts
from memtool.methods.baselines.rail import rail
from memtool.methods.baselines.ranpac import RANPAC
from memtool.methods.baselines.replay import Er
from memtool.methods.baselines.s_prompts import SPrompts, require_domains
from memtool.methods.baselines.sd_lora import SdLora
from memtool.methods.baselines.slca import Slca
from memtool.methods.baselines.sources import OF_SOURCES, HeldOut, trained_sources
from memtool.methods.baselines.text_keys import TextKeys
from memtool.methods.baselines.tree_lora import TreeLora
from memtool.methods.baselines.tuna import Tuna
from memtool.methods.baselines.zero_shot import InContext, ZeroShot, once
from memtool.registry import find
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace

__all__ = [
    "BASELINES",
    "DG_BASELINES",
    "FIRST_SESSION",
    "MTL_BASELINES",
    "REVISIONS",
    "RIVALS",
    "Baseline",
    "HeldOut",
    "at_once_baseline",
    "baseline",
    "baselines_of",
    "held_out_baseline",
    "joint_rank",
    "passes",
    "require",
    "source_of",
]

Baseline = Callable[[Workspace, Sequence[Task]], list[Row]]

BASELINES: dict[str, Baseline] = {
    "zero-shot": partial(once, ZeroShot),
    "in-context": partial(once, InContext),
    "frozen": frozen,
    "fine-tune": partial(in_turn, FineTune),
    **{kind.id: partial(in_turn, kind) for kind in (Learner, Ewc, Lwf, OLora, InfLora, MoeLora)},
    "text-keys": partial(in_turn, TextKeys),
    "joint": joint,
    **{one.id: one.in_turn for one in (RANPAC, APER, FSA)},
    **{kind.id: partial(in_turn, kind) for kind in (L2p, DualPrompt, CodaPrompt, SPrompts)},
    **{kind.id: partial(in_turn, kind) for kind in (Slca, Ease, Mos, Tuna, SdLora, TreeLora)},
    **{kind.id: partial(in_turn, kind) for kind in (Er, DerPlusPlus)},
    "rail": rail,
}
"""Every baseline of an order of tasks, by the name of its result file."""

DG_BASELINES = {**OF_SOURCES, **{one.id: one.on_sources for one in (RANPAC, APER)}}
"""Those of domain generalisation: workspace, source tasks and held-out samples to what is reached.

FSA is `erm` there, under its LDA head."""

REVISIONS = {"slca": 2, "ease": 2, "mos": 2, "tuna": 2, "dual-prompt": 2}
"""How often what a baseline computes was changed, counted from 1, which the others are at.

Rows that an earlier run kept are found by it: raise it with every change after which one reaches
other numbers, of all that share what was changed."""

MTL_BASELINES: dict[str, Baseline] = {
    "frozen": frozen_at_once,
    "joint": lambda work, tasks: at_once(Wide, 1, work, tasks),
    MoeLora.id: lambda work, tasks: at_once(MoeLora, len(tasks), work, tasks),
}
"""Those of tasks that are learned at once and all tested: their last line."""

FIRST_SESSION = (RANPAC.id, APER.id, FSA.id)
"""Those that learn on the first task alone."""

_PROMPTS = tuple(kind.id for kind in (L2p, DualPrompt, CodaPrompt, SPrompts))
_OWN_HEAD = ("slca", "ease", "mos", "tuna", "der++")
RIVALS = ("text-keys", *FIRST_SESSION, *_PROMPTS, *_OWN_HEAD, "sd-lora", "treelora", "er", "rail")
"""What `all` leaves out and is measured where it is named: several take more time than all others
together. One that a setting does not have is an error there."""

_OF_A_TRAINED_HEAD = (*FIRST_SESSION, *_PROMPTS, *_OWN_HEAD)
_NOT_OF_IMAGES = ("zero-shot", "in-context", "fine-tune", "text-keys", "rail")
_NOT_OF_FIXED_HEADS = ("in-context", "frozen", "ewc", *_OF_A_TRAINED_HEAD)
_NOT_OF_TEXTS = ("frozen", "text-keys", "rail", *_OF_A_TRAINED_HEAD)


def baselines_of(reads: str, *, fixed_head: bool = False) -> Mapping[str, Baseline]:
    """The baselines of "images", under a head that learns or is fixed in advance, or of "texts"."""
    without: tuple[str, ...]
    if reads == "texts":
        without = _NOT_OF_TEXTS
    else:
        without = _NOT_OF_FIXED_HEADS if fixed_head else _NOT_OF_IMAGES
    return {name: baseline for name, baseline in BASELINES.items() if name not in without}


def require(name: str, work: Workspace) -> None:
    """Raise MemtoolError for a baseline that cannot learn what a workspace has, or has no room."""
    if name == RANPAC.id and work.reads == "images":
        RANPAC.require(work)
    if name in _PROMPTS:
        require_prompts(work, name)
    if name == SPrompts.id:
        require_domains(work)


def passes(name: str, tasks: int) -> tuple[int, int]:
    """How often a rival runs a training image in a step, and a test image after so many tasks."""
    asking = {kind.id: 2 for kind in (L2p, DualPrompt, CodaPrompt)}  # the frozen model reads first
    step = {**asking, Er.id: 2, DerPlusPlus.id: 3}
    beside = {**asking, SPrompts.id: 2, APER.id: 2}
    test = {**beside, Ease.id: tasks, Mos.id: tasks, Tuna.id: tasks + 1}
    return step.get(name, 1), test.get(name, 1)


def baseline(name: str) -> Baseline:
    """What measures a baseline: one that ships, or a class or function of another package.

    A class is a `Learner` that learns task after task. Raises ConfigError for another class.
    """
    return BASELINES[name] if name in BASELINES else _of_others(name, in_turn)


def held_out_baseline(name: str) -> Callable[[Workspace, Sequence[Task], Images], list[HeldOut]]:
    """As `baseline`, of domain generalisation: a class learns from all sources at once."""
    if name in DG_BASELINES:
        return DG_BASELINES[name]

    def at_once(kind: type[Learner], *given: Any) -> list[HeldOut]:
        return trained_sources(kind, kind.id, kind.title, *given)

    return _of_others(name, at_once)


def at_once_baseline(name: str) -> Baseline:
    """As `baseline`, of tasks that are learned at once: a class learns all of them as one."""
    if name in MTL_BASELINES:
        return MTL_BASELINES[name]

    def learned(kind: type[Learner], work: Workspace, tasks: Sequence[Task]) -> list[Row]:
        return at_once(kind, 1, work, tasks)

    found: Baseline = _of_others(name, learned)
    return found


def source_of(name: str) -> str | None:
    """The text of a class or function of another package: a changed one is measured again."""
    if name in (*BASELINES, *DG_BASELINES):
        return None
    return inspect.getsource(find("baselines", name))


def _of_others(name: str, learned: Callable[..., Any]) -> Any:
    found = find("baselines", name)
    if not isinstance(found, type):
        return found
    if not issubclass(found, Learner):
        raise ConfigError(
            f"baseline {name}: {found.__name__} is no Learner",
            expected="a subclass of memtool.Learner, or a function of a workspace and its tasks",
        )
    return partial(learned, found)
