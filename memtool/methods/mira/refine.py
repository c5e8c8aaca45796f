"""Keys that learn on from those in closed form: cross-entropy of the right task.

Every memory learns alone, from what its block sees, under the softmax of `memory.beta` whatever
the separation: log p(task) = log of the sum over the keys of the task. The training prompts of all
tasks that have keys must be at hand, those of a stream or those that a collection kept; they are
looked at again, and no model runs while keys learn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memtool_stores
from memtool.engine import Batch, Batches
from memtool.errors import CorruptError, DataError
from memtool.learning.looks import columns_of
from memtool.methods.mira.ask import added_up, asked, joined
from memtool.methods.mira.collection import PROMPTS_PREFIX
from memtool.methods.mira.moments import looks_blob
from memtool.methods.records import task_of
from memtool.settings import TrainSettings
from memtool.streams.task import Texts

if TYPE_CHECKING:
    from memtool.methods.mira.prompts import PromptMemory


def refined(
    method: PromptMemory,
    view: memtool_stores.MemoryView,
    tasks: Sequence[int],
    keys: Sequence[Tensor],
) -> list[Tensor]:
    """The keys (memories, m, d + 1) of tasks, learned on by `consolidate.epochs` and `lr`.

    Raises DataError for a task whose prompts are not at hand, DivergedError.
    """
    work, learn = method.workspace, method.config.consolidate
    look = method.look_in(view)
    rows = [method.rows_of(prompts_of(method, view, task), look) for task in tasks]
    labels = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(one) for one in rows]))
    own = look.own(work.backbone)
    scored = Scored(keys, columns_of(own, rows[0].shape[1]), method.settings.beta)
    train = TrainSettings(
        epochs=learn.epochs,
        batch_size=learn.batch_size,
        lr=learn.lr,
        weight_decay=0.0,
        average=method.config.train.average,
    )

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.nll_loss(
            module(batch.inputs).transpose(1, 2),
            batch.labels.unsqueeze(1).expand(-1, len(scored.keys)),
        )

    seen = torch.cat(rows).numpy()
    batches = Batches(seen, labels.numpy(), learn.batch_size, learn.epochs, work.seed)
    stage = "consolidate: refine keys"
    work.engine.fit(scored, batches, loss, train, stage=stage, progress=work.progress)
    sizes = [one.shape[1] for one in keys]
    return [*scored.keys.detach().cpu().split(sizes, dim=1)]


class Scored(nn.Module):
    """log p (n, memories, tasks) of looks (n, width), by keys that learn."""

    columns: Tensor
    owners: Tensor

    def __init__(self, keys: Sequence[Tensor], columns: Tensor, beta: float) -> None:
        """Keys (memories, m, d + 1) of every task; `columns` (memories, d) are what each sees."""
        super().__init__()
        whole, owners = joined(keys)
        self.keys = nn.Parameter(whole.clone())
        self.register_buffer("owners", owners)
        self.register_buffer("columns", columns)
        self._tasks, self._beta = len(keys), beta

    def forward(self, looks: Tensor) -> Tensor:
        """As the class says."""
        with torch.autocast(looks.device.type, enabled=False):
            scores = asked(looks.float()[:, self.columns], self.keys)
            shares = (self._beta * scores).log_softmax(dim=-1)
            if len(self.owners) == self._tasks:
                return shares
            return added_up(shares.exp(), self.owners, self._tasks).clamp_min(1e-30).log()


def prompts_of(method: PromptMemory, view: memtool_stores.MemoryView, task: int) -> Texts:
    """The prompts that the keys of a task are solved from: of its stream, or kept ones.

    Raises DataError where they are not at hand.
    """
    of_task = [record for record in view.adapters if task_of(record) == task]
    found: list[str] = []
    for record in of_task:
        blob = f"{PROMPTS_PREFIX}{record.id}"
        if view.has_blob(blob):
            found += _texts(view.blob(blob), blob)
        elif view.has_blob(looks_blob(record.id)):
            raise DataError(
                f"keys learn from prompts, and those of {record.name!r} were not kept",
                expected="the example prompts of every adapter that has a key",
                remedy="memtool import DIR --prompts FILE --keep-prompts again, "
                "or --set consolidate.epochs=0",
            )
    trained = method.samples_of(view, task)
    if isinstance(trained, Texts):
        found += trained.prompts
    return Texts(tuple(found), ("",) * len(found))


def _texts(data: bytes, blob: str) -> list[str]:
    """The texts that a blob keeps. Raises CorruptError."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"blob {blob!r} is no JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise CorruptError(f"blob {blob!r} holds no texts", expected="a list of texts")
    return found
