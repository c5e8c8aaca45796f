"""Work shared by any number of processes on any machines that see one folder; no server, no clock.

A job is a folder, `<queue>/<job>/`, and who works on it is a file `lease-<n>` there. Files appear
by a hard link, which one process alone can win (on NFS, too). The number n is a fencing token: a
higher one takes the job from the one before. The holder counts up in `beat-<n>`; an observer who
sees the same count for `lease_seconds` of its own monotonic clock may claim n + 1, so that no
clocks are compared. Of a holder on the same machine that is dead a lock tells at once. What a job
came to is `result.json`, again by a link: published once, by whoever is first and was not fenced.
Nothing that was published is ever taken away: a job is opened again by a file `again-<n>` beside
its n-th result, and the next is `result-<n>.json`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from memtool import sealed
from memtool.atomic import cannot_write
from memtool.errors import MemtoolError
from memtool_stores.files import write_whole
from memtool_stores.names import below
from memtool_stores.printable import printable

BEATS_IN_LEASE = 6
"""How often a holder shows that it lives in the time after which it counts as gone."""

AGAIN = "again-"
RELEASED = "released"


class Fenced(Exception):
    """Another process has the job now: what this one made of it does not count."""


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, a job: process and machine, and where in the folder it works."""

    token: int
    owner: str
    machine: str
    host: str
    process: int
    place: str

    @property
    def words(self) -> str:
        """For a person who waits for it."""
        return printable(f"process {self.process} on {self.host}")


class Queue:
    """The jobs in a folder, as one process sees and takes them.

    `lease_seconds` is the same for all processes.
    """

    def __init__(self, folder: Path, *, lease_seconds: float) -> None:
        self.folder = folder
        self.lease_seconds = lease_seconds
        self._seen: dict[str, tuple[tuple[int, str], float]] = {}

    def result(self, job: str) -> dict[str, Any] | None:
        """What a job came to, or None. CorruptError for what is not as it was published."""
        try:
            folder = self._job(job)
            return sealed.read_json(folder / _result(_opened(folder))).content
        except FileNotFoundError:
            return None

    def is_done(self, job: str) -> bool:
        """Whether a job has its result."""
        folder = self._job(job)
        return (folder / _result(_opened(folder))).exists()

    def holder(self, job: str) -> Holder | None:
        """Who took a job last; None where nobody did, or who did is not readable yet."""
        folder = self._job(job)
        token = _newest(folder)
        return _read(folder, token) if token else None

    def may_be_written(self, job: str, place: str) -> bool:
        """Whether somebody may write in a place of a job, now or later, also one who lost it.

        Who neither gave the job back nor is known to be dead may be stopped, and go on.
        """
        folder = self._job(job)
        for token in range(1, _newest(folder) + 1):
            holder = _read(folder, token)
            if (holder is None or holder.place == place) and not self._is_over(
                folder, token, holder
            ):
                return True
        return False

    def claim(self, job: str) -> Lease | None:
        """Take a job that is not done and that nobody holds, or its holder is gone; else None.

        Returns at once. Of a holder that another machine lost this is known only after calls that
        span the time of a lease. MemtoolError where the file system refuses.
        """
        folder = self._job(job)
        opened = _opened(folder)
        if (folder / _result(opened)).exists():
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        token = _newest(folder)
        before = _read(folder, token) if token else None
        # Who gave a job back, or is dead, leaves a place to go on in; of others we cannot know
        # whether they write there still, or will again.
        over = token > 0 and self._is_over(folder, token, before)
        if token and not over and not self._is_silent(job, token):
            return None
        lock = _Lock(folder / f"lock-{token + 1}")
        if not lock.acquire():
            return None
        place = f"attempt-{token + 1}" if token else ""
        holder = Holder(
            token=token + 1,
            owner=uuid.uuid4().hex,
            machine=machine(),
            host=socket.gethostname(),
            process=os.getpid(),
            place=before.place if over and before is not None else place,
        )
        if not _appears_once(folder / _lease(holder.token), json.dumps(vars(holder)).encode()):
            lock.release()
            return None
        every_seconds = self.lease_seconds / BEATS_IN_LEASE
        lease = Lease(folder, holder, lock, every_seconds, folder / _result(opened))
        if lease.result.exists():  # the one before was just in time
            lease.release()
            return None
        return lease

    def open_again(self, job: str, fits: Callable[[dict[str, Any]], bool]) -> bool:
        """Make a job that came to something that fits one that is not done; whether this did it.

        Of two processes at once one alone does, and what the job came to since is left alone.
        """
        folder = self._job(job)
        opened = _opened(folder)
        try:
            found = sealed.read_json(folder / _result(opened)).content
        except FileNotFoundError:
            return False
        return fits(found) and _appears_once(folder / f"{AGAIN}{opened + 1}", b"")

    def _job(self, job: str) -> Path:
        return below(self.folder, job)

    @staticmethod
    def _is_over(folder: Path, token: int, holder: Holder | None) -> bool:
        """Whether the holder of a lease gave it back, or died on this machine."""
        if _beat(folder, token) == RELEASED:
            return True
        return holder is not None and holder.machine == machine() and _lock_is_free(folder, token)

    def _is_silent(self, job: str, token: int) -> bool:
        """Whether a holder has not counted on for the time of a lease, as watched from here."""
        now, state = time.monotonic(), (token, _beat(self._job(job), token))
        known = self._seen.get(job)
        if known is None or known[0] != state:
            self._seen[job] = (state, now)
            return False
        return now - known[1] >= self.lease_seconds


