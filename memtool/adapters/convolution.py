"""The patches that a convolution looks at, as the tokens of a linear layer.

A convolution is the linear map of its kernel's patches: token i of an image is the patch (channels
· height · width numbers) under the kernel at place i of the output. Adapters of it are PEFT's: A is
a convolution of the same kernel, stride and padding to the ranks, B a 1 × 1 one. So A x is computed
as a convolution, without copying patches out; where every sample has an A of its own, as one
convolution in groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image; padding with zeros, of height and width at both sides."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def is_a_place(self) -> bool:
        """Whether a patch is one place of the image: 1 × 1."""
        return self.kernel == (1, 1) and self.padding == (0, 0)


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of `images` (b, c, h, w), in stead of tokens (b, n, c · kernel)."""

    images: Tensor
    window: Window

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the tokens (b, n, d)."""
        batch, channels, *sides = self.images.shape
        window = self.window
        places = [
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(
                sides, window.padding, window.kernel, window.stride, strict=True
            )
        ]
        return batch, math.prod(places), channels * math.prod(window.kernel)

    def to(self, like: Tensor) -> Patches:
        """The patches in the number format of a tensor."""
        return Patches(self.images.to(like.dtype), self.window)

    def tokens(self) -> Tensor:
        """The patches themselves (b, n, d), copied out."""
        window = self.window
        columns = F.unfold(self.images, window.kernel, padding=window.padding, stride=window.stride)
        return columns.transpose(1, 2)

    def project(self, a: Tensor) -> Tensor:
        """The products A x (b, n, rows) of `a` (rows, d), or (g, rows, d) for g groups of samples.

        Group i of b / g samples, one after another, is multiplied by a[i].
        """
        images, window = self.images, self.window
        batch, channels, *sides = images.shape
        groups = 1 if a.ndim == 2 else len(a)
        weight = a.reshape(-1, channels, *window.kernel)
        if groups > 1:
            side_by_side = images.reshape(groups, batch // groups, channels, *sides)
            images = side_by_side.transpose(0, 1).flatten(1, 2)
        z = F.conv2d(
            images, weight, stride=window.stride, padding=window.padding, groups=groups
        ).flatten(2)
        if groups > 1:
            z = z.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
        return z.transpose(1, 2)
