"""Frozen models behind one interface (`interface.Backbone`), made by `create_backbone`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from memtool.backbones.interface import Backbone
    from memtool.config import BackboneSettings

__all__ = ["create_backbone"]


def create_backbone(settings: BackboneSettings) -> Backbone:
    """The frozen model that the settings name: "nano", "timm:<model name>" or "open_clip:<name>".

    Raises ConfigError for a name that is not known or a model that cannot be adapted,
    NotFoundError for weights that are not there, MismatchError for weights that do not fit.
    """
    family, _, model = settings.name.partition(":")
    match family:
        case "nano" if not model:
            from memtool.backbones.nano import create_nano

            return create_nano(settings)
        case "timm" if model:
            from memtool.backbones.vit import create_timm_vit

            return create_timm_vit(settings, model)
        case "hf" if model:
            raise ConfigError(
                f"backbone {settings.name} is a language model, and this reads images",
                expected="an image model: nano, timm:<model name>",
                remedy="memtool run --preset moram-trace, which reads texts",
            )
        case "open_clip" if model:
            from memtool.backbones.open_clip import create_open_clip

            return create_open_clip(settings, model)
    raise ConfigError(
        f"backbone name {settings.name!r} is not known",
        expected=did_you_mean(settings.name, ["nano", "timm:<model name>", "open_clip:<name>"]),
    )
