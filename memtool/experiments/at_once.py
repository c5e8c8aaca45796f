"""The adapters of several tasks trained at once: by processes of this machine, or in one pass.

Where a training starts from nothing that earlier tasks left, it depends on settings, seed and task
alone: which process does it changes no bit. So each adapter is trained as by `adapt`, into the same
folder, and the run goes on over what is finished. A process that lost the one who started it ends.

In one pass the groups of all tasks run through the model together (`adapt_together`), which gives
the same up to rounding. It is for a device that waits for its kernels to be started, of which there
are no more for K tasks than for one; a CPU has as much to compute as before.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from memtool.errors import ConfigError, MemtoolError, TrainingInterrupted
from memtool.methods import open_method
from memtool.progress import ProgressEvent
from memtool.settings import AT_ONCE, Config

if TYPE_CHECKING:
    from memtool.methods.method import Method
    from memtool.streams.task import Task


def require_independent(method: Method, count: int) -> None:
    """Raise ConfigError where so many tasks cannot be trained at once."""
    if count == 1:
        return
    if count < 1:
        raise ConfigError(f"{count} tasks at once", expected="1 or more")
    apart, one_pass = method.trained_apart, trains_in_one_pass(method)
    launched = method.workspace.engine.processes > 1
    if one_pass and apart is not None:
        raise ConfigError(
            f"{count} tasks in one pass: {apart}",
            expected="tasks whose adapters can learn side by side",
            remedy=("" if launched else "--set engine.tasks_at_once=processes, or ")
            + "the same without --parallel-tasks",
        )
    if not one_pass and launched:
        raise ConfigError(
            f"{count} tasks at once in processes under a launcher of several processes",
            expected="one of the two: all processes of a launcher train together",
            remedy="the command without its launcher, or without --parallel-tasks"
            + (", or --set engine.tasks_at_once=one-pass" if apart is None else ""),
        )
    needed = method.needs_before
    if needed is not None and method.config.stream.setting not in AT_ONCE:
        raise ConfigError(
            f"{count} tasks at once, where a task needs those before it: {needed}",
            expected="tasks that are trained alone",
            remedy="the same without --parallel-tasks"
            if method.kind == "atoms"
            else "--warm-start none --set adapter.residual=false, or the same without "
            "--parallel-tasks",
        )


def trains_in_one_pass(method: Method) -> bool:
    """Whether `engine.tasks_at_once` has tasks trained in one pass, not in processes."""
    engine = method.workspace.engine
    match method.config.engine.tasks_at_once:
        case "auto":
            shared = engine.device.type != "cpu" or engine.processes > 1
            return shared and method.trained_apart is None
        case wanted:
            return wanted == "one-pass"


def plan_at_once(method: Method, count: int) -> list[list[int]] | None:
    """The numbers of the tasks of every pass, so many at most; None where there is no such pass."""
    if count == 1 or not trains_in_one_pass(method):
        return None
    passes = method.in_passes(method.workspace.stream.tasks, count)
    return [[task.number for task in tasks] for tasks in passes]


def adapt_at_once(
    method: Method, tasks: Sequence[Task], count: int, *, fresh: bool = False
) -> None:
    """Train the adapters of tasks that have none yet, `count` tasks at once; `fresh`: of all.

    Raises the first error of a training, and MemtoolError for a process that died; the others end,
    and the next call goes on where they were. TrainingInterrupted after Ctrl-C, once all have saved
    how far they were.
    """
    left = [task for task in tasks if fresh or not method.is_trained(task)]
    if min(count, len(left)) < 2:
        for task in left:
            method.adapt(str(task.number), fresh=fresh)
        return
    if trains_in_one_pass(method):
        for tasks in method.in_passes(left, count):
            method.adapt_together([str(task.number) for task in tasks], fresh=fresh)
        return
    workers = [_Worker(method, fresh) for _ in range(min(count, len(left)))]
    try:
        for worker in workers:
            worker.begin(left.pop(0))
        busy = {worker.pipe: worker for worker in workers}
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                if worker.hear():
                    continue
                if left:
                    worker.begin(left.pop(0))
                else:
                    del busy[pipe]
    except KeyboardInterrupt:
        saved = [path for worker in workers if (path := worker.interrupted()) is not None]
        if saved:
            raise TrainingInterrupted(saved[0]) from None
        raise
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that trains one task after another, and the one in hand."""

    def __init__(self, method: Method, fresh: bool) -> None:
        work, context = method.workspace, get_context("spawn")
        self.pipe, other = context.Pipe()
        given = (other, work.config, work.seed, work.adapter_folder, fresh)
        self._process = context.Process(target=_train, args=given, daemon=True)
        self._process.start()
        other.close()
        self._progress = work.progress
        self._task: Task | None = None
        self._steps = False

    def begin(self, task: Task) -> None:
        """Let it train a task."""
        self._task, self._steps = task, False
        with suppress(ConnectionError):  # it died, which is told when it is heard
            self.pipe.send(str(task.number))

    def hear(self) -> bool:
        """Take what it says; whether its task goes on. Raises its errors."""
        assert self._task is not None
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise MemtoolError(
                f"the process that trained task {self._task.number} {self._task.name} ended with "
                f"{self._process.exitcode}",
                remedy="the same command again, which goes on; with fewer --parallel-tasks where "
                "the memory of the machine was full",
            ) from None
        if isinstance(said, BaseException):
            raise said
        if isinstance(said, ProgressEvent):
            self._steps = True
            if self._progress is not None:
                self._progress(said)
            return True
        self._task = None
        return False

    def interrupted(self) -> Path | None:
        """Let it save how far its training is; where it did."""
        if self._task is None or not self._steps or self._process.pid is None:
            return None
        self._progress = None
        try:
            os.kill(self._process.pid, signal.SIGINT)
            while self.hear():
                pass
        except TrainingInterrupted as error:
            return error.checkpoint
        except (MemtoolError, OSError):
            pass
        return None

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def _train(pipe: Connection, config: Config, seed: int, adapters: Path, fresh: bool) -> None:
    """What a process does: train the tasks that it is told, until nobody tells it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # but while it trains, when it saves
    logging.disable(logging.WARNING)  # the one who started it says the same
    config.limits.put_in_force()
    try:
        try:
            method = open_method(config, seed=seed, progress=pipe.send, adapters=adapters)
            while True:
                method.adapt(pipe.recv(), fresh=fresh)
                pipe.send(None)
        except (EOFError, BrokenPipeError):
            return
        except (MemtoolError, TrainingInterrupted) as error:
            pipe.send(error)
    except OSError:  # nobody is there to be told
        return
