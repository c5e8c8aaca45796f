"""Files that say themselves whether they are what was written: what a step leaves for a later one.

A JSON object has its checksum under the key `seal`, a safetensors file in its metadata under the
same name; both stay what they are for any other program. The checksum of an object is of what it
says, not of how it is laid out; that of a safetensors file is of every byte. `sha256:` in front of
it is the version of all this.

A file without a seal is of an earlier format, or was vouched for by whoever took the seal out; its
reader decides what it is worth. A file that cannot be read is not damaged: MemtoolError says why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memtool.atomic import write_atomic
from memtool.errors import CorruptError, MemtoolError
from memtool.outside import unreadable
from memtool.tensor_bytes import load_tensors
from memtool_stores import limits
from memtool_stores.files import read_ordinary
from memtool_stores.printable import shown

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "seal"
_KIND = "sha256:"
_BLANK = "0" * 64
_IN_HEADER = re.compile(rb'"seal":"sha256:([0-9a-f]{64})"')


class Document(NamedTuple):
    """A JSON object without its seal, and whether it had one."""

    content: dict[str, Any]
    sealed: bool


class TensorFile(NamedTuple):
    """What a safetensors file holds, its metadata without the seal, and whether it had one."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sealed: bool


def read_file(path: Path, limit: str = "array_bytes") -> bytes:
    """All bytes of an ordinary file that is not above one of `limits`.

    FileNotFoundError as it is; SchemaError for a folder, a pipe or one above the limits;
    MemtoolError, which is no damage, where the system refuses.
    """
    try:
        return read_ordinary(path, limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except MemoryError as error:
        raise MemtoolError(
            f"cannot read {path}: no memory for its {path.stat().st_size:,} bytes",
            remedy="end other programs, then the same command again",
        ) from error


# JSON


def write_json(path: Path, document: Mapping[str, Any]) -> Path:
    """Write an object of JSON values with its seal, whole or not at all; returns `path`.

    MemtoolError as `write_atomic`; ValueError for numbers that JSON has not.
    """
    return write_atomic(path, json_bytes(document))


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """What `write_json` writes. ValueError for numbers that JSON has not."""
    seal = f"{_KIND}{_digest(document)}"
    text = json.dumps({**document, SEAL: seal}, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def read_json(path: Path) -> Document:
    """The object in a file; FileNotFoundError, or as `parse_json` and `read_file`."""
    return parse_json(read_file(path, "text_bytes"), str(path))


def parse_json(data: bytes | str, where: str, *, remedy: str | None = None) -> Document:
    """The object of a JSON text, once its seal holds.

    CorruptError, which names `where`, for what is no JSON object and for a seal that does not hold.
    """
    limits.require("text_bytes", len(data), where)
    try:
        content = json.loads(data)
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where} is not UTF-8 text: {error}", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON: {error}", remedy=remedy) from error
    if not isinstance(content, dict):
        raise CorruptError(
            f"{where} holds a {type(content).__name__}", expected="a JSON object", remedy=remedy
        )
    if SEAL not in content:
        return Document(content, sealed=False)
    seal = content.pop(SEAL)
    found = f"{_KIND}{_digest(content)}"
    if seal != found:
        raise _broken(where, shown(seal), found, remedy)
    return Document(content, sealed=True)


def _digest(document: Mapping[str, Any]) -> str:
    """Of what an object says, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _broken(where: str, stated: str, found: str, remedy: str | None) -> CorruptError:
    return CorruptError(
        f"{where} is not what was written: its checksum does not hold",
        expected=f"{stated}, found {found!r}",
        remedy=remedy,
    )


# Safetensors


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    private: bool = False,
) -> Path:
    """Write a safetensors file with its seal, whole or not at all; returns `path`.

    Tensors are contiguous; the same ones make the same bytes. MemtoolError as `write_atomic`.
    """
    from safetensors.torch import save

    made = memoryview(save(dict(tensors)))
    end = 8 + int.from_bytes(made[:8], "little")
    # Not by `save`, which puts the keys of metadata in a random order.
    sealed = {
        "__metadata__": {**metadata, SEAL: f"{_KIND}{_BLANK}"},
        **json.loads(bytes(made[8:end])),
    }
    header = json.dumps(sealed, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    data = bytearray(b"".join([len(header).to_bytes(8, "little"), header, made[end:]]))
    place = _seal_place(data)
    assert place is not None
    data[place] = _digest_around(data, place).encode()
    return write_atomic(path, bytes(data), private=private)


def read_tensors(path: Path, *, remedy: str | None = None) -> TensorFile:
    """What a safetensors file holds, once its seal holds.

    FileNotFoundError; CorruptError for what is no such file and for a seal that does not hold;
    MemtoolError as `read_file`.
    """
    data = read_file(path)
    place = _seal_place(data)
    if place is not None:
        stated, found = data[place].decode(), _digest_around(data, place)
        if stated != found:
            raise _broken(str(path), repr(f"{_KIND}{stated}"), f"{_KIND}{found}", remedy)
    try:
        tensors = load_tensors(data, str(path))
    except CorruptError as error:
        raise CorruptError(error.message, remedy=remedy) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if (SEAL in metadata) != (place is not None):
        raise _broken(str(path), shown(metadata.get(SEAL)), "another", remedy)
    metadata.pop(SEAL, None)
    return TensorFile(tensors, metadata, sealed=place is not None)


def _seal_place(data: bytes | bytearray) -> slice | None:
    """Where the digits of the seal are: in the header, whose length the first 8 bytes say."""
    end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    match = _IN_HEADER.search(data, 8, end)
    return slice(*match.span(1)) if match else None


def _digest_around(data: bytes | bytearray, place: slice) -> str:
    """Of all bytes, with zeros in the place of the seal itself."""
    digest = hashlib.sha256(data[: place.start])
    digest.update(_BLANK.encode())
    digest.update(memoryview(data)[place.stop :])
    return digest.hexdigest()
