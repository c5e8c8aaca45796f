"""Image models of transformers as backbones, by a local folder or an id on the hub.

They run as transformers wrote them. A model's features are what its pooler says, or where it has
none its first token, or the mean of its last map.

Of ViT that is the class token behind the last norm (the pooler, which was trained with another
head, is left out), of DINOv2 and CLIP's image tower the same, of Swin and ConvNets the mean of the
last map.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtool.backbones.as_written import AsWritten
from memtool.backbones.causal_lm import model_source, without_bars
from memtool.backbones.survey import Reading
from memtool.backbones.weight_files import drawn_alike, opened
from memtool.errors import ConfigError, NotFoundError
from memtool.settings import BackboneSettings

_TOWERS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
"""Image towers that are classes of their own, by the `model_type` of a configuration."""


@without_bars()
def create_hf_images(settings: BackboneSettings, model: str) -> AsWritten:
    """The image model of `hf:<id or path>`, a folder as `save_pretrained` makes it or a hub id.

    Weights are safetensors; code that comes with it is not run. With `settings.weights` random,
    only its config.json is read. Raises ConfigError for a model that reads no images or cannot be
    adapted, NotFoundError where there are no such files.
    """
    del model
    source = _source(settings)
    with _told_what_is_missing(source):
        made = _kind_of(source, settings.name)
        if settings.weights == "random":
            with drawn_alike():
                built = made.drawn()
            opened(built)
        else:
            built = made.create.from_pretrained(
                source, config=made.config, dtype="auto", use_safetensors=True, **made.options
            ).float()
    mean, std = _normalisation(source, made.config.model_type)
    return AsWritten(
        built,
        settings.name,
        made.reading,
        image_size=settings.image_size,
        mean=mean,
        std=std,
    )


@without_bars()
def on_meta(name: str) -> tuple[nn.Module, Reading]:
    """The model of `hf:<id or path>` in eval mode, with shapes and no numbers, and how it reads.

    Only its config.json is read. Raises as `create_hf_images`.
    """
    source = model_source(BackboneSettings(name=name))
    with _told_what_is_missing(source), torch.device("meta"):
        made = _kind_of(source, name)
        return made.drawn().eval(), made.reading


@dataclass(frozen=True)
class _Kind:
    """What a configuration makes: its class, of transformers, and the options of that."""

    create: Any
    config: Any
    options: dict[str, Any]

    def drawn(self) -> Any:
        """A model with weights as they are before any training."""
        from transformers import AutoModel

        make = self.create.from_config if self.create is AutoModel else self.create
        return make(self.config, **self.options)

    @property
    def reading(self) -> Reading:
        """How it reads images."""
        size = getattr(self.config, "image_size", None)  # none of a ConvNet, which takes any
        made_for = size if size is None or isinstance(size, int) else size[0]
        return Reading(read_hf, made_for=made_for, prefix_tokens=_prefix_tokens(self.config))


def _kind_of(source: str, name: str) -> _Kind:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    create: Any = AutoModel
    if config.model_type in _TOWERS:
        create = _tower(_TOWERS[config.model_type])
        config = getattr(config, "vision_config", config)
    elif not hasattr(config, "num_channels"):
        raise ConfigError(
            f"backbone {name} is a {config.model_type}, and this reads images",
            expected="an image model, as ViT, DINOv2 or CLIP; nano, timm:<model name>",
            remedy="memtool run --preset moram-trace, which reads texts",
        )
    pools_itself = config.model_type in ("vit", "deit")
    return _Kind(create, config, {"add_pooling_layer": False} if pools_itself else {})


@contextmanager
def _told_what_is_missing(source: str) -> Iterator[None]:
    """Inside, errors of transformers are ours."""
    try:
        yield
    except OSError as error:
        raise NotFoundError(
            f"no model {source!r} that can be read: {error}",
            expected="a folder with config.json and model.safetensors",
            remedy="name a local folder: hf:FOLDER",
        ) from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{source!r} is no image model: {error}") from error


def read_hf(model: nn.Module, pixels: Tensor) -> Tensor:
    """The pooled features (b, dim): what the pooler says, else the first token or a map's mean."""
    given: dict[str, Any] = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        given["interpolate_pos_encoding"] = True
    found = model(pixel_values=pixels, **given)
    pooled = getattr(found, "pooler_output", None)
    if pooled is not None:
        return torch.flatten(pooled, 1)
    last: Tensor = found.last_hidden_state
    return last.mean(dim=(2, 3)) if last.ndim == 4 else last[:, 0]


def _prefix_tokens(config: Any) -> int:
    """The class token, with that of DeiT's distillation and registers, of a model that has them."""
    return 1 + (config.model_type == "deit") + (getattr(config, "num_register_tokens", 0) or 0)


def _source(settings: BackboneSettings) -> str:
    if settings.weights not in (None, "random"):
        raise ConfigError(
            f"backbone.weights with {settings.name}",
            expected="no weights, or random: such a model is a folder",
            remedy="--set backbone.name=hf:FOLDER",
        )
    return model_source(settings.model_copy(update={"weights": None}))


def _tower(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _normalisation(source: str, kind: str) -> tuple[list[float], list[float]]:
    """What a folder's preprocessor_config.json says, or what is usual for a kind of model."""
    from transformers import image_utils as usual
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        said = {}
    mean, std = said.get("image_mean"), said.get("image_std")
    if mean is not None and std is not None:
        return mean, std
    if kind.startswith("clip"):
        return usual.OPENAI_CLIP_MEAN, usual.OPENAI_CLIP_STD
    if kind.startswith("dinov2"):
        return usual.IMAGENET_DEFAULT_MEAN, usual.IMAGENET_DEFAULT_STD
    return usual.IMAGENET_STANDARD_MEAN, usual.IMAGENET_STANDARD_STD
