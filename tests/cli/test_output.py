"""One output object for people and scripts, and progress for both."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest
from pydantic import BaseModel

from memtool.progress import ProgressEvent
from memtool.reports.table import Grid
from memtool_cli.output import Out, PlainProgress, Table, duration, percent, size


class Point(BaseModel):
    x: int


class Terminal(io.StringIO):
    """What is written, as a terminal would be shown it."""

    def isatty(self) -> bool:
        return True


TABLE = Table(("x", "what"), [(1, "one"), (2, "two\nlines\tand tabs")])


def test_a_pipe_gets_tab_separated_columns(capsys):
    Out().data([Point(x=1)], TABLE, ids=[1])
    assert capsys.readouterr().out == "x\twhat\n1\tone\n2\ttwo lines and tabs\n"


def test_what_the_numbers_are_goes_to_stderr(capsys):
    title = "accuracy (3 seeds: mean \u00b1 sample standard deviation)"
    Out().data(Point(x=1), Grid(title, ("x", "y"), (("1", "2"),), notes=("a note",)), ids=[1])
    said = capsys.readouterr()
    assert said.out == "x\ty\n1\t2\n"
    assert said.err == f"{title}\na note\n"


def test_json_is_one_document_a_record(capsys):
    Out(json=True).data([Point(x=1), Point(x=2)], TABLE, ids=[1])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"x": 1}, {"x": 2}]


def test_quiet_prints_ids_and_says_nothing_else(capsys):
    out = Out(quiet=True)
    with out.progress() as progress:
        progress(ProgressEvent("stage", 1, 1))
    out.data(Point(x=1), TABLE, ids=["a", "b"])
    out.next("memtool write")
    said = capsys.readouterr()
    assert said.out == "a\nb\n"
    assert said.err == ""


def test_hints_go_to_stderr(capsys):
    Out().next("memtool write")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "next: memtool write\n"


def test_plain_progress_speaks_now_and_then_and_at_the_end(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))  # a second each event
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    progress = PlainProgress(every_seconds=5.0)
    for step in range(1, 13):
        progress(ProgressEvent("task 1/2: adapt", step, 12, {"loss": 1 / step}))
    progress(ProgressEvent("task 2/2: adapt", 1, 1))
    assert said.getvalue().splitlines() == [
        "task 1/2: adapt: 6/12 loss 0.167 (1.0 steps/s, 6.0 s left)",
        "task 1/2: adapt: 11/12 loss 0.0909 (1.0 steps/s, 1.0 s left)",
        "task 1/2: adapt: 12/12 loss 0.0833",
        "task 2/2: adapt: 1/1",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (duration(8.24), "8.2 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 5 min"),
        (size(512), "512 B"),
        (size(1_250_000), "1.2 MB"),
        (size(5 * 10**12), "5.0 TB"),
        (percent(0.9344), "93.4 %"),
        (percent(None), "-"),
    ],
)
def test_numbers_carry_units(text, wanted):
    assert text == wanted


def test_a_wide_table_is_cut_between_columns_in_a_terminal(monkeypatch):
    wide = Grid(
        title="Accuracy",
        header=("", *(f"method {number} %" for number in range(12))),
        rows=(("task 1", *(f"{80 + number}.5" for number in range(12))),),
        notes=("A note.",),
    )
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    Out().data(Point(x=1), TABLE, wide, ids=[1])
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    assert all(f"{80 + number}.5" in text for number in range(12))
    assert text.count("task 1") > 1
    assert text.count("Accuracy") == text.count("A note.") == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, ["note: a doubt", "note: mlflow failed"]),
        ({"json": True}, ["note: mlflow failed"]),  # which is in no record
        ({"quiet": True}, []),
    ],
)
def test_that_a_log_service_failed_is_said_beside_json(how, said, capsys):
    with Out(**how).hearing():
        for _ in range(2):
            logging.getLogger("memtool.methods").warning("a doubt")
            logging.getLogger("memtool.trackers").warning("mlflow failed")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()) == ("", said)
