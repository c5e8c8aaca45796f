"""Trackio: its folder on this machine (TRACKIO_DIR), or the Space that TRACKIO_SPACE_ID names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from memtool.trackers import Card, Points


class Trackio:
    """A run of the project that is called as the experiment."""

    def __init__(self) -> None:
        self._run: Any = None

    def begin(self, card: Card) -> str:
        """Begin the run, or go on with the one of this name."""
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import trackio

        config = {**card.settings, "note": card.note or "", "tags": ", ".join(card.tags)}
        self._run = trackio.init(
            project=card.group,
            name=card.name,
            config=config,
            resume="never" if card.anew else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"trackio show --project {card.group}"

    def log(self, points: Iterable[Points]) -> None:
        """Hand numbers over; it sends them by itself."""
        for at in points:
            self._run.log({**at.values, at.axis: at.step}, step=at.step)

    def end(self, *, failed: bool) -> None:
        """Let it write what is left."""
        del failed
        self._run.finish()
