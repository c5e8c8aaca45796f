"""How long work tells whoever started it how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ProgressEvent:
    """Step `step` of `total` of a stage is done.

    `stage` names the piece of work and where it stands among others ("task 3/5 inverted: adapt");
    a new name begins a new stage. `metrics` are numbers worth seeing now ("loss", "accuracy").
    """

    stage: str
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


Progress = Callable[[ProgressEvent], None]
