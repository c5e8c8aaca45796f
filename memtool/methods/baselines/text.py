"""What stands beside MoRAM on streams of texts: same model, texts, epochs and optimiser.

    zero-shot    the model as it is
    in-context   the model as it is, with examples from the task's training set before each prompt
    fine-tune    all weights of a copy, task after task
    sequential   one LoRA, task after task
    o-lora       a LoRA per task, summed, pressed to be orthogonal
    inf-lora     a LoRA per task, summed, its A fixed where old tasks do not see it
    moe-lora     as many LoRA as tasks, mixed for every token by a learned router
    joint        one LoRA on all tasks at once: an upper bound

The equations are those of the modules for images beside this one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, Recall
from memtool.evaluation.record import Kind, Row
from memtool.methods.baselines.branches import flat_of_all, summed
from memtool.methods.baselines.fine_tune import RATE
from memtool.methods.baselines.moe_lora import router
from memtool.methods.baselines.o_lora import STRENGTH, overlap
from memtool.methods.past_inputs import PastInputs
from memtool.methods.text import TextLearner, TextWorkspace, in_turn, text_row
from memtool.streams.ordering import random_ranks
from memtool.streams.text import TextSamples, TextTask


class ZeroShot(TextLearner):
    """The frozen model: it is measured once, and learns nothing."""

    id: ClassVar[str] = "zero-shot"
    title: ClassVar[str] = "zero-shot"

    def begin(self) -> None:
        """Nothing learns."""

    def recall(self) -> Recall | None:
        """No adapters."""
        return None


class InContext(ZeroShot):
    """The frozen model with examples before each prompt.

    Every prompt of a task has the same `text.shots` training samples before it, chosen by the seed;
    those that no longer fit into `prompt_tokens` with the prompt are left out, the last one first.
    """

    id: ClassVar[str] = "in-context"
    title: ClassVar[str] = "in-context examples"

    def prompts(self, task: TextTask, samples: TextSamples) -> Sequence[str]:
        """The prompts with their examples."""
        ranks = random_ranks(len(task.train), "examples", self.work.seed)
        places = np.argsort(ranks)[: self.work.config.text.shots].tolist()
        chosen = task.train.chosen(places)
        shots = [f"{p} {a}\n\n" for p, a in zip(chosen.prompts, chosen.answers, strict=True)]
        return [self._with_examples(shots, prompt) for prompt in samples.prompts]

    def _with_examples(self, shots: Sequence[str], prompt: str) -> str:
        for count in range(len(shots), 0, -1):
            text = "".join(shots[:count]) + prompt
            if len(self.lm.tokenizer(text, verbose=False).input_ids) <= self.lm.prompt_tokens:
                return text
        return prompt


class FineTune(ZeroShot):
    """A copy of the model, all of whose weights learn."""

    id: ClassVar[str] = "fine-tune"
    title: ClassVar[str] = "fine-tuning"

    def begin(self) -> None:
        """Copy the model, in float32 as small steps get lost in bfloat16."""
        self.lm = copy.deepcopy(self.work.backbone).float().requires_grad_(True)

    def rate_of(self, name: str) -> float:
        """Trained weights learn slower than adapters that start at zero."""
        del name
        return RATE


class Branches(TextLearner):
    """A new LoRA for every task, summed with the frozen ones in `past` (None at first)."""

    past: AdapterValues | None

    def begin(self) -> None:
        """The first branch."""
        super().begin()
        self.past = None

    def before_task(self, task: TextTask) -> None:
        """Freeze what was learned, and begin a branch that changes nothing yet."""
        del task
        if self.seen:
            self.past = self.work.stacked(flat_of_all(self.past, self.values))
            self.values = self.fresh(1)

    def recall(self) -> Recall | None:
        """All branches, for every input."""
        return summed(self.past, self.values)


class OLora(Branches):
    """A branch per task, whose A is pressed to be orthogonal to those before."""

    id: ClassVar[str] = "o-lora"
    title: ClassVar[str] = "O-LoRA"

    def penalty(self) -> Tensor:
        """λ times the overlap with the frozen branches; zero during the first task."""
        return STRENGTH * overlap(self.past, self.values)


class InfLora(Branches):
    """A branch per task, whose A lies where old tasks have no inputs; only B learns."""

    id: ClassVar[str] = "inf-lora"
    title: ClassVar[str] = "InfLoRA"

    def begin(self) -> None:
        """The first branch, and an empty past of every adapted layer."""
        super().begin()
        self.inputs = PastInputs(self.work.layout, self.work.config.past.energy)

    def before_task(self, task: TextTask) -> None:
        """Begin a branch with A from the task's inputs, B zero."""
        super().before_task(task)
        free = self.inputs.free_branch(self.input_moments(self.inputs, task.train))
        self.values = self.work.stacked(free, trainable=True)
        self.values.a.requires_grad_(False)

    def after_task(self, task: TextTask, seconds: float) -> None:
        """Add the task's inputs, as the trained model has them, to the past."""
        del seconds
        moments = self.input_moments(self.inputs, task.train)
        self.inputs.add(moments, len(self.seen) / self.tasks)


