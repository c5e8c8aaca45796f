"""Folders of adapters: those that training leaves under `runs`, and PEFT directories of others.

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
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, StrictInt, ValidationError

import memtool
from memtool import sealed
from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_files import PeftAdapter, read_peft, restored_file, write_peft
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.atomic import write_atomic
from memtool.errors import CorruptError, DataError, MismatchError, NotFoundError
from memtool.methods.about import said_by
from memtool.methods.foreign import TrainedAs, check_base_model, read_head, require_of_images
from memtool.methods.results import AdaptResult
from memtool.outside import read_file, read_json
from memtool.settings import TrainSettings
from memtool_stores.errors import ChangedMeanwhileError
from memtool_stores.files import open_as_usual, part_folder
from memtool_stores.held import TensorFile
from memtool_stores.names import check_name
from memtool_stores.printable import shown

if TYPE_CHECKING:
    from torch import Tensor

    from memtool.heads import LinearClassifier
    from memtool.methods.home import Home
    from memtool.streams.task import Task
    from memtool.workspace import Workspace

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
        return said_by(str(self.configuration.get("method"))).kind

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

    `numbers` is float32 (numel,); `head_file` the classifier beside it, as its blob. `files` is all
    of its PEFT files but the numbers, for the blob that `meta["peft"]` names: it is the same for
    all adapters that were written alike. `tensors` is the file of an adapter that has a layout of
    its own, or numbers that rows cannot hold: it is kept as it is. `about` is None for an adapter
    that was not trained here; `notes` say what is doubtful about it.
    """

    path: Path
    name: str
    numbers: npt.NDArray[np.float32]
    sha256: str
    head_file: bytes | None
    meta: dict[str, Any]
    files: bytes
    trained_as: TrainedAs
    about: About | None
    tensors: TensorFile | None = None
    notes: tuple[str, ...] = ()

    @property
    def value(self) -> Tensor:
        """The numbers as a tensor (numel,), which shares their memory."""
        import torch

        return torch.from_numpy(self.numbers)

    @property
    def head(self) -> LinearClassifier | None:
        """The classifier that came with it."""
        from memtool.methods.in_store import classifier_of

        return None if self.head_file is None else classifier_of(self.head_file, str(self.path))


