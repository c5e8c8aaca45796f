"""Changes where there is no lock: whether one was carried out, and when to try again.

An object store takes a branch or tag on the condition that nobody changed it meanwhile. A request
that is carried out while its answer is lost is sent again by the client, and then refused: what was
done looks like a conflict. The id of a version is random and is known before the branch is asked to
take it, so it is the token by which a writer finds its own commit again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memtool_stores.errors import ConflictError, MemtoolError, NotFoundError, StorageError
from memtool_stores.history import snapshots
from memtool_stores.ice import create_repository, open_repository, translated
from memtool_stores.objects import objects_at, write_new

LEAST_TRIES = 100
"""So often a function is run before a conflict comes out of `run`, however long that takes.

Of n writers that never rest, one in n tries wins.
"""

_UNKNOWN = "; whether it was carried out is not known"

_FIRST_SNAPSHOT = "ice/snapshots/1CECHNKREP0F1RSTCMT0"
_MAIN_REFERENCE = "ice/refs/branch.main/ref.json"
_FIRST_REFERENCE = b'{"snapshot":"1CECHNKREP0F1RSTCMT0"}'
"""With these icechunk begins a repository: one snapshot, the same in all, and the branch main."""


@contextmanager
def settled(url: str, doing: str, done: Callable[[], bool]) -> Iterator[None]:
    """In a bucket, an error inside the block is none when `done` finds the change carried out.

    Raises:
        StorageError: nobody answers: whether it was carried out is not known.
    """
    if not url.startswith("s3://"):
        yield
        return
    try:
        yield
    except MemtoolError as error:
        silent = isinstance(error, StorageError) and error.transient
        try:
            with translated(doing, url):
                if done():
                    return
        except MemtoolError as second:
            silent = silent or (isinstance(second, StorageError) and second.transient)
        if not silent:
            raise
        raise outcome_unknown(error) from error


def outcome_unknown(error: MemtoolError) -> StorageError:
    """The error of a change that was asked for, and of which nobody says what became."""
    return StorageError(
        error.message.removesuffix(_UNKNOWN) + _UNKNOWN,
        transient=True,
        remedy="`memtool log` shows whether it was; if not, run it again",
    )


def lies_between(repository: Any, base: str, tip: str, version: str) -> bool:
    """Whether `version` is `tip` or one of its ancestors that came after `base`."""
    if tip == base:
        return False
    for snapshot, _ in snapshots(repository, tip):
        if snapshot.id in {version, base}:
            return bool(snapshot.id == version)
    return False


def move_branch(
    url: str, repository: Any, doing: str, branch: str, base: str, version: str
) -> None:
    """Make `version` the tip of a branch that is at `base`.

    Raises:
        ConflictError: it is not: someone else moved it.
    """

    def moved() -> bool:
        return lies_between(repository, base, str(repository.lookup_branch(branch)), version)

    with settled(url, doing, moved), translated(doing, url):
        repository.reset_branch(branch, version, from_snapshot_id=base)


def is_begun(url: str) -> bool:
    """Whether all that is at `url` is a repository in which no memory was ever written.

    Whoever made it died before the memory was in it, or is about to write it.
    """
    try:
        return objects_at(url).read(_MAIN_REFERENCE) == _FIRST_REFERENCE
    except NotFoundError:
        return False


def empty_repository(url: str) -> Any:
    """A repository at `url` with no memory in it, as it was begun or a new one."""
    if not is_begun(url):
        try:
            return create_repository(url)
        except MemtoolError:
            # A request whose answer was lost has made it, or another process; or a process died
            # between the two files that it consists of: then the second is written here.
            if [entry.path for entry in objects_at(url).list()] == [_FIRST_SNAPSHOT]:
                write_new(url, _MAIN_REFERENCE, _FIRST_REFERENCE)
            if not is_begun(url):
                raise
    return open_repository(url)


class Pace:
    """When the tries of one `run` follow each other, and when it is enough."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is how long it waits for others, or for an answer."""
        self._end = time.monotonic() + seconds
        self._begin = time.monotonic()
        self._tries = 0

    def is_over(self, error: ConflictError | StorageError) -> bool:
        """Whether a try that ended with this error was the last."""
        self._tries += 1
        late = time.monotonic() > self._end
        if isinstance(error, ConflictError):
            return late and self._tries >= LEAST_TRIES
        return late or not error.transient

    def wait(self) -> None:
        """Return when it is time for the next try, a part of what the last one took later.

        Writers that lose to each other must not go on in step, and how long a commit takes in a
        bucket nobody knows beforehand.
        """
        time.sleep(random.uniform(0, time.monotonic() - self._begin))
        self._begin = time.monotonic()
