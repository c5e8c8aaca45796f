"""Adapters into the memory: those not yet there, as one version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from memtool.errors import AlreadyExistsError, MismatchError, NotFoundError
from memtool.methods.about import said_by
from memtool.methods.exchange import AdapterFolder, ReadAdapter, read_adapter
from memtool.methods.foreign import require_trained_as
from memtool.methods.home import Home, NeedsModel, StoredHome, stored_home
from memtool.methods.records import number_of, own_head_blob
from memtool.methods.results import AsAtoms, WriteResult, WrittenAdapter
from memtool.settings import Config

if TYPE_CHECKING:
    from memtool_stores import AdapterRecord, MemoryView, Transaction

Place = TypeVar("Place", bound=Home)

NO_TASKS: Mapping[Path, str] = MappingProxyType({})


class AdapterWriter(Generic[Place]):
    """The step of all methods that puts adapters into the memory.

    `kind` is the kind of row that the method keeps in the store; `any_layout` says whether it takes
    adapters of other ranks and layers than it trains, `version_each` whether every directory that
    is written becomes a version of its own.
    """

    kind: ClassVar[Literal["adapter", "atoms"]] = "adapter"
    any_layout: ClassVar[bool] = False
    version_each: ClassVar[bool] = False

    def __init__(self, workspace: Place) -> None:
        self.workspace = workspace
        self.config = workspace.config
        self.seed = workspace.seed

    def write(
        self,
        directories: Sequence[Path] | None = None,
        *,
        task: str | None = None,
        tasks: Mapping[Path, str] = NO_TASKS,
        as_atoms: bool = False,
    ) -> WriteResult:
        """Append adapters to the store: those not yet there, or the ones named.

        They become one version, or one each where the method's `version_each` says so. `task` says
        what a directory that was not made by memtool was trained on, `tasks` what this one or that
        was; else it may be called as a task. Writing what is there already
        changes nothing; another adapter of the same name is an error. An adapter goes into a memory
        of what it was trained as (whole adapters, or atoms), unless `as_atoms` says that the ranks
        of a whole one become atoms.
        """
        self._require_settings()
        work = self.workspace
        if directories is None:
            directories = [folder.path for folder in AdapterFolder.all_in(work.adapter_folder)]
            if not directories:
                raise NotFoundError(
                    f"no adapters in {work.adapter_folder}",
                    remedy="memtool train-adapter --task 1, or memtool write DIR",
                )
        versions = [[path] for path in directories] if self.version_each else [directories]
        named = {path: tasks.get(path, task) for path in directories}
        results = [self._write_version(version, named, as_atoms) for version in versions]
        return WriteResult(
            version=results[-1].version,
            added=tuple(adapter for result in results for adapter in result.added),
            skipped=tuple(name for result in results for name in result.skipped),
            known=tuple(adapter for result in results for adapter in result.known),
            as_atoms=tuple(one for result in results for one in result.as_atoms),
            notes=tuple(note for result in results for note in result.notes),
            unchanged=all(result.unchanged for result in results),
        )

    def _require_settings(self) -> None:
        """Settings that the method cannot write adapters under are errors; here none are."""

    def _write_version(
        self, directories: Sequence[Path], tasks: Mapping[Path, str | None], as_atoms: bool
    ) -> WriteResult:
        work = self.workspace
        found = []
        for path in directories:
            named = tasks[path]
            given = None if named is None else work.task(named)
            found.append(read_adapter(path, work, given, any_layout=self.any_layout))
        here: set[str] = set()
        if work.has_store:
            view = work.store.view("HEAD")
            self._require_own_kind(view)
            here = {record.name for record in view.live}
        for adapter in found:
            if adapter.name not in here:
                require_trained_as(adapter, self.kind, self.config.method, as_atoms=as_atoms)
        added: list[WrittenAdapter] = []
        known: list[WrittenAdapter] = []

        def append(txn: Transaction) -> None:
            added.clear()
            known.clear()
            records = {record.name: record for record in (*txn.adapters, *txn.atom_records)}
            tasks = {number_of(r): r.meta.get("task_name") for r in records.values()}
            for adapter in found:
                old = records.get(adapter.name)
                if old is not None:
                    if not _is_same(adapter, old):
                        raise AlreadyExistsError(
                            f"the memory holds another adapter named {adapter.name!r}",
                            expected=f"values with sha256 {old.sha256[:12]}…, "
                            f"found {adapter.sha256[:12]}… in {adapter.path}",
                            remedy="rename the directory, write to another --store, or memtool "
                            "rollback to the version before it",
                        )
                    known.append(WrittenAdapter(name=adapter.name, id=old.id))
                    continue
                _require_own_number(adapter, tasks)
                record = self._append(txn, adapter)
                records[adapter.name] = record
                if not txn.base.has_blob(adapter.meta["peft"]):
                    txn.put_blob(adapter.meta["peft"], adapter.files)
                if adapter.head_file is not None:
                    txn.put_blob(own_head_blob(adapter.name), adapter.head_file)
                added.append(WrittenAdapter(name=adapter.name, id=record.id))
            if added:
                self._also_commit(txn, added)

        names = ", ".join(adapter.name for adapter in found if adapter.name not in here)
        version = work.commit(append, f"write {names}", self._metadata("write"))
        new = {adapter.name for adapter in added}
        foreign = [a for a in found if a.name in new and a.trained_as != self.kind]
        return WriteResult(
            version=version,
            added=tuple(added),
            skipped=tuple(adapter.name for adapter in known),
            known=tuple(known),
            as_atoms=self._as_atoms(foreign),
            notes=tuple(note for a in found if a.name in new for note in a.notes),
            unchanged=not added,
        )

    def _append(self, txn: Transaction, adapter: ReadAdapter) -> AdapterRecord:
        """Append one adapter in a transaction; its record."""
        if adapter.tensors is None:
            txn.add(adapter.name, adapter.numbers, adapter.meta)
        else:
            txn.add_file(adapter.name, adapter.tensors, adapter.meta)
        return txn.adapters[-1]

    def _as_atoms(self, foreign: Sequence[ReadAdapter]) -> tuple[AsAtoms, ...]:
        """What whole adapters are worth as they are, and as the atoms that they became: here none.

        A memory of whole adapters takes no others.
        """
        del foreign
        return ()

    def _require_own_kind(self, view: MemoryView) -> None:
        """A memory holds whole adapters or atoms, never both: they are read in other ways."""
        others = view.atom_records if self.kind == "adapter" else view.adapters
        if others:
            whole = self.kind == "atoms"
            raise MismatchError(
                f"the memory {self.workspace.store_path!r} holds {len(others)} "
                + ("adapters that are recalled whole" if whole else "rows of atoms of moram"),
                expected=f"a memory of method {self.config.method}",
                remedy="another --store, or " + ("method mira" if whole else "--method moram"),
            )

    def _also_commit(self, txn: Transaction, added: Sequence[WrittenAdapter]) -> None:
        """What a method changes in the version that adds adapters: here nothing."""

    def _metadata(self, verb: str) -> dict[str, Any]:
        return {
            "verb": verb,
            "seed": self.seed,
            "configuration": self.config.recorded(),
        }


def _is_same(adapter: ReadAdapter, old: AdapterRecord) -> bool:
    """Whether an adapter is the one in memory, perhaps before its values learned on."""
    if adapter.tensors is None and not old.ragged:
        return adapter.sha256 in (old.sha256, old.meta.get("refined_from"))
    # One that is kept as its file, or was written as a row before there were such.
    same = ("file_sha256", "peft" if old.ragged else "scaling")
    return all(adapter.meta[key] == old.meta.get(key) for key in same)


def _require_own_number(adapter: ReadAdapter, tasks: Mapping[int | None, str | None]) -> None:
    """Raise MismatchError where another task has the number of an adapter's task in memory."""
    number, name = adapter.meta["task"], adapter.meta["task_name"]
    there = tasks.get(number)
    if there not in (None, name):
        raise MismatchError(
            f"{adapter.path} is of task {number} {name!r}; task {number} of the memory is "
            f"{there!r}",
            remedy="another --store",
        )


