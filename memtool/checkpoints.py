"""The state of a training on disk: parameters, moments of the optimiser, steps and losses.

A sealed safetensors file that only its owner may read: it follows from training data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from memtool import sealed
from memtool.errors import CorruptError, MismatchError

FORMAT = "3"

UNSEALED_FORMATS = ("1", "2", None)
"""Formats of checkpoints that had no checksum."""

PARAMETER = "parameter"
"""What stands before the names of parameters; before those of moments stands which they are."""

MEAN = "mean"
"""What stands before the names of the running mean of parameters."""

State = tuple[int, list[list[float]], list[list[float]]]
"""Steps done, the losses of every finished epoch and of every step of this one, by group."""

_log = logging.getLogger(__name__)


def save_checkpoint(
    path: Path,
    fingerprint: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: State,
    mean: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state of a training, whole or not at all; `mean` are running means of parameters.

    `fingerprint` is of all that decides what the training gives. MemtoolError where the file
    cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"{PARAMETER}/{name}"] = parameter.detach().contiguous()
        for key, moment in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = moment.detach().contiguous()
    for name, tensor in (mean or {}).items():
        tensors[f"{MEAN}/{name}"] = tensor.contiguous()
    steps, losses, running = state
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "state": json.dumps({"steps": steps, "losses": losses, "running": running}),
    }
    sealed.write_tensors(path, tensors, metadata, private=True)


def load_checkpoint(
    path: Path,
    fingerprint: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    mean: dict[str, Tensor] | None = None,
) -> State:
    """The saved state, loaded into parameters, optimiser and `mean`; a fresh one when none fits.

    Raises CorruptError for a file that is not what was saved, MismatchError for other parameters,
    MemtoolError where the file cannot be read.
    """
    remedy = f"the same command with --fresh, or without {path}: the training begins anew"
    try:
        saved = sealed.read_tensors(path, remedy=remedy)
    except FileNotFoundError:
        return 0, [], []
    metadata = saved.metadata
    if not saved.sealed:
        if metadata.get("format") not in UNSEALED_FORMATS:
            raise CorruptError(f"{path} is a checkpoint without its checksum", remedy=remedy)
        _log.warning("%s has no checksum: it is left aside, and the training begins anew", path)
        return 0, [], []
    if "state" not in metadata:
        raise CorruptError(f"{path} is no checkpoint of a training", remedy=remedy)
    if (metadata.get("format"), metadata.get("fingerprint")) != (FORMAT, fingerprint):
        return 0, [], []
    shapes = {
        key: value.shape for key, value in saved.tensors.items() if key.startswith(f"{PARAMETER}/")
    }
    if shapes != {f"{PARAMETER}/{name}": value.shape for name, value in trained.items()}:
        raise MismatchError(f"{path} holds other parameters than are trained", remedy=remedy)
    for key, value in saved.tensors.items():
        kind, _, name = key.partition("/")
        parameter = trained[name]
        if kind == PARAMETER:
            parameter.data.copy_(value)
        elif kind == MEAN:
            if mean is not None:
                mean[name] = value.to(parameter.device)
        else:
            where = parameter.device if value.ndim else torch.device("cpu")
            optimizer.state[parameter][kind] = value.to(where)
    state = json.loads(metadata["state"])
    return state["steps"], state["losses"], state["running"]
