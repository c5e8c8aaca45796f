"""Requests of many clients, run together: what arrives within a window is one batch.

One thread runs the model. While it does, what arrives waits: so the batches grow with the load, and
the window matters only to those who come first.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from memtool.errors import MemtoolError

logger = logging.getLogger(__name__)


class Work:
    """One request that waits to be run; `size` is how many inputs of a batch it is.

    Made in the event loop, to which `future` belongs. `begun` says that a part of its result was
    told, so that it cannot be run again.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.since = time.monotonic()
        self.dropped = False
        self.begun = False
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def drop(self) -> None:
        """Nobody waits for it any more."""
        self.dropped = True
        self.future.cancel()


W = TypeVar("W", bound=Work)


class Batcher(Generic[W]):
    """Runs works in a thread of its own, several at once.

    `run(works)` gives the result of each, in their order. Where it raises, they are run again in
    halves until only that whose fault it is fails, alone: for one of n, 2 log n runs at most. A
    batch holds up to `most` inputs, or one work that is larger.
    """

    def __init__(
        self,
        run: Callable[[Sequence[W]], Sequence[Any]],
        *,
        window: float,
        most: int,
        batched: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`window` is in seconds; `batched(size)` hears of every batch once, before it is run."""
        self.window, self.most = window, most
        self._run, self._batched = run, batched
        self._waiting: deque[W] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="memtool-batches", daemon=True)

    def start(self) -> None:
        """Begin to run what is put in."""
        self._thread.start()

    def stop(self) -> None:
        """Run what waits, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def put(self, works: Sequence[W]) -> None:
        """Let works be run."""
        with self._changed:
            self._waiting.extend(works)
            self._size += sum(work.size for work in works)
            self._changed.notify()

    def _work(self) -> None:
        while works := self._next():
            wanted = [work for work in works if not work.dropped]
            if not wanted:
                continue
            self._batched(sum(work.size for work in wanted))
            found = self._results(wanted)
            pairs = [(work, found[work]) for work in wanted]
            for loop in {work.loop for work in wanted}:
                _tell(loop, [pair for pair in pairs if pair[0].loop is loop])

    def _results(self, works: Sequence[W]) -> dict[W, Any]:
        """The result of every work, or the error of that one."""
        try:
            return dict(zip(works, self._run(works), strict=True))
        except MemtoolError as error:
            failed = error
        except Exception as error:  # a bug: no reason to stop serving
            logger.exception("a batch of %d requests failed: %r", len(works), error)
            failed = MemtoolError("the model failed; the log of the service says how")
        if len(works) == 1:
            return {works[0]: failed}
        again = [work for work in works if not (work.begun or work.dropped)]
        found: dict[W, Any] = dict.fromkeys(works, failed)
        return found | self._halves(again, at_fault=len(again) == len(works))

    def _halves(self, works: Sequence[W], *, at_fault: bool) -> dict[W, Any]:
        """The results of works of a batch that failed; `at_fault`: one of these is why."""
        if len(works) < 2:
            return self._results(works) if works else {}
        left, right = works[: len(works) // 2], works[len(works) // 2 :]
        found = self._results(left)
        if at_fault and not any(isinstance(one, Exception) for one in found.values()):
            return found | self._halves(right, at_fault=True)  # together they would fail again
        return found | self._results(right)

    def _next(self) -> list[W]:
        """The next batch; an empty one at the end."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if not self._waiting:
                return []
            end = self._waiting[0].since + self.window
            while self._size < self.most and not self._stopping:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            taken: list[W] = []
            count = 0
            while self._waiting and (not taken or count + self._waiting[0].size <= self.most):
                taken.append(self._waiting.popleft())
                count += taken[-1].size
            self._size -= count
            return taken


def _tell(loop: asyncio.AbstractEventLoop, pairs: Sequence[tuple[Work, Any]]) -> None:
    def settle() -> None:
        for work, result in pairs:
            if work.future.done():  # its client has gone, or waited too long
                continue
            if isinstance(result, Exception):
                work.future.set_exception(result)
            else:
                work.future.set_result(result)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
