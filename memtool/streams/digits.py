"""The embedded data set: scikit-learn's handwritten digits under fixed transformations.

1,797 real digits of 8x8 pixels (the test part of the UCI optical digits, CC BY 4.0) are enlarged
to 32x32. The domains are ways to see them that a model of upright, light-on-dark glyphs has not
met: each needs a skill of its own, and none of them helps with another.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from importlib import resources

import numpy as np
import numpy.typing as npt
from PIL import Image

from memtool.streams.ordering import balanced, random_ranks
from memtool.streams.table import Table

_SIDE = 32  # the transformations are defined at this size
_TRAIN_ROWS = 600
_EDITION = "digits 1"  # part of the fingerprint: raise it when an image changes

Greys = npt.NDArray[np.float32]  # (n, 32, 32), 0 background to 1 ink
Colours = npt.NDArray[np.float32]  # (n, 32, 32, 3), 0 to 1


def digits_table(setting: str, seed: int, image_size: int, *, drawn: bool = True) -> Table:
    """The digits as a table for `setting`.

    "dil", "vil", "mtl": the five domains of `DOMAINS`. "dg", "dgcl": the digits turned by the
    angles of `ANGLES`. "cil", "til", "mts": upright digits without domains. The seed draws the 600
    digits for training (60 a class; the other 1,197 are for testing, the same digits in every
    domain), the noise and the colours. Images uint8 (n, image_size, image_size, 3), resized
    bicubically where image_size is not 32; unless they are `drawn` they have no pixels,
    (n, 0, 0, 3).
    """
    pixels, digits = packaged()
    labels = digits.astype(np.int64)
    order = np.argsort(random_ranks(len(labels), "digits order", seed))
    labels = labels[order]
    is_train = balanced(labels, random_ranks(len(labels), "digits split", seed), _TRAIN_ROWS)

    views = _views(setting)
    images = [np.empty((len(labels), 0, 0, 3), np.uint8)] * len(views)
    if drawn:
        grey = np.asarray(pixels[order], dtype=np.float32).reshape(-1, 8, 8) / np.float32(16)
        ink = _enlarged(grey)
        images = [
            _resized(_as_uint8(view(ink, np.random.default_rng(_entropy(name, seed)))), image_size)
            for name, view in views.items()
        ]
    content = hashlib.sha256(f"{_EDITION}/{seed}/{list(views)}".encode())
    content.update(np.asarray(pixels, dtype="<f4").tobytes() + labels.astype("<i8").tobytes())
    domain_names = digits_domains(setting)
    return Table(
        name="digits",
        images=np.concatenate(images),
        labels=np.tile(labels, len(views)),
        domains=np.repeat(np.arange(len(views)), len(labels)) if domain_names else None,
        is_test=np.tile(~is_train, len(views)),
        class_names=tuple(str(digit) for digit in range(10)),
        domain_names=domain_names,
        fingerprint=content.hexdigest(),
    )


def upright(ink: Greys, _: np.random.Generator) -> Colours:
    """Light digits on black, as they are."""
    return _grey(ink)


def inverted(ink: Greys, _: np.random.Generator) -> Colours:
    """Dark digits on white."""
    return _grey(1 - ink)


def quarter_turn(ink: Greys, _: np.random.Generator) -> Colours:
    """Turned by 90 degrees, counter-clockwise."""
    return _grey(np.rot90(ink, axes=(1, 2)))


def half_turn_noise(ink: Greys, generator: np.random.Generator) -> Colours:
    """Turned by 180 degrees, thickened, blurred, with colour noise of standard deviation 0.25."""
    strokes = _blurred(_thickened(np.rot90(ink, 2, axes=(1, 2))))
    noise = generator.standard_normal((*ink.shape, 3), dtype=np.float32)
    return _grey(strokes) + np.float32(0.25) * noise


def mirror_texture(ink: Greys, generator: np.random.Generator) -> Colours:
    """Mirrored; a dark digit of a random colour on a lighter sum of two coloured gratings."""
    count = len(ink)
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE].astype(np.float32)
    ground = np.full((count, _SIDE, _SIDE, 3), 0.7, dtype=np.float32)
    for _ in range(2):
        angle = generator.uniform(0, np.pi, (count, 1, 1)).astype(np.float32)
        wavelength = generator.uniform(5, 14, (count, 1, 1)).astype(np.float32)
        phase = generator.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
        colour = generator.uniform(-0.2, 0.2, (count, 1, 1, 3)).astype(np.float32)
        along = rows * np.sin(angle) + columns * np.cos(angle)
        ground += np.sin(2 * np.pi / wavelength * along + phase)[..., None] * colour
    colour = generator.uniform(0, 0.35, (count, 1, 1, 3)).astype(np.float32)
    strokes = ink[:, :, ::-1, None]
    return ground * (1 - strokes) + colour * strokes


View = Callable[[Greys, np.random.Generator], Colours]

DOMAINS: dict[str, View] = {
    "upright": upright,
    "inverted": inverted,
    "rot90": quarter_turn,
    "rot180-noise": half_turn_noise,
    "mirror-texture": mirror_texture,
}

ANGLES = (0, 30, 60, 90, 120)  # degrees, counter-clockwise


def digits_domains(setting: str) -> tuple[str, ...]:
    """The names of the domains under `setting`; none where tasks are classes of all images."""
    of_domains = ("dil", "vil", "mtl", "dg", "dgcl")
    return tuple(_views(setting)) if setting in of_domains else ()


def packaged() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Pixels (1797, 64) from 0 to 16, and digits (1797,): scikit-learn's, in a file of ours."""
    packaged = resources.files("memtool.streams") / "digits.npz"
    with resources.as_file(packaged) as path, np.load(path) as file:
        return file["pixels"].astype(np.float64), file["digits"]


