"""From the run to its services: each has a thread, so that none can hold the run up or end it."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TextIO, cast

from memtool.trackers import Axis, Card, Points, Tracker, open_tracker, require_services

logger = logging.getLogger("memtool.trackers")

PATIENCE_SECONDS = 30.0
"""How long the end of a run waits for a service to take what is left."""


class Send(Protocol):
    """What a run calls with numbers; it returns at once."""

    def __call__(self, values: Mapping[str, float], *, step: int, axis: Axis) -> None:
        """Send numbers by the names of their curves."""


@contextmanager
def following(
    names: Sequence[str],
    card: Card,
    *,
    say: Callable[[str], None] = logger.info,
    open_service: Callable[[str], Tracker] = open_tracker,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Send]:
    """While the block runs, what is sent goes to all these services; `say` is told where to look.

    Nothing that a service does is an error of the block: one that fails, or has not taken
    everything `patience_seconds` after the end, is named in a warning. What the packages print goes
    to the log. Raises ConfigError before anything else for a service that is not there.
    """
    senders = [_Sender(name, card, open_service, say) for name in require_services(names)]

    def send(values: Mapping[str, float], *, step: int, axis: Axis) -> None:
        points = Points(dict(values), step, axis, time.time())
        for sender in senders:
            sender.put(points)

    with _apart(senders):
        for sender in senders:
            sender.start()
        failed = True
        try:
            yield send
            failed = False
        finally:
            for sender in senders:
                sender.close(failed)
            until = time.monotonic() + patience_seconds
            for sender in senders:
                sender.wait(max(until - time.monotonic(), 0))


_following = 0
_installing = threading.Lock()
_started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Threads that services started, and those that these started."""


def _is_of_service(thread: threading.Thread) -> bool:
    return isinstance(thread, _Sender) or thread in _started


@contextmanager
def _apart(senders: Sequence[threading.Thread]) -> Iterator[None]:
    """While it lasts, what the threads of services print goes to the log: stdout is for data alone.

    Threads that a service starts are its own; Python does not say whose a thread is, so that its
    start is watched. Others print as before, and what they put in the place of stdout stays. A
    thread of a service that goes on after the end is kept from stdout all the same.
    """
    global _following
    if not senders:
        yield
        return
    with _installing:
        _following += 1
        if not isinstance(sys.stdout, _Printed):
            sys.stdout = cast("TextIO", _Printed(sys.stdout))
        start: Any = threading.Thread.start
        if not isinstance(start, _Watched):
            setattr(threading.Thread, "start", _Watched(start))  # noqa: B010 - mypy
    try:
        yield
    finally:
        with _installing:
            _following -= 1
            if not _following and not any(_is_of_service(one) for one in threading.enumerate()):
                if isinstance(sys.stdout, _Printed):
                    sys.stdout = sys.stdout.before
                start = threading.Thread.start
                if isinstance(start, _Watched):
                    setattr(threading.Thread, "start", start.before)  # noqa: B010


class _Watched:
    """In the place of `Thread.start`: remembers what the threads of services start."""

    def __init__(self, before: Callable[[threading.Thread], None]) -> None:
        self.before = before

    def __get__(self, thread: threading.Thread | None, owner: type) -> Any:
        return self if thread is None else partial(self, thread)

    def __call__(self, thread: threading.Thread) -> None:
        """Start a thread."""
        if _is_of_service(threading.current_thread()):
            _started.add(thread)
        self.before(thread)


class _Sender(threading.Thread):
    """The thread of one service: opens it, hands points over as they come, and closes it."""

    def __init__(
        self,
        name: str,
        card: Card,
        open_service: Callable[[str], Tracker],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"memtool-log-{name}", daemon=True)
        self.service = name
        self._card = card
        self._open = open_service
        self._say = say
        self._waiting: queue.SimpleQueue[Points | None] = queue.SimpleQueue()
        self._run_failed = False
        self._broken = threading.Event()

    def put(self, points: Points) -> None:
        """Take points, unless the service failed."""
        if not self._broken.is_set():
            self._waiting.put(points)

    def close(self, failed: bool) -> None:
        """Nothing more will come."""
        self._run_failed = failed
        self._waiting.put(None)

    def wait(self, seconds: float) -> None:
        """Let it finish; say so where it does not."""
        self.join(seconds)
        if self.is_alive():
            self._broken.set()
            logger.warning(
                "the log service %s did not answer in time; the run is whole, its curves there are "
                "not",
                self.service,
            )

    def run(self) -> None:
        """Until the end, or the first error of the service."""
        try:
            tracker = self._open(self.service)
            where = tracker.begin(self._card)
            self._say(f"{self.service}: {where}")
            while (points := self._taken()) is not None:
                tracker.log(points)
            tracker.end(failed=self._run_failed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self._broken.set()
            logger.warning(
                "the log service %s failed (%s: %s); the run goes on without it",
                self.service,
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )

    def _taken(self) -> list[Points] | None:
        """Everything that waits, at least one; None at the end."""
        first = self._waiting.get()
        if first is None:
            return None
        found = [first]
        while not self._waiting.empty():
            more = self._waiting.get()
            if more is None:
                self._waiting.put(None)
                break
            found.append(more)
        return found


class _Printed:
    """In the place of stdout: takes what the threads of services print, and all else is as it was.

    `before` is the stream in whose place it is.
    """

    def __init__(self, before: TextIO) -> None:
        self.before = before

    def write(self, text: str) -> int:
        """To stdout, or into the log."""
        if not _is_of_service(threading.current_thread()):
            return self.before.write(text)
        if text.strip():
            logger.info("%s", text.strip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)
