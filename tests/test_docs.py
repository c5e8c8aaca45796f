"""The documentation is true: its commands run, its options, settings and links exist."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from memtool.config import parse_assignment, resolve
from memtool.experiments.sweep import axes_of
from memtool.settings import keys
from memtool_cli.main import VERBS
from tests.shown import METHOD, write_shown

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "60",
    "MEMTOOL_STREAM__TEST_PER_TASK": "60",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "MEMTOOL_ENGINE__DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
}

MARKED = re.compile(
    r"<!-- run(?P<slow> slow)? -->\n```(?P<language>\w+)\n(?P<code>.*?)^```", re.S | re.M
)
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)
INLINE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"\bmemtool (?P<verb>[a-z][a-z-]*)(?P<rest>[^\n|;&)#]*)")
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]*|-[a-zA-Z])\b")
SETTING = re.compile(r"--set ([a-z_.]+=[^\s`)]+)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def marked(page: Path, language: str, *, slow: bool = False) -> list[str]:
    """The blocks of a page that are marked to run, in order; the slow ones only when asked for."""
    found = MARKED.finditer(page.read_text(encoding="utf-8"))
    chosen = [one for one in found if one["language"] == language]
    return [one["code"] for one in chosen if slow or not one["slow"]]


def shell(page: Path) -> list[str]:
    """What a reader may type: the bash blocks, lines joined, and the commands in the text."""
    text = page.read_text(encoding="utf-8")
    blocks = [found["code"] for found in FENCED.finditer(text) if found["language"] != "text"]
    return [block.replace("\\\n", " ") for block in blocks] + INLINE.findall(FENCED.sub("", text))


@functools.cache
def commands_of(module: str) -> dict[str, Any]:
    """The commands that a module of verbs gives, by name."""
    group = typer.main.get_group(import_module(f"memtool_cli.verbs.{module}").app)
    return group.commands


def below_of(verb: str) -> list[str]:
    """The verbs below one that is a group, as `show` of `config`; else none."""
    return [*getattr(commands_of(VERBS[verb].module)[verb], "commands", {})]


@functools.cache
def options(verb: str) -> set[str]:
    """The options of a verb, `config show` included, as its help names them."""
    name, _, below = verb.partition(" ")
    command = commands_of(VERBS[name].module)[name]
    if below:
        command = command.commands[below]
    named = [name for one in command.params for name in (*one.opts, *one.secondary_opts)]
    return {"--help", "-h", *(name for name in named if name.startswith("-"))}


@functools.cache
def options_of_all() -> set[str]:
    """The options of every verb."""
    below = [f"{verb} {one}" for verb in VERBS for one in below_of(verb)]
    return set().union(*map(options, [*VERBS, *below]))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Small settings, nothing from around, and `memtool` and `python` of this interpreter."""
    start = tmp_path / "bin" / "memtool"
    start.parent.mkdir()
    start.write_text(f"#!{sys.executable}\nfrom memtool_cli.main import run\nrun()\n")
    start.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    return {
        **kept,
        **SMALL,
        "PATH": f"{start.parent}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "cli", "stores")),
        "XDG_CONFIG_HOME": str(tmp_path / "user"),
        "MEMTOOL_CACHE": str(tmp_path / "cache"),
    }


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_run_in_bash(here, environment):
    for code in marked(README, "bash", slow=True):
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{code}"],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert done.stdout, code


@pytest.mark.parametrize(
    "page", [page for page in PAGES if marked(page, "python")], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs_in_an_empty_folder(page, here, environment, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MEMTOOL_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith(("MEMTOOL_", "XDG_")):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(here)
    script = here.with_name("block.py")
    for code in marked(page, "python"):
        script.write_text(code, encoding="utf-8")
        runpy.run_path(str(script))


def test_the_readme_runs_what_it_promises():
    commands = "".join(marked(README, "bash"))
    for verb in ("train-adapter", "write", "consolidate", "retrieve", "eval", "rollback"):
        assert f"memtool {verb}" in commands
    assert len(marked(README, "bash", slow=True)) > len(marked(README, "bash"))
    assert marked(README, "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_exist(page):
    for text in shell(page):
        for found in COMMAND.finditer(text):
            verb, rest = found["verb"], found["rest"]
            assert verb in VERBS, found[0]
            below = next((one for one in below_of(verb) if re.match(rf" {one}\b", rest)), None)
            known = options(f"{verb} {below}" if below else verb)
            for option in OPTION.findall(rest):
                assert option in known, f"{found[0]}: {option}"
        if text.startswith("-") and text != "-":
            assert text.split()[0] in options_of_all(), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist_and_take_their_values(page, tmp_path):
    write_shown(tmp_path)
    sections = {key.partition(".")[0] for key in keys() if "." in key}
    for text in shell(page):
        assignments = []
        for line in text.splitlines():
            found = SETTING.findall(line)
            if "memtool sweep" in line:  # each of several values
                plain, axes = axes_of("mira", found)
                found = plain + [f"{key}={value}" for key in axes for value in axes[key]]
            assignments += found
        named = re.fullmatch(r"([a-z_]+)\.[a-z_]+(=\S+)?", text)
        if named and named[1] in sections and not text.endswith((".py", ".yaml", ".safetensors")):
            if named[2]:
                assignments.append(text)
            else:
                assert text in keys(), text
        for assignment in assignments:
            key, value = parse_assignment(assignment)
            if value.startswith("mine.py:"):
                value = str(tmp_path / value)
            shown = {"method": str(tmp_path / METHOD)} if key.startswith("nearest_mean.") else {}
            resolve(overrides={**shown, key: value}, ambient=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if fragment:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert fragment in slugs, target


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_of_the_readme_run_and_print_what_it_shows(here):
    """In this process, which has imported torch already; the slow test has bash run them."""
    transcripts = script("make_transcripts")
    blocks = {tuple(lines): text for lines, text in transcripts.shown(README)}
    assert README.read_text(encoding="utf-8").count("<!-- transcript -->") == len(blocks) > 0
    run = transcripts.run_in(here)
    for code in marked(README, "bash"):
        lines = transcripts.commands(code)
        outputs = [transcripts.printed([line], run) for line in lines]
        assert all(outputs), lines
        text = blocks.pop(tuple(lines), None)
        if text is not None:
            found = "\n".join(outputs)
            assert transcripts.same(text, found), f"run: python docs/make_transcripts.py\n{found}"
    assert not blocks


@pytest.mark.parametrize(
    ("line", "other", "same"),
    [
        ("a\t99.7 %\t1.9 s", "a\t98.9 %\t12 ms", True),
        ("a\t99.7 %\t1.9 s\tx", "a\t99.5 %\t1 min 16 s\tx", True),
        ("a\t99.7 %\t1.9 s", "a\t91.7 %\t1.9 s", False),
        ("loss 0.0246", "loss 0.0261", True),
        ("loss 0.0246", "loss 0.5", False),
        ("tasks 3", "tasks 4", False),
        ("version\tEH5JDYKHX8S6WZ4E1FQ0", "version\tH8Y9KFHMNEJ17JYC8X70", True),
        ("id\t01M7Y6HTFKXBCAZZXH7S168NVV", "id\ttask-3", False),
        ("separation\taffine", "separation\taffine\ndrift\t0.00", False),
    ],
)
def test_transcripts_are_compared_but_for_what_changes(line, other, same):
    assert script("make_transcripts").same(line, other) == same


def test_the_page_of_settings_is_up_to_date():
    module = script("make_settings")
    found = module.PAGE.read_text(encoding="utf-8")
    assert found == module.page(), "run: python docs/make_settings.py"
