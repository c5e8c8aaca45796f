"""Text from a file on its way to a person: what steers a terminal is shown, not done."""

from __future__ import annotations

import re
from typing import Any

SHOWN_CHARACTERS = 80

_LINE_END = re.compile(r"\s*[\n\r]\s*")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,16}\b")
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"-|[-+]?(\d[\d.,]*|\.\d+)(e[-+]?\d+)?( ?%)?", re.IGNORECASE | re.ASCII)


def printable(text: str) -> str:
    r"""The text with every character that has no picture of its own as its escape.

    Control characters, line ends, tabs, marks that turn the direction of writing, and halves of
    surrogate pairs: `"\x1b[2J"` comes out as the six characters `\x1b[2J`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_addresses(text: str) -> str:
    """The text without where objects lie in memory: they say nothing, and differ every time.

    >>> without_addresses("no loader for <csv.reader object at 0x7f3a90c1b2d0>")
    'no loader for <csv.reader object>'
    """
    return _ADDRESS.sub("", text)


def one_line(text: str) -> str:
    """The text as an error says it: printable, with a space for every end of a line.

    Where objects lie in memory is left out.
    """
    return printable(without_addresses(_LINE_END.sub(" ", text.strip())))


def shown(value: Any) -> str:
    """Any value as an error names it: quoted where it is text, printable, and not too long."""
    text = printable(without_addresses(repr(value)))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 2]}…{text[-1]}"


def printable_json(document: str) -> str:
    r"""JSON that means the same, with `\\u202e` and the like for what `printable` would escape."""
    if document.isprintable():
        return document
    return "".join(c if c.isprintable() or c == "\n" else _units(c) for c in document)


def _units(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))


def as_cell(text: str) -> str:
    """The text as a cell of a file that spreadsheets open: `'` before what they would compute.

    Numbers and the dash for a missing one stay as they are. `from_cell` gives the text back.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """The text of a cell that `as_cell` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
