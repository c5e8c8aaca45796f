"""A whole store somewhere else: a clone in a directory or a bucket.

Everything is copied as it lies, all versions and their ids included, and appears at once: the
references come last, so a copy that was cut short is no store. The references are read first, so a
copy that a writer overtakes is the store as it was then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from memtool_stores.errors import AlreadyExistsError
from memtool_stores.files import is_part, is_staged
from memtool_stores.objects import ObjectInfo, Objects

REFERENCES = "ice/refs/"
CONTENT = "ice/"
CHECKSUMS = "sums/"
_FOLDERS = tuple(
    f"{CONTENT}{kind}/" for kind in ("chunks", "manifests", "refs", "snapshots", "transactions")
)
"""What a store consists of; the lock and half-written files stay behind."""

Tell = Callable[[int, int], None]
"""Called with the files copied so far, and how many there are."""


@dataclass(frozen=True)
class Forwarded:
    """What a copy took up of a newer one: names of branches that moved or are new, and of tags.

    `deleted` are tags of the newer copy that were deleted in this one, and stay so.
    """

    branches: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.branches or self.tags)


def copy(
    source: Objects,
    target: Objects,
    tell: Tell | None = None,
    *,
    checksums: bool = True,
    there: frozenset[str] = frozenset(),
    settle: Callable[[], None] = lambda: None,
) -> int:
    """Copy every file of a store but those that are `there`; the number of files.

    Beside those the target must be empty, or a store that `settle` brings to the disk: it is called
    when all but the references is copied.
    """
    files, settled = list(files_of(source, checksums)), False
    for number, (path, pieces) in enumerate(in_order(source, files, checksums), start=1):
        if path.startswith(REFERENCES) and not settled:
            settle()
            settled = True
        # Pieces that nobody asks for are not read.
        if path not in there:
            target.write_pieces(path, pieces)
        if tell is not None:
            tell(number, len(files))
    return len(files)


def require_empty(target: Objects, url: str) -> None:
    """Raise AlreadyExistsError when there is anything at `url`."""
    for entry in target.list():
        raise AlreadyExistsError(
            f"{url} is there and not empty ({entry.path})",
            remedy="another place, or `memtool clone --resume` when a clone of this memory was cut "
            "short there; else first delete what is there",
        )


def begun_copy(source: Objects, target: Objects, url: str) -> frozenset[str]:
    """The files that a copy of `source` need not write again, when one to `url` was cut short.

    A file has a name that was drawn at random when it was written, and never changes: under the
    same name it is the same, when it is whole. Only references move.

    Raises:
        AlreadyExistsError: something else is there.
    """
    ours = {entry.path: entry for entry in source.list()}
    there = set()
    for entry in target.list():
        path, mine = entry.path, ours.get(entry.path)
        moves = path.startswith(REFERENCES)
        if mine is None or (moves and source.read(path) != target.read(path)):
            raise AlreadyExistsError(
                f"{url} is there and is no beginning of a copy of this memory ({path})",
                remedy="another place, or first delete what is there",
            )
        if moves or (mine.nbytes == entry.nbytes and _same_md5(source, mine, entry)):
            there.add(path)
    return frozenset(there)


def _same_md5(source: Objects, mine: ObjectInfo, other: ObjectInfo) -> bool:
    if other.md5 is None or mine.md5 is not None:
        return other.md5 in {None, mine.md5}
    digest = hashlib.md5(usedforsecurity=False)
    for piece in source.pieces(mine.path):
        digest.update(piece)
    return other.md5 == digest.hexdigest()


def files_of(source: Objects, checksums: bool) -> Iterator[str]:
    """The paths of all that a store consists of."""
    for entry in source.list():
        name = entry.path.rpartition("/")[2]
        if belongs(entry.path, checksums) and not (is_part(name) or is_staged(name)):
            yield entry.path


def belongs(path: str, checksums: bool) -> bool:
    """Whether a store consists of such files: in the folders of icechunk."""
    return path.startswith(_FOLDERS) or (checksums and path.startswith(CHECKSUMS))


def in_order(
    source: Objects, files: list[str], checksums: bool
) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Every file with its bytes; the references come last, as they were at the start."""
    references = {path: source.read(path) for path in files if path.startswith(REFERENCES)}
    # Listed again: what the references lead to was written before them.
    rest = sorted({*files_of(source, checksums)} - references.keys())
    for path in rest:
        if not path.startswith(REFERENCES):
            yield path, source.pieces(path)
    for path, data in sorted(references.items()):
        yield path, (data,)
