"""What answers a request: a version of the memory, with all its adapters or with one of them.

A request names it: `auto`, the name of an adapter or task, `memory@VERSION`, or
`memory@VERSION:ADAPTER`. All of them stand on one frozen model. A new version is made ready beside
the one that answers, and takes its place between two requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from memtool.errors import BusyError, ConfigError, NotFoundError, did_you_mean
from memtool.inference.predictor import Predictor
from memtool.memory import Memory, load
from memtool.methods.attached import AttachedImages, AttachedTexts
from memtool.paths import split_store
from memtool_stores import MemoryStore, StorageError
from memtool_stores.printable import shown

AUTO = "auto"
"""The name of the model that recalls by itself."""

KEPT = 8
"""Models beside the one that answers `auto`: those that were asked for last."""

LONGEST_NAME = 300
"""Characters of the name of a model."""


@dataclass(frozen=True, eq=False)
class Model:
    """One way to be answered; `adapter` is the only one that is used, where there is one."""

    memory: Memory
    adapter: str | None
    ready: Predictor | AttachedTexts

    @property
    def version(self) -> str:
        """The version of the memory."""
        return self.memory.version


class Models:
    """The models of one store; `current` is that of the version that is served.

    `opened(version)` opens a version, by its id. All that reads the store runs in one thread of its
    own, so the event loop and the model never wait for it.
    """

    def __init__(
        self,
        store: str,
        *,
        opened: Callable[[str], Memory] | None = None,
        version: str | None = None,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        """Load the version that `store` names, an address perhaps with @VERSION; else `version`.

        Raises the errors of `memtool.load` and `Memory.attach`.
        """
        self.address, self.ref = split_store(store)
        self.name = name_of(self.address)
        path = Path(self.address)
        local = () if "://" in self.address else (str(path.resolve()), str(path.absolute()))
        self._places = sorted({*local, self.address}, key=len, reverse=True)
        self._opened = opened or (lambda version: load(f"{self.address}@{version}"))
        self._precision, self._device = precision, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="memtool-store")
        self._kept: OrderedDict[tuple[str, str | None], Model] = OrderedDict()
        self._keeping = threading.Lock()
        self.current = self._made(self._opened(version or self.newest()), None)
        self.failed: tuple[str, str] | None = None

    @property
    def reads(self) -> str:
        """What the memory reads: "images" or "texts"."""
        return self.current.memory.reads

    def newest(self) -> str:
        """The id of the version that the store's address names now."""
        return MemoryStore.open(self.address).view(self.ref).version

    def names(self) -> list[str]:
        """What a request may name: `auto`, and every adapter of the version that is served."""
        return [AUTO, *(record.name for record in self.current.memory.adapters)]

    async def named(self, word: str) -> Model:
        """The model of a name. Raises NotFoundError, and VersionExpiredError for one collected."""
        current = self.current
        if word == AUTO:
            return current
        found = self._used((current.version, word))
        return found or await self._aside(self._find, current, word)

    async def reload(self, version: str | None = None) -> tuple[str, str]:
        """Take up a version, else that which the address names now: the one before, and that now.

        Raises what keeps it from being served; the version before goes on then.
        """
        model = await self._aside(self._other, version)
        before = self.current.version
        if model is not None:
            self.current = model
        return before, self.current.version

    async def look(self, version: str | None = None) -> str | None:
        """As `reload`, but tries a version that failed only once; what is wrong, where anything is.

        Where nobody answered, or another process was busy, it is tried again.

        Raises nothing that has to do with the store.
        """
        try:
            wanted = version or await self._aside(self.newest)
            if self.failed is not None and self.failed[0] == wanted:
                return self.failed[1]
            await self.reload(version)
        except Exception as error:  # noqa: BLE001 - whatever it is, what is served goes on
            return self.told(error)
        return None

    def told(self, error: BaseException) -> str:
        """What an error says in one line, without the place of the store on this machine."""
        return self.hidden(" ".join(str(error).split()) or type(error).__name__)

    def hidden(self, text: str) -> str:
        """A text with the name of the memory where its address stood, or where that leads to."""
        for place in self._places:
            text = text.replace(place, self.name)
        return text

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _aside(self, function: Callable[..., Any], *given: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._while_there, function, *given)

    def _while_there(self, function: Callable[..., Any], *given: Any) -> Any:
        """What a function gives. Raises StorageError, one that passes, where the store is gone."""
        try:
            return function(*given)
        except NotFoundError as error:
            if MemoryStore.exists(self.address):
                raise
            raise StorageError(
                f"the memory {self.name} is not where it was; what is loaded goes on",
                expected=AUTO,
                remedy="the same again once it is back",
                transient=True,
            ) from error

    def _other(self, version: str | None) -> Model | None:
        wanted = version or self.newest()
        if wanted == self.current.version:
            return None
        try:
            memory = self._opened(wanted)
            if memory.reads != self.reads:
                raise ConfigError(f"version {wanted} reads {memory.reads}, not {self.reads}")
            model = self._made(memory, None)
        except Exception as error:
            if not _may_pass(error):
                self.failed = wanted, self.told(error)
            raise
        self.failed = None
        return model

    def _find(self, current: Model, word: str) -> Model:
        if len(word) > LONGEST_NAME:
            raise NotFoundError(f"no model of a name of {len(word)} characters")
        memory = current.memory
        tasks = [record.meta.get("task_name") for record in memory.adapters]
        known = [
            *(record.name for record in memory.adapters),
            *dict.fromkeys(str(task) for task in tasks if task is not None),
        ]
        if word in known or "@" not in word:
            if word not in known:
                raise NotFoundError(
                    f"no model {shown(word)}",
                    expected=did_you_mean(word, [AUTO, *known, f"{self.name}@VERSION"]),
                )
            key = memory.version, word
            return self._used(key) or self._keep(key, memory, word)
        name, _, rest = word.partition("@")
        ref, _, adapter = rest.partition(":")
        if name != self.name or not ref:
            raise NotFoundError(
                f"no model {shown(word)}", expected=f"{self.name}@VERSION, the memory served here"
            )
        version = MemoryStore.open(self.address).view(ref).version
        if version == current.version and not adapter:
            return current
        other = version, adapter or None
        return self._used(other) or self._keep(other, self._opened(version), adapter or None)

    def _used(self, key: tuple[str, str | None]) -> Model | None:
        """A model that is kept, which is from now on the one used last; None where it is not.

        Of the event loop and of the thread of the store.
        """
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, str | None], memory: Memory, adapter: str | None) -> Model:
        model = self._made(memory, adapter)
        with self._keeping:
            self._kept[key] = model
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return model

    def _made(self, memory: Memory, adapter: str | None) -> Model:
        now: Model | None = getattr(self, "current", None)
        shared = None
        if now is not None:
            ours, theirs = now.memory.config, memory.config
            if (ours.backbone, ours.text) == (theirs.backbone, theirs.text):
                ready = now.ready
                shared = ready.model.backbone if isinstance(ready, Predictor) else ready.backbone
        attached = memory.attach(shared, task=adapter, precision=self._precision)
        attached.to(self._device)
        if isinstance(attached, AttachedTexts):
            return Model(memory, adapter, attached)
        assert isinstance(attached, AttachedImages)
        return Model(memory, adapter, Predictor(memory, attached))


def name_of(address: str) -> str:
    """What a memory at an address is called: the last part of it."""
    return PurePosixPath(address.rstrip("/")).name or address


def _may_pass(error: Exception) -> bool:
    """Whether the same may go well a little later."""
    if isinstance(error, StorageError):
        return error.transient
    return isinstance(error, BusyError | OSError)
