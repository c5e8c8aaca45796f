"""Maps of atoms: the page and the plots, whatever the tokens are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memtool.errors import MismatchError
from memtool.reports.atom_map import LINE, write_atom_picture
from memtool.reports.shown import AtomPicture
from memtool.reports.table import Grid

GRID = Grid(title="Weights", header=("atoms of", "all tokens"), rows=(("task-1", "0.5"),))


def picture(*columns: str, title: str = "a prompt") -> AtomPicture:
    """Two atoms of one task and one of another on these tokens."""
    weights = np.random.default_rng(0).random((3, len(columns)))
    return AtomPicture(
        title=title,
        about="norm over the bank",
        tasks=("1 first", "1 first", "2 second"),
        weights=weights,
        prefix_tokens=0,
        side=0,
        columns=columns,
        parts=GRID,
    )


def test_tokens_are_shown_as_they_are(tmp_path: Path) -> None:
    shown = picture("<s>", "$", "x^2", "$", "", "\n", "\x00", "你", title="a $ and a $, 你好")
    text = write_atom_picture(shown, tmp_path / "map.html").read_text(encoding="utf-8")
    for token in ("&lt;s&gt;", "$", "x^2", "␣", "⏎", "�", "你"):
        assert f">{token}</text>" in text
    for kind in ("svg", "png"):  # no letter that the font lacks is a warning, nor a formula
        assert write_atom_picture(shown, tmp_path / f"map.{kind}").stat().st_size > 1000


def test_a_long_text_goes_on_in_another_line(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(2 * LINE + 5)]
    text = write_atom_picture(picture(*words), tmp_path / "map.html").read_text(encoding="utf-8")
    assert all(f">{word}</text>" in text for word in words)
    assert text.count(">2 second</text>") == 4  # once above, and at each of three lines


def test_there_is_a_column_for_every_weight() -> None:
    with pytest.raises(MismatchError, match=r"weights of shape \(3, 2\)"):
        AtomPicture(
            title="",
            about="",
            tasks=("1", "1", "2"),
            weights=np.zeros((3, 2)),
            prefix_tokens=0,
            side=0,
            columns=("one",),
            parts=GRID,
        )
