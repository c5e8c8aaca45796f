"""Local weights of a model: a safetensors file with the very tensors of its state_dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from memtool import sealed
from memtool.errors import MismatchError, NotFoundError
from memtool.outside import is_file


def read_weights(
    path: Path,
    own: Mapping[str, Tensor],
    names: str,
    *,
    left_out: tuple[str, ...] = (),
    resample: Callable[[dict[str, Tensor]], None],
) -> dict[str, Tensor]:
    """The tensors of a file for a model with the state_dict `own`, in the model's own precision.

    `names` says whose names they have. Tensors whose name begins with one of `left_out` count in
    neither. `resample` changes position embeddings of another size, in place; nothing else may be
    missing, extra or of another shape.

    Raises NotFoundError, CorruptError (not a safetensors file, or a checksum in it that does not
    hold), MismatchError, or MemtoolError where the file cannot be read.
    """
    if not is_file(path):
        raise NotFoundError(f"no weights at {path}", expected="a safetensors file")
    loaded = sealed.read_tensors(path, remedy="fetch or convert the file again").tensors
    given = {name: tensor for name, tensor in loaded.items() if not name.startswith(left_out)}
    own = {name: tensor for name, tensor in own.items() if not name.startswith(left_out)}
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise MismatchError(
            f"{path} does not fit the model: {_some('missing', missing)}, {_some('extra', extra)}",
            expected=f"the {len(own)} tensors of the model under {names} names",
            remedy="name the model that the file was made for",
        )
    for name, tensor in given.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise MismatchError(
                f"{name} in {path} ({tensor.dtype}) is not made of finite real numbers",
                expected="float16, bfloat16, float32 or float64 without nan and inf",
            )
        given[name] = tensor.to(own[name].dtype)
    resample(given)
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise MismatchError(
                f"{name} in {path} has shape {tuple(tensor.shape)}",
                expected=str(tuple(own[name].shape)),
                remedy="name the model that the file was made for",
            )
    return given


def _some(word: str, names: list[str]) -> str:
    if not names:
        return f"none {word}"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word} ({shown})"
