"""Adapters of a memory as PEFT directories: the files that they came from, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_files import PeftAdapter, restore_peft, restored_file, write_peft
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.atomic import write_atomic
from memtool.errors import AlreadyExistsError, CorruptError, MemtoolError
from memtool.methods.exchange import CATALOG, OWN_HEAD
from memtool.methods.records import own_head_blob
from memtool.outside import way_to_write
from memtool.tensor_bytes import read_arrays
from memtool_stores.files import appearing_folders
from memtool_stores.names import below

if TYPE_CHECKING:
    from memtool.methods.home import Home
    from memtool_stores import AdapterRecord, MemoryView


def export_peft(
    home: Home,
    adapters: Sequence[str] | None,
    *,
    out: Path,
    version: str = "HEAD",
) -> list[Path]:
    """Write stored adapters (names or ids; none: all) as PEFT directories under `out`.

    An adapter that came from PEFT files becomes the same bytes again. Each gets its head and what
    the catalog knows of it. All of them appear, or none. Raises AlreadyExistsError for a directory
    that is not empty, SchemaError for a name that leads out of `out`, and MemtoolError when the
    file system refuses.
    """
    view = home.store.view(home.version_of(version))
    records = [view.get(name) for name in adapters] if adapters else view.live
    chosen = {below(out, record.name): record for record in records}
    with new_folders(*chosen) as building:
        for record, directory in zip(chosen.values(), building, strict=True):
            _write_exported(directory, view, record, home)
    return list(chosen)


def _write_exported(directory: Path, view: MemoryView, record: AdapterRecord, home: Home) -> None:
    """Write one stored adapter with its head and what the catalog knows of it."""
    write_stored(directory, view, record, home)
    if view.has_blob(own_head_blob(record.name)):
        head = view.blob(own_head_blob(record.name))
        (directory / OWN_HEAD).write_bytes(head)
    known = {
        "adapter": record.name,
        "id": record.id,
        "kind": record.kind,
        "version": view.version,
        "backbone": home.backbone.name,
        "backbone_sha256": home.backbone.sha256,
        "byte_identical": False,
        **record.meta,
    }
    if record.pruned:
        known |= {
            "byte_identical": False,
            "pruned": {k: list(v) for k, v in record.pruned.items()},
        }
    text = json.dumps(known, indent=2, default=str) + "\n"
    (directory / CATALOG).write_text(text, encoding="utf-8")


def write_stored(directory: Path, view: MemoryView, record: AdapterRecord, home: Home) -> None:
    """Write one stored adapter: as the files that it came from, where it came from files.

    The bytes are the same unless atoms of it were pruned, which are zeros then, its modules had
    scalings of their own or its numbers more than 32 bits, which were rounded on the way in;
    `meta["byte_identical"]` says so. Raises CorruptError when they should be the same and are not.
    """
    blob = record.meta.get("peft")
    if record.ragged:
        files = read_arrays(*config_blob(view, record), config="uint8 c")
        write_atomic(directory / WEIGHTS_NAME, view.export(record.id))
        write_atomic(directory / CONFIG_NAME, files["config"].bits.tobytes())
        return
    value = view.value(record.id).copy()
    tensors = home.layout.unflatten(value)  # views
    for site, ranks in record.pruned.items():
        tensors[f"{site}.lora_A"][list(ranks)] = 0
        tensors[f"{site}.lora_B"][:, list(ranks)] = 0
    if blob is None or record.pruned:
        alpha = float(record.scaling) * home.layout.rank
        write_peft(
            directory,
            value,
            home.layout,
            alpha=alpha,
            base_model=home.backbone.name,
            transposed=home.backbone.transposed,
        )
        return
    files = read_arrays(view.blob(blob), f"blob {blob!r}", header="uint8 h", config="uint8 c")
    adapter = PeftAdapter(
        value,
        home.layout,
        float(record.scaling),
        files["header"].bits.tobytes(),
        str(record.meta["file_sha256"]),
        files["config"].bits.tobytes(),
    )
    if record.meta.get("byte_identical"):
        found = hashlib.sha256(restored_file(adapter)).hexdigest()
        if found != adapter.sha256:
            raise CorruptError(
                f"adapter {record.name!r} no longer makes the file that it came from",
                expected=f"sha256 {adapter.sha256}, found {found}",
                remedy="memtool verify; an older version may hold it whole",
            )
    restore_peft(directory, adapter)


def config_blob(view: MemoryView, record: AdapterRecord) -> tuple[bytes, str]:
    """The configuration of a LoRA that was kept as its file, and where that stands.

    Raises CorruptError for a file that came without one.
    """
    name = record.meta.get("peft")
    if not isinstance(name, str) or not view.has_blob(name):
        raise CorruptError(
            f"adapter {record.name!r} has no configuration in memory",
            expected="a blob that the catalog names as its peft",
            remedy="memtool import of the folder it came from",
        )
    return view.blob(name), f"blob {name!r}"


def require_new(directory: Path) -> None:
    """Raise AlreadyExistsError for a file, or a directory that holds something."""
    if directory.exists() and not directory.is_dir():
        raise AlreadyExistsError(f"{directory} is a file", remedy="name a new directory")
    if directory.exists() and any(directory.iterdir()):
        raise AlreadyExistsError(f"{directory} is not empty", remedy="name a new directory")


@contextmanager
def new_folders(*directories: Path) -> Iterator[list[Path]]:
    """Folders to fill that become these together when the block ends well, else nothing does.

    Raises AlreadyExistsError for one that is there and holds something, and MemtoolError when the
    file system refuses.
    """
    for directory in directories:
        require_new(directory)
    try:
        with appearing_folders(*directories) as building:
            yield building
    except OSError as error:
        place = directories[0].parent
        raise MemtoolError(
            f"cannot write in {place}: {error.strerror or error}; nothing was written",
            remedy=way_to_write(error),
        ) from error
