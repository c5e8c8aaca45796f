"""The files that the page on methods of one's own shows, as a reader would save them."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/your-own-method.md"
METHOD = "nearest_mean.py:NearestMean"

SHOWN = re.compile(r"<!-- file (?P<name>\S+) -->\n```\w+\n(?P<content>.*?)^```$", re.S | re.M)


def shown_file(name: str) -> str:
    """What the page shows of one file."""
    found = {
        one["name"]: one["content"] for one in SHOWN.finditer(PAGE.read_text(encoding="utf-8"))
    }
    return found[name]


def write_shown(folder: Path) -> list[Path]:
    """Write every file of the page into a folder; their paths."""
    paths = []
    for one in SHOWN.finditer(PAGE.read_text(encoding="utf-8")):
        paths.append(folder / one["name"])
        paths[-1].write_text(one["content"], encoding="utf-8")
    return paths
