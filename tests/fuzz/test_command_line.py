"""The door of the command line: any arguments and variables, in this process and in real ones.

Every generated call ends with an exit code that the help lists, says why when it is not 0, prints
only what can be printed, and writes nothing outside of its working folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import typer
from hypothesis import strategies as st

from memtool.settings import keys
from memtool_cli.failure import EXIT_CODES
from memtool_cli.main import VERBS, main
from memtool_stores import Backbone, Layout, MemoryStore, Segment, Space
from tests.fuzz.door import (
    CASES,
    HANG_SECONDS,
    NAMES,
    WAIT_SECONDS,
    cases,
    long,
    no_hang,
    nothing_else_changes,
)
from tests.reports.sample import record

ROOT = Path(__file__).parents[2]
CODES = {int(line.split()[0]) for line in EXIT_CODES.splitlines()}
DRY = ("train-adapter", "write", "consolidate", "run", "eval")
"""Verbs that only say what they would do here: the rest of them takes minutes."""
TAKES_LONG = ("demo", "pretrain", "ablate", "study", "bisect", "explain")

FILES = [
    "memory",
    "memory@HEAD~1",
    "record.json",
    "report.html",
    "text.yaml",
    "picture.png",
    "adapters",
    "a@b",
]
PLACES = [*FILES, "new", "new/below", "/dev/null", "/dev/stdout", "-", ".", "", "~nouser/x", "fifo"]
PLACES += [
    "loop",
    "nowhere",
    "s3:/x",
    "file://memory",
    "x" * 300,
    "memory@" + "0" * 20,
    "memory/ice",
]
NUMBERS = ["0", "1", "-1", "2", "1e999", "nan", "1.5", "٣", "9" * 30, " 1", "0x1", ""]
REFERENCES = ["HEAD", "HEAD~1", "HEAD~99", "HEAD~-1", "HEAD~" + "9" * 30, "v1", "main", "", "@"]
WORDS = ["digits-dil", "mira-dil", "memory", "full", "heads", "task-1", "task-*", "[", "dil", "cpu"]
NAMED = [
    "[bold]x[/bold]",
    "[link=file:///]x",
    "{0}",
    "%n",
    "$HOME",
    "\udc80",
    "caf\u00e9",
    "\u202egnp",
]


def _stays(value: str) -> bool:
    """Whether what a value names lies in the working folder: what is asked for is done."""
    path = value.rpartition("=")[2]
    outside = path.startswith(("/", "~root", "~/", "file:///")) or path == "~" or ".." in path
    return path.startswith("/dev/") or not outside


VALUES = st.one_of(st.sampled_from(PLACES + NUMBERS + REFERENCES + WORDS + NAMED), NAMES).filter(
    _stays
)


def _parameters() -> dict[str, list[Any]]:
    """The options and arguments of every verb that ends soon, as Typer reads them."""
    found = {}
    for name, listed in VERBS.items():
        if name not in TAKES_LONG:
            group = typer.main.get_group(import_module(f"memtool_cli.verbs.{listed.module}").app)
            command = group.commands[name]
            for word, inner in getattr(command, "commands", {"": command}).items():
                found[f"{name} {word}".strip()] = inner.params
    return found


PARAMETERS = _parameters()
_QUICK = {"ls", "log", "show", "diff", "tag", "rollback", "verify", "gc", "clone", "merge", "init"}
QUICK = sorted({*_QUICK, "config show", "config presets"})
OTHERS = sorted(PARAMETERS.keys() - {*QUICK, *(DRY if CASES <= 200 else ())})
"""Verbs that load torch or draw, if they get so far: one call in thirty is of them."""


@st.composite
def settings_given(draw: st.DrawFn) -> str:
    """What follows --set: mostly a key that there is."""
    key = draw(st.one_of(st.sampled_from(sorted(keys())), NAMES))
    return f"{key}{draw(st.sampled_from(['=', '=', '=', '']))}{draw(VALUES)}"


@st.composite
def calls(draw: st.DrawFn) -> list[str]:
    """A verb with some of its options and arguments, rarely all that it needs."""
    verb = draw(st.sampled_from(OTHERS if draw(st.integers(0, 29)) == 29 else QUICK))
    words = verb.split()
    for parameter in draw(st.lists(st.sampled_from(PARAMETERS[verb]), max_size=5)):
        if parameter.param_type_name == "argument":
            words.append(draw(VALUES))
            continue
        flag = draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts]))
        if parameter.is_flag:
            words.append(flag)
        elif parameter.name == "set":
            words += [flag, draw(settings_given().filter(_stays))]
        else:
            words += [flag, draw(VALUES)]
    if verb == "gc" or verb in DRY:
        words.append("--dry-run")
    return words


VARIABLES = st.dictionaries(
    st.sampled_from(
        [*(f"MEMTOOL_{key.replace('.', '__').upper()}" for key in keys()), "MEMTOOL_X"]
    ),
    VALUES.filter(lambda value: _of_process([value])),
    max_size=1,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a memory of hostile names, and files of every kind."""
    here = tmp_path_factory.mktemp("template")
    layout = Layout(
        (Segment("a.lora_A", (2, 8), 0), Segment("a.lora_B", (8, 2), 16)), "float32", 2, 4.0, ("q",)
    )
    store = MemoryStore.create(here / "memory", Space(Backbone("nano", "", "ab" * 32), layout))
    for name in ("task-1", "[bold]x", "=1+1"):
        with store.transaction(f"write \x1b[2J{name}\u202e", {"seed": 0, "x": "\x07\n"}) as change:
            about = {
                "task": 1,
                "task_name": "a\tb\nc",
                "domain": "\x1b]0;x\x07[red]",
                "classes": (0,),
            }
            change.add(name, np.ones(32, dtype=np.float32), about)
    store.tag("v1")
    (here / "record.json").write_text(record().to_json(), encoding="utf-8")
    (here / "text.yaml").write_text("seed: 1\n", encoding="utf-8")
    (here / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    (here / "adapters").mkdir()
    (here / "a@b").mkdir()
    os.mkfifo(here / "fifo")
    (here / "loop").symlink_to("loop")
    return here


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where nothing may change but one folder of it."""
    folder = tmp_path_factory.mktemp("sandbox")
    (folder / "victim").mkdir()
    (folder / "victim" / "file").write_text("untouched", encoding="utf-8")
    return folder


def _fresh(template: Path, sandbox: Path) -> Path:
    here = sandbox / "here"
    shutil.rmtree(here, ignore_errors=True)
    _copy(template, here)
    return here


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_fifo():
            os.mkfifo(target / entry.name)
        elif entry.is_symlink():
            (target / entry.name).symlink_to(entry.readlink())
        elif entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        else:
            shutil.copy2(entry, target / entry.name)


def _environment(sandbox: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "cli", "stores")),
        "XDG_CONFIG_HOME": str(sandbox / "user"),
        "HOME": str(sandbox / "here" / "home"),
        "MEMTOOL_CACHE": str(sandbox.parent / "cache"),
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
    }


def _require_fair(words: list[str], code: int, out: str, said: str) -> None:
    call = f"{words!r} ended with {code}:\n{out[-2000:]}\n{said[-2000:]}"
    assert code in CODES, call
    assert "Traceback" not in said or "--debug" in words, call
    assert "error: unexpected" not in said, call
    assert code == 0 or said.strip() or out.strip() or {"-q", "--quiet"} & set(words), call
    for text in (out, said):
        assert all(c.isprintable() or c in "\t\n" for c in text), call
    if (
        code == 0
        and "--json" in words
        and not {"--help", "--yaml", "-", "/dev/stdout"} & set(words)
    ):
        for line in out.splitlines():
            assert isinstance(json.loads(line), dict), call


@long
@cases
@hypothesis.given(words=calls(), variables=VARIABLES)
def test_any_arguments(words, variables, template, sandbox):
    here = _fresh(template, sandbox)
    out, said = io.StringIO(), io.StringIO()
    quick = " ".join(words[:2]) in QUICK or words[0] in QUICK
    with (
        no_hang(HANG_SECONDS if quick else WAIT_SECONDS),
        nothing_else_changes(sandbox, but=here),
        contextlib.chdir(here),
        mock.patch.dict(os.environ, _environment(sandbox) | variables, clear=True),
        mock.patch.object(sys, "argv", ["memtool", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
    ):
        code = main(words)
    _require_fair(words, code, out.getvalue(), said.getvalue())


def _of_process(words: list[str]) -> bool:
    """Whether these can be the arguments of a process."""
    return not any("\0" in word or any("\ud800" <= c < "\udc80" for c in word) for word in words)


def _require_fair_process(words, variables, template, sandbox):
    here = _fresh(template, sandbox)
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"} if len(words) % 2 else {}
    with nothing_else_changes(sandbox, but=here):
        done = subprocess.run(
            [sys.executable, "-c", "from memtool_cli.main import run; run()", *words],
            cwd=here,
            env=_environment(sandbox) | variables | ascii_only,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    _require_fair(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@hypothesis.settings(cases, max_examples=3, derandomize=True)
@hypothesis.given(words=calls().filter(_of_process), variables=VARIABLES)
def test_any_arguments_of_a_process(words, variables, template, sandbox):
    _require_fair_process(words, variables, template, sandbox)


@pytest.mark.slow
@pytest.mark.timeout(900)
@hypothesis.settings(cases, max_examples=50, derandomize=False)
@hypothesis.given(words=calls().filter(_of_process), variables=VARIABLES)
def test_any_arguments_of_fifty_processes(words, variables, template, sandbox):
    _require_fair_process(words, variables, template, sandbox)
