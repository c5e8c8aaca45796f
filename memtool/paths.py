"""Addresses and paths, as settings write them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtool.errors import ConfigError
from memtool_stores.printable import printable, shown
from memtool_stores.redacted import redacted


def split_store(store: str) -> tuple[str, str]:
    """`"memory@HEAD~1"` as address and version; the version is HEAD when none is named.

    What is there as written is an address. Else it ends at the last `@` after the last `/`, so that
    `here@home/` and `user@host/memory` are addresses, too.
    """
    folder, slash, name = store.rpartition("/")
    if "@" not in name or _is_there(store):
        return store, "HEAD"
    name, _, version = name.rpartition("@")
    return folder + slash + name, version or "HEAD"


def _is_there(store: str) -> bool:
    """Whether there is anything at a path; at text that no path can be there is nothing."""
    try:
        return os.path.lexists(os.path.expanduser(store))  # noqa: PTH111 - any text
    except ValueError:
        return False


def store_beside(store: str, ending: str) -> str:
    """The setting for a memory beside that of `store`, with `ending` after its name."""
    beside = split_store(store)[0].rstrip("/") + ending
    return f"{beside}/" if "@" in beside.rpartition("/")[2] else beside


def for_others(value: Any) -> Any:
    """Values of JSON, every text in them fit for a record."""
    match value:
        case str():
            return without_home(redacted(value))
        case list():
            return [for_others(one) for one in value]
        case dict():
            return {key: for_others(one) for key, one in value.items()}
    return value


def without_home(text: str) -> str:
    """Text for a record, with `~` for the user's folder: it may go to others."""
    home = os.path.expanduser("~")  # noqa: PTH111 - no error where there is none
    if len(home) < 2 or not home.startswith("/"):
        return text
    return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?=/|$|[\s'\":,@])", "~", text)


def expand(path: Path | str, environ: Mapping[str, str] | None = None) -> Path:
    """The path with `~` and every `${VARIABLE}` replaced.

    Raises ConfigError that names a variable that is not set, or a user whom nobody knows. What a
    variable holds is never said: it may be a secret.
    """
    environ = os.environ if environ is None else environ

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not environ.get(name):
            raise ConfigError(
                f"{printable(str(path))}: the variable {name} is not set",
                remedy=f"export {name}=FOLDER",
            )
        return environ[name]

    return at_home(Path(re.sub(r"\$\{(\w+)\}", value, str(path))))


def at_home(path: Path) -> Path:
    """The path with `~` replaced. Raises ConfigError where there is no such user."""
    try:
        return path.expanduser()
    except (RuntimeError, ValueError) as error:  # ValueError: a name with NUL
        raise ConfigError(
            f"{printable(str(path))}: there is no user {shown(path.parts[0][1:])}",
            expected="~ for your own home, or the name of a user of this machine",
            remedy="write the path out, or ./~ for a folder of that name",
        ) from error
