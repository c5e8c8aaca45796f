"""What MoRAM makes of adapters: atoms, counted when they come."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.methods.about import About
from memtool.settings import Config


def _require(config: Config) -> None:
    """Tasks that come one after another."""
    if config.stream.setting == "mtl":
        raise ConfigError(
            "stream.setting mtl under method moram",
            expected="tasks that come one after another: atoms learn on top of those before them, "
            "and none can learn apart from the others",
            remedy="--set stream.setting=dil, or --method mira",
        )


ABOUT = About(kind="atoms", require=_require)
