"""Make what README.md shows of its commands again: `python docs/make_transcripts.py`.

    <!-- run -->
    ```bash
    memtool log
    ```
    <!-- transcript -->
    ```text
    what these commands print, with an empty line between two
    ```

Every block that is marked to run is run, in order and in one empty folder, with the settings that a
reader has, on the CPU. A transcript that says the same already, but for times, ids and the last
digits of a machine, stays as it is.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parents[1] / "README.md"

SHOWN = re.compile(
    r"<!-- run -->\n```bash\n(?P<code>.*?)^```\n"
    r"(?P<between>(?:(?!<!-- run|<!-- transcript|```).)*)"
    r"(?P<mark><!-- transcript -->\n```text\n)(?P<text>.*?)(?=^```)",
    re.S | re.M,
)
ON_THE_CPU = {"MEMTOOL_ENGINE__DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

CHANGING = (
    (re.compile(r"\b[0-9A-HJKMNP-TV-Z]{26}\b"), "<id>"),
    (re.compile(r"\b[0-9A-HJKMNP-TV-Z]{20}\b"), "<version>"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s|min|h)\b( \d+ (s|min)\b)?"), "<time>"),
)
"""What no two runs have in common, and what stands for it."""

_NUMBER = re.compile(r"-?\d+\.\d+")

POINTS, SHARE = 1.5, 0.2
"""By how much a figure of another machine may differ: as it stands, or of itself where small."""


def shown(page: Path = PAGE) -> list[tuple[list[str], str]]:
    """The commands and the transcript of every block of a page that has one."""
    found = SHOWN.finditer(page.read_text(encoding="utf-8"))
    return [(commands(one["code"]), one["text"]) for one in found]


def commands(code: str) -> list[str]:
    """The lines of a block of bash, those that go on in the next joined."""
    return code.replace("\\\n", " ").splitlines()


def printed(lines: list[str], run: Callable[[list[str]], str]) -> str:
    """What commands print; `run` takes the words of one, and returns its stdout."""
    return "\n".join(run(shlex.split(line, comments=True)) for line in lines)


def same(one: str, other: str) -> bool:
    """Whether two transcripts say the same, but for what changes, and by how much figures may."""
    texts = []
    for text in (one, other):
        for pattern, name in CHANGING:
            text = pattern.sub(name, text)
        texts.append(text)
    if len({_NUMBER.sub("<figure>", text) for text in texts}) > 1:
        return False
    figures = zip(*(map(float, _NUMBER.findall(text)) for text in texts), strict=True)
    return all(
        math.isclose(a, b, rel_tol=SHARE if abs(a) < 1 else 0, abs_tol=POINTS if abs(a) >= 1 else 0)
        for a, b in figures
    )


def run_in(folder: Path) -> Callable[[list[str]], str]:
    """What runs the words of a command as `memtool` does in a folder, and returns its stdout."""
    from memtool_cli.main import main

    around = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    environment = {**around, **ON_THE_CPU, "XDG_CONFIG_HOME": str(folder / ".config")}

    def run(words: list[str]) -> str:
        name, *arguments = words
        if name != "memtool":
            sys.exit(f"{name} is no command of memtool")
        out = io.StringIO()
        with (
            contextlib.chdir(folder),
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(out),
        ):
            code = main(arguments)
        if code:
            sys.exit(f"{shlex.join(words)} ended with {code}")
        return out.getvalue()

    return run


def main_of(page: Path) -> None:
    """Run the blocks of a page, and put what they print in the place of what was there."""
    with tempfile.TemporaryDirectory(prefix="memtool-transcripts-") as folder:
        run = run_in(Path(folder))

        def again(found: re.Match[str]) -> str:
            new = printed(commands(found["code"]), run)
            kept = found["text"] if same(found["text"], new) else new
            return found[0][: found.start("text") - found.start()] + kept

        text = page.read_text(encoding="utf-8")
        made = SHOWN.sub(again, text)
    if made != text:
        page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main_of(PAGE)
