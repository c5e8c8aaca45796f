"""Files that appear whole: links are followed, devices written through, kills survived."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memtool_stores.files import appearing, part, part_folder, write_whole
from memtool_stores.leftovers import find


def test_a_new_file_has_the_mode_of_any_new_file_and_an_old_one_keeps_its_own(tmp_path):
    beside, new, old = (tmp_path / name for name in ("beside", "new", "old"))
    beside.write_bytes(b"")
    write_whole(new, b"1")
    assert new.read_bytes() == b"1"
    assert new.stat().st_mode == beside.stat().st_mode
    old.write_bytes(b"0")
    old.chmod(0o640)
    write_whole(old, b"2")
    assert old.read_bytes() == b"2"
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    write_whole(tmp_path / "secret", b"3", private=True)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_links_are_followed_also_those_that_lead_nowhere_yet(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("there", "not-there"):
        (tmp_path / name).symlink_to(f"folder/{name}")
    (tmp_path / "folder/there").write_bytes(b"old")
    for name in ("there", "not-there"):
        write_whole(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "folder" / name).read_bytes() == b"new"


def test_devices_and_pipes_are_written_through(tmp_path):
    null = Path(os.devnull)
    device = null.stat().st_rdev
    write_whole(null, b"gone")
    assert null.stat().st_rdev == device
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"through")
    reader.join()
    assert read == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_to_behind_what_is_there(tmp_path, name):
    code = (
        "import sys; from pathlib import Path; from memtool_stores.files import write_whole;"
        "print('before', flush=True);"
        f"write_whole(Path({name!r}), b'page\\n'); print('after', flush=True)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert out.stdout == b"before\npage\nafter\n"
    file = tmp_path / "file"
    with file.open("wb") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True)
    assert file.read_bytes() == b"before\npage\nafter\n"


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail_half_way():
        with appearing(target) as file:
            file.write(b"half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_found(tmp_path):
    assert not find(tmp_path)
    made = {part(tmp_path / "file"), part_folder(tmp_path / "folder"), part(tmp_path / ("é" * 127))}
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "x.part").write_bytes(b"")
    (tmp_path / ".x.part").write_bytes(b"")
    assert {leftover.path for leftover in find(tmp_path)} == made
    assert not find(tmp_path / "nowhere")
