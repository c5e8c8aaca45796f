"""TensorBoard: events in `tensorboard/<run>` below the folder of the experiment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from typing import Any

from memtool.trackers import Card, Points
from memtool_stores.names import below


class TensorBoard:
    """Scalars by name and step; settings, note and tags as text."""

    def __init__(self) -> None:
        self._writer: Any = None

    def begin(self, card: Card) -> str:
        """Open the events; those of an earlier part of the same run stay beside them."""
        from torch.utils.tensorboard import SummaryWriter

        folder = below(card.shared / "tensorboard", card.name)
        if card.anew:
            shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        settings = json.dumps(dict(card.settings), indent=4)
        self._text("settings", "\n".join(f"    {line}" for line in settings.splitlines()))
        if card.note:
            self._text("note", card.note)
        if card.tags:
            self._text("tags", ", ".join(card.tags))
        return f"tensorboard --logdir {folder.parent}"

    def log(self, points: Iterable[Points]) -> None:
        """Write scalars, so that they can be seen at once."""
        for at in points:
            for name, value in at.values.items():
                self._writer.add_scalar(name, value, at.step, walltime=at.time)
        self._writer.flush()

    def end(self, *, failed: bool) -> None:
        """Close the file."""
        del failed
        self._writer.close()

    def _text(self, name: str, text: str) -> None:
        self._writer.add_text(name, text, 0)
