"""What a name says of the part of a data set that it names: training, validation or testing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from memtool_stores.printable import shown

PartName = Literal["training", "validation", "testing"]

_WORDS: dict[str, PartName] = {
    **dict.fromkeys(("train", "training"), "training"),
    **dict.fromkeys(
        ("val", "valid", "validation", "dev", "development", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing"), "testing"),
}
_NAME = re.compile(rf"({'|'.join(_WORDS)})([\W_]*(set|split|part|data|images|imgs|\d+))*[\W_]*")


def part_of(name: str) -> PartName | None:
    """The part that a folder or file of this name holds, whatever its case; None for any other.

    >>> part_of("Training"), part_of("val2017"), part_of("test_set"), part_of("trains")
    ('training', 'validation', 'testing', None)
    """
    found = _NAME.fullmatch(name.strip().casefold())
    return _WORDS[found[1]] if found else None


def alike(names: Iterable[str], what: str) -> list[str]:
    """Sentences on names that differ only in case or white space, which may be meant as one."""
    same = defaultdict(list)
    for name in names:
        same["".join(name.split()).casefold()].append(name)
    found = [group for group in same.values() if len(group) > 1]
    if not found:
        return []
    groups = "; ".join(", ".join(map(shown, group)) for group in found[:5])
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return [f"{what} that differ only in case or white space are kept apart: {groups}{more}"]


def listed(counts: Iterable[tuple[str, int]], most: int = 8) -> str:
    """`"photo (12), sketch (7) and 3 more"`."""
    words = [f"{word} ({count:,})" for word, count in counts]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
