"""What asks a memory for an adapter, and what becomes of the adapter that it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.peft_files import write_peft
from memtool.adapters.values import AdapterValues
from memtool.errors import MismatchError
from memtool.memories.recalled import Recalled
from memtool.methods.attached import AttachedAdapters
from memtool.methods.exchange import OWN_HEAD
from memtool.methods.export import new_folders
from memtool.methods.in_store import classes_of, classifier_bytes
from memtool.methods.modulation.predictor import Predictor
from memtool.methods.modulation.recallers import AdapterMemory
from memtool.methods.modulation.stored import Stored
from memtool.methods.outcome import predicted
from memtool.methods.results import Prediction, RecalledShare
from memtool.methods.subject import SUBJECT_SAMPLES, read_query
from memtool.streams import load_image
from memtool.streams.task import Images, Task, spread
from memtool.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Subject:
    """What asks: a `key` (d_k,), that of the adapter at `place` where one is meant.

    `samples` are what the recalled adapter is measured on, `image` uint8 (1, h, w, 3) what it
    predicts the class of.
    """

    words: str
    key: Tensor
    place: int | None = None
    samples: Images | None = None
    image: npt.NDArray[np.uint8] | None = None

    @classmethod
    def task(cls, stored: Stored, memory: AdapterMemory, task: Task) -> Subject:
        """The adapter of a task. Raises NotFoundError for a task that is not in memory."""
        place = stored.place(task)
        return cls(
            f"task {task.number} {task.name}",
            memory.key_of(stored.values[place]),
            place,
            samples=spread(task.test, SUBJECT_SAMPLES["images"]),
        )

    @classmethod
    def picture(cls, stored: Stored, memory: AdapterMemory, work: Workspace, file: Path) -> Subject:
        """The adapter of the task that the predictor sees in a picture."""
        image = load_image(file, work.config.backbone.image_size)[None]
        place = int(Predictor.fitting(stored).predict(work, image)[0])
        return cls(str(file), memory.key_of(stored.values[place]), place, image=image)

    @classmethod
    def query(cls, memory: AdapterMemory, work: Workspace, file: Path) -> Subject:
        """A key that somebody made, or the first numbers of a whole adapter."""
        asked = read_query(file, work.backbone)
        if asked.ndim == 1 and len(asked) in (memory.key_length, memory.numel):
            return cls(str(file), asked[: memory.key_length])
        raise MismatchError(
            f"{file}: query of shape {tuple(asked.shape)}",
            expected=f"({memory.key_length},), a key, or ({memory.numel},), an adapter",
            remedy="a key of the same backbone, targets and rank as the memory",
        )


def prediction(
    work: Workspace, own: Stored, value: Tensor, image: npt.NDArray[np.uint8]
) -> Prediction:
    """The class of an image (1, h, w, 3) through one adapter (numel,) and the head of `own`."""
    attached = AttachedAdapters(
        work.backbone,
        AdapterValues.from_flat(value[None], work.layout, own.records[0].scaling),
        own.heads,
        "fp32",
        places=[0],
        adapters=1,
        told=0,
    ).to(work.backbone.device)
    with torch.no_grad():
        seen = attached(torch.tensor(image, device=work.backbone.device))
    return predicted(seen.probabilities[0].cpu(), classes_of(own.view), None)


def write_recalled(work: Workspace, own: Stored, value: Tensor, out: Path) -> None:
    """An adapter (numel,) and the head of `own` as a PEFT folder, which must be new."""
    with new_folders(out) as (building,):
        write_peft(
            building,
            value,
            work.layout,
            alpha=float(own.records[0].scaling) * work.layout.rank,
            base_model=work.backbone.name,
        )
        (building / OWN_HEAD).write_bytes(classifier_bytes(own.heads[0]))


def shares(stored: Stored, recalled: Recalled) -> tuple[RecalledShare, ...]:
    """How much of every stored adapter is in the first one recalled."""
    return tuple(
        RecalledShare(name=record.name, task=task, share=float(share))
        for record, task, share in zip(
            stored.records, stored.tasks, recalled.coefficients[0], strict=True
        )
    )
