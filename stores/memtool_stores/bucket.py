"""Changes where no lock is: whether one was carried out though its answer was lost, and when to try
again.

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

from memtool_stores.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageError,
    StoreError,
)
from memtool_stores.history import MAIN, snapshots
from memtool_stores.ice import create_repository, open_repository, translated

LEAST_TRIES = 100
"""So often a function is run before a conflict comes out of `run`, however long that takes.

Of n writers that never rest, one in n tries wins.
"""


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
    except StoreError as error:
        silent = isinstance(error, StorageError) and error.transient
        try:
            with translated(doing, url):
                if done():
                    return
        except StoreError as second:
            silent = silent or (isinstance(second, StorageError) and second.transient)
        if not silent:
            raise
        raise StorageError(
            f"{error.message}; whether it was carried out is not known",
            transient=True,
            expected=error.expected,
            remedy="`memtool log` shows whether it was; if not, run it again",
        ) from error


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
        with translated("open the store", url):
            repository = open_repository(url)
            tip = repository.lookup_branch(MAIN)
            return repository.lookup_snapshot(tip).parent_id is None
    except (IntegrityError, NotFoundError):
        return False


def empty_repository(url: str) -> Any:
    """A repository at `url` with no memory in it, as it was begun or a new one.

    Raises:
        AlreadyExistsError: there are files at `url` that lead nowhere.
    """
    try:
        return open_repository(url) if is_begun(url) else create_repository(url)
    except StoreError:
        if is_begun(url):  # by the request whose answer was lost, or by another process
            return open_repository(url)
        raise


class Pace:
    """When the tries of one `run` follow each other, and when it is enough."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is how long it waits for others, or for an answer."""
        self._end = time.monotonic() + seconds
        self._begin = time.monotonic()
        self._tries = 0

    def wait_after(self, error: ConflictError | StorageError) -> None:
        """Return when it is time for the next try, a part of what the last one took later.

        Writers that lose to each other must not go on in step; how long a commit takes, in a bucket
        nobody knows beforehand.

        Raises:
            ConflictError, StorageError: what was given, when it is enough or nothing would change.
        """
        self._tries += 1
        over = time.monotonic() > self._end
        if isinstance(error, ConflictError):
            over = over and self._tries >= LEAST_TRIES
        elif not error.transient:
            over = True
        if over:
            raise error
        time.sleep(random.uniform(0, time.monotonic() - self._begin))
        self._begin = time.monotonic()
