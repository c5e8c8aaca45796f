"""What Modulation needs, and what it makes of new adapters: it counts them when they come."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.methods.about import About, require_trained_head
from memtool.settings import Config


def _require(config: Config) -> None:
    """A head that is trained, and a task of every input, given or predicted."""
    require_trained_head(config)
    if config.stream.setting in ("vil", "mtl", "dgcl"):
        raise ConfigError(
            f"stream.setting {config.stream.setting} under method modulation",
            expected="til, where the task is given, or mts, where it is predicted: an adapter is "
            "recalled whole, with the head of its task",
            remedy="--set stream.setting=mts, or --method mira",
        )


ABOUT = About(require=_require)
