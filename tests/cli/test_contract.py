"""What every verb promises: exit codes, a clean stdout, errors that help, help without torch."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time

import filelock
import pytest

from memtool.experiments.ablations import ABLATIONS
from memtool_cli import failure
from memtool_cli.main import VERBS
from memtool_cli.verbs.experiments import WORDS


def test_help_lists_every_verb_and_the_exit_codes(memtool):
    done = memtool("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for verb in VERBS:
        assert verb in done.stdout
    for line in ("0 done", "3 not found", "130 interrupted", "141 broken pipe"):
        assert line in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb, memtool):
    below = {"config": ["show"], "study": ["capacity"]}.get(verb, [])
    done = memtool(verb, *below, "--help")
    assert done.returncode == 0, done.stderr
    assert "Examples" in done.stdout
    assert 2 <= done.stdout.count("$ memtool") + done.stdout.count("$ dir=$(memtool") <= 4
    assert "--json" in done.stdout


def test_what_only_reads_never_loads_torch(memory, torchless):
    torchless(
        "--help",
        "train-adapter --help",
        "log",
        "ls --json",
        "show",
        "diff HEAD~1",
        "verify",
        "config show",
        "config presets",
    )


def test_version(process):
    assert process("--version").stdout.startswith("memtool ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["log"], 0, ""),
        (["tag", "v1"], 0, ""),
        (["evl"], 2, "did you mean 'eval'"),
        (["log", "--sore", "x"], 2, "--store"),
        (["train-adapter"], 2, "--task"),
        (["retrieve"], 2, "one of --task, --image and --query"),
        (["retrieve", "--task", "1", "--image", "x.png"], 2, "one of --task"),
        (["eval", "--setting", "dill"], 2, "did you mean 'dil'?"),
        (["consolidate", "--sep", "afine", "--dry-run"], 2, "did you mean 'affine'?"),
        (["log", "--set", "adapter.rnk=8"], 2, "did you mean 'adapter.rank'?"),
        (["log", "--set", "adapter.rank"], 2, "KEY=VALUE"),
        (["log", "--preset", "mira-dul"], 3, "did you mean 'mira-dil'?"),
        (["log", "--config", "nowhere.yaml"], 3, "nowhere.yaml"),
        (["log", "--json", "-q"], 2, "one of them"),
        (["verify", "--level", "ful"], 2, "did you mean 'full'?"),
        (["gc", "--keep-last", "1"], 2, "--yes"),
        (["rollback", "HEAD~1"], 2, "--yes"),
        (["tag", "v1", "--store", "memory@HEAD~1"], 2, "can be read, not written to"),
        (["write", "--store", "memory@HEAD~1"], 2, "can be read, not written to"),
        (["ls", "--store", "nowhere"], 3, "memtool train-adapter --task 1"),
        (["show", "HEAD~99"], 3, "memtool log"),
        (["tag", "consolidated"], 4, "already"),
        (["report", "nowhere.json"], 3, "nowhere.json"),
        (["train-adapter", "--task", "1", "--seed", "1", "--seed", "2"], 2, "memtool run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes_and_what_is_said(arguments, code, said, memory, memtool):
    memory.tag("consolidated")
    done = memtool(*arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code"), [(["log", "-q"], 0), (["log", "--sore", "x"], 2), (["show", "x"], 3)]
)
def test_a_process_ends_as_a_call_does(arguments, code, memory, memtool, process):
    done, called = process(*arguments), memtool(*arguments)
    assert done.returncode == called.returncode == code
    assert (done.stdout, done.stderr) == (called.stdout, called.stderr)


def test_no_arguments_show_the_help_once(process):
    done = process()
    assert done.returncode == 2
    assert done.stdout.count("Usage: memtool") == 1


def test_debug_shows_the_traceback(memtool):
    assert "Traceback" in memtool("log", "--debug").stderr
    assert "Traceback" not in memtool("log").stderr


def test_damage_found_by_verify_is_a_no_and_met_by_a_reader_an_integrity_error(
    memory, here, memtool
):
    damaged = 0
    for chunk in (here / "memory" / "ice" / "chunks").rglob("*"):
        if chunk.is_file():
            data = bytearray(chunk.read_bytes())
            data[len(data) // 2] ^= 1
            chunk.write_bytes(bytes(data))
            damaged += 1
    assert damaged
    done = memtool("verify", "--json")
    assert done.returncode == 1
    record = json.loads(done.stdout)
    assert record["schema"] == "memtool.verify"
    assert record["ok"] is False
    assert record["damages"]
    done = memtool("show")
    assert done.returncode == 5
    assert done.stdout == ""
    assert "memtool verify" in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOENT, 3, "x.yaml is not there"),
        (errno.EACCES, 2, "--store PATH"),
        (errno.EROFS, 2, "other permissions"),
        (errno.ENOSPC, 1, "memtool gc"),
        (errno.EIO, 1, "x.yaml"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_path(number, code, said, capfd, monkeypatch):
    monkeypatch.setattr(failure, "close_stdout", lambda: None)
    assert failure.report(OSError(number, os.strerror(number), "x.yaml")) == code
    told = capfd.readouterr().err
    assert "x.yaml" in told
    assert said in told


def test_a_library_that_finds_no_memory_is_told_so(capfd):
    refused = ImportError("libx.so: failed to map segment from shared object", name="x")
    assert failure.report(refused) == 1
    assert "ulimit -v" in capfd.readouterr().err
    with pytest.raises(ImportError, match="no module"):
        failure.report(ImportError("no module"))


def test_a_full_disk_under_stdout(memory, here, environ, start):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [*start, "log"],
            cwd=here,
            env=environ,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unforeseen_error_is_one_line_and_exit_code_1(here, environ, start):
    code = "from memtool_cli import main, options\noptions.resolve = lambda **_: 1 / 0\nmain.run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "config", "show"],
        cwd=here,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: unexpected ZeroDivisionError")
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["log"], ["--help"], ["config", "show", "--json"]])
def test_a_closed_pipe_ends_with_141(arguments, memory, here, environ, start):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*start, *arguments],
        cwd=here,
        env=environ,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_ctrl_c_ends_with_130_and_says_what_is_safe(memory, here, environ, start):
    lock = filelock.FileLock(here / "memory" / "lock")
    with lock:
        waiting = subprocess.Popen(
            [*start, "tag", "v1"],
            cwd=here,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background of a script ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(3)  # past the imports, into the wait for the lock
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "every committed version is safe" in said
    assert "Traceback" not in said
    assert memory.tags() == {}


def test_a_terminal_gets_a_table_and_no_colour_when_told(memory, here, environ, start):
    def seen(**variables: str) -> str:
        master, slave = pty.openpty()
        with subprocess.Popen(
            [*start, "ls"],
            cwd=here,
            env=environ | {"TERM": "xterm-256color"} | variables,
            stdout=slave,
            stderr=slave,
            stdin=slave,
        ) as process:
            os.close(slave)
            text = b""
            while True:
                try:
                    part = os.read(master, 65536)
                except OSError:  # the other end is closed: how a pty says so
                    break
                if not part:
                    break
                text += part
        os.close(master)
        assert process.returncode == 0
        return text.decode()

    shown = seen()
    assert "─" in shown
    assert "\x1b[1m" in shown
    assert "\x1b[3" not in seen(NO_COLOR="1")


def test_every_ablation_has_its_word() -> None:
    assert tuple(ABLATIONS) == WORDS
