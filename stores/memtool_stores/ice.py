"""The one door to icechunk: its import, its configuration, its errors, and what it leaves out.

icechunk is imported on first use (it takes a quarter of a second), with its log off, which goes to
stdout and says no more than its errors. It calls no fsync and hangs in a forked child; both are
closed here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memtool_stores import clock
from memtool_stores.errors import (
    AlreadyExistsError,
    ConflictError,
    ForkedProcessError,
    IntegrityError,
    MemtoolError,
    NotFoundError,
    StorageError,
)

GROWING = {"values": (0, 1024), "catalog": (0, 128), "keys": (1, 128), "parts": (0, 2048)}
"""The arrays that grow with the memory: along which axis, and how many chunks a manifest lists.

A commit writes the manifests that it touches whole, and icechunk looks at all of an array, each
beside each other: of few chunks each they are too many, of many too long. Chosen by what a commit
among 100,000 adapters takes, and how long it is. Another number must be a multiple of the one
before: a manifest that lies across two of the new ones would be written for both.
"""

CACHED_CHUNKS = 500_000
"""Chunks in the manifests that a repository keeps in memory, about 60 bytes each."""

HANDLES = 20
"""Files that must be free to be opened before a store is: zarr reads ten chunks at a time."""

MEMORY_BYTES = 1024 * 1024 * 1024
"""Address space that must be free where the system limits it (`ulimit -v`): most is never used."""

SCARCE_BYTES = 128 * 1024 * 1024
"""With less of it a failure to unpack says nothing of the bytes that were to be unpacked."""

_runs = {"threads": False}
_UNREADABLE = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError)

_fork = {"imported": False, "child": False}


def _in_child() -> None:
    _fork["child"] = _fork["imported"]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def guard_fork() -> None:
    """Nothing, unless this process was forked from one that had used a store.

    Raises:
        ForkedProcessError: the threads of icechunk do not exist in this child; a call would hang.
    """
    if _fork["child"]:
        raise ForkedProcessError(
            f"process {os.getpid()} was forked from one that had opened a store",
            remedy='start workers with the "spawn" method, or read all values before the fork',
        )


def icechunk() -> Any:
    """The icechunk module."""
    guard_fork()
    os.environ.setdefault("ICECHUNK_LOG", "off")
    try:
        import icechunk as module
    except ImportError as error:
        # Of a library that the system would not open, the loader tells only in words.
        refused = _of_environment(str(error), "load icechunk", "this process")
        if refused is None:
            raise
        raise refused from error

    _fork["imported"] = True
    return module


def configuration() -> Any:
    """The configuration of every repository of ours, given at every open.

    No chunk lies inside a manifest, manifests of what grows are cut (`GROWING`), none is read
    ahead: appends and opening stay independent of the number of adapters. Those that are kept in
    memory (`CACHED_CHUNKS`) are few: who reads all versions meets many.
    """
    ice = icechunk()
    config = ice.RepositoryConfig.default()
    config.caching = ice.CachingConfig(num_chunk_refs=CACHED_CHUNKS)
    config.inline_chunk_threshold_bytes = 0
    config.manifest = ice.ManifestConfig(
        splitting=ice.ManifestSplittingConfig.from_dict(
            {
                ice.ManifestSplitCondition.path_matches(f"^/{array}$"): {
                    ice.ManifestSplitDimCondition.Axis(axis): chunks
                }
                for array, (axis, chunks) in GROWING.items()
            }
        ),
        preload=ice.ManifestPreloadConfig(
            max_total_refs=0, preload_if=ice.ManifestPreloadCondition.false()
        ),
    )
    return config


def storage(url: str) -> Any:
    """The icechunk storage of the repository inside a store."""
    ice = icechunk()
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return ice.s3_storage(
            bucket=bucket,
            prefix=f"{prefix.strip('/')}/ice".lstrip("/"),
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            endpoint_url=endpoint,
            allow_http=bool(endpoint and endpoint.startswith("http://")),
            force_path_style=endpoint is not None,
            from_env=True,
        )
    return ice.local_filesystem_storage(str(Path(url) / "ice"))


def open_repository(url: str) -> Any:
    """The icechunk repository of the store at `url`, with our configuration.

    Raises:
        NotFoundError: there is none.
        IntegrityError: there is one, but the file of its branch main is lost or damaged.
        StorageError: this process may not open the files, or use the memory, that icechunk needs.
    """
    if not url.startswith("s3://") and not (Path(url) / "ice").is_dir():
        # icechunk would make the folder.
        raise _no_store(url)
    _require_resources(url)
    try:
        with translated("open the store", url):
            repository = icechunk().Repository.open(storage(url), configuration())
            _runs["threads"] = True
            return repository
    except NotFoundError as error:
        # icechunk looks for the file of main alone to tell whether there is a repository.
        if url.startswith("s3://") or not (Path(url) / "ice" / "refs").is_dir():
            raise
        raise IntegrityError(
            what="branch", name="main", expected="the id of a version", found="no file"
        ) from error


def _require_resources(url: str) -> None:
    """Without some files and memory the threads of icechunk begin in a panic, or hang."""
    if _runs["threads"]:
        return
    doing = "open the store"
    try:
        handles, room = _free_handles(), _free_address_space()
    except OSError as error:
        raise of_os_error(error, doing, url) from error
    if handles < HANDLES:
        raise of_os_error(OSError(errno.EMFILE, ""), doing, url)
    if room < MEMORY_BYTES:
        raise _out_of_memory(doing, url)


def _free_handles() -> float:
    """How many more files this process may open."""
    if sys.platform != "linux":
        return float("inf")
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most - sum(1 for _ in Path("/proc/self/fd").iterdir())


def _free_address_space() -> float:
    """How many more bytes of memory this process may ask for, by the limit that was set for it."""
    if sys.platform != "linux":
        return float("inf")
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return float("inf")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return most - pages * resource.getpagesize()


def create_repository(url: str) -> Any:
    """A new icechunk repository for a store at `url`, in format 1, which both 1.x and 2.x read.

    No configuration is stored in it: it is given at every open, and a file that nobody reads cannot
    be damaged.
    """
    ice = icechunk()
    with translated("create the store", url):
        if hasattr(ice, "SpecVersion"):
            ice.Repository.create(storage(url), spec_version=1)
        else:
            ice.Repository.create(storage(url))
    return open_repository(url)


def manifests(repository: Any, version: str) -> frozenset[str]:
    """Ids of the manifests that a version uses."""
    if hasattr(repository, "list_manifest_files"):
        listed = repository.list_manifest_files(version)
    else:
        listed = repository.lookup_snapshot(version).manifests
    return frozenset(str(manifest.id) for manifest in listed)


@contextlib.contextmanager
def translated(doing: str, where: str) -> Iterator[None]:
    """Errors of icechunk, zarr and the system inside the block, as errors of ours.

    `doing` says what was tried ("read values of 'photo'"), `where` is the store.
    """
    # zarr and its codecs report what does not decode, and metadata that do not parse, in any of
    # `_UNREADABLE`; our own errors pass through.
    try:
        yield
    except MemtoolError:
        raise
    except icechunk().ConflictError as error:
        raise _conflict(doing, where) from error
    except icechunk().IcechunkError as error:
        raise _of_message(_told(error), doing, where) from error
    except OSError as error:
        raise of_os_error(error, doing, where) from error
    except MemoryError as error:
        raise _out_of_memory(doing, where) from error
    except ImportError as error:
        refused = _of_environment(str(error), doing, where)
        if refused is None:
            raise
        raise refused from error
    except _UNREADABLE as error:
        refused = _of_environment(str(error), doing, where)
        if refused is not None:
            raise refused from error
        raise IntegrityError(
            what="store", name=where, expected=f"to {doing}", found=_first_line(str(error))
        ) from error
    except BaseException as error:
        # Some damaged metadata make the Rust code of icechunk panic; that has no class of its own.
        if not type(error).__module__.startswith("pyo3_"):
            raise
        refused = _of_environment(str(error), doing, where)
        if refused is not None:
            raise refused from error
        raise IntegrityError(
            what="store",
            name=where,
            expected=f"to {doing}",
            found=f"what icechunk fails on: {error}",
        ) from error


@contextlib.contextmanager
def looking_up(repository: Any, *versions: str) -> Iterator[None]:
    """Inside the block, "snapshot not found" is said only of these versions that are not there.

    All calls of icechunk but `lookup_snapshot` say it also where the system refused to read one.
    """
    try:
        yield
    except icechunk().IcechunkError as error:
        if "snapshot not found" in _told(error).lower():
            for version in versions:
                repository.lookup_snapshot(version)
        raise


def of_os_error(error: OSError, doing: str, where: str) -> MemtoolError:
    """An error of the system as one of ours."""
    told = StorageError(f"could not {doing} in {where}: {error}")
    return _of_errno(error.errno, doing, where) or told


def _of_errno(code: int | None, doing: str, where: str) -> StorageError | None:
    """What the system refused for its own reasons: it says nothing of the bytes of a store."""
    match code:
        case errno.ENOSPC | errno.EDQUOT:
            return disk_full(doing, where)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return _not_permitted(doing, where)
        case errno.EFBIG:
            return _too_large(doing, where)
        case errno.EMFILE | errno.ENFILE:
            return StorageError(
                f"could not {doing} in {where}: too many open files",
                remedy="more files for each process (`ulimit -n 4096`), then again",
            )
        case errno.ENOMEM | errno.EAGAIN:
            return _out_of_memory(doing, where)
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.ENODEV | errno.ENXIO:
            return StorageError(
                f"could not {doing} in {where}: the disk did not answer ({os.strerror(code)})",
                transient=True,
                remedy="run it again; if that does not help, look at the disk (`dmesg`)",
            )
    return None


def _out_of_memory(doing: str, where: str) -> StorageError:
    return StorageError(
        f"could not {doing} in {where}: not enough memory, or too many threads",
        remedy="end other programs, or take away the limit (`ulimit -v unlimited`), then again",
    )


_IN_WORDS = (
    (r"too many open files", errno.EMFILE),
    (r"cannot allocate memory|out of memory|unable to allocate|failed to map", errno.ENOMEM),
    (r"no space left|quota exceeded", errno.ENOSPC),
    (r"permission denied|read-only file system", errno.EACCES),
    (r"file too large", errno.EFBIG),
    (r"input/output error", errno.EIO),
    (r"stale (nfs )?file handle", errno.ESTALE),
    (r"can't start new thread|failed to spawn", errno.EAGAIN),
)


def _of_environment(text: str, doing: str, where: str) -> StorageError | None:
    """The refusal of the system that a message tells of, by its number or in words."""
    lower = text.lower()
    codes = [int(code) for code in re.findall(r"os error (\d+)", lower)]
    codes += [code for words, code in _IN_WORDS if re.search(words, lower)]
    told = (_of_errno(code, doing, where) for code in codes)
    return next((error for error in told if error is not None), None)


def disk_full(doing: str, where: str, needed_bytes: int | None = None) -> StorageError:
    """The disk has no room: says how much is free, and what was needed where that is known."""
    free = shutil.disk_usage(_existing(where)).free
    need = f", {needed_bytes:,} bytes needed" if needed_bytes is not None else ""
    return StorageError(
        f"could not {doing}: the disk of {where} is full ({free:,} bytes free{need}); "
        "the last version is as it was",
        remedy="free some space, or `memtool gc --keep-last 10`",
    )


def _existing(where: str) -> Path:
    path = Path(where)
    while not path.exists():
        path = path.parent
    return path


def _not_permitted(doing: str, where: str) -> StorageError:
    if doing.startswith(("read", "find", "list", "open", "load", "verify")):
        verb, remedy = "read", "the permissions of the files there (`ls -l`), or another user"
    else:
        verb, remedy = "write", "make the folder writable, or `clone` the store to one that is"
    return StorageError(
        f"could not {doing}: no permission to {verb} in {where}",
        remedy=remedy,
    )


def _too_large(doing: str, where: str) -> StorageError:
    return StorageError(
        f"could not {doing}: a file in {where} would be larger than this process may write; "
        "the last version is as it was",
        remedy="ulimit -f unlimited",
    )


def _no_store(where: str) -> NotFoundError:
    return NotFoundError(
        f"no store at {where}",
        remedy="memtool write makes one, from adapters of memtool train-adapter",
    )


def _conflict(doing: str, where: str) -> ConflictError:
    return ConflictError(
        f"could not {doing}: another writer committed to {where} first; nothing was stored",
        remedy="run it again, or use store.run(function, message), which does so by itself",
    )


def _first_line(text: str) -> str:
    """The heart of an icechunk report, without its drawing and call stack."""
    lines = [line.strip(" x×|│├╰─▶`->") for line in text.splitlines()]
    return next((line for line in lines if line), "an error without a message")


def _told(error: Any) -> str:
    """What an icechunk error says: its message and, in 2.x, its kind in words."""
    kind = str(getattr(error, "kind", "")).replace("-", " ")
    return f"{error}\n{kind}"


_NO_ANSWER = (
    r"timed? ?out|timeout|connection|dispatch failure|unavailable|slow ?down|throttl|internalerror"
)


def _of_message(text: str, doing: str, where: str) -> MemtoolError:
    """The one place that reads the messages of icechunk 1.x and the kinds of 2.x."""
    brief = _first_line(text)
    lower = text.lower()
    refused = _of_environment(text, doing, where) or clock.of_message(text, doing, where)
    if refused is not None:
        return refused
    if "branch update conflict" in lower:
        return _conflict(doing, where)
    if "clean prefixes" in lower:
        return AlreadyExistsError(
            f"could not {doing}: there are files at {where} already",
            remedy="another place, or first delete what is there",
        )
    if "tag already exists" in lower:
        return AlreadyExistsError(
            f"could not {doing}: that tag is taken, or was used before; a tag never moves",
            remedy="choose another name",
        )
    if re.search(r"repository doesn.t exist", lower):
        return _no_store(where)
    if re.search(r"(ref|snapshot|branch|tag) not found|invalid snapshot id", lower):
        return NotFoundError(f"could not {doing} in {where}: {brief}")
    if re.search(_NO_ANSWER, lower):
        return StorageError(
            f"could not {doing} in {where}: {brief}", transient=True, remedy="run it again"
        )
    wrong = (
        r"magic|flatbuffer|serializ|decod|decompress|invalid|corrupt|not found|cannot be found|"
        r"cannot read|only supports|format error"
    )
    # What is cut short or does not decompress is an "I/O error" too, but not one of the system.
    unpacking = "i/o error" in lower and ("::fetch_" in lower or "os error" not in lower)
    if unpacking and _free_address_space() < SCARCE_BYTES:
        return _out_of_memory(doing, where)
    if re.search(wrong, lower) or unpacking:
        return IntegrityError(what="store", name=where, expected=f"to {doing}", found=brief)
    return StorageError(f"could not {doing} in {where}: {brief}")


def sync_to_disk(folder: Path) -> None:
    """Everything written to the file system of `folder` so far is on the disk when this returns.

    icechunk names its files at random and tells nobody, so the new ones cannot be synced one by one
    without listing all. Linux has a call for a whole file system; elsewhere the listing is paid.

    Raises:
        StorageError: the system reports that a write failed.
    """
    try:
        if sys.platform == "linux":
            handle = os.open(folder, os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).syncfs(handle):
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))
            finally:
                os.close(handle)
        else:
            for path in (folder, *folder.rglob("*")):
                if path.is_file() or os.name == "posix":
                    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
                    try:
                        os.fsync(handle)
                    finally:
                        os.close(handle)
    except OSError as error:
        raise of_os_error(error, "bring a commit to the disk", str(folder)) from error
