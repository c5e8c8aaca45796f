"""Image models of transformers as backbones, by a local folder or an id on the hub.

They run as transformers wrote them. A model's features are what its pooler says, or where it has
none its first token, or the mean of its last map.

Of ViT that is the class token behind the last norm (the pooler, which was trained with another
head, is left out), of DINOv2 and CLIP's image tower the same, of Swin and ConvNets the mean of the
last map.
"""

from __future__ import annotations

import inspect
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
    from transformers import AutoConfig, AutoModel

    del model
    source = _source(settings)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        given: dict[str, Any] = {}
        create: Any = AutoModel
        if config.model_type in _TOWERS:
            create = _tower(_TOWERS[config.model_type])
            config = getattr(config, "vision_config", config)
        elif not hasattr(config, "num_channels"):
            raise ConfigError(
                f"backbone {settings.name} is a {config.model_type}, and this reads images",
                expected="an image model, as ViT, DINOv2 or CLIP; nano, timm:<model name>",
                remedy="memtool run --preset moram-trace, which reads texts",
            )
        if config.model_type in ("vit", "deit"):
            given["add_pooling_layer"] = False
        if settings.weights == "random":
            with drawn_alike():
                make = create.from_config if create is AutoModel else create
                built = make(config, **given)
            opened(built)
        else:
            built = create.from_pretrained(
                source, config=config, dtype="auto", use_safetensors=True, **given
            ).float()
    except OSError as error:
        raise NotFoundError(
            f"no model {source!r} that can be read: {error}",
            expected="a folder with config.json and model.safetensors",
            remedy="name a local folder: hf:FOLDER",
        ) from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{source!r} is no image model: {error}") from error
    mean, std = _normalisation(source, config.model_type)
    size = getattr(config, "image_size", None)  # none of a ConvNet, which takes any
    made_for = size if size is None or isinstance(size, int) else size[0]
    return AsWritten(
        built,
        settings.name,
        Reading(read_hf, made_for=made_for, prefix_tokens=_prefix_tokens(config)),
        image_size=settings.image_size,
        mean=mean,
        std=std,
    )


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
