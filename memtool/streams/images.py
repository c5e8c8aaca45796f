"""From an encoded image to a square uint8 array."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from memtool.errors import DataError, NotFoundError
from memtool.settings import Crop
from memtool_stores import limits
from memtool_stores.errors import SchemaError
from memtool_stores.files import read_ordinary
from memtool_stores.printable import printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded; other decoders of Pillow run programs, or are little tried."""

_KINDS = "a complete PNG, JPEG, WebP, BMP, GIF, TIFF or PPM image"

# All that Pillow's decoders raise for bytes that are not what they say.
_DECODE_ERRORS = (
    OSError,  # unidentified or truncated; the bytes are in memory, so it is not the disk
    SyntaxError,  # a broken PNG chunk
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
)

_opening = threading.Lock()


def square_of(image: Image.Image, size: int, crop: Crop = "centre") -> Image.Image:
    """A picture of (size, size), resized by bicubic interpolation with antialiasing.

    Under `centre` its largest centred square, which is the same as resizing the shorter side and
    cropping the centre; under `squash` all of it, stretched; under `pad` all of it, as large as
    there is room, in the middle of black.
    """
    to, how = (size, size), Image.Resampling.BICUBIC
    match crop:
        case "centre":
            return ImageOps.fit(image, to, how)
        case "squash":
            return image.resize(to, how)
        case "pad":
            return ImageOps.pad(image, to, how)


def decode_square(
    encoded: bytes, image_size: int, where: str, crop: Crop = "centre"
) -> npt.NDArray[np.uint8]:
    """Decode one image to RGB uint8 (image_size, image_size, 3).

    It is made square by `square_of`. The orientation in the EXIF data is
    applied where that can be read; of several frames the first one counts. Raises DataError,
    beginning with `where`, for bytes that are not a readable image, and for an image of more than
    limits.image_pixels, before it is decoded.
    """
    square = _decoded(encoded, where, lambda image: square_of(upright_rgb(image), image_size, crop))
    return np.asarray(square, dtype=np.uint8)


def decode_rgb(encoded: bytes, where: str) -> Image.Image:
    """Decode one image to RGB in its own size; the rest as `decode_square`."""
    return _decoded(encoded, where, upright_rgb)


def require_image(encoded: bytes, where: str) -> None:
    """Raise DataError, as `decode_square`, for what does not begin as an image; decode nothing."""
    _decoded(encoded, where, lambda image: image)


def _decoded(encoded: bytes, where: str, made: Callable[[Image.Image], Image.Image]) -> Image.Image:
    where = printable(where)
    try:
        with _opened(encoded) as image:
            width, height = image.size
            limits.require("image_pixels", width * height, f"{where}: {width} x {height}")
            return made(image)
    except SchemaError as error:
        raise _too_large(error) from error
    except MemoryError as error:
        raise DataError(
            f"{where}: there is no memory to decode it",
            remedy="a smaller copy of the image, or a machine with more memory",
        ) from error
    except _DECODE_ERRORS as error:
        reason = "no format that is read here" if "cannot identify" in str(error) else str(error)
        raise DataError(
            f"{where}: not an image that can be read ({printable(reason)})",
            expected=_KINDS,
            remedy="replace or remove it",
        ) from error


def load_square(
    path: str | PathLike[str], image_size: int, crop: Crop = "centre"
) -> npt.NDArray[np.uint8]:
    """Read and decode one file: uint8 (image_size, image_size, 3), made square by `square_of`.

    Raises NotFoundError where there is no such file, DataError where it is not a readable image,
    no ordinary file, or above limits.image_bytes or limits.image_pixels.
    """
    with quiet_decoders():
        return decode_square(image_bytes(Path(path)), image_size, str(path), crop)


def image_bytes(file: Path) -> bytes:
    """The encoded image in a file. Raises NotFoundError and DataError as `load_square`."""
    name = printable(str(file))
    try:
        return read_ordinary(file, "image_bytes")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no image {name}", remedy="check the path") from error
    except SchemaError as error:
        if "limits." in (error.expected or ""):
            raise _too_large(error) from error
        raise DataError(
            f"{error.message}, not an image file", expected="the path of one image"
        ) from error
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror})", remedy="check its path and permissions"
        ) from error


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Inside, Pillow warns of nothing: of an image that it could decode all the same.

    Warnings are of the whole process, so this is for one thread, around those that decode.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _opened(encoded: bytes) -> Image.Image:
    """The image of which only the header is read."""
    # Pillow's own limit, a variable of its module, would warn or raise before ours is looked at.
    with _opening:
        most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = most


def upright_rgb(image: Image.Image) -> Image.Image:
    """Three channels of eight bits, turned as the EXIF data say."""
    return _as_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image  # its pixels are whole; only what is said of them is not


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


def _too_large(error: SchemaError) -> DataError:
    return DataError(
        error.message,
        expected=error.expected,
        remedy=f"a smaller copy of the image, or {error.remedy}",
    )
