"""Collections of LoRA adapters of one language model, as others trained them.

    adapters/poems/adapter_model.safetensors, adapter_config.json
    prompts.jsonl           {"adapter": "poems", "prompt": "Write four lines about rain."}

Every file is kept byte for byte, in its own layout. Of the prompts only the moments of what they
look like are kept, unless the texts are asked for: from them `consolidate` makes the keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import memtool_stores
from memtool.adapters.layout import Site
from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_files import parse_peft, peft_file
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.adapters.stock import OneAdapter, Stock
from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    ConfigError,
    DataError,
    MemtoolError,
    MismatchError,
)
from memtool.learning.looks import PromptLook
from memtool.methods.exchange import peft_blob
from memtool.methods.folders import adapter_folders
from memtool.methods.foreign import check_base_model
from memtool.methods.in_store import drop
from memtool.methods.mira.moments import PromptState, looks_blob
from memtool.methods.records import number_of, task_numbers
from memtool.methods.results import WriteResult, WrittenAdapter
from memtool.methods.routed.memory import kept_bytes
from memtool.outside import read_file
from memtool.pictured import require_text_alone
from memtool.streams.task import Texts, spread
from memtool.streams.text import LINE, adapter_lines, text_sources
from memtool_stores.held import Held, Spool, TensorFile
from memtool_stores.names import check_name
from memtool_stores.printable import shown
from memtool_stores.tensorfile import Header

if TYPE_CHECKING:
    from memtool.methods.mira.prompts import PromptMemory
    from memtool.workspace import Workspace

PROMPTS_PREFIX = "prompts."
"""Blobs of this name hold the example prompts of an adapter, where they were to be kept."""

MOST_PROMPTS = 4096
"""Prompts of an adapter that are looked at; of more, some that are spread evenly."""

_LICENCE = re.compile(r"^licen[sc]e\s*:\s*(\S.{0,80})$", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Collected:
    """One adapter of a collection, and what was read of its files; `task` is None where unnamed."""

    path: Path
    name: str
    task: str | None
    tensors: TensorFile
    config: bytes
    scaling: float
    about: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def meta(self) -> dict[str, Any]:
        """What the catalog keeps of it, but for its task."""
        return {
            "collection": dict(self.about),
            "scaling": self.scaling,
            "peft": self.blob,
            "byte_identical": True,
        }

    def adapter(self, sites: Sequence[Site]) -> OneAdapter:
        """The numbers of its file, read again, for a model that offers these sites."""
        data = read_file(self.path / WEIGHTS_NAME, "array_bytes")
        found = parse_peft(data, self.config, sites, str(self.path))
        return OneAdapter(found.layout, found.value.float(), found.scaling)

    @property
    def file(self) -> bytes:
        """Its configuration, as a blob."""
        return peft_blob(config=self.config)[1]

    @property
    def blob(self) -> str:
        """Name of that blob: the same for adapters that were configured alike."""
        return peft_blob(config=self.config)[0]


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
    whose tasks are called as the adapters; those of an adapter take the place of its earlier ones.
    `metadata` is what the version says of itself.

    Raises DataError for a file that cannot be used and for prompts of an adapter that is not there,
    AlreadyExistsError for two adapters of one name, MismatchError for one that does not fit,
    ConfigError for prompts that would be looked at otherwise than those in memory.
    """
    work = method.workspace
    _require_same_model(work)
    alike: dict[Header, Header] = {}
    adapters = [_read(method, path, task, alike) for path, task in adapter_folders(places)]
    _require_names_apart(adapters)
    view = work.store.view("HEAD") if work.has_store else None
    here = {record.name for record in view.live} if view is not None else set()
    if view is not None:
        method.require_same_look(PromptState.load(view))
    texts = {} if prompts is None else prompts_of(prompts, {one.name for one in adapters} | here)
    with Spool() as spool:
        look, first = _look(method, view, adapters) if texts else (method.look, ())
        moments = {n: spool.put(_moments(method, asked, look)) for n, asked in texts.items()}
        kept = texts if keep_prompts else {}
        given = _Given(tuple(adapters), moments, kept, method.state.without_keys(), first)
        names = few([one.name for one in adapters])
        version = work.commit(given.append, f"import {names}", metadata)
    return given.result(version)


def _require_same_model(work: Workspace) -> None:
    """Raise MismatchError where the memory is of another model, or knows it by another name."""
    if not work.has_store:
        return
    here = memtool_stores.MemoryStore.open(work.store_path).space.backbone
    given = work.backbone
    if (here.name, here.sha256) != (given.name, given.sha256):
        same = here.sha256 == given.sha256
        raise MismatchError(
            f"the memory {work.store_path!r} is of {here.name} ({here.sha256[:12]}…), and the "
            f"adapters are said to be of {given.name} "
            + ("(the same weights)" if same else f"({given.sha256[:12]}…)"),
            expected=f"--base {here.name}",
            remedy=f"--base {here.name}" + ("" if same else ", or another --store"),
        )


