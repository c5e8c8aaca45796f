"""Frozen models behind one interface (`interface.Backbone`), made by `create_backbone`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool import registry
from memtool.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from memtool.backbones.interface import Backbone
    from memtool.settings import BackboneSettings

__all__ = ["create_backbone"]

_FORMS = ("nano", "timm:<model name>", "open_clip:<name>", "open_clip_image:<name>", "hf:<id>")


def create_backbone(settings: BackboneSettings) -> Backbone:
    """The frozen model of images that the settings name.

    "nano", "timm:<model name>", "open_clip:<name>", "open_clip_image:<name>" or "hf:<id or path>".

    A name that another package gives, with or without ":<model name>", and "module:Class" are
    called with the settings, and the model's name where there is one.

    Raises ConfigError for a name that is not known or a model that cannot be adapted,
    NotFoundError for weights that are not there, MismatchError for weights that do not fit.

    >>> from memtool import Config
    >>> backbone = create_backbone(Config().backbone)
    >>> backbone.name, backbone.image_size
    ('nano', 32)
    """
    family, colon, model = settings.name.partition(":")
    ships = family in registry.SHIPPED["backbones"]
    if settings.quantise is not None:
        raise ConfigError(
            f"backbone.quantise with {settings.name}, which reads images",
            expected="a language model: hf:<id or path>",
            remedy="--set backbone.quantise=none",
        )
    if ships and bool(model) != (family == "nano") and colon == ":" * bool(model):
        create = registry.find("backbones", family)
        found: Backbone = create(settings, model) if model else create(settings)
        return found
    if ships or not registry.known("backbones", settings.name):
        raise ConfigError(
            f"backbone name {settings.name!r} is not known",
            expected=did_you_mean(settings.name, _FORMS),
        )
    return _of_others(settings, family, model)


def _of_others(settings: BackboneSettings, family: str, model: str) -> Backbone:
    """A model of another package. Raises ConfigError for what is no `interface.Backbone`."""
    from memtool.backbones.interface import Backbone

    by_name = registry.known("backbones", family)
    create = registry.find("backbones", family if by_name else settings.name)
    found = create(settings, model) if by_name and model else create(settings)
    if not isinstance(found, Backbone):
        raise ConfigError(
            f"backbone {settings.name} is a {type(found).__name__}",
            expected="a memtool.backbones.interface.Backbone",
        )
    return found
