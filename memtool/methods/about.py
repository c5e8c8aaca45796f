"""What is known of a method before it is imported: no torch is needed to ask.

A method that ships says it in `about.py` of its own folder; of any other this is unknown, and its
class says it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from memtool import registry
from memtool.errors import ConfigError
from memtool.settings import Config


def nothing(config: Config) -> None:
    """Take every configuration."""
    del config


@dataclass(frozen=True)
class About:
    """`kind` is the kind of row that it keeps in the store.

    `appends` says whether its memory takes a new adapter as it is; else it counts or learns when
    one comes. `collects` says whether it takes a collection of adapters of one language model.
    `require` raises ConfigError for a configuration that it cannot work under.
    """

    kind: Literal["adapter", "atoms"] = "adapter"
    appends: bool = False
    collects: bool = False
    require: Callable[[Config], None] = nothing


def said_by(method: str) -> About:
    """What a method says of itself; of one that does not ship the defaults."""
    if method not in registry.SHIPPED["methods"]:
        return About()
    folder, _, _ = registry.SHIPPED["methods"][method].rpartition(".method:")
    found: About = import_module(f"{folder}.about").ABOUT
    return found


def require_trained_head(config: Config) -> None:
    """Raise ConfigError for setting xtail, and for a head that is fixed in advance."""
    ahead = config.stream.setting != "trace" and config.head.is_fixed
    if ahead or config.stream.setting == "xtail":
        raise ConfigError(
            f"method {config.method} with stream.setting {config.stream.setting} and head.kind "
            f"{config.head.kind}",
            expected="method mira or moram for setting xtail and for heads that know all classes "
            "ahead",
            remedy="--set method=mira --set head.kind=prototype",
        )


def require_mixup(config: Config) -> None:
    """Raise ConfigError where `train.mixup` would mix what cannot be mixed."""
    if config.train.mixup == 0:
        return
    texts, towers = config.stream.setting == "trace", config.head.kind == "text"
    if not texts and not towers:
        return
    raise ConfigError(
        f"train.mixup {config.train.mixup:g} "
        + ("on a stream of texts" if texts else "with head.kind text"),
        expected="images under a head whose loss is linear in the labels: tokens, and matches of "
        "images to texts, have no mean",
        remedy="--set train.mixup=0",
    )
