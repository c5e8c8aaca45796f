"""From an encoded image to a square uint8 array."""

from __future__ import annotations

import io
import struct
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from memtool.errors import DataError, NotFoundError

_DECODE_ERRORS = (
    OSError,  # unidentified or truncated
    SyntaxError,  # what Pillow raises for a broken PNG chunk
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def decode_square(encoded: bytes, image_size: int, where: str) -> npt.NDArray[np.uint8]:
    """Decode one image to RGB uint8 (image_size, image_size, 3).

    The largest centred square is resized by bicubic interpolation with antialiasing, which is the
    same as resizing the shorter side and cropping the centre. The orientation in the EXIF data is
    applied. Raises DataError, beginning with `where`, for bytes that are not a readable image.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            upright = ImageOps.exif_transpose(image)
            rgb = _as_rgb(upright)
            square = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BICUBIC)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{where}: not an image that can be read ({error})",
            expected="a complete PNG, JPEG, WebP, BMP, GIF or TIFF image",
            remedy="replace or remove it",
        ) from error
    return np.asarray(square, dtype=np.uint8)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Three channels of eight bits; transparency is dropped, sixteen bits keep the upper eight."""
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255 and turn most of it white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    elif image.mode == "P":
        # A palette may carry transparency, which only RGBA can hold on the way to RGB.
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_square(path: str | PathLike[str], image_size: int) -> npt.NDArray[np.uint8]:
    """Read and decode one file: uint8 (image_size, image_size, 3).

    Raises NotFoundError where there is no such file, DataError where it is not a readable image.
    """
    file = Path(path)
    if not file.exists():
        raise NotFoundError(f"there is no image {file}", remedy="check the path")
    if not file.is_file():
        raise DataError(f"{file} is not an image file", expected="the path of one image")
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return decode_square(encoded, image_size, str(file))
