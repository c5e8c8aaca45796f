"""What MIRA needs, and what it makes of new adapters."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.methods.about import About, require_trained_head
from memtool.settings import Config

POSTERIORS = ("softmax", "topk", "sparsemax", "entmax", "max")
"""Separations that give shares of one: what keys in closed form are made for."""


def _require(config: Config) -> None:
    """Images and a head that learns, no model of two towers; or texts, and keys in closed form."""
    if config.stream.setting == "trace":
        _require_closed_form(config)
        return
    require_trained_head(config)
    if not isinstance(config.memory.look_at, int):
        raise ConfigError(
            f"memory.look_at {','.join(config.memory.look_at)} on a stream of images",
            expected="the number of one block",
            remedy="--set memory.look_at=2",
        )
    if config.backbone.name.startswith("open_clip:"):
        raise ConfigError(
            f"method mira on backbone {config.backbone.name}",
            expected="an image model: its memories look at blocks as wide as the features",
            remedy="--set method=moram, or a backbone timm:<model name>",
        )


def _require_closed_form(config: Config) -> None:
    """What a memory of prompts can be made with."""
    memory, learn = config.memory, config.consolidate
    for name, found, known in (
        ("memory.scope", memory.scope, ("model",)),
        ("memory.mix", memory.mix, ("delta",)),
        ("memory.query", memory.query, ("identity",)),
        ("memory.keys_of", memory.keys_of, ("task",)),
        ("memory.routing", memory.routing, ("mixture", "lda")),
        ("memory.similarity", memory.similarity, ("scaled-dot", "dot")),
        ("memory.separation", memory.separation, POSTERIORS),
        ("consolidate.keys", learn.keys, ("closed-form",)),
        ("consolidate.epochs", learn.epochs, (0,)),
    ):
        if found not in known:
            raise ConfigError(
                f"{name} {found} on a stream of texts",
                expected=" or ".join(map(str, known)),
                remedy=f"--set {name}={known[0]}",
            )


ABOUT = About(appends=True, require=_require)
