"""What happens on the arrows of the one flow: mira, moram, modulation, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from memtool.config import Config
    from memtool.methods.mira.method import Mira
    from memtool.methods.modulation.method import Modulation
    from memtool.methods.moram.method import Moram
    from memtool.progress import Progress


def open_method(
    config: Config, *, seed: int, progress: Progress | None = None, adapters: Path | None = None
) -> Mira | Modulation | Moram:
    """The method that the configuration names, over it and one seed.

    `adapters` as in `Workspace`. Raises ConfigError for a stream of texts, setting xtail, or a head
    that is fixed in advance, without moram; and for mira on a backbone of two towers.
    """
    if config.stream.setting == "trace" and config.method != "moram":
        raise ConfigError(
            f"method {config.method} on a stream of texts (setting trace)",
            expected="method moram",
            remedy="memtool run --preset moram-trace",
        )
    ahead = config.stream.setting != "trace" and config.head.kind in ("prototype", "text")
    if config.method != "moram" and (ahead or config.stream.setting == "xtail"):
        raise ConfigError(
            f"method {config.method} with stream.setting {config.stream.setting} and head.kind "
            f"{config.head.kind}",
            expected="method moram for setting xtail and for heads that know all classes ahead",
            remedy="--set method=moram",
        )
    if config.method == "mira" and config.backbone.name.startswith("open_clip:"):
        raise ConfigError(
            f"method mira on backbone {config.backbone.name}",
            expected="an image model: its memories look at blocks as wide as the features",
            remedy="--set method=moram, or a backbone timm:<model name>",
        )
    if config.method == "modulation":
        from memtool.methods.modulation.method import Modulation

        return Modulation.open(config, seed=seed, progress=progress, adapters=adapters)
    if config.method == "moram":
        from memtool.methods.moram.method import Moram

        return Moram.open(config, seed=seed, progress=progress, adapters=adapters)
    from memtool.methods.mira.method import Mira

    return Mira.open(config, seed=seed, progress=progress, adapters=adapters)
