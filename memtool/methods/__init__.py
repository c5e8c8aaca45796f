"""What happens on the arrows of the one flow: mira, moram, modulation, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool import registry
from memtool.errors import ConfigError
from memtool.methods.about import require_mixup, said_by

if TYPE_CHECKING:
    from pathlib import Path

    from memtool.methods.method import Method
    from memtool.progress import Progress
    from memtool.settings import Config


def open_method(
    config: Config, *, seed: int, progress: Progress | None = None, adapters: Path | None = None
) -> Method:
    """The method that the configuration names, over it and one seed.

    `adapters` as in `Workspace`. A class says in `reads` what it reads: images, where it says
    nothing. Raises ConfigError for a configuration that the method cannot work under.
    """
    require_mixup(config)
    config.adapted_from(1)  # of whatever depth: is there a look to begin at?
    said_by(config.method).require(config)
    method: type[Method] = registry.find("methods", config.method)
    samples = "texts" if config.stream.setting == "trace" else "images"
    reads = getattr(method, "reads", ("images",))
    if samples not in reads:
        raise ConfigError(
            f"method {config.method} on a stream of {samples} ({config.stream.source})",
            expected=f"a stream of {' or '.join(reads)}",
        )
    return method.open(config, seed=seed, progress=progress, adapters=adapters)
