"""Safetensors files as bytes: eight bytes of length, a JSON header, and the data section.

Only the header is parsed here; the data section of an adapter file is a value as it stands. What a
header says of sizes is compared with the size of the file before anything is made of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtool_stores import limits
from memtool_stores.errors import SchemaError
from memtool_stores.ice import of_os_error
from memtool_stores.jsonvalues import items, mapping, member, parse, whole
from memtool_stores.printable import shown

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtype names of safetensors that a layout can have."""

ALL_NAMES = {"F64": "float64", **NAMES}
"""Those that a tensor of a file can have."""

MOST_AXES = 32
"""Axes of a tensor; numpy and torch take no more than twice as many."""

LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of one tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Header:
    """The header of a file: its own bytes, and the tensors in the order of their data."""

    data: bytes
    tensors: tuple[TensorInfo, ...]

    def one_dtype(self, where: str) -> str:
        """The dtype of all tensors, one that a layout can have.

        Raises:
            SchemaError: they have several, or another one.
        """
        dtypes = {tensor.dtype for tensor in self.tensors}
        if len(dtypes) != 1 or not dtypes <= set(NAMES.values()):
            raise SchemaError(
                f"{where} has tensors of dtype {', '.join(sorted(dtypes))}",
                expected=f"all of one dtype of {', '.join(NAMES)}",
            )
        return dtypes.pop()


def read_header(data: bytes, where: str, *, size: int | None = None) -> Header:
    """The header of the safetensors file that begins with `data`, all of its header at least.

    `size` is how long the file is, the length of `data` for None.

    Raises:
        SchemaError: not safetensors, more or less data than the header says, a gap between
            tensors, no tensor, or a dtype that is none of `ALL_NAMES`. It names the tensor.
    """
    size = len(data) if size is None else size
    end = _end_of_header(data, where, size)
    what = f"{where} is not a safetensors file: its header"
    entries = mapping(parse(data[LENGTH_BYTES:end], what, unique=True), what)
    entries.pop("__metadata__", None)
    listed = sorted(_entry(name, entry, where) for name, entry in entries.items())
    dtypes = {dtype for _, _, _, dtype, _ in listed}
    if not dtypes or not dtypes <= ALL_NAMES.keys():
        raise SchemaError(
            f"{where} has tensors of dtype {', '.join(map(shown, sorted(dtypes))) or 'none'}",
            expected=f"tensors of {', '.join(ALL_NAMES)}",
        )
    begin = 0
    for first, last, name, dtype, shape in listed:
        nbytes = _width(dtype) * math.prod(shape)
        if (first, last) != (begin, begin + nbytes):
            raise SchemaError(
                f"tensor {shown(name)} of {where} has bytes {first} to {last} of the data",
                expected=f"{begin} to {begin + nbytes}: {shown(list(shape))} of {dtype}, "
                "where the last tensor ends",
            )
        begin = last
    if end + begin != size:
        raise SchemaError(
            f"{where} is not a safetensors file: {size - end:,} bytes of data behind the header",
            expected=f"{begin:,} bytes, as the header says",
            remedy="copy the file again",
        )
    tensors = (TensorInfo(name, shape, ALL_NAMES[dtype]) for _, _, name, dtype, shape in listed)
    return Header(data[:end], tuple(tensors))


def _end_of_header(data: bytes, where: str, size: int) -> int:
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or LENGTH_BYTES + length > size:
        said = f"a header of {length:,} bytes" if size >= LENGTH_BYTES else "no length of a header"
        raise SchemaError(
            f"{where} is not a safetensors file: {said} in a file of {size:,} bytes",
            expected="8 bytes with the length of the header, the header, the data",
        )
    limits.require("header_bytes", length, f"the header of {where}")
    return LENGTH_BYTES + length


def _entry(name: str, entry: Any, where: str) -> tuple[int, int, str, str, tuple[int, ...]]:
    """First and last byte, name, dtype and shape of one tensor."""
    what = f"tensor {shown(name)} of {where}"
    entry = mapping(entry, what)
    dtype = member(entry, "dtype", what)
    if not isinstance(dtype, str):
        raise SchemaError(f"the dtype of {what} is {shown(dtype)}", expected=", ".join(ALL_NAMES))
    shape = items(member(entry, "shape", what), f"the shape of {what}")
    offsets = items(member(entry, "data_offsets", what), f"data_offsets of {what}")
    if len(shape) > MOST_AXES or len(offsets) != 2:
        raise SchemaError(
            f"{what} has {len(shape)} axes and {len(offsets)} data_offsets",
            expected=f"at most {MOST_AXES} axes, and two offsets",
        )
    first, last = (whole(offset, f"an offset of {what}") for offset in offsets)
    return first, last, name, dtype, tuple(whole(n, f"an axis of {what}") for n in shape)


def _width(dtype: str) -> int:
    return {"F64": 8, "F32": 4}.get(dtype, 2)


def read_header_of(path: Path) -> Header:
    """The header of a safetensors file; its data are not read.

    Raises:
        SchemaError: as `read_header`.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(LENGTH_BYTES)
            data += file.read(_end_of_header(data, str(path), size) - LENGTH_BYTES)
    except OSError as error:
        raise of_os_error(error, "read the adapter", str(path)) from error
    return read_header(data, str(path), size=size)


def write_header(named: Sequence[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """Header bytes for tensors that lie one after another in this order, padded to eight bytes."""
    code = next(code for code, name in NAMES.items() if name == dtype)
    entries: dict[str, Any] = {}
    begin = 0
    for name, shape in named:
        end = begin + _width(code) * math.prod(shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT folder, or an empty dict when there is none.

    Raises:
        SchemaError: it is not a JSON object, or larger than a text may be.
        StorageError: it cannot be read.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    try:
        limits.require("text_bytes", path.stat().st_size, str(path))
        data = path.read_bytes()
    except OSError as error:
        raise of_os_error(error, "read the configuration of the adapter", str(path)) from error
    return mapping(parse(data, str(path)), str(path))
