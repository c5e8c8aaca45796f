"""Local weights of a model: a safetensors file with the very tensors of its state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from memtool import sealed
from memtool.errors import MismatchError, NotFoundError
from memtool.outside import is_file


def read_weights(
    path: Path,
    own: Mapping[str, Tensor],
    names: str,
    *,
    left_out: tuple[str, ...] = (),
    made: tuple[str, ...] = (),
    resample: Callable[[dict[str, Tensor]], None],
) -> dict[str, Tensor]:
    """The tensors of a file for a model with the state_dict `own`, in the model's own precision.

    `names` says whose names they have. Tensors whose name begins with one of `left_out`, or ends
    with one of `made`, count in neither. `resample` changes position embeddings of another size, in
    place; nothing else may be missing, extra or of another shape.

    Raises NotFoundError, CorruptError (not a safetensors file, or a checksum in it that does not
    hold), MismatchError, or MemtoolError where the file cannot be read.
    """
    if not is_file(path):
        raise NotFoundError(f"no weights at {path}", expected="a safetensors file")
    loaded = sealed.read_tensors(path, remedy="fetch or convert the file again").tensors

    def counts(name: str) -> bool:
        return not name.startswith(left_out) and not name.endswith(made)

    given = {name: tensor for name, tensor in loaded.items() if counts(name)}
    own = {name: tensor for name, tensor in own.items() if counts(name)}
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


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Within, torch's global generator draws the same numbers every time; then as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def opened(model: nn.Module) -> None:
    """Set scales and gains to one that begin at zero, or nearly: those at the end of a branch.

    With them a branch of a model with random weights is as good as absent, and an adapter in it.
    """
    for name, parameter in model.named_parameters():
        gain = name.rpartition(".")[2].startswith(("weight", "gamma"))
        if gain and parameter.ndim == 1 and bool((parameter.abs() < 1e-3).all()):
            parameter.fill_(1.0)


def _some(word: str, names: list[str]) -> str:
    if not names:
        return f"none {word}"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {word} ({shown})"
