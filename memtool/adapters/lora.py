"""How new LoRA adapters begin: A random, B zero, so that a new adapter changes nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtool.adapters.layout import Layout
from memtool.errors import MismatchError


def init_lora(
    layout: Layout,
    count: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    draw: str = "normal",
) -> Tensor:
    """Flat values (count, numel) of fresh adapters: A ~ N(0, 1 / in_features), B = 0.

    The variance keeps A x at the scale of x for every width. With `draw` "kaiming" A is uniform
    within ±1 / √in_features, a third of that variance, as torch draws it with a = √5. They lie on
    the generator's device.
    Adapter i does not depend on `count` nor on `dtype` but for rounding: draws are float32, one
    adapter after the other.
    """
    if count < 1:
        raise MismatchError(f"{count} adapters", expected="at least one adapter")
    values = torch.zeros(count, layout.numel, dtype=dtype, device=generator.device)
    for value in values:
        for segment, site in zip(layout.segments[::2], layout.sites, strict=True):
            draws = _draws(segment.numel, generator, draw)
            end = segment.offset + segment.numel
            value[segment.offset : end] = draws / math.sqrt(site.in_features)
    return values


def _draws(count: int, generator: torch.Generator, draw: str) -> Tensor:
    """Numbers (count,) of variance 1, or uniform within ±1."""
    if draw == "kaiming":
        return torch.empty(count, device=generator.device).uniform_(-1, 1, generator=generator)
    return torch.randn(count, generator=generator, device=generator.device)
