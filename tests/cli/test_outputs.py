"""Where files go: devices, pipes, links, folders; as real processes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.reports.sample import record


@pytest.fixture
def page(here: Path) -> Path:
    """An evaluation record to make pages of."""
    file = here / "record.json"
    file.write_text(record().to_json(), encoding="utf-8")
    return file


@pytest.fixture
def process(here, environ, start):
    """`memtool …` with a stdout of its own: what it wrote there as bytes, what it said."""

    def run(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*start, *arguments],
            cwd=here,
            env=environ,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )

    return run


def is_page(content: bytes) -> bool:
    """Whether this is a page, and nothing beside it."""
    return content.startswith(b"<!DOCTYPE html>") and content.endswith(b"</html>\n")


def is_whole(content: bytes) -> bool:
    """Whether this is what `memtool init` writes, and nothing beside it."""
    return content.startswith(b"# Settings of memtool") and content.count(b"image_pixels") == 1


def test_a_device_stays_a_device(page, process):
    assert process("report", "record.json", "--out", "/dev/null").returncode == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert process("init", "/dev/full").returncode == 1
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_page_comes_out_of_stdout_alone(page, process):
    done = process("report", "record.json", "--out", "-", "--json")
    assert done.returncode == 0, done.stderr
    assert is_page(done.stdout)
    assert json.loads(done.stderr)["schema"] == "memtool.file"


@pytest.mark.parametrize("name", ["/dev/stdout", "-", "/dev/fd/1", "/proc/self/fd/1"])
def test_names_of_stdout(name, process):
    done = process("init", name)
    assert done.returncode == 0, done.stderr
    assert is_whole(done.stdout)
    assert b"written\t" in done.stderr


def test_with_quiet_there_is_nothing_beside_the_file(process):
    done = process("init", "-", "-q")
    assert is_whole(done.stdout)
    assert done.stderr == b""


def test_into_a_file_that_stdout_is(process, here):
    with (here / "out.yaml").open("wb") as file:
        file.write(b"what was there\n")
        file.flush()
        assert process("init", "-", stdout=file.fileno()).returncode == 0
    before, _, after = (here / "out.yaml").read_bytes().partition(b"\n")
    assert before == b"what was there"
    assert is_whole(after)


def test_a_pipe_that_has_a_name(process, here):
    os.mkfifo(here / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((here / "pipe").read_bytes()))
    reader.start()
    assert process("init", "pipe").returncode == 0
    reader.join(timeout=60)
    assert is_whole(read[0])
    assert stat.S_ISFIFO((here / "pipe").stat().st_mode)


def test_links_are_followed(process, here):
    (here / "there").mkdir()
    (here / "whole").symlink_to("there/old")
    (here / "dangling").symlink_to("there/new")
    (here / "there" / "old").write_text("old", encoding="utf-8")
    for link in ("whole", "dangling"):
        assert process("init", link, "--yes").returncode == 0
        assert (here / link).is_symlink()
        assert is_whole((here / link).read_bytes())


def test_a_missing_folder_is_made_and_a_folder_is_no_file(memory, process, here):
    assert process("init", "a/b/settings.yaml").returncode == 0
    assert is_whole((here / "a" / "b" / "settings.yaml").read_bytes())
    for verb in (["init", "a"], ["report", "record.json", "--out", "a"]):
        done = process(*verb)
        assert done.returncode == 2
        assert b"a is a folder" in done.stderr
    done = process("init", "a/b/settings.yaml/below")
    assert done.returncode == 1
    assert b"cannot write a/b/settings.yaml/below" in done.stderr
    assert sorted(path.name for path in here.iterdir()) == ["a", "memory"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(process, here):
    (here / "closed").mkdir(mode=0o500)
    done = process("init", "closed/settings.yaml")
    assert done.returncode == 1
    assert b"a folder that you may write" in done.stderr
    assert list((here / "closed").iterdir()) == []


def test_a_reader_that_leaves_early_ends_it_with_141(process):
    reader, writer = os.pipe()
    os.close(reader)
    done = process("init", "-", stdout=writer)
    os.close(writer)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_streams_that_are_closed_harm_nothing(closed, here, memory, environ, start):
    done = subprocess.run(
        [*start, "tag", "v1"],
        cwd=here,
        env=environ,
        preexec_fn=lambda: [os.close(number) for number in closed],
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "v1" in memory.tags()