def write_adapter(
    folder: AdapterFolder,
    work: Workspace,
    task: Task,
    *,
    value: Tensor,
    head: bytes | None,
    result: AdaptResult,
    fingerprint: str,
    warm_start: str,
    beneath: str = "",
) -> None:
    """Write a trained adapter, and the file of its head where it has one.

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
            transposed=work.backbone.transposed,
        )
        if head is not None:
            write_atomic(building / OWN_HEAD, head)
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


def read_adapter(
    path: Path, home: Home, task: Task | None = None, *, any_layout: bool = False
) -> ReadAdapter:
    """Read a folder for the model and layout of a memory; `task` where the folder does not say it.

    `any_layout` says whether the memory takes adapters of other ranks and layers than are trained
    for it. Raises NotFoundError, MismatchError, DataError and CorruptError, and as `read_peft`;
    NeedsModel where only the model tells which layers there are.
    """
    if not path.is_dir():
        raise NotFoundError(f"no adapter directory {path}", remedy="ls runs/adapters")
    folder = AdapterFolder(path)
    about = folder.about() if _is_there(path / ABOUT) else None
    if about is not None:
        folder.require_whole(about)
    elif home.config.stream.setting != "trace":
        require_of_images(path)
    found = _read_any(path, home) if any_layout else _read_alike(path, home)
    exported = _Exported.read(path / CATALOG) if _is_there(path / CATALOG) else _Exported()
    trained_on = (exported.backbone, exported.backbone_sha256)
    if about is not None:
        trained_on = (about.backbone, about.backbone_sha256)
    notes = check_base_model(path, found, trained_on, home.backbone)
    number = _task_number(path, exported.task if about is None else about.result.task, task, home)
    with np.errstate(over="ignore"):
        numbers = found.numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DataError(f"{path} has numbers that 32 bits cannot hold")
    width = home.backbone.dim if _is_there(path / OWN_HEAD) else None
    chosen = home.task(str(number))
    head = None
    if width is not None:
        head = read_head(path / OWN_HEAD, (len(home.stream.class_names), width))
    meta = _meta(path, home, chosen, about)
    meta |= {"scaling": found.scaling, "file_sha256": found.sha256}
    again = hashlib.sha256(restored_file(replace(found, numbers=numbers))).hexdigest()
    meta["byte_identical"] = again == found.sha256
    tensors = None
    sha256 = hashlib.sha256(numbers.astype("<f4", copy=False).tobytes()).hexdigest()
    beside = {"header": found.header, "config": found.config}
    if any_layout and (found.layout != home.layout or not meta["byte_identical"]):
        tensors = _as_it_is(path / WEIGHTS_NAME, found.sha256)
        sha256 = tensors.values.sha256
        meta["byte_identical"] = True
        del beside["header"]  # the store keeps that of a file
    meta["peft"], files = peft_blob(**beside)
    name = check_name(about.result.name if about else path.resolve().name, "an adapter")
    trained_as = exported.kind if about is None else about.trained_as
    return ReadAdapter(
        path, name, numbers, sha256, head, meta, files, trained_as, about, tensors, notes
    )


def _as_it_is(file: Path, sha256: str) -> TensorFile:
    """The tensors of a file that was read already, to be read again when they are written."""
    read = partial(read_file, file, "array_bytes")
    tensors = TensorFile.of(read(), str(file), read)
    if tensors.sha256 != sha256:
        raise ChangedMeanwhileError(
            f"{file} changed while it was read",
            expected=f"sha256 {sha256}",
            remedy="the same again",
        )
    return tensors


def _read_alike(path: Path, home: Home) -> PeftAdapter:
    """An adapter of the layout of those that are trained for a memory, and of no other."""
    found = read_peft(path, home.layout.sites)
    if found.layout != home.layout:
        raise MismatchError(
            f"{path}: an adapter of rank {found.layout.rank} at {len(found.layout.sites)} sites",
            expected=f"rank {home.layout.rank} at {len(home.layout.sites)} sites, as configured",
            remedy=f"--rank {found.layout.rank}, or --method mira, which takes any layout",
        )
    return found


def _read_any(path: Path, home: Home) -> PeftAdapter:
    """An adapter of any layers that the model has; NeedsModel where a store alone cannot tell."""
    try:
        found = read_peft(path, home.layout.sites)
        if found.layout == home.layout:
            return found
    except MismatchError:
        pass
    return read_peft(path, home.backbone.all_sites)


def _task_number(path: Path, said: int | None, given: Task | None, home: Home) -> int:
    """The number of the task that an adapter was trained on.

    The user or the folder says it, or the folder is called as a task.
    """
    if given is not None:
        if said not in (None, given.number):
            raise MismatchError(
                f"{path} says that it was trained on task {said}, not {given.number}",
                remedy="leave --task away",
            )
        return given.number
    if said is not None:
        return said
    for task in home.stream.tasks:
        if task.name == path.resolve().name:
            return task.number
    raise DataError(
        f"{path} does not say which task it was trained on, nor is it called as one",
        expected=f"one of {', '.join(task.name for task in home.stream.tasks[:8])}",
        remedy=f"memtool import {path}:TASK, by number or name",
    )


def _meta(path: Path, home: Home, chosen: Task, about: About | None) -> dict[str, Any]:
    """What the catalog keeps of what an adapter was trained on.

    Raises MismatchError for another task of this number than the folder says.
    """
    names = home.stream.class_names
    classes = tuple(names[c] for c in chosen.classes)
    if about is not None and (about.result.task_name, about.classes) != (chosen.name, classes):
        raise MismatchError(
            f"{path} was trained on task {about.result.task} {about.result.task_name!r} "
            f"of {about.stream}",
            expected=f"task {chosen.number} {chosen.name!r} of {home.stream.name}, as configured",
            remedy="the stream settings that it was trained with (memtool.json holds them)",
        )
    return {
        "task": chosen.number,
        "task_name": chosen.name,
        "seed": about.result.seed if about else None,
        "domain": about.domain if about else chosen.domain,
        "classes": list(about.classes if about else classes),
        "class_ids": list(chosen.classes),
        "setting": about.setting if about else home.stream.setting,
        "hyperparameters": about.section("train", TrainSettings).model_dump(mode="json")
        if about
        else {},
        "provenance": {
            "beneath": about.beneath if about else "",
            "fingerprint": about.fingerprint if about else "",
            "seconds": about.result.seconds if about else 0.0,
            "directory": path.name,
            "stream": about.stream if about else home.stream.name,
            "warm_start": about.warm_start if about else "unknown",
            "memtool": about.memtool if about else "",
        },
    }


def peft_blob(**parts: bytes) -> tuple[str, bytes]:
    """Name and bytes of a blob of what PEFT files have beside their numbers: one for all alike.

    `config` is the configuration; `header` that of tensors which are kept as a row.
    """
    from safetensors.numpy import save

    blob = save({name: np.frombuffer(data, np.uint8) for name, data in parts.items()})
    return PEFT_PREFIX + hashlib.sha256(blob).hexdigest()[:32], blob


def _is_there(file: Path) -> bool:
    """Whether there is anything of this name: a pipe or a broken link, too, is looked at."""
    return os.path.lexists(file)
