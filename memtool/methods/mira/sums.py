"""What the moments of all tasks add up to, kept so that those of earlier tasks are not read again.

    asked.<n>   how often and where every task asked: counts and sums of its queries, in rows
    asked       the second moments of the queries of all
    seen        the moments of the features of all, where one head is solved from them

They are of the tasks that the state of their version names, in its order, or they are not there.
Sums go on where they ended, so they are those of all tasks read one after another: bit for bit, but
for the factor of a random projection, which is compressed on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from safetensors.torch import save
from torch import Tensor

from memtool.errors import CorruptError
from memtool.heads import FeatureStatistics
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.moments import Moments
from memtool.methods.in_store import drop
from memtool.methods.pieces import drop_rows, put_rows, read_rows
from memtool.tensor_bytes import read_tensors
from memtool_stores import MemoryView, Transaction

ASKED, SEEN = "asked", "seen"


@dataclass(frozen=True, eq=False)
class Asked:
    """The queries of tasks, in all or by class: `sizes` are how many parts of `whole` each has."""

    whole: QueryStatistics
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        statistics: Iterable[QueryStatistics],
        *,
        by_class: bool = False,
        before: Asked | None = None,
    ) -> Self:
        """What is counted of every task, after those of `before`; one task's are held at a time."""
        sizes = [] if before is None else [*before.sizes]

        def each() -> Iterable[QueryStatistics]:
            if before is not None:
                yield before.whole
            for part in statistics:
                own = part if by_class else part.pooled()
                sizes.append(own.tasks)
                yield own

        whole = QueryStatistics.joined(each())
        return cls(whole, tuple(sizes))

    def put(self, txn: Transaction) -> None:
        """Keep them in the version that is being written."""
        places = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        moments = self.whole.moments
        rows = {"task": places, "count": moments.counts, "sum": moments.sums.transpose(0, 1)}
        put_rows(txn, ASKED, rows)
        txn.put_blob(ASKED, save({"second": moments.second.contiguous()}))

    @classmethod
    def read(cls, view: MemoryView) -> Self | None:
        """What a version keeps; None where it does not. Raises CorruptError."""
        if not view.has_blob(ASKED):
            return None
        rows = read_rows(view, ASKED, task="int64 p", count="float64 p", sum="float64 p g d")
        second = read_tensors(view.blob(ASKED), f"blob {ASKED!r}", second="float64 g d d")["second"]
        if not rows or rows["sum"].shape[1:] != second.shape[:2]:
            raise CorruptError(f"blob {ASKED!r} is not of the queries that it says it sums")
        sizes = _sizes(rows["task"])
        sums = rows["sum"].transpose(0, 1).contiguous()
        tensors = {"counts": rows["count"], "sums": sums, "second": second}
        moments = Moments.from_tensors(tensors, f"blob {ASKED!r}")
        return cls(QueryStatistics.of(moments), sizes)


def _sizes(places: Tensor) -> tuple[int, ...]:
    """How many rows each task has, of the task (p,) of every row. Raises CorruptError."""
    steps = places.diff(prepend=places.new_tensor([-1]))
    if not bool(((steps == 0) | (steps == 1)).all()) or int(places[0]) != 0:
        raise CorruptError(f"blobs {ASKED!r} have tasks that do not follow each other")
    return tuple(places.bincount().tolist())


def drop_asked(txn: Transaction) -> None:
    """Keep none in the version that is being written."""
    drop_rows(txn, ASKED)
    drop(txn, ASKED)


def put_seen(txn: Transaction, seen: FeatureStatistics | None) -> None:
    """Keep the moments of the features of all tasks; None: none."""
    if seen is None:
        drop(txn, SEEN)
    else:
        txn.put_blob(SEEN, seen.to_bytes())


def read_seen(view: MemoryView) -> FeatureStatistics | None:
    """What `put_seen` kept. Raises CorruptError."""
    if not view.has_blob(SEEN):
        return None
    return FeatureStatistics.from_bytes(view.blob(SEEN), f"blob {SEEN!r}")
