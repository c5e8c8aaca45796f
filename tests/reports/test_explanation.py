"""One explained input as a plot and a page: every file kind, any number of adapters and blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from memtool.errors import ConfigError, MismatchError
from memtool.reports.explanation import write_explained
from memtool.reports.shown import Explained, coefficient_grid
from memtool.reports.table import Grid


def explained(blocks: int = 4, adapters: int = 3) -> Explained:
    generator = np.random.default_rng(0)
    return Explained(
        title="a <b> & $c$.png",
        about="affine, delta",
        facts=(("what comes out", "T-shirt (98.0 %)"),),
        blocks=tuple(range(blocks)),
        adapters=tuple(f"task-{i}-seed-0" for i in range(adapters)),
        values=generator.normal(size=(max(blocks, 1), adapters)),
        contributions=generator.normal(size=adapters) / 4,
        parts=Grid("Adapters", ("adapter", "adds %", "without it"), (("a", "-1.5", "T-shirt"),)),
        winner="T-shirt",
    )


@pytest.mark.parametrize(("blocks", "adapters"), [(0, 1), (0, 40), (4, 3), (12, 10), (32, 200)])
def test_any_size_is_drawn(blocks: int, adapters: int, tmp_path: Path) -> None:
    view = explained(blocks, adapters)
    png = write_explained(view, tmp_path / "plot.png")
    with Image.open(png) as image:
        assert image.width > 800
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    svg = write_explained(view, tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert "currentColor" not in svg  # a file of its own has colours of its own
    assert len(svg) < 2_000_000


def test_the_page(tmp_path: Path) -> None:
    text = write_explained(explained(), tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "<b> &" not in text
    assert "currentColor" in text
    assert "<td>−1.5</td>" in text
    assert "<td>T-shirt</td>" in text  # the hyphen of a word is no minus sign
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_nothing_is_negative_or_zero_everywhere(tmp_path: Path) -> None:
    still = replace(explained(), values=np.zeros((4, 3)), contributions=np.zeros(3))
    assert write_explained(still, tmp_path / "plot.svg").stat().st_size > 0
    assert coefficient_grid(still).bold == frozenset()
    assert coefficient_grid(still).notes == ()


def test_a_users_plotting_defaults_do_not_reach_it(tmp_path: Path) -> None:
    first = write_explained(explained(), tmp_path / "a.svg").read_bytes()
    with matplotlib.rc_context({"font.size": 30}):
        assert write_explained(explained(), tmp_path / "b.svg").read_bytes() == first


def test_coefficients_have_the_longer_side_down() -> None:
    tall = coefficient_grid(explained(2, 6))
    assert (len(tall.rows), tall.header) == (6, ("", "block 0", "block 1"))
    wide = coefficient_grid(explained(6, 2))
    assert (len(wide.rows), wide.header) == (6, ("", "task-0-seed-0", "task-1-seed-0"))
    values = explained(6, 2).values
    assert wide.bold == {(i, 1 + j) for i, j in np.argwhere(values < 0).tolist()}
    assert coefficient_grid(explained(0, 1)).rows[0][0] == "all blocks"


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="contributions of shape"):
        replace(explained(), contributions=np.zeros(2))
    with pytest.raises(ConfigError, match=r"\.svg, \.png, \.html"):
        write_explained(explained(), tmp_path / "plot.jpg")
