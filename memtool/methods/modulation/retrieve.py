"""What asks a memory for an adapter, and what becomes of the adapter that it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from memtool.methods.modulation.measure import accuracies, answering
from memtool.methods.modulation.predictor import Predictor
from memtool.methods.modulation.recallers import AdapterMemory
from memtool.methods.modulation.stored import Stored
from memtool.methods.outcome import predicted
from memtool.methods.results import Prediction, RecalledShare
from memtool.methods.subject import Subject, read_query
from memtool.streams.task import Images
from memtool.workspace import Workspace


def place_of(work: Workspace, stored: Stored, subject: Subject) -> int:
    """Whose adapter a subject asks for: that of its task, or of the task that is seen in it.

    Raises NotFoundError for a task that is not in memory, and where nothing sees tasks.
    """
    if subject.task is not None:
        return stored.place(subject.task)
    return int(Predictor.fitting(stored).predict(work, subject.samples)[0])


def asked_key(memory: AdapterMemory, work: Workspace, file: Path) -> Tensor:
    """A key (d_k,) that somebody made, or the first numbers of a whole adapter."""
    asked = read_query(file, work.backbone)
    if asked.ndim == 1 and len(asked) in (memory.key_length, memory.numel):
        return asked[: memory.key_length]
    raise MismatchError(
        f"{file}: query of shape {tuple(asked.shape)}",
        expected=f"({memory.key_length},), a key, or ({memory.numel},), an adapter",
        remedy="a key of the same backbone, targets and rank as the memory",
    )


def outcome_of(work: Workspace, own: Stored, value: Tensor, subject: Subject) -> dict[str, Any]:
    """What comes of a subject through one adapter (numel,), in words of a `RecallResult`.

    `own` has the head of that adapter. Of a task the accuracy or the loss, of an image its class,
    of a prompt the answer.
    """
    samples, alone = subject.samples, subject.task is None
    if isinstance(samples, Images):
        if alone:
            return {"prediction": prediction(work, own, value, samples.images)}
        return {"accuracy": accuracies(work, own, value[None], [samples])[0]}
    said = answering(work, own, value[None])
    if alone:
        return {"answer": said.answers(samples.prompts)[0]}
    return {"loss": said.loss(work.backbone.encode(samples.prompts, samples.answers))}


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
    """An adapter (numel,) and the head of `own`, if any, as a PEFT folder, which must be new."""
    with new_folders(out) as (building,):
        write_peft(
            building,
            value,
            work.layout,
            alpha=float(own.records[0].scaling) * work.layout.rank,
            base_model=work.backbone.name.removeprefix("hf:"),
            transposed=work.backbone.transposed,
        )
        for head in own.heads:
            (building / OWN_HEAD).write_bytes(classifier_bytes(head))


def shares(stored: Stored, recalled: Recalled) -> tuple[RecalledShare, ...]:
    """How much of every stored adapter is in the first one recalled."""
    return tuple(
        RecalledShare(name=record.name, task=task, share=float(share))
        for record, task, share in zip(
            stored.records, stored.tasks, recalled.coefficients[0], strict=True
        )
    )
