"""The script of live figures: Vega, Vega-Lite and Vega-Embed as one text, made once a machine."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from memtool.atomic import write_atomic
from memtool.errors import MemtoolError
from memtool.streams.table import cache_folder


def script_file() -> Path:
    """Where the script of this version of vl-convert is kept, below the cache folder."""
    return cache_folder() / "reports" / f"vega-{version('vl-convert-python')}.js"


@cache
def script() -> str:
    """The script that defines `vegaEmbed`; making it takes some seconds, finding it none."""
    file = script_file()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    import vl_convert

    # Its stub asks for a snippet, which the function does without.
    text: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    with suppress(MemtoolError, OSError):  # a cache that cannot be written costs time alone
        write_atomic(file, text)
    return text