def _look(
    method: PromptMemory, view: memtool_stores.MemoryView | None, adapters: Sequence[Collected]
) -> tuple[PromptLook, tuple[str, ...]]:
    """How prompts are looked at, and the names of the adapters that they are looked at under.

    Those of a memory that holds adapters, else of the first task of what it is given.
    """
    if "first" not in method.look.passes:
        return method.look, ()
    if view is not None and view.adapters:
        names = tuple(view.get(id).name for id in method.first_in(view))
        return method.look_in(view), names
    first = [one for one in adapters if (one.task or one.name) == _task_of_first(adapters)]
    sites = method.workspace.backbone.all_sites
    stock = Stock(len(first), sites, lambda number: first[number].adapter(sites))
    return replace(method.look, first=stock), tuple(one.name for one in first)


def _task_of_first(adapters: Sequence[Collected]) -> str | None:
    return (adapters[0].task or adapters[0].name) if adapters else None


def _moments(method: PromptMemory, asked: Sequence[str], look: PromptLook) -> bytes:
    """What is kept of how these prompts look, as a blob."""
    some = spread(Texts(tuple(asked), ("",) * len(asked)), MOST_PROMPTS)
    return kept_bytes(method.kept_of(some, look), method.name)


@dataclass(eq=False)
class _Given:
    """What one import takes in, and after `append` what was new of it.

    `moments` are those of the prompts of adapters, by name; `texts` the prompts that are kept;
    `state` says how prompts are looked at, in a memory that knows none; `first` are the names of
    the adapters that these were looked at under.
    """

    adapters: Sequence[Collected]
    moments: Mapping[str, Held]
    texts: Mapping[str, Sequence[str]]
    state: PromptState
    first: tuple[str, ...] = ()
    added: list[WrittenAdapter] = field(default_factory=list)
    known: list[WrittenAdapter] = field(default_factory=list)
    asked_anew: list[str] = field(default_factory=list)
    unchanged: bool = True

    def append(self, txn: memtool_stores.Transaction) -> None:
        """Put all that is not there into a transaction; it may be run again."""
        for told in (self.added, self.known, self.asked_anew):
            told.clear()
        ids = {record.name: record for record in txn.adapters}
        numbers = task_numbers(txn.adapters)
        # No number comes twice, so that what was said of an older version means the same later.
        most = max(filter(None, map(number_of, txn.base.catalog.records.values())), default=0)
        for one in self.adapters:
            old = ids.get(one.name)
            if old is not None:
                _require_same(one, old)
                self.known.append(WrittenAdapter(name=one.name, id=old.id))
                continue
            task = one.task or one.name
            number = numbers.setdefault(task, most + 1)
            most = max(most, number)
            meta = {**one.meta, "task": number, "task_name": task}
            id = txn.add_file(one.name, one.tensors, meta)
            self.added.append(WrittenAdapter(name=one.name, id=id))
            if not txn.base.has_blob(one.blob):
                txn.put_blob(one.blob, one.file)
        rows = {record.name: record.id for record in txn.adapters}
        for name, held in self.moments.items():
            if _put(txn, looks_blob(rows[name]), held) and name in ids:
                self.asked_anew.append(name)
            _put_prompts(txn, f"{PROMPTS_PREFIX}{rows[name]}", self.texts.get(name))
        if self.moments:
            self._put_state(txn, rows)
        self.unchanged = not txn.changed

    def _put_state(self, txn: memtool_stores.Transaction, rows: Mapping[str, str]) -> None:
        """Say how prompts are looked at, where nothing says it; ChangedMeanwhileError if other."""
        first = tuple(rows[name] for name in self.first if name in rows)
        known = PromptState.load(txn.base)
        if len(first) < len(self.first) or (known is not None and known.first != first):
            raise ChangedMeanwhileError(
                "the adapters that prompts are looked at under are others than before",
                remedy="the same command again; nothing was imported",
            )
        if known is None:
            self.state.model_copy(update={"first": first}).put(txn)

    def result(self, version: str) -> WriteResult:
        """What came of it, at that version."""
        notes = [note for one in self.adapters for note in one.notes]
        if silent := [one.name for one in self.added if one.name not in self.moments]:
            notes.append(
                f"no prompts of {few(silent)}: no prompt will choose them, they can be asked for "
                "by name"
            )
        if self.asked_anew:
            anew = few(self.asked_anew)
            notes.append(f"other prompts than before of {anew}: memtool consolidate")
        return WriteResult(
            version=version,
            added=tuple(self.added),
            skipped=tuple(one.name for one in self.known),
            known=tuple(self.known),
            notes=tuple(notes),
            unchanged=self.unchanged,
        )


