"""A decoded data set as one table of rows: what the cache keeps and the cuts cut."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.errors import DataError
from memtool.paths import expand
from memtool.streams.stored import StoredImages
from memtool.streams.task import Images

_CHUNK_BYTES = 64 * 1024**2


@dataclass(frozen=True, eq=False)
class Table:
    """All rows of a data set.

    images uint8 (n, size, size, 3), in memory, or on disk where they are many; labels int64 (n,),
    ids into `class_names`; domains int64 (n,), ids into `domain_names`, or none; is_test bool
    (n,), all False where the source has no test split of its own. `fingerprint` is a sha256 of the
    encoded images and their labels: it does not depend on paths, times or the image size. `content`
    uint64 (n,) is the same for two rows whose images are the same, pixel by pixel. `notes` are
    sentences on what was taken for what and what was left out.
    """

    name: str
    images: npt.NDArray[np.uint8] | StoredImages
    labels: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64] | None
    is_test: npt.NDArray[np.bool_]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    fingerprint: str
    content: npt.NDArray[np.uint64] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def samples(self, rows: npt.NDArray[np.int64]) -> Images:
        """The samples of ascending `rows` (k,).

        Of a table in memory, rows that follow each other are a view. Of one on disk, rows are
        copied into a file that has no name and goes with the process: a big data set never has to
        fit into memory, and nobody can cut short what is mapped.
        """
        labels = self.labels[rows]
        if isinstance(self.images, StoredImages):
            return Images(_spooled(self.images, rows), labels)
        if len(rows) == 0 or rows[-1] - rows[0] + 1 == len(rows):
            first = int(rows[0]) if len(rows) else 0
            return Images(self.images[first : first + len(rows)], labels)
        return Images(self.images[rows], labels)


def _spooled(images: StoredImages, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The images of `rows` in an unnamed file below the cache, mapped into memory."""
    if len(rows) == 0:
        return np.empty((0, *images.shape[1:]), np.uint8)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            step = max(1, _CHUNK_BYTES * len(images) // images.nbytes)
            for start in range(0, len(rows), step):
                # Written, not stored through a mapping: a full disk is then an error, no signal.
                file.write(images.read(rows[start : start + step]).data)
            file.flush()
            shape = (len(rows), *images.shape[1:])
            return np.asarray(np.memmap(file, dtype=np.uint8, mode="c", shape=shape))
    except OSError as error:
        raise cache_error(error) from error


def cache_folder() -> Path:
    """Where decoded data is kept: $MEMTOOL_CACHE, else the user's cache folder."""
    given = os.environ.get("MEMTOOL_CACHE")
    if given:
        return expand(given)
    import platformdirs

    return platformdirs.user_cache_path("memtool")


def cache_error(error: OSError) -> DataError:
    """What a failure to write below the cache folder is told as."""
    return DataError(
        f"cannot write to the cache {cache_folder()}: {error.strerror or error}",
        expected="a writable folder with room for the decoded images",
        remedy="free some space, or set MEMTOOL_CACHE to another folder",
    )
