"""Which test samples were right: beside their share, and as text in a record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Flags = npt.NDArray[np.bool_]
Classes = npt.NDArray[np.int64]


class Right(BaseModel):
    """Right or wrong of every sample of a test set, in its order.

    bits: hexadecimal, the first sample the highest bit of the first digit, right is 1; whole bytes,
    zeros at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: Annotated[int, Field(ge=1)]
    bits: str

    @model_validator(mode="after")
    def _bits_fit(self) -> Right:
        try:
            packed = bytes.fromhex(self.bits)
        except ValueError as error:
            raise ValueError("bits that are not hexadecimal") from error
        unused = 8 * len(packed) - self.samples
        if not 0 <= unused < 8 or (packed[-1] & ((1 << unused) - 1)):
            raise ValueError(f"bits of {len(packed)} bytes for {self.samples} samples")
        return self

    @classmethod
    def of(cls, flags: npt.ArrayLike) -> Right:
        """Of one flag or more, (n,) bool."""
        array = np.asarray(flags, dtype=np.bool_)
        return cls(samples=len(array), bits=np.packbits(array).tobytes().hex())

    @property
    def flags(self) -> Flags:
        """(n,) bool, True where the sample was right."""
        packed = np.frombuffer(bytes.fromhex(self.bits), np.uint8)
        return np.unpackbits(packed, count=self.samples).astype(np.bool_)

    @property
    def share(self) -> Share:
        """How many of all were right."""
        return Share(self.flags)


class Share(float):
    """The share of samples that were right, 0..1, which still knows which; NaN of no samples.

    A float in all else: what is computed from it is a plain float.

        share = Share([True, False, True, True])
        assert share == 0.75 and list(share.flags) == [True, False, True, True]
    """

    flags: Flags
    taken: Classes | None
    """(n, 2) int: the class of every sample, and what it was taken for; None of no classes."""

    def __new__(cls, flags: npt.ArrayLike, taken: npt.ArrayLike | None = None) -> Share:
        """Of (n,) bool."""
        array = np.array(flags, dtype=np.bool_)
        array.flags.writeable = False
        share = super().__new__(cls, int(array.sum()) / len(array) if len(array) else math.nan)
        share.flags = array
        share.taken = None if taken is None else np.asarray(taken, dtype=np.int64)
        return share

    @classmethod
    def of_classes(cls, chosen: npt.ArrayLike, labels: npt.ArrayLike) -> Share:
        """Of the classes (n,) that samples were taken for, and their own (n,)."""
        said, own = np.asarray(chosen), np.asarray(labels)
        return cls(said == own, np.stack([own, said], axis=1))

    def __getnewargs__(self) -> tuple[Flags, Classes | None]:  # type: ignore[override]
        """What another process makes it of."""
        return (self.flags, self.taken)


def right_of(score: float | None) -> Right | None:
    """Which samples a score is the share of; None where it does not know, or of no samples."""
    return Right.of(score.flags) if isinstance(score, Share) and len(score.flags) else None


def confused(scores: Sequence[float | None]) -> tuple[tuple[int, int, int], ...]:
    """Of all samples: (class, taken for, how many), by class; empty unless all scores know it."""
    known = [
        score.taken for score in scores if isinstance(score, Share) and score.taken is not None
    ]
    if not known or len(known) < len(scores):
        return ()
    pairs, counts = np.unique(np.concatenate(known), axis=0, return_counts=True)
    return tuple(
        (int(own), int(said), int(count))
        for (own, said), count in zip(pairs.tolist(), counts.tolist(), strict=True)
    )
