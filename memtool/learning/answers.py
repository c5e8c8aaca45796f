"""How answers are measured: −log p of their tokens, and the metric of their task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from memtool.adapters.values import Recall
from memtool.backbones.answering import RecallOf, answers, by_length, trimmed, without_answers
from memtool.backbones.causal_lm import CausalLM, EncodedTexts
from memtool.devices import exact, sent
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.metrics import final_average, loss_forgetting
from memtool.evaluation.record import Kind, Row, rights
from memtool.evaluation.right import Right, right_of
from memtool.evaluation.text import score
from memtool.streams.task import Task
from memtool.workspace import Workspace


class AnswerScores(BaseModel):
    """What a model reaches on the test texts of every task.

    `losses` are −log p in nats per answer token; `scores` the tasks' metrics, fractions 0..1, of
    generated answers, None where nothing was generated; `right` which answers to a task were right,
    None for a metric that knows more than right and wrong. `cut_prompts` and `cut_answers` count
    those that were longer than the limits, over all tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    right: tuple[Right | None, ...] = ()
    cut_prompts: int = 0
    cut_answers: int = 0

    @classmethod
    def joined(cls, parts: Sequence[AnswerScores]) -> AnswerScores:
        """Those of several sets of tasks, one after another."""
        generated = all(part.scores is not None for part in parts)
        return cls(
            losses=tuple(loss for part in parts for loss in part.losses),
            scores=tuple(one for part in parts for one in part.scores or ()) if generated else None,
            right=tuple(one for part in parts for one in part.right),
            cut_prompts=sum(part.cut_prompts for part in parts),
            cut_answers=sum(part.cut_answers for part in parts),
        )

    def first(self, count: int) -> AnswerScores:
        """Those of the first tasks; what was cut is that of all."""
        scores = None if self.scores is None else self.scores[:count]
        changes = {"losses": self.losses[:count], "scores": scores, "right": self.right[:count]}
        return self.model_copy(update=changes)

    @property
    def known(self) -> tuple[float, ...]:
        """The scores, each a `Share` where `right` knows of what; none without answers."""
        scores = self.scores or ()
        right = self.right or (None,) * len(scores)
        return tuple(
            score if one is None else one.share for score, one in zip(scores, right, strict=True)
        )


class Answering:
    """A language model under a recall, and what it reaches on texts."""

    def __init__(self, work: Workspace, recall: Recall | RecallOf | None, lm: Any = None) -> None:
        """`recall` is one for all, or a `RecallOf`.

        `lm` is the model, or what answers as a `CausalLM` does; none for the workspace's.
        """
        self.work = work
        self.recall_of = recall if isinstance(recall, RecallOf) else RecallOf(lambda _: recall)
        self.lm: CausalLM = lm or work.backbone
        self.batch = work.config.engine.eval_batch_size

    def scores(
        self,
        tasks: Sequence[Task],
        stage: str,
        asked: Callable[[Task], Sequence[str]] = lambda task: task.test.prompts,
    ) -> AnswerScores:
        """Loss, and with `text.generate` the metric, on the test texts of tasks.

        `asked` gives the prompts of a task.
        """
        generates = self.work.config.text.generate
        losses: list[float] = []
        scores: list[float] = []
        cut_prompts = cut_answers = 0
        for task in self.work.telling(stage, tasks):
            prompts = asked(task)
            encoded = self.lm.encode(prompts, task.test.answers)
            cut_prompts += encoded.cut_prompts
            cut_answers += encoded.cut_answers
            losses.append(self.loss(encoded))
            if generates:
                assert task.metric is not None
                said = self.answers(prompts)
                scores.append(score(task.metric, said, task.test.answers, task.test.prompts))
        return AnswerScores(
            losses=tuple(losses),
            scores=tuple(scores) if generates else None,
            right=tuple(map(right_of, scores)),
            cut_prompts=cut_prompts,
            cut_answers=cut_answers,
        )

    @torch.no_grad()
    def loss(self, encoded: EncodedTexts) -> float:
        """The mean −log p over all answer tokens."""
        engine, total = self.work.engine, 0.0
        tokens, lengths = encoded.tokens, encoded.answers
        for rows in by_length(tokens, self.batch):
            batch = trimmed(tokens[rows]).to(engine.device)
            with engine.autocast():
                said = lengths[rows]
                recall = self.recall_of(without_answers(batch, sent(said, batch.device)))
                each = self.lm.answer_loss(batch, said, recall)
            total += float(exact(each).sum())
        return total / int(lengths.sum())

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The greedy answers to prompts."""
        with self.work.engine.autocast():
            return answers(self.lm, prompts, self.recall_of, batch=self.batch)


def answer_row(
    id: str,
    label: str,
    kind: Kind,
    tasks: Sequence[Task],
    found: Mapping[int, AnswerScores],
    seconds: float | None = None,
) -> Row:
    """The row of what was measured on tasks, or the first of them, after so many.

    Where the last ones were not learned, its metrics are those of a stream that ended before them.
    """
    matrix = AccuracyMatrix.empty([task.name for task in tasks])
    losses = np.full((len(tasks) + 1, len(tasks)), np.nan)
    for number, scores in found.items():
        losses[number, : len(scores.losses)] = scores.losses
        if scores.scores is not None:
            later = [None] * (len(tasks) - len(scores.known))
            matrix = matrix.with_row(number, [*scores.known, *later])
    learned = max(found)
    ended = losses[: learned + 1, :learned]
    more = {"loss.final": final_average(ended)}
    if learned > 1 and not np.isnan(np.diagonal(ended[1:])).any():
        more["loss.forgetting"] = loss_forgetting(ended)
    row = Row.measured(id, label, kind, matrix.up_to(learned), more=more, seconds=seconds)
    cells = tuple(tuple(None if np.isnan(x) else float(x) for x in line) for line in losses)
    changes = {
        "accuracy": matrix.cells,
        "right": rights(matrix),
        "loss": cells,
        "cut_prompts": found[learned].cut_prompts,
        "cut_answers": found[learned].cut_answers,
    }
    return row.model_copy(update=changes)
