"""What came out for inputs: how many are right, the best class, and how like what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memtool.evaluation.right import Share
from memtool.memories.novelty import LIMIT, TaskReaches
from memtool.methods.results import Prediction
from memtool.streams.task import Images


def share_right(logits: Tensor, samples: Images) -> Share:
    """Share of samples whose own class has the highest of the logits (n, classes)."""
    return Share.of_classes(logits.argmax(1).numpy(), samples.labels)


def seen_before(reaches: TaskReaches, looks: Sequence[Tensor], weights: Tensor) -> float | None:
    """The novelty of one input of these looks (groups, 1, dim) and weights (1, t).

    None where the moments of its tasks do not tell.
    """
    far = reaches(looks, weights)
    return None if far is None or bool(far.isnan()) else float(far)


def predicted(probabilities: Tensor, class_names: Sequence[str], far: float | None) -> Prediction:
    """The most probable of classes (classes,), for an input of novelty `far`."""
    best = int(probabilities.argmax())
    return Prediction(
        label=class_names[best],
        probability=float(probabilities[best]),
        **told_of(far),
    )


def told_of(far: float | None) -> dict[str, Any]:
    """What a result says of an input of novelty `far`."""
    return {"novelty": far, "unlike": None if far is None else far > LIMIT}
