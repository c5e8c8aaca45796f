"""Bytes that a transaction does not hold: they are read again when they are written.

A transaction of a thousand files would else have all of them in memory until it is committed. What
is read then must be what was looked at, by its hash.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from memtool_stores.errors import ChangedMeanwhileError
from memtool_stores.ice import of_os_error
from memtool_stores.ragged import piece_hashes
from memtool_stores.tensorfile import Header, read_header

Bytes = bytes | memoryview

SPOOLED_BYTES = 16 * 1024 * 1024
"""As much of what waits stays in memory."""


@dataclass(frozen=True, eq=False)
class Held:
    """`nbytes` bytes with this hash, which `read` gives as often as it is called.

    `where` says in words where they are.
    """

    sha256: str
    nbytes: int
    read: Callable[[], Bytes]
    where: str

    @classmethod
    def of(cls, data: bytes) -> Held:
        """Bytes that are held."""
        return cls(hashlib.sha256(data).hexdigest(), len(data), lambda: data, "memory")

    def data(self) -> Bytes:
        """The bytes.

        Raises:
            ChangedMeanwhileError: they are others by now.
        """
        data = self.read()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ChangedMeanwhileError(
                f"{self.where} changed while it was written into the memory; nothing was stored",
                expected=f"sha256 {self.sha256}",
                remedy="the same again",
            )
        return data


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file that was looked at: all that a row says of it, and its data, not held.

    `sha256` is that of the whole file, `pieces` as in `piece_hashes` of the data.
    """

    header: Header
    sha256: str
    values: Held
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, data: bytes, where: str, read: Callable[[], bytes] | None = None) -> Self:
        """The file with these bytes; `read` gives them again, without it they stay in memory.

        Raises:
            SchemaError: as `read_header`.
        """
        header = read_header(data, where)
        begin, again = len(header.data), read or (lambda: data)
        values = memoryview(data)[begin:]
        held = Held(
            hashlib.sha256(values).hexdigest(),
            len(values),
            lambda: memoryview(again())[begin:],
            where,
        )
        return cls(header, hashlib.sha256(data).hexdigest(), held, piece_hashes(values))


class Spool:
    """Bytes that wait to be written into a memory, in a file without a name: a kill leaves none.

    Inside a `with` block; after it they are gone.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOLED_BYTES)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def put(self, data: bytes) -> Held:
        """Let these bytes wait.

        Raises:
            StorageError: the folder for temporary files has no room.
        """
        begin, nbytes = self._file.seek(0, 2), len(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise of_os_error(error, "keep what waits", tempfile.gettempdir()) from error
        digest = hashlib.sha256(data).hexdigest()
        return Held(digest, nbytes, lambda: self._read(begin, nbytes), "a temporary file")

    def _read(self, begin: int, nbytes: int) -> bytes:
        self._file.seek(begin)
        return self._file.read(nbytes)
