"""Images as a training sees them: mirrored, cropped, or as they are (`train.augment`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import sent
from memtool.settings import TrainSettings


def augmented(images: Tensor, seed: int, settings: TrainSettings) -> Tensor:
    """Images uint8 (n, h, w, 3) as they are, or mirrored by chance and cropped from a padded frame.

    All draws follow from `seed`. `flip` mirrors alone; `crop` takes a piece of every one, see
    `cropped`.
    """
    if settings.augment == "none":
        return images
    generator = torch.Generator().manual_seed(seed)
    if settings.augment == "crop":
        return cropped(images, generator)
    count, height, width, _ = images.shape
    pad = max(1, height // 8)
    mirrored = torch.rand(count, generator=generator) < 0.5
    if settings.augment == "flip":
        turned = sent(mirrored, images.device).view(-1, 1, 1, 1)
        return torch.where(turned, images.flip(2), images)
    offset = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    offset, mirrored = sent(offset, images.device), sent(mirrored, images.device)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(2), images)
    channels_first = images.permute(0, 3, 1, 2).float()
    padded = F.pad(channels_first, (pad, pad, pad, pad), mode="reflect").to(torch.uint8)
    rows = offset[:, :1] + torch.arange(height, device=images.device)
    columns = offset[:, 1:] + torch.arange(width, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]


CROP_AREA, CROP_RATIO, CROP_TRIES = (0.9, 1.0), (3 / 4, 4 / 3), 10
"""Of `cropped`: what OpenCLIP trains with, and so the published MoRAM."""


def crop_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A piece of each of `count` images: int64 (count, 4), top, left, height and width in pixels.

    Area and ratio of the sides, the latter on a logarithmic scale, are uniform in `CROP_AREA` and
    `CROP_RATIO`; a piece that does not fit is drawn again, ten times at most, then it is the whole.
    """
    shape = (count, CROP_TRIES)
    area = torch.empty(shape).uniform_(*CROP_AREA, generator=generator) * height * width
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    ratio = torch.empty(shape).uniform_(low, high, generator=generator).exp()
    wide, high_ = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide <= width) & (high_ <= height) & (wide > 0) & (high_ > 0)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    tall = torch.where(found, high_.gather(1, first)[:, 0], torch.tensor(float(height)))
    broad = torch.where(found, wide.gather(1, first)[:, 0], torch.tensor(float(width)))
    place = torch.rand((count, 2), generator=generator)
    top = (place[:, 0] * (height - tall + 1)).floor()
    left = (place[:, 1] * (width - broad + 1)).floor()
    return torch.stack([top, left, tall, broad], dim=1).long()


def cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    """A piece of every image uint8 (n, h, w, 3), back in its size by antialiased bicubic."""
    count, height, width, _ = images.shape
    boxes = crop_boxes(count, height, width, generator)
    channels_first = images.permute(0, 3, 1, 2).float()
    pieces = [
        F.interpolate(
            image[None, :, top : top + tall, left : left + broad],
            size=(height, width),
            mode="bicubic",
            antialias=True,
        )
        for image, (top, left, tall, broad) in zip(channels_first, boxes.tolist(), strict=True)
    ]
    return torch.cat(pieces).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
