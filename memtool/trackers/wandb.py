"""Weights & Biases: offline, unless WANDB_MODE says otherwise: nothing leaves unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from memtool.trackers import Card, Points


class Wandb:
    """A run of the project `memtool`, grouped by experiment, in `wandb` below its folder."""

    def __init__(self) -> None:
        self._run: Any = None

    def begin(self, card: Card) -> str:
        """Begin the run; each axis is a number of its own, which the curves run over."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        card.shared.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "memtool"),
            group=card.group,
            name=card.name,
            notes=card.note,
            tags=list(card.tags),
            config=dict(card.settings),
            dir=str(card.shared),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        for axis in ("step", "tasks"):
            self._run.define_metric(f"axis/{axis}")
        return f"wandb sync {self._run.settings.sync_dir}"

    def log(self, points: Iterable[Points]) -> None:
        """Send numbers, each curve over its own axis."""
        for at in points:
            axis = f"axis/{at.axis}"
            for name in at.values:
                self._run.define_metric(name, step_metric=axis)
            self._run.log({**at.values, axis: at.step})

    def end(self, *, failed: bool) -> None:
        """Close the run with its exit code."""
        self._run.finish(exit_code=int(failed))
