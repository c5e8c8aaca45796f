"""nano: the small Vision Transformer whose weights ship in the package.

1.27 million parameters; 32 x 32 input becomes 17 tokens of width 160 in four blocks. `pretrain.py`
makes the weights; `weights/nano.md` says from what.
"""

from __future__ import annotations

from importlib import resources

from memtool.backbones.plain_vit import PlainViT
from memtool.backbones.vit import VitBackbone, check_image_size
from memtool.backbones.vit_weights import load_vit_weights
from memtool.backbones.weight_files import drawn_alike
from memtool.settings import BackboneSettings

NANO_IMAGE_SIZE = 32
NANO_PATCH_SIZE = 8
NANO_MEAN = (0.5, 0.5, 0.5)
NANO_STD = (0.5, 0.5, 0.5)


def build_nano(image_size: int = NANO_IMAGE_SIZE) -> PlainViT:
    """The architecture with freshly initialised weights (from torch's global generator)."""
    return PlainViT(
        image_size=image_size,
        patch_size=NANO_PATCH_SIZE,
        dim=160,
        depth=4,
        heads=4,
        mlp_ratio=4,
    )


def create_nano(settings: BackboneSettings) -> VitBackbone:
    """The embedded model, with the weights of the package or those of `settings.weights`."""
    check_image_size(settings.image_size, NANO_PATCH_SIZE, settings.name)
    with drawn_alike():
        vit = build_nano(settings.image_size)
    if settings.weights == "random":
        pass
    elif settings.weights is not None:
        load_vit_weights(vit, settings.weights)
    else:
        packaged = resources.files("memtool.backbones") / "weights" / "nano.safetensors"
        with resources.as_file(packaged) as path:
            load_vit_weights(vit, path)
    return VitBackbone(vit, settings.name, mean=NANO_MEAN, std=NANO_STD)
