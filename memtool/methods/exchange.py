"""Adapters at the doors of the memory: the folders under `runs`, and PEFT directories in and out.

A folder made by `train-adapter` is a PEFT directory (adapter_model.safetensors,
adapter_config.json) with two files beside it: `memtool.json`, which says what it was trained on,
and `head.safetensors`, the classifier trained with it. Without these it is anybody's PEFT adapter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

import memtool
from memtool.adapters.layout import Layout
from memtool.adapters.peft_files import (
    PeftAdapter,
    read_peft,
    restore_peft,
    restored_file,
    write_peft,
)
from memtool.errors import (
    AlreadyThereError,
    CorruptError,
    DataError,
    MismatchError,
    NotFoundError,
)
from memtool.heads import LinearClassifier
from memtool.methods.results import AdaptResult
from memtool.methods.state import Snapshot, classifier_bytes, classifier_of, own_head_blob

if TYPE_CHECKING:
    from memtool.methods.workspace import MemoryWorkspace, T, Workspace
    from memtool_stores import AdapterRecord, MemoryView

ABOUT = "memtool.json"
OWN_HEAD = "head.safetensors"
CATALOG = "memtool_catalog.json"
PEFT_PREFIX = "peft."
"""Blobs of this name hold what PEFT files have beside their numbers: header and configuration."""


class About(BaseModel):
    """What an adapter was trained on: the file `memtool.json` of its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    result: AdaptResult
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
        """What the adapter was trained on."""
        file = self.path / ABOUT
        try:
            return About.model_validate_json(file.read_bytes())
        except FileNotFoundError as error:
            raise NotFoundError(f"no {file}") from error
        except ValidationError as error:
            raise CorruptError(
                f"{file}: {error.errors()[0]['msg']}",
                remedy="memtool train-adapter --fresh, or remove the folder",
            ) from error

    def result(self) -> AdaptResult:
        """What its training returned, at the place where it is now."""
        return self.about().result.model_copy(update={"path": self.path})


@dataclass(frozen=True, eq=False)
class ReadAdapter:
    """An adapter read from a folder: its value in this layout and what the catalog keeps of it.

    `files` is all of its PEFT files but the numbers, for the blob that `meta["peft"]` names: it is
    the same for all adapters that were written alike.
    """

    path: Path
    name: str
    value: Tensor
    sha256: str
    head: LinearClassifier | None
    meta: dict[str, Any]
    files: bytes


