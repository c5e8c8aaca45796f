"""Tensors in bytes that somebody else may have written: of the names, shapes and types asked for.

>>> tensors = read_tensors(data, "blob 'head'", weight="h c d", bias="h c")     # doctest: +SKIP

A store that was sent by a stranger has the hashes that it should have; what its blobs hold is
looked at here before anything computes with it. `read_arrays` and `load_arrays` are the same for
numpy, and need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool.errors import CorruptError

_TYPES = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I16": ("int16", "<i2"),
    "I8": ("int8", "<i1"),
    "U64": ("uint64", "<u8"),
    "U32": ("uint32", "<u4"),
    "U16": ("uint16", "<u2"),
    "U8": ("uint8", "<u1"),
    "BOOL": ("bool", "?"),
    "C64": ("complex64", "<c8"),
    "F8_E4M3": ("float8_e4m3fn", "<u1"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "<u1"),
    "F8_E5M2": ("float8_e5m2", "<u1"),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", "<u1"),
}
"""By the word of a safetensors file: torch's name of the type, and numpy's of its bits."""


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A tensor of a safetensors file.

    `dtype` is torch's name of its type ("torch.float32"). `bits` has its shape; a type that numpy
    has not is in unsigned integers.
    """

    dtype: str
    bits: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes."""
        return self.bits.shape

    @property
    def ndim(self) -> int:
        """How many axes."""
        return self.bits.ndim

    @cached_property
    def numbers(self) -> npt.NDArray[Any]:
        """What it holds, bfloat16 as the same numbers in float32."""
        return widened(self.bits) if self.dtype == "torch.bfloat16" else self.bits


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The bits of bfloat16 as the same numbers in float32, of which they are the upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 numbers in bfloat16: the nearest, of two as near the even one."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read_tensors(data: bytes, where: str, /, **shapes: str) -> dict[str, Any]:
    """The tensors of a safetensors file, by name.

    A shape is a letter an axis: equal letters are equal lengths, in all tensors of the file. Before
    them may stand `float64`, `int64` or `uint8` for that type (else float32, float16 or bfloat16),
    and `?` first for a tensor that may be absent.

    Raises CorruptError that names `where` and the tensor: no safetensors, another name, shape or
    type, or numbers that are none (NaN).
    """
    tensors = load_tensors(data, where)
    _check_all(tensors, where, shapes)
    return tensors


def read_arrays(data: bytes, where: str, /, **shapes: str) -> dict[str, StoredArray]:
    """As `read_tensors`, for numpy."""
    arrays = load_arrays(data, where)
    _check_all(arrays, where, shapes)
    return arrays


def load_tensors(data: bytes, where: str) -> dict[str, Any]:
    """The tensors of a safetensors file, whatever they are called. Raises CorruptError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    # A type that this torch does not have is a KeyError, a length that cannot be a ValueError.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CorruptError(f"{where} is no safetensors file: {error}") from error


def load_arrays(data: bytes, where: str) -> dict[str, StoredArray]:
    """As `load_tensors`, for numpy."""
    from safetensors import SafetensorError, deserialize

    found: dict[str, StoredArray] = {}
    try:
        for name, tensor in deserialize(data):
            dtype, bits = _TYPES[tensor["dtype"]]
            array = np.frombuffer(tensor["data"], dtype=bits).reshape(tensor["shape"])
            found[name] = StoredArray(f"torch.{dtype}", array)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptError(f"{where} is no safetensors file: {error}") from error
    return found


def _check_all(tensors: Mapping[str, Any], where: str, shapes: Mapping[str, str]) -> None:
    lengths: dict[str, int] = {}
    for name, asked in shapes.items():
        if name in tensors:
            _check(name, tensors[name], asked.removeprefix("?").split(), lengths, where)
        elif not asked.startswith("?"):
            raise _wrong(where, f"no tensor {name!r}", f"tensors {', '.join(shapes)}")
    if more := sorted(tensors.keys() - shapes.keys()):
        raise _wrong(where, f"a tensor {more[0]!r}", f"only {', '.join(shapes)}")


def _check(name: str, tensor: Any, asked: list[str], lengths: dict[str, int], where: str) -> None:
    kinds = ["torch.float32", "torch.float16", "torch.bfloat16"]
    if asked and len(asked[0]) > 1:
        kinds = [f"torch.{asked[0]}"]
        asked = asked[1:]
    found = f"{name} of {tensor.dtype} and shape {tuple(tensor.shape)}"
    if str(tensor.dtype) not in kinds or tensor.ndim != len(asked):
        raise _wrong(where, found, f"{' or '.join(kinds)}, axes {' '.join(asked)}")
    for axis, length in zip(asked, tensor.shape, strict=True):
        if lengths.setdefault(axis, length) != length:
            raise _wrong(where, found, f"axis {axis} of {lengths[axis]}, as in the others")
    if _has_nan(tensor):
        raise _wrong(where, f"{name} with NaN", "numbers")


def _has_nan(tensor: Any) -> bool:
    if isinstance(tensor, StoredArray):
        return bool(np.isnan(tensor.numbers).any())
    return bool(tensor.is_floating_point() and tensor.isnan().any())


def _wrong(where: str, found: str, expected: str) -> CorruptError:
    return CorruptError(f"{where} holds {found}", expected=expected)
