"""Text from a file on its way to a person: what steers a terminal is shown, not done."""

from __future__ import annotations

import re
from typing import Any

SHOWN_CHARACTERS = 80

_LINE_END = re.compile(r"\s*[\n\r]\s*")


def printable(text: str) -> str:
    r"""The text with every character that has no picture of its own as its escape.

    Control characters, line ends, tabs, marks that turn the direction of writing, and halves of
    surrogate pairs: `"\x1b[2J"` comes out as the six characters `\x1b[2J`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The text as an error says it: printable, with a space for every end of a line."""
    return printable(_LINE_END.sub(" ", text.strip()))


def shown(value: Any) -> str:
    """Any value as an error names it: quoted where it is text, printable, and not too long."""
    text = printable(repr(value))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 2]}…{text[-1]}"
