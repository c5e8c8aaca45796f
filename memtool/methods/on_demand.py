"""What is known of every task, one at a time in memory: what a store holds, and what waits for it.

A memory of many tasks has more moments than fit into memory at once; what is made of them, keys and
heads, reads them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from memtool_stores import MemoryView
from memtool_stores.held import Held, Spool

Value = TypeVar("Value")


class Stored(Protocol):
    """What can be written as a blob."""

    def to_bytes(self) -> bytes:
        """As a blob."""


Moments = TypeVar("Moments", bound=Stored)


class OnDemand(Mapping[int, Value]):
    """Values by task, in order; each is read whenever it is asked for, and not remembered."""

    def __init__(self, tasks: Iterable[int], read: Callable[[int], Value]) -> None:
        self._tasks = dict.fromkeys(tasks)
        self._read = read

    def beside(self, task: int, value: Value) -> OnDemand[Value]:
        """The same with this value, in the place of another of the task, or as the last one."""
        return OnDemand([*self, task], lambda one: value if one == task else self[one])

    def __getitem__(self, task: int) -> Value:
        if task not in self._tasks:
            raise KeyError(task)
        return self._read(task)

    def __contains__(self, task: object) -> bool:
        """Whether there is a value; it is not read."""
        return task in self._tasks

    def __iter__(self) -> Iterator[int]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


class Counted(OnDemand[Moments]):
    """Moments by task: those in blobs of a version, and those that were put since, in a spool."""

    def __init__(
        self,
        view: MemoryView,
        blobs: Mapping[int, str],
        of_bytes: Callable[[bytes, str], Moments],
        spool: Spool,
    ) -> None:
        super().__init__(blobs, lambda task: of_bytes(*self._bytes(task)))
        self._view, self._blobs, self._spool = view, blobs, spool
        self._waiting: dict[int, Held] = {}

    def _bytes(self, task: int) -> tuple[bytes, str]:
        """The bytes of a task's moments, and where they are."""
        waiting = self._waiting.get(task)
        if waiting is not None:
            return bytes(waiting.data()), waiting.where
        blob = self._blobs[task]
        return self._view.blob(blob), f"blob {blob!r}"

    def put(self, task: int, moments: Moments) -> None:
        """Take these moments in, in the place of older ones of the task."""
        self._tasks[task] = None
        self._waiting[task] = self._spool.put(moments.to_bytes())

    def waiting(self, task: int) -> Held:
        """The bytes of moments that were put. Raises KeyError for others."""
        return self._waiting[task]

    def in_order(self, tasks: Iterable[int]) -> None:
        """Have these tasks alone, in this order."""
        self._tasks = dict.fromkeys(tasks)
