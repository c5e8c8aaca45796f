"""The pictures of prompts: files, or images in memory, and the column that names them in JSON.

    {"prompt": "<image> What colour is it?", "answer": "red", "image": "pictures/7.png"}

`image` is one path or a list of them, relative to the file that names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memtool.errors import DataError, MemtoolError
from memtool.pictured import Picture, Prompt
from memtool.streams.images import decode_rgb, image_bytes, quiet_decoders, require_image
from memtool_stores.printable import printable, shown

COLUMN = "image"
"""The key of an entry that names its pictures."""


@dataclass(frozen=True, eq=False)
class PictureFile:
    """A picture in a file, which is read when it is asked for."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return printable(str(self.path))

    @cached_property
    def sha256(self) -> str:
        """Of the file. Raises NotFoundError and DataError for one that is no image.

        Only its beginning is looked at: what is broken behind it is found when it is decoded.
        """
        encoded = image_bytes(self.path)
        with quiet_decoders():
            require_image(encoded, self.name)
        return hashlib.sha256(encoded).hexdigest()

    def rgb(self) -> Image.Image:
        """As `Picture.rgb`. Raises NotFoundError for a file that is not there."""
        with quiet_decoders():
            return decode_rgb(image_bytes(self.path), self.name)


@dataclass(frozen=True, eq=False)
class PictureInMemory:
    """An image (height, width, 3) uint8 that somebody brought."""

    pixels: Any
    name: str = field(default="an image in memory")

    @cached_property
    def sha256(self) -> str:
        """Of its size and pixels."""
        pixels = np.ascontiguousarray(self.pixels)
        return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()

    def rgb(self) -> Image.Image:
        """As `Picture.rgb`."""
        return Image.fromarray(np.ascontiguousarray(self.pixels))


def picture_of(image: Any) -> Picture:
    """A picture: a path, a PIL image, or pixels uint8 (height, width, 3), as an array or a tensor.

    Raises DataError for anything else.
    """
    if isinstance(image, str | PathLike):
        return PictureFile(Path(image))
    if isinstance(image, Image.Image):
        return PictureInMemory(np.asarray(image.convert("RGB")))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise DataError(
            f"an image of type {type(image).__name__}, {pixels.dtype} {pixels.shape}",
            expected="a path, a PIL image, or uint8 (height, width, 3)",
        )
    return PictureInMemory(pixels)


def with_pictures(prompts: Sequence[str], images: Sequence[Any] | None) -> list[str]:
    """Prompts with the pictures of each: one, a list of several, or None.

    Raises DataError for another number of images than of prompts, and for what is no image.
    """
    if images is None:
        return list(prompts)
    if isinstance(images, str | PathLike) or len(images) != len(prompts):
        count = 1 if isinstance(images, str | PathLike) else len(images)
        raise DataError(
            f"images for {count} prompts, and {len(prompts)} prompts",
            expected="an image for each prompt, a list of several, or None",
        )
    found: list[str] = []
    for prompt, some in zip(prompts, images, strict=True):
        many = some if isinstance(some, list | tuple) else [] if some is None else [some]
        found.append(Prompt(prompt, [picture_of(one) for one in many]) if many else prompt)
    return found


def with_files(prompt: str, said: Any, folder: Path, where: str) -> str:
    """A prompt with the pictures that an entry of JSON names; None names none.

    Raises NotFoundError and DataError, beginning with `where`, for a picture that is not there or
    is none; only the beginning of a file is decoded here.
    """
    if said is None:
        return prompt
    names = said if isinstance(said, list) else [said]
    if not names or not all(type(one) is str and one.strip() for one in names):
        raise DataError(
            f"{where}: {COLUMN} is {shown(said)}",
            expected="the path of an image file, or a list of paths",
        )
    pictures = [PictureFile(folder / one) for one in names]
    for picture in pictures:
        try:
            _ = picture.sha256
        except MemtoolError as error:
            raise type(error)(
                f"{where}: {error.message}", expected=error.expected, remedy=error.remedy
            ) from error
    return Prompt(prompt, pictures)
