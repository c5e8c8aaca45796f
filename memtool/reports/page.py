"""What every HTML page is made with: the templates and their filters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memtool.reports.table import MISSING


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
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["minus"] = _minus
    return environment


def _minus(text: str) -> str:
    """A dash for what is missing, a minus sign before numbers; hyphens in words stay."""
    return "–" if text == MISSING else re.sub(r"(?<!\w)-(?=\d)", "−", text)
