"""What MoRAM makes of adapters: atoms, counted when they come."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.methods.about import About
from memtool.settings import Config

SETTINGS = ("til", "cil", "dil", "vil", "dgcl", "xtail", "trace")
"""Settings that one bank of atoms can be measured in."""


def _require(config: Config) -> None:
    """Tasks that come one after another."""
    if config.stream.setting == "mtl":
        raise ConfigError(
            "stream.setting mtl under method moram",
            expected="tasks that come one after another: atoms learn on top of those before them, "
            "and none can learn apart from the others",
            remedy="--set stream.setting=dil, or --method mira",
        )


def require_learnable(config: Config) -> None:
    """Raise ConfigError for settings that atoms which learn cannot follow."""
    adapter, setting = config.adapter, config.stream.setting
    if setting not in SETTINGS:
        raise ConfigError(
            f"stream.setting {setting} under method moram",
            expected=f"one of {', '.join(SETTINGS)}",
        )
    if adapter.per_task > 1:
        raise ConfigError(
            f"adapter.per_task {adapter.per_task} under method moram",
            expected="1: a task adds its atoms once",
            remedy="--rank N for more atoms a task",
        )
    if adapter.warm_start != "none" or adapter.residual:
        raise ConfigError(
            "adapter.residual and adapter.warm_start under method moram",
            expected="none of them: new atoms start at zero on top of all that are in memory",
            remedy="--warm-start none, --set adapter.residual=false",
        )


ABOUT = About(kind="atoms", require=_require)