def write_adapter(
    folder: AdapterFolder,
    work: MemoryWorkspace[T],
    task: T,
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
    building = Path(tempfile.mkdtemp(dir=folder.path.parent, prefix=f".{folder.path.name}-"))
    try:
        write_peft(
            building,
            value,
            work.layout,
            alpha=work.config.adapter.alpha,
            base_model=work.backbone.name,
        )
        if head is not None:
            (building / OWN_HEAD).write_bytes(classifier_bytes(head))
        (building / ABOUT).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")
        building.chmod(0o755)
        if folder.path.exists():
            replaced = building.with_name(f"{building.name}-old")
            folder.path.rename(replaced)
            building.rename(folder.path)
            shutil.rmtree(replaced)
        else:
            building.rename(folder.path)
    finally:
        if building.exists():
            shutil.rmtree(building)


def read_adapter(path: Path, work: MemoryWorkspace[T], task: T | None = None) -> ReadAdapter:
    """Read a folder for this backbone and layout; `task` where the folder does not say it."""
    if not path.is_dir():
        raise NotFoundError(f"no adapter directory {path}", remedy="ls runs/adapters")
    found = read_peft(path, work.layout.sites)
    if found.layout != work.layout:
        raise MismatchError(
            f"{path}: an adapter of rank {found.layout.rank} at {len(found.layout.sites)} sites",
            expected=f"rank {work.layout.rank} at {len(work.layout.sites)} sites, as configured",
            remedy=f"--rank {found.layout.rank}; a store holds adapters of one rank only",
        )
    folder = AdapterFolder(path)
    about = folder.about() if folder.is_complete else None
    if about is not None and about.backbone_sha256 != work.backbone.sha256:
        raise MismatchError(
            f"{path} was trained on {about.backbone} ({about.backbone_sha256[:12]}…)",
            expected=f"{work.backbone.name} ({work.backbone.sha256[:12]}…)",
            remedy="--preset or --set backbone.name as it was trained with",
        )
    number = _known_task(path, about)
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
    head = path / OWN_HEAD
    own = classifier_of(head.read_bytes(), str(head)) if head.is_file() else None
    value = found.value.float()
    chosen = work.task(str(number))
    names = work.stream.class_names
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
        "scaling": found.scaling,
        "setting": about.setting if about else work.stream.setting,
        "hyperparameters": about.configuration.get("train", {}) if about else {},
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
    name = about.result.name if about else path.resolve().name
    return ReadAdapter(path, name, value, sha256, own, meta, files)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _known_task(path: Path, about: About | None) -> int | None:
    """The task that the folder itself names: one made here, or one exported from a memory."""
    if about is not None:
        return about.result.task
    try:
        task = json.loads((path / CATALOG).read_text(encoding="utf-8")).get("task")
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return task if isinstance(task, int) else None


def recalled_adapter(
    directory: Path, work: Workspace, snapshot: Snapshot, coefficients: Tensor
) -> Path:
    """Write the mixture of fixed coefficients (memories, t) as one PEFT adapter.

    Under delta it is the stack of all ranks, B scaled by its coefficient: rank t · r and equal to
    the mixture. Under params A and B are mixed, and the rank stays r.
    """
    _, model, _ = snapshot.consolidated()
    rank, count = work.layout.rank, len(snapshot.records)
    values = torch.from_numpy(snapshot.view.values([r.id for r in snapshot.records]).copy())
    scaling = torch.tensor([record.scaling for record in snapshot.records])
    tensors = work.layout.unflatten(values)
    stacked = model.mix == "delta"
    layout = Layout(work.layout.sites, rank * count if stacked else rank)
    mixed: dict[str, Tensor] = {}
    for site in work.layout.sites:
        place = model.memory.blocks.index(site.block) if len(coefficients) > 1 else 0
        weights = coefficients[place].cpu().float()
        a, b = tensors[f"{site.name}.lora_A"], tensors[f"{site.name}.lora_B"]
        if stacked:
            mixed[f"{site.name}.lora_A"] = a.reshape(count * rank, -1)
            scaled = b * (weights * scaling)[:, None, None]
            mixed[f"{site.name}.lora_B"] = scaled.permute(1, 0, 2).reshape(-1, count * rank)
        else:
            mixed[f"{site.name}.lora_A"] = torch.einsum("t,trd->rd", weights, a)
            mixed[f"{site.name}.lora_B"] = torch.einsum("t,tor->or", weights * scaling, b)
    require_new(directory)
    # The scaling is in B already, so alpha / r is 1.
    write_peft(
        directory,
        layout.flatten(mixed),
        layout,
        alpha=float(layout.rank),
        base_model=work.backbone.name,
    )
    return directory


def export_peft(
    work: MemoryWorkspace[Any],
    adapters: Sequence[str] | None,
    *,
    out: Path,
    version: str = "HEAD",
) -> list[Path]:
    """Write stored adapters (names or ids; none: all) as PEFT directories under `out`.

    An adapter that came from PEFT files becomes the same bytes again. Each gets its head and what
    the catalog knows of it. Raises AlreadyThereError for a directory that is not empty, before any
    is written.
    """
    view = work.store.view(work.version_of(version))
    records = [view.get(name) for name in adapters] if adapters else view.live
    targets = [out / record.name for record in records]
    for directory in targets:
        require_new(directory)
    for record, directory in zip(records, targets, strict=True):
        _write_stored(directory, view, record, work)
        if own_head_blob(record.name) in view.blobs():
            head = view.blob(own_head_blob(record.name))
            (directory / OWN_HEAD).write_bytes(head)
        known = {
            "adapter": record.name,
            "id": record.id,
            "version": view.version,
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
    return targets


def _write_stored(
    directory: Path, view: MemoryView, record: AdapterRecord, work: MemoryWorkspace[Any]
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
    files = load(view.blob(blob))
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
    """Raise AlreadyThereError for a file, or a directory that holds something."""
    if directory.exists() and not directory.is_dir():
        raise AlreadyThereError(f"{directory} is a file", remedy="name a new directory")
    if directory.exists() and any(directory.iterdir()):
        raise AlreadyThereError(f"{directory} is not empty", remedy="name a new directory")