class Lease:
    """A job that is held, with a thread that shows it; as a context it is given back at the end."""

    def __init__(
        self, folder: Path, holder: Holder, lock: _Lock, every_seconds: float, result: Path
    ) -> None:
        """`result` is the file that may be published."""
        self.holder = holder
        self.result = result
        self._folder = folder
        self._lock = lock
        self._every_seconds = every_seconds
        self._over = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._live, name="memtool-lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> int:
        """The fencing token."""
        return self.holder.token

    @property
    def lost(self) -> bool:
        """Whether another process took the job, as far as is known without a look."""
        return self._lost.is_set()

    def require_held(self) -> None:
        """Raise Fenced where another process took the job; cheap enough for every step."""
        if self.lost:
            raise Fenced

    def publish(self, result: dict[str, Any]) -> bool:
        """Say what the job came to; False where it does not count, as another took it."""
        if self._is_fenced():
            return False
        return publish_once(self.result, result)

    def release(self) -> None:
        """Give it back: another process may take it at once."""
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # else it counts as gone a little later
            self._write(RELEASED)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _is_fenced(self) -> bool:
        if (self._folder / _lease(self.token + 1)).exists():
            self._lost.set()
        return self.lost

    def _live(self) -> None:
        count = 0
        while not self._over.wait(self._every_seconds):
            count += 1
            # A full disk, a server that is away: if it lasts, another takes the job.
            with suppress(OSError):
                if self._is_fenced():
                    return
                self._write(str(count))

    def _write(self, text: str) -> None:
        path = self._folder / f"beat-{self.token}"
        part = path.with_name(f".{path.name}-{self.holder.owner}")
        part.write_text(text, encoding="ascii")
        part.replace(path)


class _Lock:
    """A lock of the system on a file, which it frees when the process ends."""

    def __init__(self, path: Path) -> None:
        import filelock

        self._held = filelock.FileLock(path, timeout=0)

    def acquire(self) -> bool:
        """Whether it was free. MemtoolError where files cannot be locked."""
        import filelock

        try:
            self._held.acquire()
        except filelock.Timeout:
            return False
        except OSError as error:
            raise MemtoolError(
                f"cannot lock {self._held.lock_file}: {error.strerror or error}",
                remedy="a folder that you may write, on a file system with locks",
            ) from error
        return True

    def release(self) -> None:
        """Free it."""
        self._held.release()


def publish_once(path: Path, document: dict[str, Any]) -> bool:
    """Write a sealed JSON object where there is none yet; False where another process was first."""
    return _appears_once(path, sealed.json_bytes(document))


@cache
def machine() -> str:
    """What processes that see each other's locks have in common: this start of this kernel."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"


def _lease(token: int) -> str:
    return f"lease-{token}"


def _result(opened: int) -> str:
    """The file of what a job came to after it was opened again so many times."""
    return f"result-{opened}.json" if opened else "result.json"


def _opened(folder: Path) -> int:
    """How many times a job was opened again."""
    return _highest(folder, AGAIN)


def _newest(folder: Path) -> int:
    """The highest token of a job; 0 where it was never taken."""
    return _highest(folder, "lease-")


def _highest(folder: Path, head: str) -> int:
    words = [path.name.removeprefix(head) for path in folder.glob(f"{head}*")]
    return max((int(word) for word in words if word.isdigit()), default=0)


def _read(folder: Path, token: int) -> Holder | None:
    try:
        said = json.loads(sealed.read_file(folder / _lease(token), "text_bytes"))
        return Holder(**said)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _beat(folder: Path, token: int) -> str:
    try:
        return (folder / f"beat-{token}").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return ""


def _lock_is_free(folder: Path, token: int) -> bool:
    path = folder / f"lock-{token}"
    lock = _Lock(path)
    if not path.exists() or not lock.acquire():
        return False
    lock.release()
    return True


def _appears_once(path: Path, data: bytes) -> bool:
    """Make a file whole, unless there is one: whether it is ours."""
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        write_whole(part, data)
        try:
            os.link(part, path)
        except FileExistsError:
            # Over a network the answer to a link that was made can be lost, and asked for again.
            return part.stat().st_nlink > 1
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
    return True