class MoeLora(TextLearner):
    """As many LoRA as tasks; a router in every adapted block mixes them for every token.

    g = softmax(W h + c) with h the layer-normed input of the block; a router starts at zero. It
    looks at one token at a time, so that an answer does not depend on what comes later.
    """

    id: ClassVar[str] = "moe-lora"
    title: ClassVar[str] = "MoE-LoRA"

    def begin(self) -> None:
        """Experts and routers."""
        self.values = self.fresh(self.tasks)
        self.routers = nn.ModuleDict()
        for block in self.work.layout.blocks:
            self.routers[str(block)] = router(self.lm.dim, self.tasks)

    def recall(self) -> Recall | None:
        """The experts as the router of the block weighs them."""

        def of_block(block: int, hidden: Tensor) -> Mixture | None:
            here = self.values.block(block)
            if here is None:
                return None
            with torch.autocast(hidden.device.type, enabled=False):
                query = nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
                coefficients = self.routers[str(block)](query).softmax(dim=-1)
            return Mixture.weighted(here, coefficients)

        return of_block


class Joint(TextLearner):
    """One LoRA on all tasks at once."""

    id: ClassVar[str] = "joint"
    title: ClassVar[str] = "joint LoRA"
    kind: ClassVar[Kind] = "upper bound"

    def stage(self, task: TextTask) -> str:
        """It stands among no others."""
        return task.name


def once(kind: type[ZeroShot], work: TextWorkspace) -> Row:
    """The row of a model that learns nothing: the same after every task."""
    tasks = len(work.stream.tasks)
    learner = kind(work, tasks)
    scores = learner.measure()
    return text_row(learner, dict.fromkeys(range(tasks + 1), scores), seconds=0.0)


def joint(work: TextWorkspace) -> Row:
    """The row of joint training: there is no model before all tasks were learned."""
    tasks = work.stream.tasks

    def pooled(parts: Sequence[TextSamples]) -> TextSamples:
        return TextSamples(
            tuple(prompt for part in parts for prompt in part.prompts),
            tuple(answer for part in parts for answer in part.answers),
        )

    learner = Joint(work, len(tasks))
    begin = time.perf_counter()
    learner.learn(
        TextTask(
            number=0,
            name="all tasks",
            metric="exact-match",
            train=pooled([task.train for task in tasks]),
            validation=TextSamples((), ()),
            test=pooled([task.test for task in tasks]),
        )
    )
    seconds = time.perf_counter() - begin
    return text_row(learner, {len(tasks): learner.measure()}, seconds=seconds)


def _in_turn(kind: type[TextLearner]) -> Callable[[TextWorkspace], Row]:
    return lambda work: in_turn(kind(work, len(work.stream.tasks)))


TEXT_BASELINES: dict[str, Callable[[TextWorkspace], Row]] = {
    "zero-shot": lambda work: once(ZeroShot, work),
    "in-context": lambda work: once(InContext, work),
    "joint": joint,
    **{kind.id: _in_turn(kind) for kind in (FineTune, TextLearner, OLora, InfLora, MoeLora)},
}
"""Every baseline by the name of its result file, each to one row."""
