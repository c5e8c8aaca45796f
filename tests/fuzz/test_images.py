"""Pictures as strangers make them: damaged, enormous by what they say of themselves, or none."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memtool.errors import DataError
from memtool.streams import load_image, open_table
from memtool.streams.images import decode_square
from memtool_stores import limits
from tests.fuzz.door import STRANGE, cases, damaged, long, refused_or_taken

pytestmark = long

_PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def _encoded(form: str, mode: str = "RGB", **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).convert(mode).save(buffer, form, **more)
    return buffer.getvalue()


def _with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded("JPEG", exif=exif)


def _frames(form: str) -> bytes:
    others = [Image.fromarray(_PIXELS[::-1].copy()) for _ in range(2)]
    return _encoded(form, save_all=True, append_images=others)


WHOLE = [
    *(_encoded(form) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")),
    *(_frames(form) for form in ("GIF", "PNG", "WEBP", "TIFF")),
    *(_encoded("TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "packbits")),
    *(_encoded("PNG", mode) for mode in ("P", "1", "LA", "RGBA", "I;16")),
    *(_encoded("JPEG", "CMYK"), _with_exif()),
    _encoded("TIFF", "F"),
]  # fmt: skip


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG that says of itself what it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(width: int, height: int, bits: int) -> bytes:
    """As `png`, a BMP."""
    return b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, width, height, 1, bits, *[0] * 6
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures") / "x.png"


_SIDES = st.one_of(st.integers(0, 300), st.sampled_from([2**14, 2**20, 2**31 - 1, 2**32 - 1]))


@cases
@given(
    content=st.one_of(
        st.sampled_from(WHOLE).flatmap(damaged),
        st.builds(png, _SIDES, _SIDES, st.sampled_from([0, 1, 8, 16]), st.integers(0, 7), STRANGE),
        st.builds(
            bmp, _SIDES.map(lambda n: min(n, 2**31 - 1)), st.integers(-300, 300), st.integers(0, 40)
        ),
        STRANGE,
    )
)
def test_bytes_of_an_image(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with refused_or_taken(), warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warnings do not come through
        image = load_image(file, 16)
        assert image.shape == (16, 16, 3)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "GIF"])
def test_an_image_above_the_limit_is_refused_before_it_is_decoded(form: str) -> None:
    side = 20_000
    content = png(side, side) if form == "PNG" else _large(form, side)
    assert len(content) < 2_000_000
    with pytest.raises(DataError) as caught:
        decode_square(content, 32, f"x.{form}")
    assert f"{side} x {side}" in caught.value.message
    assert "limits.image_pixels" in (caught.value.expected or "")
    assert f"--set limits.image_pixels={side * side}" in (caught.value.remedy or "")


def _large(form: str, side: int) -> bytes:
    """An image whose header says that it is larger than it is."""
    small = _encoded(form)
    if form == "GIF":
        return small[:6] + struct.pack("<HH", side, side) + small[10:]
    # Width and height are the entries 256 and 257 of the directory of a TIFF.
    for tag, was in ((256, 16), (257, 12)):
        for kind in (3, 4):
            old = struct.pack("<HHIHH", tag, kind, 1, was, 0)
            small = small.replace(old, struct.pack("<HHIHH", tag, kind, 1, side, 0))
    return small


def test_the_limit_is_a_setting(file: Path) -> None:
    before = limits.current()
    file.write_bytes(WHOLE[0])
    try:
        limits.use(replace(before, image_pixels=12 * 16))
        assert load_image(file, 8).shape == (8, 8, 3)
        limits.use(replace(before, image_pixels=12 * 16 - 1))
        with pytest.raises(DataError, match="16 x 12: 192 pixels"):
            load_image(file, 8)
        limits.use(replace(before, image_bytes=len(WHOLE[0]) - 1))
        with pytest.raises(DataError, match=r"x\.png: [\d,]+ bytes"):
            load_image(file, 8)
    finally:
        limits.use(before)


@pytest.mark.parametrize("name", ["pipe.png", "folder.png", "drawing.svg", "zero.png"])
def test_what_is_no_image_is_told_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_image(tmp_path / name, 32)


def test_a_data_set_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(WHOLE[0])
    (tmp_path / "data/b/2.png").write_bytes(png(12_000, 10_000))
    with pytest.raises(DataError, match=r"b/2\.png: not an image that can be read"):
        open_table(str(tmp_path / "data"), 16)
    (tmp_path / "data/b/2.png").write_bytes(png(12_000, 12_000))
    with pytest.raises(DataError, match=r"b/2\.png: 12000 x 12000: 144,000,000 pixels"):
        open_table(str(tmp_path / "data"), 16)
    assert not list(recwarn)


def test_unreadable_exif_leaves_the_image_as_it_is() -> None:
    whole = _with_exif()
    broken = whole.replace(b"MM\0*", b"MM\0\xff").replace(b"II*\0", b"II\xff\0")
    assert broken != whole
    assert decode_square(broken, 12, "x").shape == (12, 12, 3)
