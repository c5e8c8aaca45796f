"""Tensors in bytes that somebody else may have written: of the names, shapes and types asked for.

>>> tensors = read_tensors(data, "blob 'head'", weight="h c d", bias="h c")     # doctest: +SKIP

A store that was sent by a stranger has the hashes that it should have; what its blobs hold is
looked at here before anything computes with it.
"""

from __future__ import annotations

from typing import Any

from memtool.errors import CorruptError


def read_tensors(data: bytes, where: str, /, **shapes: str) -> dict[str, Any]:
    """The tensors of a safetensors file, by name.

    A shape is a letter an axis: equal letters are equal lengths, in all tensors of the file. Before
    them may stand `float64` or `int64` for that type (else float32, float16 or bfloat16), and `?`
    first for a tensor that may be absent.

    Raises CorruptError that names `where` and the tensor: no safetensors, another name, shape or
    type, or numbers that are none (NaN).
    """
    tensors = load_tensors(data, where)
    lengths: dict[str, int] = {}
    for name, asked in shapes.items():
        if name in tensors:
            _check(name, tensors[name], asked.removeprefix("?").split(), lengths, where)
        elif not asked.startswith("?"):
            raise _wrong(where, f"no tensor {name!r}", f"tensors {', '.join(shapes)}")
    if more := sorted(tensors.keys() - shapes.keys()):
        raise _wrong(where, f"a tensor {more[0]!r}", f"only {', '.join(shapes)}")
    return tensors


def load_tensors(data: bytes, where: str) -> dict[str, Any]:
    """The tensors of a safetensors file, whatever they are called. Raises CorruptError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    # A type that this torch does not have is a KeyError, a length that cannot be a ValueError.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CorruptError(f"{where} is no safetensors file: {error}") from error


def _check(name: str, tensor: Any, asked: list[str], lengths: dict[str, int], where: str) -> None:
    import torch

    kinds: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    if asked and len(asked[0]) > 1:
        kinds = (getattr(torch, asked[0]),)
        asked = asked[1:]
    found = f"{name} of {tensor.dtype} and shape {tuple(tensor.shape)}"
    if tensor.dtype not in kinds or tensor.ndim != len(asked):
        raise _wrong(where, found, f"{' or '.join(map(str, kinds))}, axes {' '.join(asked)}")
    for axis, length in zip(asked, tensor.shape, strict=True):
        if lengths.setdefault(axis, length) != length:
            raise _wrong(where, found, f"axis {axis} of {lengths[axis]}, as in the others")
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise _wrong(where, f"{name} with NaN", "numbers")


def _wrong(where: str, found: str, expected: str) -> CorruptError:
    return CorruptError(f"{where} holds {found}", expected=expected)
