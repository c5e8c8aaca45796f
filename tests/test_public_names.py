"""The public names: sorted, all there, and light until they are used."""

import subprocess
import sys

import memtool


def test_all_is_sorted_and_every_name_is_there():
    assert memtool.__all__ == sorted(memtool.__all__)
    assert {*memtool._HOME, "__version__"} == set(memtool.__all__)
    for name in memtool.__all__:
        assert getattr(memtool, name) is not None


def test_importing_loads_neither_torch_nor_numpy():
    code = "import sys, memtool; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
