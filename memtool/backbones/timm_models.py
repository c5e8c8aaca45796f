"""Any model of timm as a backbone: plain Vision Transformers written out, all others as written."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from memtool.backbones.as_written import AsWritten
from memtool.backbones.interface import Backbone
from memtool.backbones.listing import like
from memtool.backbones.survey import Reading, block_names
from memtool.backbones.vit import VitBackbone, check_image_size, is_plain
from memtool.backbones.vit_weights import load_vit_weights
from memtool.backbones.weight_files import drawn_alike, opened
from memtool.errors import ConfigError, NotFoundError
from memtool.settings import BackboneSettings

_REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError)
"""What models of timm raise when they are built for a size that they cannot have."""


def create_timm(settings: BackboneSettings, model: str) -> Backbone:
    """The timm model `model` with the weights of `settings.weights`, or with timm's own.

    Raises ConfigError for a model that timm does not know or that cannot be adapted, NotFoundError
    for weights that cannot be fetched, and as `load_vit_weights`.
    """
    import timm

    if not timm.is_model(model):
        raise ConfigError(
            f"timm has no model {model!r}",
            expected=like(model),
            remedy="memtool backbones FILTER lists them",
        )
    with drawn_alike():
        built = build_timm(model, settings.image_size, fetch=settings.weights is None)
    plain = is_plain(built)
    if plain:
        check_image_size(settings.image_size, built.patch_embed.patch_size[0], settings.name)
    if settings.weights == "random":
        opened(built)
    elif settings.weights is not None:
        load_vit_weights(built, settings.weights)
    cfg = timm.data.resolve_model_data_config(built)
    mean, std = cfg["mean"], cfg["std"]
    if plain:
        return VitBackbone(built, settings.name, mean=mean, std=std)
    return AsWritten(
        built,
        settings.name,
        reading_of(built),
        image_size=settings.image_size,
        mean=mean,
        std=std,
    )


def build_timm(model: str, size: int | None, *, fetch: bool = False) -> Any:
    """A model without its classifier, for images of a size where it asks for one.

    Raises ConfigError for a size that it cannot be built for, NotFoundError for weights that cannot
    be fetched.
    """
    import timm

    sized = {} if size is None else {"img_size": size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that timm has moved
        try:
            try:
                return timm.create_model(model, pretrained=fetch, num_classes=0, **sized)
            except TypeError:  # a ConvNet takes images of any size
                return timm.create_model(model, pretrained=fetch, num_classes=0)
        except (OSError, *_REFUSALS) as error:
            if fetch and isinstance(error, OSError | RuntimeError):
                raise NotFoundError(
                    f"no pre-trained weights for timm:{model}: {error}",
                    remedy="name a local safetensors file as backbone.weights, or random",
                ) from error
            native = timm.models.get_pretrained_cfg(model)
            made_for = 224 if native is None else native.input_size[-1]
            of_size = "" if size is None else f" for images of {size} pixels"
            raise ConfigError(
                f"timm's {model} cannot be built{of_size}: {error}",
                expected=f"images of {made_for} pixels, for which it was made",
                remedy=f"--set backbone.image_size={made_for}",
            ) from error


def reading_of(model: nn.Module) -> Reading:
    """How a model of timm without its classifier reads images."""
    from timm.data import resolve_model_data_config

    return Reading(
        lambda model, pixels: model(pixels),
        blocks_of(model),
        channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC",
        made_for=resolve_model_data_config(model)["input_size"][-1],
        prefix_tokens=getattr(model, "num_prefix_tokens", 0),
    )


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the modules that may be blocks, by the groups that timm itself has of its layers."""
    try:
        found = model.group_matcher(coarse=False)["blocks"]  # type: ignore[operator]
    except (AttributeError, TypeError, KeyError):  # timm has none, or a broken one
        return []
    patterns = [found] if isinstance(found, str) else [pattern for pattern, _ in found]
    return block_names(model, patterns)


def on_meta(model: str) -> tuple[nn.Module, Reading]:
    """A model in eval mode, with shapes and no numbers, and how it reads images."""
    with torch.device("meta"):
        built = build_timm(model, None).eval()
    return built, reading_of(built)
