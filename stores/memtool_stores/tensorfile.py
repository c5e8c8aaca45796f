"""Safetensors files as bytes: eight bytes of length, a JSON header, and the data section.

Only the header is parsed here; the data section of an adapter file is a value as it stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtool_stores.errors import SchemaError

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtype names of safetensors that a value can have."""


@dataclass(frozen=True)
class TensorInfo:
    """Name and shape of one tensor of a file."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The header of a file: its own bytes, the tensors in the order of their data, one dtype."""

    data: bytes
    tensors: tuple[TensorInfo, ...]
    dtype: str


def read_header(data: bytes, where: str) -> Header:
    """The header of the safetensors file that begins with `data`.

    Raises:
        SchemaError: not safetensors, a gap between tensors, or not one dtype of `NAMES`.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8:end])
        entries.pop("__metadata__", None)
        listed = sorted(
            (int(e["data_offsets"][0]), int(e["data_offsets"][1]), name, e["dtype"], e["shape"])
            for name, e in entries.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SchemaError(f"{where} is not a safetensors file: {error}") from error
    dtypes = {entry[3] for entry in listed}
    if len(dtypes) != 1 or not dtypes <= NAMES.keys():
        raise SchemaError(
            f"{where} has tensors of dtype {', '.join(sorted(dtypes)) or 'none'}",
            expected=f"all of one dtype of {', '.join(NAMES)}",
        )
    dtype = dtypes.pop()
    width = 4 if dtype == "F32" else 2
    begin = 0
    for first, last, name, _, shape in listed:
        if first != begin or last - first != width * math.prod(shape):
            raise SchemaError(f"tensor {name!r} of {where} does not begin where the last one ends")
        begin = last
    tensors = tuple(TensorInfo(name, tuple(shape)) for _, _, name, _, shape in listed)
    return Header(data[:end], tensors, NAMES[dtype])


def write_header(named: Sequence[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """Header bytes for tensors that lie one after another in this order, padded to eight bytes."""
    code = next(code for code, name in NAMES.items() if name == dtype)
    width = 4 if code == "F32" else 2
    entries: dict[str, Any] = {}
    begin = 0
    for name, shape in named:
        end = begin + width * math.prod(shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT folder, or an empty dict when there is none.

    Raises:
        SchemaError: it is not JSON.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SchemaError(f"{path} is not JSON: {error}") from error
    return dict(config)
