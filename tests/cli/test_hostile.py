"""A memory that a stranger made to write elsewhere: every door refuses it, nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.door import nothing_else_changes

VERBS = (
    ("ls",),
    ("ls", "--json"),
    ("show",),
    ("export", "--out", "D"),
    ("export", "--bundle", "again.bundle"),
    ("clone", "twin"),
    ("verify",),
)
READ = """
import sys
from memtool_stores import MemoryStore, MemtoolError
for read in ("values", "blobs", "adapters"):
    try:
        view = MemoryStore.open("hostile").view()
        found = getattr(view, read)
        found = found() if callable(found) else found
    except MemtoolError as error:
        print("refused", error.message)
    else:
        print("read", found)
"""


def made(here: Path, environ: dict[str, str], kind: str, name: str) -> None:
    script = Path(__file__).with_name("hostile.py")
    subprocess.run(
        [sys.executable, str(script), "hostile", kind, name], cwd=here, env=environ, check=True
    )


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.fixture
def sandbox(here: Path, tmp_path: Path) -> Path:
    """The folder above the working folder, with things in it that a path could climb to."""
    for victim in ("x", "victim", "abs/x"):
        (tmp_path / victim).parent.mkdir(exist_ok=True)
        (tmp_path / victim).mkdir()
        (tmp_path / victim / "precious.values").write_bytes(b"precious")
    return tmp_path


NAMES = [
    ("adapter", "{sandbox}/abs/x"),
    ("adapter", ".."),
    ("adapter", "a/b"),
    ("adapter", "-rf"),
    ("adapter", "line\nline\x1b[2J"),
    ("adapter", "x" * 300),
    ("blob", "..."),
    ("store", "{sandbox}/abs"),
    ("store", "not-a-ulid"),
]


@pytest.mark.parametrize(
    ("kind", "name", "run"),
    [
        ("adapter", "../../x", "memtool"),
        ("store", "../../victim", "memtool"),
        *(pytest.param(*case, "memtool", marks=pytest.mark.slow) for case in NAMES),
        # As it was met, every verb a process of its own.
        pytest.param("adapter", "../../x", "process", marks=pytest.mark.slow),
        pytest.param("store", "../../victim", "process", marks=pytest.mark.slow),
    ],
)
def test_a_hostile_memory_is_refused_at_every_door(
    request, here, environ, sandbox, kind, name, run
):
    run = request.getfixturevalue(run)
    made(here, environ, kind, name.format(sandbox=sandbox))
    before = listing(sandbox)
    # The names of blobs are read by what reads blobs; the values of sound adapters may be mapped.
    cache = sandbox / "cache" if kind == "blob" else None
    with nothing_else_changes(sandbox, but=cache):
        done = run("import", "hostile.bundle", "--store", "copy")
        assert done.returncode in {2, 5}, done.stderr
        assert "Traceback" not in done.stderr
        assert "\x1b[2J" not in done.stderr
        for verb in VERBS:
            done = run(*verb, "--store", "hostile")
            assert done.returncode != 0 or (kind, verb[0]) == ("blob", "ls"), (verb, done.stdout)
            assert "Traceback" not in done.stderr, verb
    after = listing(sandbox)
    allowed = {str(here / "hostile" / "lock"), str(sandbox / "cache")}
    new = {path for path in after - before if path not in allowed}
    assert not [path for path in new if cache is None or not Path(path).is_relative_to(cache)]
    assert before <= after
    with nothing_else_changes(sandbox, but=cache):
        ran = subprocess.run(
            [sys.executable, "-c", READ],
            cwd=here,
            env=environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "refused" in ran.stdout
    assert "Traceback" not in ran.stderr
