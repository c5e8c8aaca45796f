"""Adapters at the doors of the memory: the folders under `runs`, and PEFT directories in and out.

A folder made by `train-adapter` is a PEFT directory (adapter_model.safetensors,
adapter_config.json) with two files beside it: `memtool.json`, which says what it was trained on and
what the sha256 of the others is, and `head.safetensors`, the classifier trained with it. Without
these it is anybody's PEFT adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError
from safetensors.torch import save
from torch import Tensor

import memtool
from memtool import sealed
from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_files import (
    PeftAdapter,
    read_peft,
    restore_peft,
    restored_file,
    write_peft,
)
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.atomic import write_atomic
from memtool.config import TrainSettings
from memtool.errors import (
    AlreadyExistsError,
    CorruptError,
    DataError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)
from memtool.heads import LinearClassifier
from memtool.methods.foreign import TrainedAs, check_base_model, read_head
from memtool.methods.in_store import classifier_bytes, own_head_blob
from memtool.methods.results import AdaptResult
from memtool.outside import read_file, read_json, way_to_write
from memtool.tensor_bytes import read_tensors
from memtool_stores.files import appearing_folders, open_as_usual, part_folder
from memtool_stores.names import below, check_name
from memtool_stores.printable import shown

if TYPE_CHECKING:
    from memtool.streams.task import Task
    from memtool.workspace import Workspace
    from memtool_stores import AdapterRecord, MemoryView

ABOUT = "memtool.json"
OWN_HEAD = "head.safetensors"
CATALOG = "memtool_catalog.json"
ABOUT_VERSION = 2
"""Since version 2 `memtool.json` has a checksum of its own and those of the files beside it."""
PEFT_PREFIX = "peft."
"""Blobs of this name hold what PEFT files have beside their numbers: header and configuration."""


ANEW = (
    "memtool train-adapter --fresh, or, for an adapter that was changed on purpose, "
    f"memtool write --task N without {ABOUT} and {OWN_HEAD}"
)
"""What helps where a folder of runs is not what was written."""

Section = TypeVar("Section", bound=BaseModel)


class _Beside(BaseModel):
    """A JSON file beside the PEFT files of an adapter."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def read(cls, file: Path) -> Self:
        """What a file says. Raises CorruptError for another content, NotFoundError."""
        try:
            return cls.model_validate(read_json(file))
        except ValidationError as error:
            raise _wrong(file, error) from error