def _put(txn: memtool_stores.Transaction, name: str, data: Held) -> bool:
    """Put a blob where it is not there already; whether it was put."""
    if txn.base.blob_sha256(name) == data.sha256:
        return False
    txn.put_blob(name, data)
    return True


def _put_prompts(txn: memtool_stores.Transaction, name: str, asked: Sequence[str] | None) -> None:
    """Keep prompts; where they are not to be kept, none of before stay either."""
    if asked is not None:
        require_text_alone(asked, "--keep-prompts")
        _put(txn, name, Held.of(json.dumps(asked).encode()))
    else:
        drop(txn, name)


def few(names: Sequence[str]) -> str:
    """Some names, and that there are more."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


# Folders ----------------------------------------------------------------------------------------


def _read(
    method: PromptMemory, path: Path, task: str | None, alike: dict[Header, Header]
) -> Collected:
    """The adapter of a folder, which must fit the model; `alike` has the headers of those before.

    Headers that are equal are one, so that a thousand files of one shape have one in memory.
    """
    read = partial(peft_file, path, WEIGHTS_NAME)
    data, config = read(), peft_file(path, CONFIG_NAME)
    found = parse_peft(data, config, method.workspace.backbone.all_sites, str(path))
    with np.errstate(over="ignore"):
        if not np.isfinite(found.numbers.astype(np.float32)).all():
            raise DataError(f"{path} has numbers that 32 bits cannot hold")
    tensors = TensorFile.of(data, str(path / WEIGHTS_NAME), read)
    tensors = replace(tensors, header=alike.setdefault(tensors.header, tensors.header))
    name = check_name(path.resolve().name, "an adapter")
    if task is not None:
        check_name(task, "a task")
    about = {
        "folder": path.name,
        "base": found.base_model,
        "revision": found.revision,
        "rank": found.layout.rank,
        "sites": len(found.layout.sites),
        "licence": _licence(path),
    }
    return Collected(
        path=path,
        name=name,
        task=task,
        tensors=tensors,
        config=config,
        scaling=found.scaling,
        about={key: value for key, value in about.items() if value is not None},
        notes=check_base_model(path, found, (None, None), method.workspace.backbone),
    )


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
    """An adapter of a name that is there must be the same files, and of the same task."""
    sha256, blob = old.meta.get("file_sha256"), old.meta.get("peft")
    if (sha256, blob) != (one.tensors.sha256, one.blob):
        raise AlreadyExistsError(
            f"the memory holds another adapter named {one.name!r}",
            expected="the same configuration"
            if sha256 == one.tensors.sha256
            else f"a file with sha256 {str(sha256)[:12]}…, found {one.tensors.sha256[:12]}… in "
            f"{one.path}",
            remedy="rename the folder, or another --store",
        )
    if one.task not in (None, old.meta.get("task_name")):
        raise AlreadyExistsError(
            f"the memory holds {one.name!r} as an adapter of {old.meta.get('task_name')!r}",
            expected=f"the same task, not {one.task!r}",
            remedy=f"memtool forget {one.name} first",
        )


def _require_names_apart(adapters: Sequence[Collected]) -> None:
    """Raise AlreadyExistsError for two adapters of one name."""
    places: dict[str, Path] = {}
    for one in adapters:
        if one.name in places:
            raise AlreadyExistsError(
                f"two adapters named {one.name!r}: {places[one.name]} and {one.path}",
                remedy="rename one of the folders",
            )
        places[one.name] = one.path


# Prompts ----------------------------------------------------------------------------------------


def prompts_of(source: Path, known: set[str]) -> dict[str, list[str]]:
    """The example prompts of every adapter, from a file of JSON lines or a stream of texts.

    Raises DataError, with the number of the line, for what is no prompt, and for one of an adapter
    that is not `known`; NotFoundError.
    """
    if str(source) in text_sources() or source.suffix in (".yaml", ".yml"):
        from memtool.settings import StreamSettings
        from memtool.streams.text import open_text_stream

        stream = open_text_stream(StreamSettings(source=str(source), setting="trace"))
        named = {t.name: [*t.train.prompts] for t in stream.tasks if t.name in known}
        if not named:
            raise ConfigError(
                f"no task of {source} is called as an adapter",
                expected=f"one of {', '.join(sorted(known)[:8])}",
            )
        return named
    found: dict[str, list[str]] = {}
    for line in adapter_lines(source, answered=False):
        if line.adapter not in known:
            raise DataError(
                f"{line.where}: a prompt of {shown(line.adapter)}, which is no adapter here",
                expected=f"one of {', '.join(sorted(known)[:8])}",
                remedy="import that adapter too, or leave its lines out",
            )
        found.setdefault(line.adapter, []).append(line.prompt)
    if not found:
        raise ConfigError(f"{source} holds no prompts", expected=LINE)
    return found
