from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtool.errors import DataError, NotFoundError
from memtool.streams import load_image
from memtool.streams.images import decode_square


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    pixels = _noise(20, 20)
    assert np.array_equal(decode_square(_png(Image.fromarray(pixels)), 20, "x"), pixels)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (90, 30)])
def test_it_is_the_shorter_side_resized_and_the_centre_cropped(height: int, width: int) -> None:
    image = Image.fromarray(_noise(height, width))
    scale = 20 / min(height, width)
    rows, columns = round(height * scale), round(width * scale)
    resized = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = (rows - 20) // 2, (columns - 20) // 2
    expected = resized[top : top + 20, left : left + 20].astype(int)
    assert np.abs(decode_square(_png(image), 20, "x") - expected).max() <= 1


def test_shrinking_averages() -> None:
    # Without antialiasing a fine chequerboard would keep its black and white.
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = decode_square(_png(Image.fromarray(board.astype(np.uint8))), 8, "x")
    assert np.abs(small.astype(int) - 127).max() < 10


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = np.full((10, 10), 200, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 256)
    else:
        image = Image.fromarray(grey).convert(mode)
    square = decode_square(_png(image), 10, "x")
    assert square.shape == (10, 10, 3)
    assert square.dtype == np.uint8
    if mode != "1":
        assert np.abs(square.astype(int) - 200).max() <= 2


def test_a_palette_with_transparency_raises_no_warning() -> None:
    image = Image.fromarray(_noise(10, 10)).quantize(8)
    image.info["transparency"] = bytes(range(8))
    assert decode_square(_png(image), 10, "x").shape == (10, 10, 3)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png", 16)
    assert image[12, 8, 0] == 255
    assert image[4, 8, 0] == 0


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.png"):
        load_image(tmp_path / "nothing.png", 32)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an image file"):
        load_image(tmp_path, 32)


@pytest.mark.parametrize("content", [b"", b"hello", "truncated", "flipped"])
def test_broken_bytes_name_the_file(tmp_path: Path, content: bytes | str) -> None:
    whole = _png(Image.fromarray(_noise(40, 40)))
    if content == "truncated":
        content = whole[: len(whole) // 2]
    elif content == "flipped":
        content = whole[:50] + b"\0" * 100 + whole[150:]
    assert isinstance(content, bytes)
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png: not an image that can be read"):
        load_image(tmp_path / "broken.png", 32)
