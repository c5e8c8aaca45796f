"""Decoded images in a .npy file: read block by block, each checked against its checksum.

Nothing is mapped: a file that is cut short, or a disk that fails, is then an error and no signal
that ends the process.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.errors import CorruptError
from memtool.outside import unreadable

_BLOCK_BYTES = 4 * 1024**2

Shape = tuple[int, int, int, int]


def block_rows(shape: Shape) -> int:
    """How many images a block has: about 4 MB of them."""
    return max(1, _BLOCK_BYTES // max(1, int(np.prod(shape[1:]))))


class StoredImages:
    """The images uint8 (n, size, size, 3) of an open file.

    `checksums` has the crc32 of every block of `block_rows` images. It is compared whenever a block
    is read. The file stays open: it may be replaced or removed meanwhile.
    """

    def __init__(self, path: Path, shape: Shape, checksums: Sequence[int]) -> None:
        self.path = path
        self.shape = shape
        self._checksums = checksums
        self._rows = block_rows(shape)
        # Images are all but the header, whose length the format does not fix.
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)
        self._first = os.fstat(self._handle).st_size - self.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return int(np.prod(self.shape))

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The images of ascending `rows`, in memory.

        Raises CorruptError for a block that is not what was written, MemtoolError where the file
        cannot be read.
        """
        blocks = rows // self._rows
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            found[here] = self._block(block)[rows[here] - block * self._rows]
        return found

    def all(self) -> npt.NDArray[np.uint8]:
        """All images, in memory; errors as `read`."""
        found = np.empty(self.shape, np.uint8)
        for block in range(len(self._checksums)):
            self._fill(block, found[block * self._rows : (block + 1) * self._rows])
        return found

    def _block(self, block: int) -> npt.NDArray[np.uint8]:
        count = min(self._rows, len(self) - block * self._rows)
        found = np.empty((count, *self.shape[1:]), np.uint8)
        self._fill(block, found)
        return found

    def _fill(self, block: int, into: npt.NDArray[np.uint8]) -> None:
        view = into.data.cast("B")
        place = self._first + block * self._rows * (self.nbytes // len(self))
        try:
            there = 0
            while (more := self._some(view[there:], place + there)) > 0:
                there += more
        except OSError as error:
            raise unreadable(self.path, error) from error
        if there < len(view) or zlib.crc32(view) != self._checksums[block]:
            raise CorruptError(
                f"{self.path} is not what was written: the checksum of block {block} (images from "
                f"{block * self._rows}) does not hold",
                remedy=f"the same command without {self.path.parent}: it is decoded again",
            )

    def _some(self, into: memoryview, place: int) -> int:
        """Read what comes at once; how many bytes that was, 0 at the end of the file."""
        return os.preadv(self._handle, [into], place) if place >= 0 and len(into) else 0