class _StoredWriter(AdapterWriter[StoredHome]):
    """Writes what the store alone tells how to write."""

    @property
    def appends(self) -> bool:
        """Whether new adapters are taken as they are."""
        return said_by(self.config.method).appends

    @property
    def any_layout(self) -> bool:  # type: ignore[override]
        """The same."""
        return self.appends

    def _require_own_kind(self, view: MemoryView) -> None:
        if self.appends:  # else nothing is new to a memory that remembers its method
            super()._require_own_kind(view)

    def _append(self, txn: Transaction, adapter: ReadAdapter) -> AdapterRecord:
        if not self.appends:
            raise NeedsModel
        return super()._append(txn, adapter)


def write_stored(
    config: Config,
    *,
    seed: int,
    directories: Sequence[Path] | None,
    task: str | None,
    tasks: Mapping[Path, str] = NO_TASKS,
    as_atoms: bool = False,
) -> WriteResult | None:
    """As `AdapterWriter.write` of the method, without torch; None where the model is needed.

    It is for a new memory, for another than the store was made with, and where a method does more
    with a new adapter than to store it.
    """
    appends = said_by(config.method).appends
    home = stored_home(config, seed=seed, all_settings=not appends)
    if home is None:
        return None
    if not appends:
        names = {record.name for record in home.view.live}
        paths = directories or [one.path for one in AdapterFolder.all_in(home.adapter_folder)]
        if as_atoms or not all(path.name in names for path in paths):
            return None
    try:
        return _StoredWriter(home).write(directories, task=task, tasks=tasks, as_atoms=as_atoms)
    except NeedsModel:
        return None
