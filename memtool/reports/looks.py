"""How a method looks: one colour, one shape and one dash wherever it is drawn, in every report.

The colours are Okabe and Ito's, told apart by the colour-blind; there are more methods than
colours, so shape and dash go on where they repeat.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memtool.evaluation.summary import RowSummary

INK = "currentColor"
OWN = "#0072b2"
"""The colour of the method that a record is of, and of no other row."""
COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
DASHES = ((1, 0), (6, 2), (2, 2), (8, 2, 2, 2), (4, 4), (10, 3))

# A place of its own for what is often seen together: neighbours differ in colour.
_FAMILIES = (
    "sequential",
    "frozen",
    "ewc",
    "uniform",
    "lwf",
    "routed",
    "zero-shot",
    "joint",
    "oracle",
    "exact",
    "memory-nonnegative",
    "hard",
    "er",
    "der++",
    "l2p",
    "dual-prompt",
    "coda-prompt",
    "s-prompts",
    "slca",
    "o-lora",
    "inf-lora",
    "sd-lora",
    "moe-lora",
    "ease",
    "mos",
    "tuna",
    "fsa",
    "aper",
    "ranpac",
    "rail",
)
_HEADS = ("lda", "ridge", "ncm", "linear", "fixed", "routed")


@dataclass(frozen=True)
class Look:
    """The colour, shape and dash of a method, as Vega names them."""

    colour: str
    shape: str
    dash: tuple[int, ...]
    width: float


def look_of(row: RowSummary) -> Look:
    """The look of a row, by its id alone; upper bounds are dashed and in the colour of text."""
    family, _, head = row.id.partition("-")
    if row.id in _FAMILIES:
        family, head = row.id, ""
    elif (
        long := next((one for one in _FAMILIES if row.id.startswith(f"{one}-")), None)
    ) is not None:
        family, head = long, row.id[len(long) + 1 :]
    if row.kind == "method" and not row.reading:
        place = 0 if row.id == "memory" else 1 + zlib.crc32(row.id.encode()) % 5
        return Look(OWN, SHAPES[place], DASHES[place], 2.6)
    if row.kind == "upper bound":
        place = zlib.crc32(row.id.encode()) % len(SHAPES)
        return Look(INK, SHAPES[place], (4, 3), 1.2)
    place = _FAMILIES.index(family) if family in _FAMILIES else zlib.crc32(family.encode())
    of_head = _HEADS.index(head) + 1 if head in _HEADS else zlib.crc32(head.encode()) if head else 0
    colour = COLOURS[place % len(COLOURS)]
    shape = SHAPES[(place // len(COLOURS) + of_head) % len(SHAPES)]
    dash = DASHES[(place // len(COLOURS) + of_head) % len(DASHES)]
    return Look(colour, shape, dash, 1.3)


def scales(rows: Sequence[RowSummary], names: Sequence[str]) -> dict[str, Any]:
    """The scales of colour, shape and dash that give rows called `names` their looks."""
    looks = [look_of(row) for row in rows]
    return {
        "color": {"domain": list(names), "range": [look.colour for look in looks]},
        "shape": {"domain": list(names), "range": [look.shape for look in looks]},
        "strokeDash": {"domain": list(names), "range": [list(look.dash) for look in looks]},
    }
