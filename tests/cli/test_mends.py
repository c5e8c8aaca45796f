"""What new users met: each error names what helps, and each kind of slip is met everywhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import typer

from memtool import engine
from memtool.config import resolve
from memtool.errors import ConfigError, DataError, did_you_mean
from memtool.experiments.ablations import besides
from memtool.words import near
from memtool.workspace import Workspace
from memtool_cli import options
from memtool_cli.main import VERBS
from memtool_cli.output import Out, Table
from memtool_stores.printable import shown

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [
        ("gpu", ("auto", "cpu", "cuda", "mps"), ["cuda", "mps"]),
        ("qkv", TARGETS, ["q,k,v"]),
        ("vq", TARGETS, ["q,v"]),
        ("mira", ("digits-dil", "mira-cil", "mira-dg", "moram"), ["mira-cil", "mira-dg"]),
        ("train", VERBS, ["train-adapter"]),
        ("trian", VERBS, ["train-adapter"]),
        ("Affine", ("softmax", "affine"), ["affine"]),
        ("xyzzy", TARGETS, []),
    ],
)
def test_what_may_be_meant(given, known, meant):
    assert near(given, known) == meant
    assert ("did you mean" in did_you_mean(given, known)) == bool(meant)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian --task 3", "did you mean 'train-adapter'?"),
        ("config shwo", "did you mean 'show'?"),
        ("run --lr 0.1", "--set train.lr=VALUE"),
        ("run --presett x", "did you mean '--preset'?"),
        ("run --device gpu", "did you mean 'cuda' or 'mps'?"),
        ("eval --at-least 85", "--at-least 85%"),
        ("run --preset", "try: memtool run --help"),
    ],
)
def test_an_error_says_what_may_have_been_meant(memtool, line, said):
    done = memtool(*line.split())
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_per_cent_is_a_share():
    assert options.share("--at-least", "85%") == options.share("--at-least", "0.85") == 0.85
    for wrong in ("101%", "-1", "nan", "x", "85"):
        with pytest.raises(ConfigError):
            options.share("--at-least", wrong)


def _commands(command, path):
    if hasattr(command, "commands"):
        for name, below in command.commands.items():
            yield from _commands(below, [*path, name])
    else:
        yield path, command


def test_every_option_of_one_value_is_refused_when_it_is_given_twice(memtool):
    tried = 0
    for verb, listed in VERBS.items():
        module = import_module(f"memtool_cli.verbs.{listed.module}")
        real = typer.main.get_group(module.app).commands[verb]
        for path, command in _commands(real, [verb]):
            for option in command.params:
                one = option.param_type_name == "option" and not option.multiple
                if one and not option.is_flag and option.opts[0].startswith("--"):
                    done = memtool(*path, option.opts[0], "1", option.opts[0], "2")
                    assert done.returncode == 2, (path, option.opts)
                    assert "given 2 times" in done.stderr, (path, option.opts, done.stderr)
                    tried += 1
    assert tried > 100


def test_no_error_says_where_an_object_lies():
    for said in (str(DataError(f"no {object()!r}", remedy=repr(print.__self__))), shown(object())):
        assert "0x" not in said


def test_a_plan_of_one_task_has_one(memtool):
    done = memtool("train-adapter", "--task", "rot90", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split("\t")[:2] == ["3", "rot90"]
    assert "upright" not in done.stdout


def test_a_rank_above_the_width_is_said(caplog):
    for rank, said in ((161, 1), (160, 0)):
        caplog.clear()
        config = resolve(overrides={"adapter.rank": str(rank)}, ambient=False).config
        assert Workspace(config, seed=0).layout.rank == rank
        assert sum("above the width" in one.getMessage() for one in caplog.records) == said


def test_bf16_on_a_cpu_that_does_not_know_it_is_said(monkeypatch, caplog):
    settings = resolve(overrides={"engine.precision": "bf16", "engine.device": "cpu"}).config.engine
    for flags, said in (({"avx2"}, 1), ({"avx2", "avx512_bf16"}, 0), (set(), 0)):
        caplog.clear()
        monkeypatch.setattr(engine, "cpu_flags", lambda flags=flags: flags)
        engine.Engine(settings, threads=1)
        assert sum("bf16" in record.getMessage() for record in caplog.records) == said


def test_a_tag_that_exists_says_where_it_points(memtool, memory):
    done = memtool("tag", "good")
    assert done.returncode == 0, done.stderr
    again = memtool("tag", "good", "HEAD~1")
    assert again.returncode == 4
    assert done.stdout.split()[-1] in again.stderr
    assert "try: memtool tag good-2 " in again.stderr


def test_a_table_fits_sixty_columns(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    header = ("id", "name", "kind", "task")
    rows = [("0" * 26, f"{name}-of-a-task", "adapter", "3") for name in ("one", "another", "third")]
    assert Table(header, rows, spared=("kind", "id")).within(60).header == ("id", "name", "task")
    assert Table(header, rows, spared=("kind", "id")).within(30).header == ("name", "task")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    Out().data([], Table(header, rows, spared=("kind", "id")), ids=[])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 60
    assert "0" * 26 in out.getvalue()


def test_an_ablation_says_what_else_it_changes():
    config = resolve(preset="digits-dil").config
    assert besides(config, "protect")["consolidate.keys"] == ("closed-form", "random")
    assert besides(config, "adapters") == {}


def test_the_real_bash_completes(environ, here, start):
    script = here / "memtool"
    script.write_text(f"#!{sys.executable}\nfrom memtool_cli.main import run\nrun()\n")
    script.chmod(0o755)
    ask = """
        source <(_MEMTOOL_COMPLETE=source_bash memtool)
        complete -p memtool >&2
        for line in "memtool tr" "memtool run --pre" "memtool run --preset mira-d" \\
                "memtool train-adapter --task in"; do
            read -ra COMP_WORDS <<< "$line"
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            COMPREPLY=()
            _memtool_completion memtool
            echo "${COMPREPLY[*]}"
        done
    """
    done = subprocess.run(
        ["bash", "-c", ask],
        cwd=here,
        env=environ | {"PATH": f"{here}{os.pathsep}{environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    verbs, flags, presets, tasks = done.stdout.splitlines()
    assert verbs == "train-adapter"
    assert "--preset" in flags.split()
    assert {"mira-dg", "mira-dil"} <= set(presets.split())
    assert tasks == "inverted"
    assert "_memtool_completion" in done.stderr


def test_tags_are_completed(memtool, memory):
    assert memtool("tag", "zz-good").returncode == 0
    from memtool_cli import complete

    assert complete.stores(f"{memory.url}@zz") == [f"{memory.url}@zz-good"]


def test_the_tour_runs_five_real_commands_and_leaves_what_is_asked_for(memtool, here):
    small = {
        "MEMTOOL_STREAM__TRAIN_PER_TASK": "20",
        "MEMTOOL_STREAM__TEST_PER_TASK": "20",
        "MEMTOOL_TRAIN__EPOCHS": "1",
        "MEMTOOL_ENGINE__DEVICE": "cpu",
        "MEMTOOL_STORE": str(here / "in-use"),
    }
    done = memtool("tour", "--yes", "--out", "kept", **small)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("$ memtool ") == 5
    assert "final average %" in done.stdout
    assert (here / "kept/memory").is_dir()
    assert not (here / "in-use").exists()
    assert memtool("tour", "--yes", "--out", "kept", **small).returncode == 4
