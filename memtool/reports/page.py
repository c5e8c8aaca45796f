"""What every HTML page is made with: the templates and their filters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memtool.reports.table import MISSING
from memtool_stores.printable import printable

_SPACES = ("\u00a0", "\u2009")  # what a page sets between a number and its unit
_SPACED = re.compile(f"([{''.join(_SPACES)}])")


@dataclass(frozen=True)
class Picture:
    """A plot with its caption."""

    svg: Markup
    caption: str


def templates() -> Environment:
    """The templates of this package; text is escaped, a missing name is an error."""
    environment = Environment(
        loader=PackageLoader("memtool.reports"),
        autoescape=True,
        finalize=_seen,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["minus"] = _minus
    return environment


def _seen(value: Any) -> Any:
    """Text with the escape of every character that would hide or turn what stands beside it."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(part if part in _SPACES else printable(part) for part in _SPACED.split(value))


def _minus(text: str) -> str:
    """A dash for what is missing, a minus sign before numbers; hyphens in words stay."""
    return "–" if text == MISSING else re.sub(r"(?<!\w)-(?=\d)", "−", text)
