"""Figures: one Vega-Lite specification each, from which come the live picture and the static one.

Vega-Lite by vl-convert: one wheel draws the static SVG and holds the script (0.9 MB on a page, and
Plotly 4.5), without a browser or a network.
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memtool.atomic import write_atomic
from memtool.errors import ConfigError

WIDTH = 640
"""Pixels of a static picture; a live one is as wide as its page."""
MOST_SHAPES = 1500
"""Of more cells the static picture is an image: shapes would fill megabytes."""
FONT = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif'
RULE = "var(--rule)"
INK = "currentColor"

CONFIG: dict[str, Any] = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": RULE,
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelPadding": 6,
        "labelLimit": 250,
    },
    "axisQuantitative": {"format": ".6~g"},
    "legend": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 290,
        "orient": "bottom",
        "direction": "horizontal",
        "columns": 2,
        "symbolSize": 70,
        "format": ".6~g",
    },
    "text": {"fontSize": 11, "fill": INK},
    "rule": {"stroke": INK},
}
"""What all figures have in common; an axis says its numbers whole: 97.5 is not 98."""
FIT = {"type": "fit-x", "contains": "padding"}


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure: `spec` is its Vega-Lite specification, `name` what it is called on a page.

    `cells` is how many shapes it has about. A notebook shows it live; `save` writes it.
    """

    name: str
    caption: str
    spec: dict[str, Any] = field(repr=False)
    cells: int = 0

    def svg(self) -> str:
        """A static picture that is complete in itself, on white."""
        return _concrete(self._drawn())

    def inline(self) -> str:
        """The same for a page, in the page's own colours; an image where it has many cells."""
        if self.cells > MOST_SHAPES:
            data = base64.b64encode(_small(self.png(scale=1.5))).decode()
            return f'<img alt="" width="{WIDTH}" src="data:image/png;base64,{data}">'
        svg = self._drawn()
        # Clips are numbered by how much was drawn before; ids are one name space on a page.
        ids = dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))
        for number, one in enumerate(ids):
            svg = re.sub(
                rf'(\bid="|url\(#|href="#){re.escape(one)}(?=["\)])',
                rf"\1{self.name}-{number}",
                svg,
            )
        return svg

    def png(self, *, scale: float = 2.0) -> bytes:
        """A static picture on white, as the bytes of a PNG."""
        import vl_convert

        found: bytes = vl_convert.svg_to_png(self.svg(), scale=scale)
        return found

    def save(self, path: str | Path) -> Path:
        """Write it as .svg, .png, .json (the specification) or .html (live). ConfigError else."""
        path = Path(path)
        match path.suffix.lower():
            case ".svg":
                return write_atomic(path, self.svg())
            case ".png":
                return write_atomic(path, self.png())
            case ".json":
                return write_atomic(path, json.dumps(self._whole(), indent=1) + "\n")
            case ".html":
                from memtool.reports.html import page_of

                return write_atomic(path, page_of(self))
        raise ConfigError(f"a figure as {path.name}", expected=".svg, .png, .json or .html")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """What a notebook shows: the live figure where it can, else the static one."""
        return {
            "application/vnd.vegalite.v5+json": self._whole(),
            "image/svg+xml": self.svg(),
            "text/plain": f"{self.name}: {self.caption}",
        }

    def _whole(self) -> dict[str, Any]:
        """The specification with the common settings, complete in itself."""
        text = json.dumps(
            {"config": CONFIG, "width": WIDTH, "autosize": FIT, **self.spec, "background": "white"}
        )
        return dict(json.loads(text.replace(RULE, "#d5d6da").replace(INK, "#1c1d20")))

    def _drawn(self) -> str:
        import vl_convert

        spec = {"width": WIDTH, "autosize": FIT, **self.spec}
        found: str = vl_convert.vegalite_to_svg(spec, config=CONFIG, allowed_base_urls=[])
        return found[found.index("<svg") :].strip()


def _small(png: bytes) -> bytes:
    """A picture of few colours, in few bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(128).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _concrete(svg: str) -> str:
    """An SVG that stands alone: on white, in colours of its own."""
    svg = svg.replace(RULE, "#d5d6da").replace(INK, "#1c1d20")
    return re.sub(
        r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1
    )
