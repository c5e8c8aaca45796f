"""Forms with files, read in memory: a request is no larger than is allowed, and whole.

RFC 7578 and 2046: parts between lines of `--boundary`, each with headers, an empty line and its
bytes. As a body is at hand whole, a part ends where the next line is found, whatever is in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

FILE = b"file"
"""The field of pictures."""

MOST_FIELDS = 16
"""Fields beside the files."""

MOST_HEADER_BYTES = 16 * 1024
"""The headers of one part."""

_USUAL = re.compile(rb'form-data; name="([^"\\]*)"(?:; filename="([^"\\]*)")?')
"""What clients write; all else is read by the rules of its grammar."""

_BROKEN = re.compile(rb"[\0\r\n]")
"""What no line of headers holds."""


@dataclass
class Form:
    """What a form holds: the name and bytes of every file, and its other fields as text."""

    files: list[tuple[str, bytes]] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)


def parsed(body: bytes, content_type: str, *, most: int) -> Form:
    """The form in a body. Raises HTTPException for one that is none, ends early, or has too much.

    It may have `most` files.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise HTTPException(400, "the form has no boundary in its Content-Type")
    line = b"\r\n--" + boundary
    form, others = Form(), 0
    at = _first(body, line)
    while body[at : at + 2] != b"--":
        begin, head = _headers(body, at)
        end = body.find(line, begin)
        if end < 0:
            raise HTTPException(400, "the form ends in the middle")
        name, told = _named(head)
        if not name:
            raise HTTPException(400, "a part of the form has no name in its Content-Disposition")
        if name == FILE:
            number = len(form.files) + 1
            if number > most:
                raise HTTPException(413, f"more than {most} files: a request has no more")
            form.files.append((told.decode(errors="replace") or f"file {number}", body[begin:end]))
        else:
            others += 1  # also of one name, of which the last counts
            if others > MOST_FIELDS:
                raise HTTPException(400, f"more than {MOST_FIELDS} fields beside the files")
            text = body[begin:end].decode(errors="replace")
            form.fields[name.decode(errors="replace")] = text
        at = end + len(line)
    return form


def _first(body: bytes, line: bytes) -> int:
    """Where the first line of the boundary ends."""
    if body.startswith(line[2:]):
        return len(line) - 2
    before = body.find(line)  # what stands before it counts for nothing
    if before < 0:
        raise HTTPException(400, "the form cannot be read: no line of its boundary")
    return before + len(line)


def _headers(body: bytes, at: int) -> tuple[int, bytes]:
    """Where the bytes of a part begin, and its headers; `at` is behind its boundary."""
    end = body.find(b"\r\n\r\n", at, at + MOST_HEADER_BYTES)
    if end < 0:
        if len(body) - at < MOST_HEADER_BYTES:
            raise HTTPException(400, "the form ends in the middle")
        raise HTTPException(400, "the form cannot be read: headers without an end")
    rest, _, head = body[at : end + 2].partition(b"\r\n")
    if rest.strip(b" \t"):
        raise HTTPException(400, "the form cannot be read: a boundary and something behind it")
    return end + 4, head


def _named(head: bytes) -> tuple[bytes, bytes]:
    """The names of a field and of its file, empty where there is none."""
    lines = head.split(b"\r\n")
    if any(_BROKEN.search(one) for one in lines):
        raise HTTPException(400, "the form cannot be read: a line break or NUL within a header")
    for one in lines:
        name, _, value = one.partition(b":")
        if name.strip().lower() == b"content-disposition":
            usual = _USUAL.fullmatch(value.strip())
            if usual is not None:
                return usual[1], usual[2] or b""
            _, about = parse_options_header(value.strip())
            return about.get(b"name", b""), about.get(b"filename", b"")
    return b"", b""
