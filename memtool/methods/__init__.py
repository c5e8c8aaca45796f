"""What happens on the arrows of the one flow: mira, moram, modulation, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from memtool.config import Config
    from memtool.methods.mira import Mira
    from memtool.methods.modulation import Modulation
    from memtool.methods.moram import Moram
    from memtool.methods.text_memory import TextMoram
    from memtool.progress import Progress


def open_method(
    config: Config, *, seed: int, progress: Progress | None = None, adapters: Path | None = None
) -> Mira | Modulation | Moram:
    """The method on images that the configuration names, over it and one seed.

    `adapters` as in `Workspace`. Raises ConfigError for a stream of texts; for setting xtail, or a
    head that is fixed in advance, without moram; and for mira on a backbone of two towers.
    """
    if config.stream.setting == "trace":
        raise ConfigError(
            f"stream {config.stream.source} of setting trace: its tasks are texts, not images",
            expected=f"another setting under method {config.method}",
            remedy="--set method=moram, which reads texts",
        )
    ahead = config.head.kind in ("prototype", "text")
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
        from memtool.methods.modulation import Modulation

        return Modulation.open(config, seed=seed, progress=progress, adapters=adapters)
    if config.method == "moram":
        from memtool.methods.moram import Moram

        return Moram.open(config, seed=seed, progress=progress, adapters=adapters)
    from memtool.methods.mira import Mira

    return Mira.open(config, seed=seed, progress=progress, adapters=adapters)


def open_text_method(config: Config, *, seed: int, progress: Progress | None = None) -> TextMoram:
    """The method on a stream of texts (setting trace), over a configuration and one seed.

    Raises ConfigError for another method than moram.
    """
    from memtool.methods.text_memory import TextMoram

    return TextMoram.open(config, seed=seed, progress=progress)
