"""Forms with files, parsed in memory: a request is no larger than is allowed, and whole."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILE = b"file"
"""The field of pictures."""

MOST_FIELDS = 16
"""Fields beside the files."""

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
    line = options.get(b"boundary")
    if not line:
        raise HTTPException(400, "the form has no boundary in its Content-Type")
    reader = _Reader(most)
    try:
        parser = MultipartParser(line, reader.callbacks)
        parser.write(body)
    except FormParserError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from error
    if not reader.ended:
        raise HTTPException(400, "the form ends in the middle")
    return reader.form


class _Reader:
    """Takes the parts of a form as the parser finds them."""

    def __init__(self, most: int) -> None:
        self.form = Form()
        self.ended = False
        self._most = most
        self._others = 0
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []

    @property
    def callbacks(self) -> MultipartCallbacks:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._whole,
        }

    def _begin(self) -> None:
        self._headers, self._parts = {}, []

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._parts.append(data[start:end])

    def _end(self) -> None:
        line = self._headers.get(b"content-disposition", b"")
        if _BROKEN.search(line):
            raise HTTPException(400, "the form cannot be read: a line break or NUL in a header")
        _, about = parse_options_header(line)
        name, data = about.get(b"name", b""), b"".join(self._parts)
        if not name:
            raise HTTPException(400, "a part of the form has no name in its Content-Disposition")
        if name == FILE:
            if len(self.form.files) >= self._most:
                raise HTTPException(413, f"more than {self._most} files: a request has no more")
            number = len(self.form.files) + 1
            told = about.get(b"filename", b"").decode(errors="replace")
            self.form.files.append((told or f"file {number}", data))
            return
        self._others += 1  # also of one name, of which the last counts
        if self._others > MOST_FIELDS:
            raise HTTPException(400, f"more than {MOST_FIELDS} fields beside the files")
        self.form.fields[name.decode(errors="replace")] = data.decode(errors="replace")

    def _whole(self) -> None:
        self.ended = True
