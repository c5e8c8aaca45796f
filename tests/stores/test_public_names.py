"""The face of the package: names, codes, and how light it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import memtool_stores
from memtool_stores import errors


def _python(code: str) -> str:
    source = Path(memtool_stores.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(source), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert memtool_stores.__all__ == sorted(memtool_stores.__all__)
    for name in memtool_stores.__all__:
        assert getattr(memtool_stores, name).__name__ == name
    assert dir(memtool_stores) == memtool_stores.__all__


def test_codes_are_stable_and_drawn() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    codes = {c.__name__: c.code for c in classes if issubclass(c, errors.MemtoolError)}
    assert codes == {
        "MemtoolError": "error",
        "NotFoundError": "not-found",
        "VersionExpiredError": "version-expired",
        "AlreadyExistsError": "already-exists",
        "BusyError": "busy",
        "ChangedMeanwhileError": "changed-meanwhile",
        "ConflictError": "conflict",
        "CorruptError": "corrupt",
        "LockTimeoutError": "lock-timeout",
        "IntegrityError": "integrity",
        "SchemaError": "schema",
        "NewerSchemaError": "newer-schema",
        "MismatchError": "mismatch",
        "SpaceMismatchError": "space-mismatch",
        "ForkedProcessError": "forked-process",
        "ClockError": "clock",
        "StorageError": "storage",
    }
    assert errors.__doc__ is not None
    for name, code in codes.items():
        assert name in errors.__doc__
        assert name == "MemtoolError" or f" {code}\n" in errors.__doc__


def test_the_import_is_light() -> None:
    loaded = _python("import memtool_stores, sys; print(*sys.modules)").split()
    assert not {"numpy", "zarr", "icechunk", "torch", "pydantic"} & set(loaded)


def test_reading_never_loads_torch_and_leaves_stdout_clean(grown: object) -> None:
    url = grown.url  # type: ignore[attr-defined]
    code = (
        f"import sys, memtool_stores as m; s = m.MemoryStore.open({url!r}); s.log(); s.verify();"
        "s.view().values; print('torch' in sys.modules)"
    )
    assert _python(code) == "False\n"
