"""What happens on the arrows of the one flow: mira, modulation, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from memtool.config import Config
    from memtool.methods.mira import Mira
    from memtool.methods.modulation import Modulation
    from memtool.progress import Progress


def open_method(
    config: Config, *, seed: int, progress: Progress | None = None, adapters: Path | None = None
) -> Mira | Modulation:
    """The method that the configuration names, over it and one seed; `adapters` as `Workspace`."""
    if config.method == "modulation":
        from memtool.methods.modulation import Modulation

        return Modulation.open(config, seed=seed, progress=progress, adapters=adapters)
    from memtool.methods.mira import Mira

    return Mira.open(config, seed=seed, progress=progress, adapters=adapters)
