"""What a name that comes from a file may be, and how a path is made of one.

Adapters, blobs, tags, branches and stores are named by people and by files that people send each
other. A name is checked when it is added and again when it is read, and no path is made of one but
by `below`. There are three kinds:

  name   an adapter, a row of atoms: text that is also one part of a path
  ref    a tag, a branch, a blob: ASCII without spaces, and no way to write a version
  id     a store, a row: a ULID
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from memtool_stores.errors import SchemaError
from memtool_stores.printable import shown

NAME_BYTES = 200
"""Longest name, as UTF-8: file systems take 255, and files in the making add to it."""

_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_VERSION_ID = re.compile(r"[0-9A-HJKMNP-TV-Z]{20}")
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


def check_name(name: object, kind: str) -> str:
    """The name, when an adapter or whatever `kind` says can have it.

    Raises:
        SchemaError: it is no text, empty, too long, cannot be printed, or is no part of a path.
    """
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not 0 < len(name.encode()) <= NAME_BYTES
        or name != name.strip()
        or name[0] in ".-"
        or "/" in name
        or "\\" in name
    ):
        raise SchemaError(
            f"{shown(name)} cannot be the name of {kind}",
            expected=f"printable text of at most {NAME_BYTES} bytes without / and \\, not "
            "beginning with a dot, a dash or a space",
        )
    return name


def check_ref(name: object, kind: str) -> str:
    """The name, when a tag, a branch or a blob can have it.

    Raises:
        SchemaError: it has other characters, or reads as another way to name a version.
    """
    if (
        not isinstance(name, str)
        or not _REF.fullmatch(name)
        or name == "HEAD"
        or is_version_id(name)
    ):
        raise SchemaError(
            f"{shown(name)} cannot be the name of a {kind}",
            expected="letters, digits, '.', '_' and '-', at most 100, beginning with one of the "
            "first two; not HEAD, not a version id",
        )
    return name


def check_id(id: object, kind: str) -> str:
    """The id, when it is a ULID: 26 characters of Crockford's base 32.

    Raises:
        SchemaError: it is not.
    """
    if not isinstance(id, str) or not _ULID.fullmatch(id):
        raise SchemaError(
            f"{shown(id)} cannot be the id of {kind}",
            expected="a ULID: 26 digits and capital letters without I, L, O and U",
        )
    return id


def is_version_id(text: str) -> bool:
    """Whether this is how a version is written in full."""
    return bool(_VERSION_ID.fullmatch(text))


def check_path(path: object, kind: str) -> str:
    """A relative path with `/`, as files of a store and of a bundle have.

    Raises:
        SchemaError: it is absolute, leads up, or has a part that no file of ours has.
    """
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or not all(
        part.isprintable() and 0 < len(part.encode()) <= 255 and part[0] != "." and "\\" not in part
        for part in parts
    ):
        raise SchemaError(
            f"{shown(path)} cannot be the path of {kind}",
            expected="names between single slashes, none beginning with a dot",
        )
    return str(path)


def below(folder: Path, *names: str) -> Path:
    """The path of these names under `folder`, which it cannot leave, by links neither.

    Raises:
        SchemaError: it would.
    """
    path = folder.joinpath(*names)
    inside = all(PurePosixPath(name).name == name and name not in {"", ".."} for name in names)
    if not inside or not path.resolve().is_relative_to(folder.resolve()):
        raise SchemaError(
            f"{shown('/'.join(names))} leads out of {folder}",
            expected="a name of one part, and no link to elsewhere",
        )
    return path
