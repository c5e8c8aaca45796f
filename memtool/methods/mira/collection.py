"""Collections of LoRA adapters of one language model, as others trained them.

    adapters/poems/adapter_model.safetensors, adapter_config.json
    prompts.jsonl           {"adapter": "poems", "prompt": "Write four lines about rain."}

Every file is kept byte for byte, in its own layout. Of the prompts only the moments of what they
look like are kept, unless the texts are asked for: from them `consolidate` makes the keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

import memtool_stores
from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_files import PeftAdapter, parse_peft
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.errors import AlreadyExistsError, ConfigError, DataError, MemtoolError, NotFoundError
from memtool.learning.looks import looks_of
from memtool.methods.exchange import PEFT_PREFIX
from memtool.methods.foreign import check_base_model
from memtool.methods.records import number_of
from memtool.methods.results import WriteResult, WrittenAdapter
from memtool.methods.routed.memory import kept_blob, kept_bytes
from memtool.outside import is_file, read_file
from memtool.streams.rows import parse_json, text_of
from memtool.streams.text import text_descriptions
from memtool_stores.names import check_name
from memtool_stores.printable import shown

if TYPE_CHECKING:
    from memtool.methods.mira.prompts import PromptMemory

PROMPTS_PREFIX = "prompts."
"""Blobs of this name hold the example prompts of a task, where they were to be kept."""

_LICENCE = re.compile(r"^licen[sc]e\s*:\s*(\S.{0,80})$", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Collected:
    """One adapter of a collection: its files, what was read of them, and what is doubtful."""

    path: Path
    name: str
    task: str
    data: bytes
    config: bytes
    found: PeftAdapter
    notes: tuple[str, ...]

    @property
    def meta(self) -> dict[str, Any]:
        """What the catalog keeps of it, but for its task."""
        collection = {
            "folder": self.path.name,
            "base": self.found.base_model,
            "revision": self.found.revision,
            "rank": self.found.layout.rank,
            "sites": len(self.found.layout.sites),
            "licence": _licence(self.path),
        }
        return {
            "collection": {key: value for key, value in collection.items() if value is not None},
            "scaling": self.found.scaling,
            "peft": self.blob,
            "byte_identical": True,
        }

    @property
    def file(self) -> bytes:
        """Its configuration, as a blob."""
        return save({"config": np.frombuffer(self.config, np.uint8)})

    @property
    def blob(self) -> str:
        """Name of that blob: the same for adapters that were configured alike."""
        return PEFT_PREFIX + hashlib.sha256(self.file).hexdigest()[:32]


def collect(
    method: PromptMemory,
    places: Sequence[str],
    prompts: Path | None = None,
    *,
    metadata: Mapping[str, Any],
    keep_prompts: bool = False,
) -> WriteResult:
    """Take adapters, and what their example prompts look like, into the memory: one version.

    `places` are PEFT folders, or folders of them, perhaps with `:TASK` behind; without it the name
    of a folder is its task. `prompts` is a file of JSON lines, or the name of a stream of texts
    whose tasks are called as the adapters; those of a task take the place of earlier ones.
    `metadata` is what the version says of itself.

    Raises DataError for a file that cannot be used and for prompts of an adapter that is not there,
    AlreadyExistsError for two adapters of one name, MismatchError for one that does not fit.
    """
    work = method.workspace
    adapters = [_read(method, path, task) for path, task in adapter_folders(places)]
    view = work.store.view("HEAD") if work.has_store else None
    here = {record.name: record for record in view.live} if view is not None else {}
    texts = {} if prompts is None else prompts_of(prompts, {one.name for one in adapters} | {*here})
    numbers = _numbers(adapters, here.values())
    blobs: dict[str, bytes] = {}
    for number, asked in _by_task(texts, adapters, here, numbers).items():
        seen = looks_of(work, asked, method.look)
        blobs[kept_blob(number)] = kept_bytes(method.keep(seen), method.name)
        if keep_prompts:
            blobs[f"{PROMPTS_PREFIX}{number}"] = json.dumps(asked).encode()
    added: list[WrittenAdapter] = []
    known: list[WrittenAdapter] = []

    def append(txn: memtool_stores.Transaction) -> None:
        added.clear()
        known.clear()
        there = {record.name: record for record in txn.adapters}
        for one in adapters:
            old = there.get(one.name)
            if old is not None:
                _require_same(one, old)
                known.append(WrittenAdapter(name=one.name, id=old.id))
                continue
            meta = {**one.meta, "task": numbers[one.task], "task_name": one.task}
            added.append(WrittenAdapter(name=one.name, id=txn.add_file(one.name, one.data, meta)))
            if one.blob not in txn.base.blobs():
                txn.put_blob(one.blob, one.file)
        for name, data in blobs.items():
            if txn.base.state.blobs.get(name) != hashlib.sha256(data).hexdigest():
                txn.put_blob(name, data)

    names = ", ".join(one.name for one in adapters[:5]) + (", …" if len(adapters) > 5 else "")
    store = work.store_or_new()
    store.run(append, f"import {names}", metadata=metadata)
    silent = [one.name for one in adapters if prompts is not None and one.name not in texts]
    notes = [note for one in adapters for note in one.notes]
    if silent:
        notes.append(
            f"no prompts of {', '.join(silent[:5])}{', …' if len(silent) > 5 else ''}: no prompt "
            "will choose them, they can be asked for by name"
        )
    return WriteResult(
        version=store.head(),
        added=tuple(added),
        skipped=tuple(one.name for one in known),
        known=tuple(known),
        notes=tuple(notes),
    )


# Folders ----------------------------------------------------------------------------------------


def adapter_folders(places: Sequence[str]) -> list[tuple[Path, str | None]]:
    """The PEFT folders at these places, or one below them, with the task that was named.

    Raises NotFoundError for a place that is none and holds none.
    """
    found: list[tuple[Path, str | None]] = []
    for place in places:
        path, task = Path(place), None
        if not path.exists() and ":" in place:
            folder, _, task = place.rpartition(":")
            path = Path(folder)
        inside = sorted(one for one in path.glob("*") if is_file(one / CONFIG_NAME))
        if is_file(path / CONFIG_NAME):
            inside = [path]
        if not inside:
            raise NotFoundError(
                f"no adapter in {place}",
                expected=f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a folder of such",
            )
        found += [(one, task) for one in inside]
    return found


def _read(method: PromptMemory, path: Path, task: str | None) -> Collected:
    """The adapter of a folder, which must fit the model."""
    data, config = (
        read_file(path / name, limit)
        for name, limit in ((WEIGHTS_NAME, "array_bytes"), (CONFIG_NAME, "text_bytes"))
    )
    found = parse_peft(data, config, method.sites, str(path))
    with np.errstate(over="ignore"):
        if not np.isfinite(found.numbers.astype(np.float32)).all():
            raise DataError(f"{path} has numbers that 32 bits cannot hold")
    name = check_name(path.resolve().name, "an adapter")
    backbone = method.workspace.backbone
    notes = check_base_model(path, found, (None, None), backbone)
    return Collected(path, name, task or name, data, config, found, notes)


def _licence(folder: Path) -> str | None:
    """The licence that the model card beside an adapter names, if it names one."""
    try:
        head = read_file(folder / "README.md")[:65536].decode(errors="replace")
    except MemtoolError:
        return None
    _, _, rest = head.partition("---")
    said = _LICENCE.search(rest.partition("\n---")[0])
    return said[1].strip() if said else None


def _require_same(one: Collected, old: memtool_stores.AdapterRecord) -> None:
    """An adapter of a name that is there must be the same file."""
    sha256 = hashlib.sha256(one.data).hexdigest()
    if old.meta.get("file_sha256") != sha256:
        raise AlreadyExistsError(
            f"the memory holds another adapter named {one.name!r}",
            expected=f"a file with sha256 {str(old.meta.get('file_sha256'))[:12]}…, found "
            f"{sha256[:12]}… in {one.path}",
            remedy="rename the folder, or another --store",
        )


def _numbers(adapters: Sequence[Collected], records: Any) -> dict[str, int]:
    """The number of every task, by name: that in memory, else the next ones."""
    numbers: dict[str, int] = {}
    for record in records:
        number = number_of(record)
        if number is not None:
            numbers[str(record.meta.get("task_name") or record.name)] = number
    names: dict[str, Path] = {}
    for one in adapters:
        if one.name in names:
            raise AlreadyExistsError(
                f"two adapters named {one.name!r}: {names[one.name]} and {one.path}",
                remedy="rename one of the folders",
            )
        names[one.name] = one.path
        numbers.setdefault(one.task, max(numbers.values(), default=0) + 1)
    return numbers


def _by_task(
    texts: Mapping[str, Sequence[str]],
    adapters: Sequence[Collected],
    here: Mapping[str, memtool_stores.AdapterRecord],
    numbers: Mapping[str, int],
) -> dict[int, list[str]]:
    """The prompts of every task, by its number."""
    tasks = {name: number_of(record) for name, record in here.items()}
    tasks |= {one.name: numbers[one.task] for one in adapters}
    found: dict[int, list[str]] = {}
    for name, asked in texts.items():
        number = tasks[name]
        if number is not None:
            found.setdefault(number, []).extend(asked)
    return found


# Prompts ----------------------------------------------------------------------------------------


def prompts_of(source: Path, known: set[str]) -> dict[str, list[str]]:
    """The example prompts of every adapter, from a file of JSON lines or a stream of texts.

    Raises DataError, with the number of the line, for what is no prompt, and for one of an adapter
    that is not `known`; NotFoundError.
    """
    if str(source) in text_descriptions() or source.suffix in (".yaml", ".yml"):
        from memtool.settings import StreamSettings
        from memtool.streams.text import open_text_stream

        stream = open_text_stream(StreamSettings(source=str(source), setting="trace"))
        return {t.name: [*t.train.prompts] for t in stream.tasks if t.name in known}
    try:
        lines = text_of(source).splitlines()
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {source}", expected=_LINE) from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        entry = parse_json(line, where)
        name = entry.get("adapter") if isinstance(entry, dict) else None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if type(name) is not str or type(prompt) is not str or not prompt.strip():
            raise DataError(f"{where}: {shown(line)[:80]}", expected=_LINE)
        if name not in known:
            raise DataError(
                f"{where}: a prompt of {shown(name)}, which is no adapter here",
                expected=f"one of {', '.join(sorted(known)[:8])}",
            )
        found.setdefault(name, []).append(prompt)
    if not found:
        raise ConfigError(f"{source} holds no prompts", expected=_LINE)
    return found


_LINE = 'lines such as {"adapter": "poems", "prompt": "Write four lines about rain."}'
