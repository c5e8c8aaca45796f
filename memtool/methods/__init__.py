"""What happens on the arrows of the one flow: mira, moram, modulation, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool import registry
from memtool.errors import ConfigError
from memtool.sections import SECTIONS

if TYPE_CHECKING:
    from pathlib import Path

    from memtool.methods.mira.method import Mira
    from memtool.methods.modulation.method import Modulation
    from memtool.methods.moram.method import Moram
    from memtool.progress import Progress
    from memtool.settings import Config


def open_method(
    config: Config, *, seed: int, progress: Progress | None = None, adapters: Path | None = None
) -> Mira | Modulation | Moram:
    """The method that the configuration names, over it and one seed.

    `adapters` as in `Workspace`. A class of other people says in `reads` what it reads: images,
    where it says nothing. Raises ConfigError for a stream of texts, setting xtail, or a head that
    is fixed in advance, under mira and modulation; for mira on a backbone of two towers; and for
    samples that a class does not read.
    """
    texts = config.stream.setting == "trace"
    ahead = not texts and config.head.kind in ("prototype", "text")
    if config.method in ("mira", "modulation") and (ahead or config.stream.setting == "xtail"):
        raise ConfigError(
            f"method {config.method} with stream.setting {config.stream.setting} and head.kind "
            f"{config.head.kind}",
            expected="method moram for setting xtail and for heads that know all classes ahead",
            remedy="--set method=moram",
        )
    if config.method in ("mira", "modulation") and texts:
        raise ConfigError(
            f"method {config.method} on a stream of texts (setting trace)",
            expected="method moram",
            remedy="memtool run --preset moram-trace",
        )
    if config.method == "mira" and config.backbone.name.startswith("open_clip:"):
        raise ConfigError(
            f"method mira on backbone {config.backbone.name}",
            expected="an image model: its memories look at blocks as wide as the features",
            remedy="--set method=moram, or a backbone timm:<model name>",
        )
    method = registry.find("methods", config.method)
    samples, reads = "texts" if texts else "images", getattr(method, "reads", ("images",))
    if config.method not in SECTIONS and samples not in reads:
        raise ConfigError(
            f"method {config.method} on a stream of {samples} ({config.stream.source})",
            expected=f"a stream of {' or '.join(reads)}",
        )
    return method.open(config, seed=seed, progress=progress, adapters=adapters)
