"""Orders of a stream: those that a configuration names, and those drawn from its seed.

A seeded order stays the same on every machine and with every numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, did_you_mean


def named_places(
    order: Sequence[str],
    known: Sequence[str],
    source: str,
    what: str,
    *,
    again: str | None = None,
) -> list[int]:
    """The place in `known` of every name of `stream.order`.

    Raises ConfigError for a name that is no `what` of `source`, and for one that comes twice;
    `again` says then where it may.
    """
    index = {name: number for number, name in enumerate(known)}
    for place, name in enumerate(order):
        if name not in index:
            raise ConfigError(
                f"stream.order names {name!r}, which is no {what} of {source}",
                expected=did_you_mean(name, known),
            )
        if name in order[:place]:
            raise ConfigError(
                f"stream.order names {name!r} twice",
                expected=f"every {what} once" if again else None,
                remedy=again,
            )
    return [index[name] for name in order]


def random_ranks(count: int, purpose: str, seed: int) -> npt.NDArray[np.uint64]:
    """One random 64-bit number for each of `count` rows; sorting by it shuffles them.

    Raw words of a bit generator, because numpy promises to keep those, while the methods of
    `Generator` may change. `purpose` keeps orders made from one seed apart.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.asarray(raw, dtype=np.uint64)


def position_in_group(
    groups: npt.NDArray[np.int64], ranks: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """The place (0, 1, ...) of each row among the rows of its group, ordered by rank; (n,)."""
    order = np.lexsort((ranks, groups))
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    position = np.empty(len(groups), dtype=np.int64)
    position[order] = np.arange(len(groups)) - starts
    return position


def balanced(
    groups: npt.NDArray[np.int64], ranks: npt.NDArray[np.uint64], count: int
) -> npt.NDArray[np.bool_]:
    """Mask of `count` rows (or all, if fewer), as equally many of each group as there are.

    A larger count keeps every row that a smaller one chose.
    """
    order = np.lexsort((ranks, position_in_group(groups, ranks)))
    chosen = np.zeros(len(groups), dtype=np.bool_)
    chosen[order[:count]] = True
    return chosen


def stratified(
    groups: npt.NDArray[np.int64], ranks: npt.NDArray[np.uint64], share: float
) -> npt.NDArray[np.bool_]:
    """Mask of about `share` of every group.

    A group of two or more gives at least one row and keeps at least one; a single row is kept.
    """
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    wanted = np.rint(share * sizes).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), sizes - 1)
    return np.asarray(position_in_group(groups, ranks) < wanted[inverse])


def held_back(
    groups: npt.NDArray[np.int64], ranks: npt.NDArray[np.uint64], validation: float
) -> npt.NDArray[np.bool_]:
    """Mask of a share (below 1) of every group, or of so many rows, as equally from all groups.

    Every group keeps one row. Of a count fewer are chosen where no more can be spared.
    """
    if validation < 1:
        return stratified(groups, ranks, validation)
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    spared = np.flatnonzero(position_in_group(groups, ranks) < sizes[inverse] - 1)
    chosen = np.zeros(len(groups), dtype=np.bool_)
    chosen[spared[balanced(groups[spared], ranks[spared], int(validation))]] = True
    return chosen
