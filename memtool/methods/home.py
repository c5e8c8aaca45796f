"""The memory that adapters come to: its model, layout and tasks, as far as files need them.

A workspace is one, with the frozen model and the stream open. `StoredHome` is what the store itself
says of them, where it was made with the very settings at hand: nothing of torch is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from memtool.adapters.layout import Layout, Site, sites_of
from memtool.errors import MismatchError
from memtool.methods.records import own_head_blob
from memtool.paths import split_store
from memtool.remembered import remembered
from memtool.settings import Config
from memtool.tensor_bytes import read_arrays
from memtool_stores import MemoryStore

if TYPE_CHECKING:
    from memtool.streams.task import Stream, Task
    from memtool.workspace import Workspace
    from memtool_stores import MemoryView, Transaction

Home: TypeAlias = "Workspace | StoredHome"

FAMILIES = ("nano", "timm", "open_clip", "hf")
"""Backbones whose sites are told by the names of the segments in a store."""

OF_A_HOME = ("method", "stream", "backbone", "adapter.rank", "adapter.alpha", "head.kind")
"""Settings, and sections of them, that say what adapters a memory takes."""


class NeedsModel(Exception):
    """The store alone does not say it: the model and the stream must be opened."""


@dataclass(frozen=True, eq=False)
class StoredModel:
    """The frozen model of a memory, as a version of it tells."""

    view: MemoryView

    @property
    def name(self) -> str:
        """As in the configuration."""
        return self.view.space.backbone.name

    @property
    def sha256(self) -> str:
        """Of its tensors."""
        return self.view.space.backbone.sha256

    @property
    def transposed(self) -> bool:
        """As of the model: those of GPT-2 alone are, which names its blocks so."""
        return self.view.space.layout.segments[0].name.startswith("transformer.h.")

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """All that the model offers to an adapter, which no store tells: NeedsModel."""
        raise NeedsModel

    @property
    def dim(self) -> int:
        """Width of the features, as of a head that came with an adapter.

        Raises NeedsModel where none did.
        """
        for record in self.view.live:
            name = own_head_blob(record.name)
            if self.view.has_blob(name):
                head = read_arrays(self.view.blob(name), f"blob {name!r}", weight="c d", bias="c")
                return head["weight"].shape[1]
        raise NeedsModel


@dataclass(frozen=True, eq=False)
class StoredHome:
    """A memory that is there, by what it says itself; `view` is the version that was asked for."""

    config: Config
    seed: int
    store: MemoryStore
    view: MemoryView
    has_store: bool = True

    @cached_property
    def layout(self) -> Layout:
        """Where each number of an adapter lies."""
        layout = self.view.space.layout
        return Layout(sites_of((s.name, s.shape) for s in layout.segments), layout.rank)

    @property
    def backbone(self) -> StoredModel:
        """What is known of the frozen model."""
        return StoredModel(self.view)

    @cached_property
    def stream(self) -> Stream:
        """The tasks; images are not drawn."""
        from memtool.streams import outline

        return outline(self.config.stream, self.config.backbone.image_size)

    def task(self, name: str) -> Task:
        """A task by number or name. Raises NeedsModel for what may be none."""
        for task in self.stream.tasks:
            if name in (task.name, str(task.number)):
                return task
        raise NeedsModel

    @property
    def adapter_folder(self) -> Path:
        """Where trained adapters lie."""
        return self.config.runs / "adapters"

    @property
    def store_path(self) -> str:
        """The store's address, without the version."""
        return split_store(self.config.store)[0]

    def commit(
        self, function: Callable[[Transaction], None], message: str, metadata: Mapping[str, Any]
    ) -> str:
        """As of a workspace; the memory is there."""
        self.store.run(function, message, metadata)
        return self.store.head()

    def version_of(self, version: str) -> str:
        """As of a workspace."""
        named = split_store(self.config.store)[1]
        return named if version == "HEAD" else version


def stored_home(config: Config, *, seed: int, all_settings: bool = False) -> StoredHome | None:
    """The memory of a configuration, where its store says all that files need; else None.

    It does where it was made with the same settings as far as `OF_A_HOME`, or all that it
    remembers.
    """
    path, version = split_store(config.store)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # else one of several processes writes
    known = config.backbone.name.partition(":")[0] in FAMILIES
    if not (alone and known and config.engine.device in ("auto", "cpu")):
        return None
    if not MemoryStore.exists(path):
        return None
    store = MemoryStore.open(path, lock_timeout=config.lock_timeout)
    made_with = remembered(store, version)
    if not made_with or not _same(made_with, config, all_settings):
        return None
    home = StoredHome(config, seed, store, store.view(version))
    try:
        home.layout  # noqa: B018
    except MismatchError:  # slices of layers that only the model knows
        return None
    return home


def _same(made_with: dict[str, Any], config: Config, all_settings: bool) -> bool:
    """Whether what a memory remembers is what the configuration says."""
    here = config.recorded()
    for key, value in made_with.items():
        section = key.partition(".")[0]
        if key == "seed" or not (all_settings or key in OF_A_HOME or section in OF_A_HOME):
            continue
        at: Any = here
        for part in key.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if _plain(at) != _plain(value):
            return False
    return True


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
