"""The frozen model as it is: alone, and of a language model with examples before each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from memtool.adapters.values import Recall
from memtool.backbones.causal_lm import CausalLM
from memtool.evaluation.record import Row
from memtool.learning.learner import Learner
from memtool.methods.baselines.testing import measured_by
from memtool.pictured import together
from memtool.streams.ordering import random_ranks
from memtool.streams.task import Task
from memtool.workspace import Workspace


class ZeroShot(Learner):
    """The frozen model: it is measured once, and learns nothing."""

    id: ClassVar[str] = "zero-shot"
    title: ClassVar[str] = "zero-shot"

    def begin(self) -> None:
        """Nothing learns."""

    def recall(self) -> Recall | None:
        """No adapters."""
        return None


class InContext(ZeroShot):
    """The frozen language model with examples before each prompt.

    Every prompt of a task has the same `text.shots` training samples before it, chosen by the seed;
    those that no longer fit into `prompt_tokens` with the prompt are left out, the last one first.
    """

    id: ClassVar[str] = "in-context"
    title: ClassVar[str] = "in-context examples"

    def asked(self, task: Task) -> Sequence[str]:
        """The prompts with their examples."""
        ranks = random_ranks(len(task.train), "examples", self.work.seed)
        chosen = task.train.chosen(np.argsort(ranks)[: self.work.config.text.shots].tolist())
        pairs = zip(chosen.prompts, chosen.answers, strict=True)
        shots = [together((prompt, f" {answer}\n\n")) for prompt, answer in pairs]
        return [self._with_examples(shots, prompt) for prompt in task.test.prompts]

    def _with_examples(self, shots: Sequence[str], prompt: str) -> str:
        lm: CausalLM = self.work.backbone
        for count in range(len(shots), 0, -1):
            text = together((*shots[:count], prompt))
            if lm.length_of(text) <= lm.prompt_tokens:
                return text
        return prompt


def once(kind: type[ZeroShot], work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """The rows of a model that learns nothing: the same after every task."""
    testing = measured_by(kind(work, len(tasks)), tasks, ("fixed",))
    testing.at_all_times()
    return testing.rows(0.0)
