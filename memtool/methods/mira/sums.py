"""What the moments of all tasks add up to, kept so that those of earlier tasks are not read again.

    asked.<n>   how often and where every task asked: counts and sums of its queries, in rows
    asked       the second moments of the queries of all
    seen        the moments of the features of all, where one head is solved from them

They are of the tasks that the state of their version names, in its order, or they are not there.
Of prompts they are of what the keys were solved from, and as `prompt-reach` of the witnesses.
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
from memtool.methods.in_store import drop, put_changed
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

    def put(self, txn: Transaction, name: str = ASKED) -> None:
        """Keep them in the version that is being written."""
        places = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        moments = self.whole.moments
        rows = {"task": places, "count": moments.counts, "sum": moments.sums.transpose(0, 1)}
        put_rows(txn, name, rows)
        whole = {"second": moments.second.contiguous()}
        if moments.reach is not None:
            whole["reach"] = moments.reach
        put_changed(txn, name, save(whole))

    @classmethod
    def read(cls, view: MemoryView, name: str = ASKED, *, tasks: int | None = None) -> Self | None:
        """What a version keeps; None where it does not, or not of so many `tasks`.

        Raises CorruptError.
        """
        rows = read_rows(view, name, task="int64 p", count="float64 p", sum="float64 p g d")
        if not rows or not view.has_blob(name):
            return None
        where = f"blob {name!r}"
        shapes = {key: Moments.SHAPES[key] for key in ("second", "reach")}
        whole = read_tensors(view.blob(name), where, **shapes)
        if rows["sum"].shape[1:] != whole["second"].shape[:2]:
            raise CorruptError(f"{where} is not of the same vectors as its rows")
        sums = rows["sum"].transpose(0, 1).contiguous()
        moments = Moments.from_tensors({"counts": rows["count"], "sums": sums, **whole}, where)
        sizes = _sizes(rows["task"], where)
        if tasks not in (None, len(sizes)):
            return None
        return cls(QueryStatistics.of(moments), sizes)


def _sizes(places: Tensor, where: str) -> tuple[int, ...]:
    """How many rows each task has, of the task (p,) of every row. Raises CorruptError."""
    steps = places.diff(prepend=places.new_tensor([-1]))
    if not bool(((steps == 0) | (steps == 1)).all()) or int(places[0]) != 0:
        raise CorruptError(f"{where} has rows of tasks that do not follow each other")
    return tuple(places.bincount().tolist())


def drop_asked(txn: Transaction, name: str = ASKED) -> None:
    """Keep none in the version that is being written."""
    drop_rows(txn, name)
    drop(txn, name)


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
