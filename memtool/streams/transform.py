"""The preprocessing of a picture as a transform of torchvision, the same as data sets get."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from memtool.errors import DataError
from memtool.settings import Crop
from memtool.streams.images import square_of, upright_rgb


class Square(nn.Module):
    """A PIL image to RGB, made square by `memtool.streams.images.square_of`."""

    def __init__(self, size: int, crop: Crop = "centre") -> None:
        super().__init__()
        self.size, self.crop = size, crop

    def forward(self, image: Image.Image) -> Image.Image:
        """A picture of (size, size). Raises DataError for what is no PIL image."""
        if not isinstance(image, Image.Image):
            raise DataError(
                f"a picture of type {type(image).__name__}",
                expected="a PIL image",
                remedy="the model itself takes uint8 tensors (n, height, width, 3)",
            )
        return square_of(upright_rgb(image), self.size, self.crop)


def transform_of(size: int, mean: Tensor, std: Tensor, crop: Crop = "centre") -> v2.Compose:
    """PIL image to normalised float32 (3, size, size); mean and std of the channels in [0, 1]."""
    channels = [one.flatten().tolist() for one in (mean, std)]
    return v2.Compose(
        [
            Square(size, crop),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*channels),
        ]
    )
