"""Stores in repositories of the Hugging Face Hub: `hf://user/name`, which can be read.

A repository holds the files of a store below `memory/`, as `memtool push` put them there, in one
commit a push. To read it they are brought to the cache of the hub on this machine, which keeps what
it has: of a newer commit only new files are fetched, without a network the last one fetched is read
(`HF_HUB_OFFLINE=1`). That cache is made of links, which a store never follows out of its folder: a
commit becomes a folder of its own beside our other caches, of the same bytes on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from memtool_stores import caches
from memtool_stores.errors import MemtoolError, NotFoundError, SchemaError, StorageError
from memtool_stores.files import is_part, part_folder
from memtool_stores.ice import of_os_error

SCHEME = "hf://"
FOLDER = "memory"
"""Where in a repository the files of its store lie."""

KNOWN_SECONDS = 10.0
"""So long the newest commit is not asked for again: a command opens its store several times."""

KEEP_COMMITS = 3
"""Folders of older commits that stay when a new one is made: somebody may be reading them."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

_fetched: dict[tuple[str, str], tuple[Path, float]] = {}
"""By endpoint and repository: where its newest commit lies, and when that was asked."""
_addresses: dict[str, str] = {}
"""By folder: the repository that it is a copy of."""


def is_hub(url: str) -> bool:
    """Whether this is the address of a repository; a Path that was made of one lost a slash."""
    return url.startswith("hf:/")


def repository_of(text: str) -> str:
    """`user/name` of that, or of `hf://user/name`.

    Raises:
        SchemaError: it is no name of a repository.
    """
    name = re.sub(r"^hf:/{1,2}", "", text).rstrip("/")
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".")):
        raise SchemaError(
            f"{text} names no repository of the Hugging Face Hub",
            expected=f"user/name, as a store {SCHEME}user/name or {SCHEME}user/name@VERSION",
        )
    return name


def endpoint() -> str:
    """The hub that is asked: $HF_ENDPOINT, else huggingface.co."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def api() -> Any:
    """The client of the hub, with the token of $HF_TOKEN or `hf auth login`."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), library_name="memtool")


def copy_of(url: str) -> str:
    """The folder on this machine that holds the store of a repository, as of its newest commit.

    Raises:
        NotFoundError: no such repository, or no store in it.
        StorageError: no answer, or no permission.
    """
    repository = repository_of(url)
    known = _fetched.get((endpoint(), repository))
    if known is None or time.monotonic() - known[1] > KNOWN_SECONDS or not known[0].is_dir():
        known = _fetch(repository), time.monotonic()
        _fetched[endpoint(), repository] = known
        _addresses[str(known[0])] = SCHEME + repository
    return str(known[0])


def address_of(folder: str) -> str | None:
    """`hf://user/name` of a folder that `copy_of` gave; None of any other."""
    return _addresses.get(folder)


def forget(repository: str) -> None:
    """Ask for the newest commit again the next time: this process has made one."""
    _fetched.pop((endpoint(), repository), None)


def _fetch(repository: str) -> Path:
    with quiet(), answering(f"read {SCHEME}{repository}", repository):
        snapshot = Path(
            api().snapshot_download(repository, allow_patterns=[f"{FOLDER}/*"])
        ).absolute()
    if not (snapshot / FOLDER / "ice" / "refs").is_dir():
        raise NotFoundError(
            f"no memory in {SCHEME}{repository}",
            expected=f"a repository with a folder {FOLDER}/, as `memtool push` makes it",
        )
    return _folder_of_files(repository, snapshot)


def _folder_of_files(repository: str, snapshot: Path) -> Path:
    """The files of a commit in the cache of the hub, not links to them; made once, whole."""
    folder = _cache(repository) / snapshot.name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = part_folder(folder)
        try:
            for link in (snapshot / FOLDER).rglob("*"):
                if link.is_file():
                    file = building / link.relative_to(snapshot / FOLDER)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    _same_bytes(link.resolve(), file)
            with contextlib.suppress(OSError):  # another process has made it
                building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        caches.remove_parts(folder.parent)
        others = [one for one in folder.parent.iterdir() if one != folder and not is_part(one.name)]
        for old in sorted(others, key=lambda one: one.stat().st_mtime)[:-KEEP_COMMITS]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise of_os_error(error, f"keep a copy of {SCHEME}{repository}", str(folder)) from error
    return folder


def _same_bytes(source: Path, file: Path) -> None:
    try:
        file.hardlink_to(source)
    except OSError:  # another file system, or one without
        shutil.copyfile(source, file)


def _cache(repository: str) -> Path:
    """Where the commits of a repository lie, a folder each."""
    host = hashlib.sha256(endpoint().encode()).hexdigest()[:8]
    return caches.root() / "hub" / host / repository.replace("/", "--")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the client shows no bars of its own and logs no requests."""
    import logging

    # As documented; the module does not list them for a type checker.
    bars: Any = import_module("huggingface_hub.utils")
    log = logging.getLogger("huggingface_hub")
    before, had_bars = log.level, not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
        if had_bars:
            bars.enable_progress_bars()


@contextmanager
def answering(doing: str, repository: str) -> Iterator[None]:
    """Inside, what the hub or the client of it says becomes an error of ours; no secret is in it.

    Raises:
        NotFoundError: there is no such repository, or the token at hand may not see it.
        StorageError: no token, no permission, or no answer.
    """
    from huggingface_hub import errors

    below = _errors_below()
    caught: tuple[type[Exception], ...] = (*below, RuntimeError)

    try:
        yield
    except MemtoolError:
        raise
    except errors.GatedRepoError as error:
        raise StorageError(
            f"could not {doing}: its owner has not given you access",
            remedy=f"ask for it at {endpoint()}/{repository}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"could not {doing}: there is no repository {repository} at {endpoint()}, or it is "
            "private and the token at hand may not see it",
            remedy="check the name; for a private one `hf auth login`, or export HF_TOKEN",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(doing, error) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _no_answer(doing) from error
    except caught as error:
        refusal = _cause(error, errors.HfHubHTTPError)
        if refusal is not None:
            raise _refused(doing, refusal) from error
        if isinstance(error, RuntimeError) and _cause(error, below) is None:
            raise
        raise _no_answer(doing) from error


def _errors_below() -> tuple[type[Exception], ...]:
    """What the library below the client raises where nobody answers: which it is follows its own.

    One of httpx or requests, by the version of the client.
    """
    from huggingface_hub.errors import HfHubHTTPError

    found = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (*(kind for kind in found if issubclass(kind, Exception)), OSError)


def _cause(error: BaseException, kind: Any) -> Any:
    """The first of the errors that led to this one that is of a kind; None for none."""
    at: BaseException | None = error
    while at is not None and not isinstance(at, kind):
        at = at.__cause__ or at.__context__
    return at


def _refused(doing: str, error: Any) -> MemtoolError:
    """What the hub answered, in our words."""
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return StorageError(
            f"could not {doing}: {endpoint()} does not permit it with the token at hand"
            if _has_token()
            else f"could not {doing}: {endpoint()} asks for a token, and there is none",
            remedy="`hf auth login` with a token that may write, or export HF_TOKEN",
        )
    said = getattr(error, "server_message", None) or f"status {status}"
    return StorageError(
        f"could not {doing}: {endpoint()} answered: {said}",
        transient=status is None or status >= 500 or status == 429,
        remedy="run it again later" if status is None or status >= 429 else None,
    )


def _no_answer(doing: str) -> StorageError:
    return StorageError(
        f"could not {doing}: no answer from {endpoint()}",
        transient=True,
        remedy="check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), then run it again",
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
