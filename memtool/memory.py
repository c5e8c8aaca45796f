"""A memory to be used: opened from its store alone, attached to its frozen model.

    memory = memtool.load("memory@good")
    model = memory.attach()                 # a torch.nn.Module, in eval mode
    out = model(batch)                      # .logits .probabilities .weights .novelty .unlike
    memory.classes[int(out.logits[0].argmax())]

The store knows its model, adapters, method and head: no configuration and no data are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtool.config import resolve
from memtool.errors import ConfigError, NotFoundError
from memtool.paths import split_store
from memtool.remembered import remembered
from memtool.settings import Config
from memtool_stores import MemoryStore

if TYPE_CHECKING:
    from memtool.backbones.interface import FrozenModel
    from memtool.methods.attached import Attached
    from memtool_stores import AdapterRecord, MemoryView, Version


class Log(list["Version"]):
    """Versions, newest first; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        from memtool.reports.notebook import table_html
        from memtool.reports.table import Grid

        rows = tuple((one.id, f"{one.time:%Y-%m-%d %H:%M}", one.message) for one in self)
        return table_html(Grid("Versions, newest first", ("version", "time (UTC)", "what"), rows))


@dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """One version of a memory, as `load` opens it.

    `config` is what it was made with; `seed` that of its run.
    """

    store: MemoryStore
    view: MemoryView
    config: Config

    def __repr__(self) -> str:
        """Where it is, its method and model, and how many adapters it holds."""
        made = f"{self.config.method} on {self.config.backbone.name}"
        return f"<Memory {self.store.url}@{self.version}: {made}, {len(self.adapters)} adapters>"

    def _repr_html_(self) -> str:
        from memtool.reports.notebook import table_html
        from memtool.reports.table import MISSING, Grid

        rows = [
            (
                record.name,
                str(record.meta.get("task") or MISSING),
                str(record.meta.get("task_name") or MISSING),
                record.id,
            )
            for record in self.adapters
        ]
        header = ("adapter", "task", "called", "id")
        return table_html(Grid(repr(self).strip("<>"), header, tuple(rows)))

    @property
    def version(self) -> str:
        """The version that was opened."""
        return self.view.version

    @property
    def adapters(self) -> tuple[AdapterRecord, ...]:
        """What it holds, in the order written: whole adapters, or rows of atoms."""
        return self.view.live

    @property
    def reads(self) -> str:
        """What it reads: "images" or "texts"."""
        return "texts" if self.config.stream.setting == "trace" else "images"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits; none of a language model."""
        return self._method().class_names(self.view)

    @cached_property
    def transform(self) -> Callable[..., Any]:
        """The preprocessing of a picture, as a torchvision transform: PIL image to float tensor.

        Imports torchvision. Raises ConfigError for a memory of texts.
        """
        if self.reads == "texts":
            raise ConfigError("a language model has no transform", expected="a memory of images")
        from memtool.backbones.interface import Backbone
        from memtool.streams.transform import transform_of

        backbone = self._backbone()
        assert isinstance(backbone, Backbone)
        return transform_of(
            backbone.image_size, backbone.mean, backbone.std, self.config.stream.crop
        )

    def log(self) -> Log:
        """The versions up to this one, newest first.

        >>> log = load("memory").log()
        >>> log[0].id == load("memory").version, len(log) > 3
        (True, True)
        """
        return Log(self.store.log(self.version))

    def attach(
        self,
        backbone: FrozenModel | None = None,
        *,
        task: str | int | None = None,
        precision: str = "fp32",
    ) -> Attached:
        """The version on its frozen model: a module in eval mode whose parameters are frozen.

        `backbone` is the model, where it is at hand (it is taken over); else it is made as the
        memory remembers it. `task` says of what task all inputs are, by number or name: its adapter
        is used exactly. `precision` is fp32 or bf16.

        Raises NotFoundError for weights that are not there, the store's SpaceMismatchError for
        another model than the memory's, ConfigError for a memory without keys.

        >>> import torch
        >>> model = load("memory").attach()
        >>> out = model(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
        >>> tuple(out.logits.shape), tuple(out.weights.shape)  # by class, by adapter
        ((3, 10), (3, 2))
        >>> load("memory").attach(task=1)(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).weights
        tensor([[1., 0.]])
        """
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision {precision!r}", expected="fp32 or bf16")
        from memtool.backbones.interface import FrozenModel

        if backbone is not None and not isinstance(backbone, FrozenModel):
            raise ConfigError(
                f"a backbone of type {type(backbone).__name__}",
                expected="a model of memtool.create_backbone",
                remedy="attach() without one makes the model that the memory remembers",
            )
        method = self._method()
        method.workspace.backbone = backbone or self._backbone()
        word = None if task is None else str(task)
        attached = method.attach(self.version, task=word, precision=precision)
        return attached.eval().requires_grad_(False)

    def _backbone(self) -> FrozenModel:
        """The frozen model that the memory remembers, on the CPU."""
        from memtool.workspace import open_backbone

        return open_backbone(self.config)

    def _method(self) -> Any:
        from memtool.methods import open_method

        config = self.config.model_copy(update={"store": self.store.url})
        return open_method(config, seed=config.seed[0])


def load(
    store: str | Path,
    *,
    weights: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Memory:
    """Open a memory: a folder or bucket, perhaps @VERSION.

    `weights` is the file of its model, where that is not where the memory remembers it. `overrides`
    are settings by dotted key that count before what the memory remembers; a method of a file of
    one's own is named here. Raises NotFoundError for a memory that is not there, does not say what
    it was made with, or was made with a method that is not installed.

        >>> memory = load("memory@good")
        >>> memory
        <Memory ...memory@...: mira on nano, 2 adapters>
        >>> [record.name for record in memory.adapters]
        ['task-1-seed-0', 'task-2-seed-0']
        >>> memory.classes[:3], memory.reads
        (('0', '1', '2'), 'images')
        >>> load("memory@better")
        Traceback (most recent call last):
        ...
        memtool_stores.errors.NotFoundError: ...
    """
    address, version = split_store(str(store))
    opened = MemoryStore.open(address)
    view = opened.view(version)
    made_with = remembered(opened, view.version)
    if not view.live:
        raise NotFoundError(f"the memory {address!r} holds no adapters at version {view.version}")
    if not made_with:
        raise NotFoundError(
            f"the memory {address!r} does not say what it was made with",
            expected="a version that memtool write or consolidate made",
        )
    if weights is not None:
        made_with["backbone.weights"] = str(weights)
    found = resolve(ambient=False, remembered=made_with, overrides=overrides)
    return Memory(opened, view, found.config)
