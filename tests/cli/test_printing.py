"""Whatever a file put into a name or a message: what comes out can be printed, without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from pydantic import BaseModel

from memtool.errors import ConfigError, TrainingInterrupted
from memtool.progress import ProgressEvent
from memtool.reports.table import Grid
from memtool_cli import failure
from memtool_cli.output import Out, PlainProgress, Table
from memtool_cli.terminal import Plain
from memtool_stores import Backbone, Layout, MemoryStore, Segment, Space, limits
from memtool_stores.printable import as_cell, from_cell, printable_json
from tests.fuzz.door import NAMES

STEERING = "\x1b[2J\x1b]0;owned\x07\u202eab\tc\r\nd[bold]e[/bold]\x9b31m"
SECRET = "s3cr3t-of-the-bucket"


class Named(BaseModel):
    name: str
    path: Path = Path("x")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(text: str) -> bool:
    return all(c.isprintable() or c in "\t\n" for c in text)


@hypothesis.given(name=NAMES, terminal=st.booleans())
@hypothesis.settings(max_examples=60)
def test_tables_keep_their_rows_and_columns(name, terminal):
    shown, said = (Terminal() if terminal else io.StringIO()), io.StringIO()
    rows = [("first", name, "1"), (name, "second", "2")]
    tables = Table(("a", name, "b"), rows, title=name), Grid(name, ("", name), ((name, "1"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", shown)
        patch.setattr("sys.stderr", said)
        patch.setenv("NO_COLOR", "1")
        patch.setenv("TERM", "dumb")
        Out().data(Named(name="x"), *tables, ids=[])
        Out().note(name)
    assert printed(shown.getvalue() + said.getvalue())
    if not terminal:
        lines = shown.getvalue().splitlines()
        assert [line.count("\t") for line in lines] == [2, 2, 2, 0, 1, 1]


def test_markup_in_a_name_is_not_read(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    Out().data(Named(name="x"), Table(("[red]a",), [("[link=file:///x]b :boom:",)]), ids=[])
    assert "[red]a" in shown.getvalue()
    assert "[link=file:///x]b :boom:" in shown.getvalue()


@hypothesis.given(name=st.one_of(NAMES, st.text()))
def test_json_says_the_same_with_escapes(name):
    document = json.dumps({"name": name}, ensure_ascii=False)
    escaped = printable_json(document)
    assert escaped.isprintable()
    assert json.loads(escaped) == {"name": name}


def test_json_of_a_path_that_is_not_text(capsys):
    path = Path(os.fsdecode(b"a\x80"))
    Out(json=True).data(Named(name=STEERING, path=path), ids=[])
    out = capsys.readouterr().out
    assert out.strip().isprintable()
    assert json.loads(out) == {"name": STEERING, "path": str(path)}


@hypothesis.given(text=st.one_of(NAMES, st.text(alphabet="'=+-@\t\r1.a%", max_size=6)))
def test_a_cell_is_no_formula_and_gives_its_text_back(text):
    cell = as_cell(text)
    assert from_cell(cell) == text
    number = cell.strip("%+-").replace(".", "").isdigit() or cell == "-"
    assert number or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.parametrize("number", ["-", "-1", "+1.5", "12,345", "-1e-05", "93.4 %", "1"])
def test_numbers_are_no_formulas(number):
    assert as_cell(number) == number


def test_progress_and_logs_of_hostile_names(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    PlainProgress()(ProgressEvent(STEERING, 1, 1, {STEERING: 1.0}))
    record = logging.LogRecord("memtool", logging.INFO, "", 0, "%s", (STEERING,), None)
    said.write(Plain("%(name)s: %(message)s").format(record))
    assert printed(said.getvalue())
    assert said.getvalue().count("\n") == 1


def test_errors_hold_no_secret_and_nothing_that_steers(monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text = f"https://user:{SECRET}@host/{STEERING} {SECRET}"
    failure.report(OSError(5, text, text))
    failure.report(ConfigError(text, expected=text, remedy=text))
    try:
        raise ConfigError(text)
    except ConfigError as error:
        failure.show_traceback(error)
    failure.on_unexpected(ValueError, ValueError(text), None)
    said = capsys.readouterr().err
    assert SECRET not in said
    assert "user:" not in said
    assert printed(said)
    assert "Traceback" in said


def test_a_traceback_holds_no_secret(memtool):
    variables = {"MEMTOOL_STREAM__SOURCE": f"/nowhere/{SECRET}", "AWS_SESSION_TOKEN": SECRET}
    done = memtool("train-adapter", "--task", "1", "--debug", "--dry-run", **variables)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_an_interruption_says_that_a_training_was_saved_when_it_was(capsys):
    assert failure.report(KeyboardInterrupt()) == 130
    assert "saved" not in capsys.readouterr().err
    assert failure.report(TrainingInterrupted(Path("runs/c.safetensors"))) == 130
    assert "the training was saved as runs/c.safetensors" in capsys.readouterr().err


@pytest.fixture
def hostile(here: Path) -> MemoryStore:
    """A memory whose messages, tasks and names were chosen by a stranger."""
    layout = Layout(
        (Segment("a.lora_A", (2, 8), 0), Segment("a.lora_B", (8, 2), 16)), "float32", 2, 4.0, ("q",)
    )
    store = MemoryStore.create(here / "memory", Space(Backbone("nano", "", "ab" * 32), layout))
    with store.transaction(STEERING, {STEERING: STEERING}) as change:
        about = {"task": 1, "task_name": STEERING, "domain": STEERING, "classes": (STEERING,)}
        change.add("[bold]=1+1", np.ones(32, dtype=np.float32), about)
    return store


@pytest.mark.parametrize(
    "arguments",
    [["log"], ["ls"], ["show"], ["diff", "HEAD~1"], ["log", "--json"], ["ls", "--json"]],
)
def test_verbs_on_a_hostile_memory(arguments, hostile, memtool):
    done = memtool(*arguments)
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout + done.stderr)
    if "--json" in arguments:
        assert repr(STEERING)[1:-1] in repr(json.loads(done.stdout))
    else:
        assert len(done.stdout.splitlines()) < 25


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_no_encoding_of_a_terminal_is_an_error(variables, hostile, here, environ, start):
    odd = os.fsdecode(b"caf\xc3\xa9-\x80")
    done = subprocess.run(
        [*start, "log", "--store", odd],
        cwd=here,
        env=environ | variables,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (2, 3)
    assert b"Traceback" not in done.stderr
    assert b"UnicodeEncodeError" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["log", "--store", "a", "--store", "b"], "--store is given 2 times"),
        (["log", "-n", "1", "--limit", "2"], "--limit/-n is given 2 times"),
        (["retrieve", "--image", "a", "--image", "b"], "--image is given 2 times"),
        (["run", "--resume", "--fresh"], "--resume/--fresh is given 2 times"),
        (["config", "presets", "--json", "-q"], "one of them"),
        (["log", "--set", "seed=1", "--set", "seed=2"], "seed is given twice"),
        (["eval", "--rank", "4", "--set", "adapter.rank=8"], "adapter.rank is given twice"),
        (["log", "--store", "~nouser/m"], "there is no such user"),
        (["config", "show", "--config", "~nouser/m"], "no user"),
        (["config", "show", "--set", "runs=~nouser/m"], "no user"),
        (["log", "--store", "a\0b"], "NUL"),
        (["tag", "v1", "--lock-timeout", "-1"], "lock_timeout"),
    ],
)
def test_what_is_refused_by_name(arguments, said, memory, memtool):
    done = memtool(*arguments)
    assert done.returncode == 2 or "user" in said, done.stderr
    assert done.returncode
    assert said in done.stderr
    assert done.stdout == ""


def test_what_may_be_said_twice(memory, memtool):
    assert memtool("log", "--set", "seed=1", "--set", "seed=1").returncode == 0
    assert memtool("log", "--rank", "4").returncode == 2  # log has no such option
    assert memtool("log", "--json", "--json").returncode == 0
    done = memtool("log", "--set", "adapter.rank=8", "--set", "limits.text_bytes=9")
    assert "adapter.rank has no effect here" in done.stderr
    assert "limits" not in done.stderr
    assert limits.current() == limits.Limits()  # those of a call end with it


def test_a_lock_that_is_held_is_waited_for_as_long_as_was_asked(memory, here, memtool):
    lock = here / "memory" / "lock"
    code = (
        f"import filelock, time; lock = filelock.FileLock({str(lock)!r}); lock.acquire()\n"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = memtool("tag", "v1", "--lock-timeout", "0.2")
        holder.kill()
    assert done.returncode == 4
    assert "0.2 seconds" in done.stderr
    assert "--lock-timeout" in done.stderr
    assert memtool("tag", "v1", "--lock-timeout", "0.2").returncode == 0
