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

from memtool_stores.errors import (
    AlreadyExistsError,
    ConflictError,
    ForkedProcessError,
    IntegrityError,
    NotFoundError,
    StorageError,
    StoreError,
)

ROWS_PER_MANIFEST = 512
"""Rows of `/values` listed by one manifest file: what makes an append independent of T."""

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
    import icechunk as module

    _fork["imported"] = True
    return module


def configuration() -> Any:
    """The configuration of every repository of ours, given at every open.

    No chunk lies inside a manifest, manifests of `/values` are cut every 512 rows, none is read
    ahead: appends and opening stay independent of the number of adapters.
    """
    ice = icechunk()
    config = ice.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    config.manifest = ice.ManifestConfig(
        splitting=ice.ManifestSplittingConfig.from_dict(
            {
                ice.ManifestSplitCondition.path_matches("^/values$"): {
                    ice.ManifestSplitDimCondition.Axis(0): ROWS_PER_MANIFEST
                }
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
    """
    try:
        with translated("open the store", url):
            return icechunk().Repository.open(storage(url), configuration())
    except NotFoundError as error:
        # icechunk looks for the file of main alone to tell whether there is a repository.
        if url.startswith("s3://") or not (Path(url) / "ice" / "refs").is_dir():
            raise
        raise IntegrityError(
            what="branch", name="main", expected="the id of a version", found="no file"
        ) from error


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
    except StoreError:
        raise
    except icechunk().ConflictError as error:
        raise _conflict(doing, where) from error
    except icechunk().IcechunkError as error:
        raise _of_message(_told(error), doing, where) from error
    except OSError as error:
        raise of_os_error(error, doing, where) from error
    except MemoryError as error:
        raise StorageError(
            f"could not {doing} in {where}: there is not enough memory", transient=True
        ) from error
    except _UNREADABLE as error:
        if "can't start new thread" in str(error):
            raise StorageError(
                f"could not {doing} in {where}: {error}", transient=True, remedy="run it again"
            ) from error
        raise IntegrityError(
            what="store", name=where, expected=f"to {doing}", found=_first_line(str(error))
        ) from error
    except BaseException as error:
        # Some damaged metadata make the Rust code of icechunk panic; that has no class of its own.
        if not type(error).__module__.startswith("pyo3_"):
            raise
        raise IntegrityError(
            what="store",
            name=where,
            expected=f"to {doing}",
            found=f"what icechunk fails on: {error}",
        ) from error


def of_os_error(error: OSError, doing: str, where: str) -> StoreError:
    """An error of the system as one of ours."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return disk_full(doing, where)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return _not_permitted(doing, where)
        case errno.EFBIG:
            return _too_large(doing, where)
        case _:
            return StorageError(f"could not {doing} in {where}: {error}")


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
    return StorageError(
        f"could not {doing}: no permission to write in {where}",
        remedy="make the folder writable, or `clone` the store to one that is",
    )


def _too_large(doing: str, where: str) -> StorageError:
    return StorageError(
        f"could not {doing}: a file in {where} would be larger than this process may write; "
        "the last version is as it was",
        remedy="ulimit -f unlimited",
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


def _of_message(text: str, doing: str, where: str) -> StoreError:
    """The one place that reads the messages of icechunk 1.x and the kinds of 2.x."""
    brief = _first_line(text)
    lower = text.lower()
    if "no space left" in lower or "os error 28" in lower or "quota exceeded" in lower:
        return disk_full(doing, where)
    if "permission denied" in lower or "read-only file system" in lower:
        return _not_permitted(doing, where)
    if "file too large" in lower:
        return _too_large(doing, where)
    if "branch update conflict" in lower:
        return _conflict(doing, where)
    if "tag already exists" in lower:
        return AlreadyExistsError(
            f"could not {doing}: that tag is taken, or was used before; a tag never moves",
            remedy="choose another name",
        )
    if re.search(r"repository doesn.t exist", lower):
        return NotFoundError(
            f"no store at {where}",
            remedy="memtool write makes one, from adapters of memtool train-adapter",
        )
    if re.search(r"(ref|snapshot|branch|tag) not found|invalid snapshot id", lower):
        return NotFoundError(f"could not {doing} in {where}: {brief}")
    if re.search(r"timed? ?out|timeout|connection|dispatch failure|unavailable|slow ?down", lower):
        return StorageError(
            f"could not {doing} in {where}: {brief}", transient=True, remedy="run it again"
        )
    wrong = (
        r"magic|flatbuffer|serializ|decod|decompress|invalid|corrupt|not found|cannot be found|"
        r"cannot read|only supports|format error"
    )
    # What is cut short or does not decompress is an "I/O error" too, but not one of the system.
    unpacking = "i/o error" in lower and ("::fetch_" in lower or "os error" not in lower)
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