def _views(setting: str) -> dict[str, View]:
    match setting:
        case "dil" | "vil" | "mtl":
            return DOMAINS
        case "dg" | "dgcl":
            return {f"rot{angle}": _turned(angle) for angle in ANGLES}
        case _:
            return {"upright": upright}


def _turned(degrees: int) -> View:
    def view(ink: Greys, _: np.random.Generator) -> Colours:
        turned = [Image.fromarray(digit).rotate(degrees, Image.Resampling.BICUBIC) for digit in ink]
        return _grey(np.stack([np.asarray(digit) for digit in turned]))

    return view


def _enlarged(small: Greys) -> Greys:
    """(n, 8, 8) to (n, 32, 32), bicubic; the overshoot of the interpolation is cut off."""
    size = (_SIDE, _SIDE)
    large = [Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC) for digit in small]
    return np.stack([np.asarray(digit) for digit in large]).clip(0, 1)


def _thickened(ink: Greys) -> Greys:
    """The maximum over 5x5 pixels."""
    padded = np.pad(ink, ((0, 0), (2, 2), (2, 2)))
    rows = functools.reduce(np.maximum, (padded[:, y : y + _SIDE] for y in range(5)))
    return functools.reduce(np.maximum, (rows[:, :, x : x + _SIDE] for x in range(5)))


def _blurred(ink: Greys) -> Greys:
    """Binomial weights of nine pixels along both axes: a Gaussian of 1.4 pixels."""
    weights = np.array([math.comb(8, place) for place in range(9)], dtype=np.float32) / 256
    for axis in (1, 2):
        width = [(0, 0), (0, 0), (0, 0)]
        width[axis] = (4, 4)
        padded = np.pad(ink, width)
        slices = [np.take(padded, range(start, start + _SIDE), axis) for start in range(9)]
        ink = np.tensordot(weights, np.stack(slices), 1).astype(np.float32)
    return ink


def _grey(ink: Greys) -> Colours:
    return np.repeat(ink[..., None], 3, axis=-1)


def _as_uint8(colours: Colours) -> npt.NDArray[np.uint8]:
    return np.rint(colours.clip(0, 1) * 255).astype(np.uint8)


def _resized(images: npt.NDArray[np.uint8], image_size: int) -> npt.NDArray[np.uint8]:
    if image_size == _SIDE:
        return images
    size = (image_size, image_size)
    large = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in large])


def _entropy(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:16], "little")
