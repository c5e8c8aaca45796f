"""How sure a memory is of images that it never learned from, and when it had better be silent.

The blob `calibration` holds, of every image that was held back for validation, how sure the memory
was of its prediction and whether that was right. How sure is the margin of the best class over the
next, in nats: heads that are solved in closed form give probabilities too near to one to be told
apart. An image that is unlike all that was learned counts as not sure at all. From these follows,
for any share of wrong labels that one can live with, the threshold below which the memory abstains:

    the lowest t with  (1 + |{i : sure_i ≥ t and wrong_i}|) / (n + 1) ≤ wrong

Of images like the held-back ones the expected share that gets a wrong label is then at most
`wrong`, whatever the memory and for any number n of them (conformal risk control: Angelopoulos et
al. 2022, Theorem 1, with the loss "answered and wrong", which no higher threshold makes larger).

It belongs to the version that it was measured on: after any change of adapters, keys or head it is
of another memory, and is not used.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

import memtool_stores
from memtool.errors import ConfigError
from memtool.methods.in_store import StoredState

WRONG = 0.05
"""The share of images that may get a wrong label, unless another one is asked for."""

LEAST_IMAGES = math.ceil(1 / WRONG) - 1
"""Held-back images that can vouch for `WRONG`."""

Sure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Threshold:
    """From how sure on the memory answers, and what that came to on the held-back images.

    `sure` is in nats: the best class is exp(sure) times as probable as the next (`odds`). `wrong`
    is the share that was asked for; `images` how many were held back; `coverage` the share of them
    that is answered, `accuracy` the share of those that is right, None where none is answered.
    """

    sure: float
    wrong: float
    images: int
    coverage: float
    accuracy: float | None

    @property
    def odds(self) -> float:
        """How many times as probable as the next class the best one must be."""
        return math.exp(self.sure)


class Calibration(StoredState):
    """How sure a memory was of held-back images, and whether it was right, in one order.

    `measured` says of what memory: `digest_of` its version.
    """

    blob: ClassVar[str] = "calibration"

    schema_version: int = 1
    measured: str
    sure: Annotated[tuple[Sure, ...], Field(min_length=1)]
    right: tuple[bool, ...]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.sure) != len(self.right):
            raise ValueError(f"{len(self.sure)} images, {len(self.right)} of them right or wrong")
        return self

    def threshold(self, wrong: float = WRONG) -> Threshold:
        """From how sure on the memory answers, for a share of wrong labels between 0 and 1.

        Raises ConfigError where so few images cannot vouch for so small a share.
        """
        if not 0 < wrong < 1:
            raise ConfigError(f"a share of wrong labels of {wrong:g}", expected="between 0 and 1")
        count = len(self.sure)
        allowed = math.floor(wrong * (count + 1) + 1e-9) - 1
        if allowed < 0:
            least = math.ceil(1 / wrong - 1e-9) - 1
            raise ConfigError(
                f"{count} held-back images cannot vouch for a share of wrong labels of {wrong:g}",
                expected=f"{least:,} of them, or a share of at least {1 / (count + 1):.2g}",
                remedy=f"--wrong {_rounded_up(1 / (count + 1))}, or a memory with a larger "
                "stream.validation",
            )
        sure, right = np.array(self.sure), np.array(self.right)
        wrongly = np.sort(sure[~right])[::-1]
        # Above the surest of the wrong answers that are too many, and above no margin at all.
        surest = wrongly[allowed] if len(wrongly) > allowed else 0.0
        lowest = float(np.nextafter(surest, np.inf))
        answered = sure >= lowest
        accuracy = float(right[answered].mean()) if answered.any() else None
        return Threshold(lowest, wrong, count, float(answered.mean()), accuracy)


def calibration_of(view: memtool_stores.MemoryView) -> Calibration | None:
    """What was measured on the memory of a version; None where nothing was, or on another."""
    found = Calibration.load(view)
    return found if found is not None and found.measured == digest_of(view) else None


def told_of(view: memtool_stores.MemoryView) -> dict[str, float]:
    """What a record says of a version that was calibrated, by metric; {} where it was not."""
    found = calibration_of(view)
    if found is None or len(found.sure) < LEAST_IMAGES:
        return {}
    threshold = found.threshold()
    told = {"reject.coverage": threshold.coverage}
    return told if threshold.accuracy is None else told | {"reject.accuracy": threshold.accuracy}


def digest_of(view: memtool_stores.MemoryView) -> str:
    """A sha256 of all that the predictions of a version follow from: adapters, keys and blobs."""
    state = view.state
    blobs = {name: sha256 for name, sha256 in view.blob_hashes.items() if name != Calibration.blob}
    # No more of the state of keys: what an older memtool measured of this version holds.
    keys = state.keys
    said_of_keys = None if keys is None else {"sha256": keys.sha256, "rows": keys.rows}
    rows = [(record.id, record.sha256) for record in view.live]
    said = json.dumps([rows, said_of_keys, blobs], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _rounded_up(share: float) -> float:
    """A share with two digits that is not smaller."""
    scale = 10 ** (2 - math.ceil(math.log10(share)))
    return math.ceil(share * scale - 1e-9) / scale
