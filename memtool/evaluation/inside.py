"""What a record holds of the inside of a run: who recalls what, keys, curves, examples and costs.

Numbers have five digits: they are drawn, and nothing is computed from them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from memtool.errors import MismatchError

Numbers = npt.NDArray[np.float64]

MOST_NUMBERS = 8000
"""With more, a record leaves out the blocks of a memory."""
EXAMPLE_SIDE = 64
"""Pixels: pictures of examples are no larger."""
EXAMPLE_LETTERS = 400
"""Prompts of examples are no longer."""

Values = tuple[float, ...]
Table = tuple[Values, ...]


class Part(BaseModel):
    """Frozen; an unknown key, NaN or infinity is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Recalled(Part):
    """Weights of adapters for test samples of each true task: means over samples and memories.

    weights, spread: (tasks, adapters), mean and standard deviation over the `samples` of each task;
    what: what a weight is; by_block: (blocks, tasks, adapters) of the memories `blocks`, none where
    one memory serves all or there are too many.
    """

    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    weights: Table
    spread: Table = ()
    samples: tuple[Annotated[int, Field(ge=1)], ...]
    what: str = "weight"
    blocks: tuple[int, ...] = ()
    by_block: tuple[Table, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Recalled:
        shape = (len(self.tasks), len(self.adapters))
        _require(self.weights, shape, "weights")
        if self.spread:
            _require(self.spread, shape, "spread")
        if self.by_block or self.blocks:
            _require(self.by_block, (len(self.blocks), *shape), "weights by block")
        if len(self.samples) != len(self.tasks):
            raise ValueError(f"samples of {len(self.samples)} tasks, not {len(self.tasks)}")
        return self

    @classmethod
    def of(
        cls,
        found: Sequence[npt.ArrayLike],
        tasks: Sequence[str],
        adapters: Sequence[str],
        *,
        blocks: Sequence[int] = (),
        what: str = "weight",
    ) -> Recalled:
        """Of weights (n, adapters) or (n, memories, adapters), an array a task.

        MismatchError for numbers of another shape, or that are not finite.
        """
        arrays = [np.asarray(each, dtype=np.float64) for each in found]
        arrays = [each[:, None] if each.ndim == 2 else each for each in arrays]
        names = (len(tasks), len(adapters))
        if len(arrays) != len(tasks) or any(
            each.ndim != 3 or each.shape[2] != len(adapters) or not len(each) for each in arrays
        ):
            raise MismatchError(
                f"weights of shapes {[each.shape for each in arrays]} for {names} tasks, adapters",
                expected="(samples, memories, adapters) for every task",
            )
        if not all(np.isfinite(each).all() for each in arrays):
            raise MismatchError("weights with NaN or infinity", expected="finite numbers")
        means = [each.mean(axis=1) for each in arrays]
        several = len(blocks) > 1 and len(blocks) * len(tasks) * len(adapters) <= MOST_NUMBERS
        by_block = np.stack([each.mean(axis=0) for each in arrays], axis=1) if several else ()
        return cls(
            tasks=tuple(tasks),
            adapters=tuple(adapters),
            weights=_table(np.stack([one.mean(axis=0) for one in means])),
            spread=_table(np.stack([one.std(axis=0) for one in means])),
            samples=tuple(len(one) for one in means),
            what=what,
            blocks=tuple(blocks) if several else (),
            by_block=tuple(_table(one) for one in by_block),
        )


class Keys(Part):
    """Cosine similarity of the keys of every two adapters: (adapters, adapters)."""

    adapters: tuple[str, ...]
    cosine: Table

    @model_validator(mode="after")
    def _fits(self) -> Keys:
        _require(self.cosine, (len(self.adapters),) * 2, "cosines of keys")
        return self

    @classmethod
    def of(cls, keys: npt.ArrayLike, adapters: Sequence[str]) -> Keys:
        """Of keys (adapters, d), or (blocks, adapters, d): the mean over the blocks.

        MismatchError for another shape, and for a key without a direction.
        """
        vectors = np.asarray(keys, dtype=np.float64)
        if vectors.ndim not in (2, 3) or vectors.shape[-2] != len(adapters):
            raise MismatchError(
                f"keys of shape {vectors.shape}", expected="(adapters, d) or (blocks, adapters, d)"
            )
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if (norms == 0).any():
            raise MismatchError("a key of all zeros", expected="keys with a direction")
        units = vectors / norms
        cosine = units @ units.swapaxes(-1, -2)
        mean = cosine.mean(axis=0) if cosine.ndim == 3 else cosine
        return cls(adapters=tuple(adapters), cosine=_table(mean))


class Curve(Part):
    """What a training showed, epoch by epoch: of an adapter, or of keys after a task."""

    of: Literal["adapters", "keys"]
    name: str
    loss: Values


class Example(Part):
    """One test sample, what was said of it, and the adapters of most weight.

    image: base64 of a PNG, at most `EXAMPLE_SIDE` pixels wide; text: the beginning of a prompt.
    """

    task: str
    image: str | None = None
    text: str | None = None
    label: str | None = None
    said: str | None = None
    probability: Annotated[float, Field(ge=0, le=1)] | None = None
    weights: tuple[tuple[str, float], ...] = ()


class Cost(Part):
    """What one part of the run cost; None where it was not measured."""

    label: str
    seconds: Annotated[float, Field(ge=0)] | None = None
    parameters: Annotated[int, Field(ge=0)] | None = None
    bytes: Annotated[int, Field(ge=0)] | None = None


class Inside(Part):
    """Empty, or None, what the method has not."""

    recalled: Recalled | None = None
    keys: Keys | None = None
    curves: tuple[Curve, ...] = ()
    examples: tuple[Example, ...] = ()
    costs: tuple[Cost, ...] = ()


def picture_text(image: npt.NDArray[np.uint8]) -> str:
    """An image (h, w, 3) for an `Example`: base64 of a PNG of at most `EXAMPLE_SIDE` pixels."""
    from PIL import Image

    picture = Image.fromarray(np.asarray(image))
    picture.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def strongest(
    weights: Sequence[float], names: Sequence[str], count: int = 3
) -> Sequence[tuple[str, float]]:
    """The adapters of most weight, by its size, each with it."""
    order = sorted(range(len(names)), key=lambda place: -abs(weights[place]))
    return [(names[place], float(f"{weights[place]:.5g}")) for place in order[:count]]


def _table(values: Numbers) -> Table:
    return tuple(tuple(float(f"{value:.5g}") for value in row) for row in values)


def _require(values: object, shape: tuple[int, ...], what: str) -> None:
    found = np.shape(np.array(values, dtype=object)) if 0 in shape else np.array(values).shape
    if found != shape or 0 in shape:
        raise ValueError(f"{what} of shape {found}, expected {shape}, not empty")