class About(_Beside):
    """What an adapter was trained on: the file `memtool.json` of its folder.

    `files` has the sha256 of the files beside it; empty in folders of schema version 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = ABOUT_VERSION
    result: AdaptResult
    files: dict[str, str] = {}
    fingerprint: str
    setting: str
    domain: str | None
    classes: tuple[str, ...]
    stream: str
    stream_fingerprint: str
    backbone: str
    backbone_sha256: str
    warm_start: str
    beneath: str = ""
    configuration: dict[str, Any]
    memtool: str

    @classmethod
    def read(cls, file: Path) -> Self:
        """What a file says, once its seal holds; folders of schema version 1 have none.

        Raises CorruptError, or MismatchError for one that a newer memtool wrote.
        """
        document = sealed.parse_json(read_file(file), str(file), remedy=ANEW)
        version = document.content.get("schema_version")
        if isinstance(version, int) and version > ABOUT_VERSION:
            raise MismatchError(
                f"{file} has schema version {version}, made by a newer memtool",
                expected=f"at most {ABOUT_VERSION}",
                remedy="upgrade memtool",
            )
        try:
            about = cls.model_validate_json(json.dumps(document.content))
        except ValidationError as error:
            raise _wrong(file, error) from error
        if about.schema_version > 1 and not document.sealed:
            raise CorruptError(f"{file} has no checksum", remedy=ANEW)
        return about

    @property
    def trained_as(self) -> TrainedAs:
        """What the adapter is."""
        return "atoms" if self.configuration.get("method") == "moram" else "adapter"

    def section(self, name: str, model: type[Section]) -> Section:
        """A section of the configuration that it was trained with. Raises CorruptError."""
        try:
            return model.model_validate(self.configuration.get(name))
        except ValidationError as error:
            raise _wrong(Path(ABOUT), error, f"configuration.{name}") from error


class _Exported(_Beside):
    """What `memtool_catalog.json` says of an adapter that came out of a memory."""

    task: StrictInt | None = None
    kind: TrainedAs = "adapter"
    backbone: str | None = None
    backbone_sha256: str | None = None


def _wrong(file: Path, error: ValidationError, section: str = "") -> CorruptError:
    """What a file says that it cannot say."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, (*filter(None, [section]), *first["loc"])))
    return CorruptError(
        f"{file}: {place or 'the whole'} is {shown(first['input'])}: {first['msg']}",
        remedy="a folder as `memtool train-adapter` or `memtool export` writes it"
        if file.name == CATALOG
        else ANEW,
    )


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that holds, or will hold, one adapter."""

    path: Path

    @classmethod
    def all_in(cls, folder: Path) -> list[AdapterFolder]:
        """The finished adapters of a folder, by task, then by name."""
        # A name with a dot in front is a folder in the making, or one that a kill left behind.
        found = [cls(path.parent) for path in folder.glob(f"[!.]*/{ABOUT}")]
        return sorted(found, key=lambda one: (one.result().task, one.path.name))

    @property
    def is_complete(self) -> bool:
        """Whether training ended and everything was written; the folder appears whole."""
        return (self.path / ABOUT).is_file()

    def about(self) -> About:
        """What the adapter was trained on.

        CorruptError for a file that is not what was written, MemtoolError for one that cannot be
        read.
        """
        return About.read(self.path / ABOUT)

    def require_whole(self, about: About) -> None:
        """Raise CorruptError where a file is not the one that was written with `about`."""
        if about.schema_version < 2:
            return
        for name in (WEIGHTS_NAME, CONFIG_NAME, OWN_HEAD):
            wanted, file = about.files.get(name), self.path / name
            found = None
            with suppress(NotFoundError):
                found = hashlib.sha256(read_file(file, "array_bytes")).hexdigest()
            if found != wanted:
                raise CorruptError(
                    f"{file} is not what was written: {ABOUT} has another sha256",
                    expected=f"{wanted or 'no such file'}, found {found or 'none'}",
                    remedy=ANEW,
                )

    def result(self) -> AdaptResult:
        """What its training returned, at the place where it is now."""
        return self.about().result.model_copy(update={"path": self.path})


@dataclass(frozen=True, eq=False)
class ReadAdapter:
    """An adapter read from a folder: its value in this layout and what the catalog keeps of it.

    `files` is all of its PEFT files but the numbers, for the blob that `meta["peft"]` names: it is
    the same for all adapters that were written alike. `about` is None for an adapter that was not
    trained here; `notes` say what is doubtful about it.
    """

    path: Path
    name: str
    value: Tensor
    sha256: str
    head: LinearClassifier | None
    meta: dict[str, Any]
    files: bytes
    trained_as: TrainedAs
    about: About | None
    notes: tuple[str, ...] = ()


def write_adapter(
    folder: AdapterFolder,
    work: Workspace,
    task: Task,
    *,
    value: Tensor,
    head: LinearClassifier | None,
    result: AdaptResult,
    fingerprint: str,
    warm_start: str,
    beneath: str = "",
) -> None:
    """Write a trained adapter, and its head where it has one.

    The folder appears whole or not at all.
    """
    classes = work.stream.class_names
    about = About(
        result=result,
        fingerprint=fingerprint,
        setting=work.stream.setting,
        domain=task.domain,
        classes=tuple(classes[c] for c in task.classes),
        stream=work.stream.name,
        stream_fingerprint=work.stream.fingerprint,
        backbone=work.backbone.name,
        backbone_sha256=work.backbone.sha256,
        warm_start=warm_start,
        beneath=beneath,
        configuration=work.config.recorded(),
        memtool=memtool.__version__,
    )
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    # One to fill, and one to put an older one into until the new one is in its place.
    building, replaced = part_folder(folder.path), part_folder(folder.path)
    try:
        write_peft(
            building,
            value,
            work.layout,
            alpha=work.config.adapter.alpha,
            base_model=work.backbone.name,
        )
        if head is not None:
            write_atomic(building / OWN_HEAD, classifier_bytes(head))
        files = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(building.iterdir())
        }
        about = about.model_copy(update={"files": files})
        sealed.write_json(building / ABOUT, about.model_dump(mode="json", by_alias=True))
        open_as_usual(building)
        if folder.path.exists():
            folder.path.rename(replaced)
        building.rename(folder.path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if not folder.path.exists() and any(replaced.iterdir()):
            replaced.rename(folder.path)
        shutil.rmtree(replaced, ignore_errors=True)


def read_adapter(path: Path, work: Workspace, task: Task | None = None) -> ReadAdapter:
    """Read a folder for this backbone and layout; `task` where the folder does not say it."""
    if not path.is_dir():
        raise NotFoundError(f"no adapter directory {path}", remedy="ls runs/adapters")
    folder = AdapterFolder(path)
    about = folder.about() if _is_there(path / ABOUT) else None
    if about is not None:
        folder.require_whole(about)
    found = read_peft(path, work.layout.sites)
    if found.layout != work.layout:
        raise MismatchError(
            f"{path}: an adapter of rank {found.layout.rank} at {len(found.layout.sites)} sites",
            expected=f"rank {work.layout.rank} at {len(work.layout.sites)} sites, as configured",
            remedy=f"--rank {found.layout.rank}; a store holds adapters of one rank only",
        )
    exported = _Exported.read(path / CATALOG) if _is_there(path / CATALOG) else _Exported()
    trained_on = (exported.backbone, exported.backbone_sha256)
    if about is not None:
        trained_on = (about.backbone, about.backbone_sha256)
    notes = check_base_model(path, found, trained_on, work.backbone)
    number = exported.task if about is None else about.result.task
    if task is not None:
        if number not in (None, task.number):
            raise MismatchError(
                f"{path} says that it was trained on task {number}, not {task.number}",
                remedy="leave --task away",
            )
        number = task.number
    if number is None:
        raise DataError(
            f"{path} does not say which task it was trained on",
            remedy=f"memtool write {path} --task N",
        )
    value = found.value.float()
    if not bool(value.isfinite().all()):
        raise DataError(f"{path} has numbers that 32 bits cannot hold")
    chosen = work.task(str(number))
    names = work.stream.class_names
    own = None
    if _is_there(path / OWN_HEAD):
        own = read_head(path / OWN_HEAD, (len(names), work.backbone.dim))
    if about is not None and (about.result.task_name, about.classes) != (
        chosen.name,
        tuple(names[c] for c in chosen.classes),
    ):
        raise MismatchError(
            f"{path} was trained on task {about.result.task} {about.result.task_name!r} "
            f"of {about.stream}",
            expected=f"task {chosen.number} {chosen.name!r} of {work.stream.name}, as configured",
            remedy="the stream settings that it was trained with (memtool.json holds them)",
        )
    meta: dict[str, Any] = {
        "task": number,
        "task_name": chosen.name,
        "seed": about.result.seed if about else None,
        "domain": about.domain if about else chosen.domain,
        "classes": list(about.classes) if about else [names[c] for c in chosen.classes],
        "class_ids": list(chosen.classes),
        "scaling": found.scaling,
        "setting": about.setting if about else work.stream.setting,
        "hyperparameters": about.section("train", TrainSettings).model_dump(mode="json")
        if about
        else {},
        "provenance": {
            "beneath": about.beneath if about else "",
            "fingerprint": about.fingerprint if about else "",
            "seconds": about.result.seconds if about else 0.0,
            "directory": path.name,
            "stream": about.stream if about else work.stream.name,
            "warm_start": about.warm_start if about else "unknown",
            "memtool": about.memtool if about else "",
        },
        "file_sha256": found.sha256,
    }
    exact = hashlib.sha256(restored_file(replace(found, value=value))).hexdigest() == found.sha256
    meta["byte_identical"] = exact
    files = save({"header": _bytes_tensor(found.header), "config": _bytes_tensor(found.config)})
    meta["peft"] = PEFT_PREFIX + hashlib.sha256(files).hexdigest()[:32]
    sha256 = hashlib.sha256(np.ascontiguousarray(value.numpy(), dtype="<f4").tobytes()).hexdigest()
    name = check_name(about.result.name if about else path.resolve().name, "an adapter")
    trained_as = exported.kind if about is None else about.trained_as
    return ReadAdapter(path, name, value, sha256, own, meta, files, trained_as, about, notes)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_there(file: Path) -> bool:
    """Whether there is anything of this name: a pipe or a broken link, too, is looked at."""
    return os.path.lexists(file)


def export_peft(
    work: Workspace,
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
    view = work.store.view(work.version_of(version))
    records = [view.get(name) for name in adapters] if adapters else view.live
    chosen = {below(out, record.name): record for record in records}
    with new_folders(*chosen) as building:
        for record, directory in zip(chosen.values(), building, strict=True):
            _write_exported(directory, view, record, work)
    return list(chosen)


def _write_exported(
    directory: Path, view: MemoryView, record: AdapterRecord, work: Workspace
) -> None:
    """Write one stored adapter with its head and what the catalog knows of it."""
    _write_stored(directory, view, record, work)
    if own_head_blob(record.name) in view.blobs():
        head = view.blob(own_head_blob(record.name))
        (directory / OWN_HEAD).write_bytes(head)
    known = {
        "adapter": record.name,
        "id": record.id,
        "kind": record.kind,
        "version": view.version,
        "backbone": work.backbone.name,
        "backbone_sha256": work.backbone.sha256,
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


def _write_stored(
    directory: Path, view: MemoryView, record: AdapterRecord, work: Workspace
) -> None:
    """Write one stored adapter: as the files that it came from, where it came from files.

    The bytes are the same unless atoms of it were pruned, which are zeros then, its modules had
    scalings of their own or its numbers more than 32 bits, which were rounded on the way in;
    `meta["byte_identical"]` says so. Raises CorruptError when they should be the same and are not.
    """
    value = torch.from_numpy(view.value(record.id).copy())
    blob = record.meta.get("peft")
    tensors = work.layout.unflatten(value)  # views
    for site, ranks in record.pruned.items():
        tensors[f"{site}.lora_A"][list(ranks)] = 0
        tensors[f"{site}.lora_B"][:, list(ranks)] = 0
    if blob is None or record.pruned:
        alpha = float(record.scaling) * work.layout.rank
        write_peft(directory, value, work.layout, alpha=alpha, base_model=work.backbone.name)
        return
    files = read_tensors(view.blob(blob), f"blob {blob!r}", header="uint8 h", config="uint8 c")
    adapter = PeftAdapter(
        value,
        work.layout,
        float(record.scaling),
        files["header"].numpy().tobytes(),
        str(record.meta["file_sha256"]),
        files["config"].numpy().tobytes(),
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
