"""What an earlier version of a memory scored on a task, under `runs/scores`: measured once.

A history is read at every version after a task, and older versions stay what they are. The name of
a file says all that its content follows from: what the version predicts by, the task, the settings
and the machine. The newest version is measured anew each time; what it scored is kept for the day
when it is an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import Base64Bytes, TypeAdapter
from safetensors.torch import save
from torch import Tensor

from memtool import __version__
from memtool.evaluation.right import Share
from memtool.methods.kept import fingerprint_of, keep, kept
from memtool.streams.task import Images, Task
from memtool.tensor_bytes import read_tensors
from memtool.workspace import Workspace

Result = TypeVar("Result")

DECIDES_NOTHING = {"store", "lock_timeout", "runs", "baselines", "orders", "limits"}
"""Settings that change nothing of what a stored version predicts."""


@dataclass(frozen=True)
class Taken:
    """What the test images of a task were taken for: a class each.

    `packed` are the weights (n, memories, t) of adapters behind it as a safetensors file, where
    they are kept.
    """

    classes: tuple[int, ...]
    packed: Base64Bytes | None = None

    @classmethod
    def of(cls, score: Share, weights: Tensor | None = None) -> Taken:
        """Of a score of classes, with weights (n, memories, t) float32 or without."""
        assert score.taken is not None
        packed = None if weights is None else save({"weights": weights.contiguous()})
        return cls(tuple(score.taken[:, 1].tolist()), packed)

    def share(self, samples: Images) -> Share:
        """The score on these samples, which are those that were taken for something."""
        return Share.of_classes(self.classes, samples.labels)

    @property
    def weights(self) -> Tensor:
        """The weights (n, memories, t) that were kept. Raises CorruptError where none were."""
        found: Tensor = read_tensors(self.packed or b"", "kept weights", weights="n m t")["weights"]
        return found


TAKEN = TypeAdapter(Taken)


class Earlier:
    """The scores of one version, by all that `decides` what it predicts, as JSON values."""

    def __init__(self, work: Workspace, decides: Sequence[object]) -> None:
        self._work = work
        self._decides = [
            __version__,
            *decides,
            work.backbone.sha256,
            work.stream.fingerprint,
            {
                name: one
                for name, one in work.config.recorded().items()
                if name not in DECIDES_NOTHING
            },
            work.engine.precision,
            str(work.engine.device),
        ]

    def of(
        self,
        task: Task,
        kind: TypeAdapter[Result],
        find: Callable[[], Result],
        *,
        anew: bool = False,
    ) -> Result:
        """What the version scored on a task, as it was kept; else, or `anew`, what `find` gives."""
        if not anew:
            return kept(self._file(task), kind, self._work.engine, find)
        found = find()
        self.keep(task, kind, found)
        return found

    def keep(self, task: Task, kind: TypeAdapter[Result], found: Result) -> None:
        """Keep what the version scored on a task."""
        keep(self._file(task), kind, self._work.engine, found)

    def _file(self, task: Task) -> Path:
        said = fingerprint_of([*self._decides, task.number, task.name])[:24]
        config = self._work.config
        return config.runs / "scores" / f"{config.method}-task-{task.number}-{said}.json"
