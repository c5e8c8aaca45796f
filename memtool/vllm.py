"""Adapters of memories in vLLM: a LoRA resolver that finds `memory@version:adapter` in stores.

    export MEMTOOL_VLLM_STORES=/srv/memory,hf://user/name VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
    vllm serve MODEL --enable-lora --max-lora-rank 64

A request names as its model `memory@good:poems`: the last part of a store's address, perhaps a
version, and a whole adapter by name or id. vLLM loads this module by its plugins
(`vllm.general_plugins`); no other store than those of the variable is ever opened.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtool.errors import ConfigError, MemtoolError, MismatchError, NotFoundError, did_you_mean
from memtool_stores import caches
from memtool_stores.files import part_folder

if TYPE_CHECKING:
    from memtool_stores import AdapterRecord, MemoryStore, MemoryView

STORES = "MEMTOOL_VLLM_STORES"
"""The variable that names the stores, separated by commas."""
RESOLVER = "memtool"

KEEP_BYTES = 8_000_000_000
"""What the cache of adapters holds at most, beside those that a process uses."""

_log = logging.getLogger(__name__)


def register() -> None:
    """Register the resolver with vLLM, where $MEMTOOL_VLLM_STORES names stores.

    vLLM calls it when it starts. Raises ConfigError for two stores of one name.
    """
    addresses = [one.strip() for one in os.environ.get(STORES, "").split(",") if one.strip()]
    if not addresses:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(RESOLVER, resolver(addresses))


def resolver(addresses: list[str]) -> Any:
    """A `vllm.lora.resolver.LoRAResolver` over these stores. Needs vLLM."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    found = Adapters(addresses)

    class MemoryResolver(LoRAResolver):
        """Finds adapters in memories."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The request for vLLM; None for a name of others, and for what is refused."""
            try:
                folder = await asyncio.to_thread(found.folder_of, lora_name, base_model_name)
            except MemtoolError as error:
                _log.warning("no LoRA %r: %s", lora_name, str(error).replace("\n", "; "))
                return None
            if folder is None:
                return None
            return LoRARequest(
                lora_name=lora_name,
                lora_int_id=found.number_of(lora_name, folder),
                lora_path=str(folder),
            )

    return MemoryResolver()


class Adapters:
    """Whole adapters of some memories, as PEFT directories in a private cache."""

    def __init__(self, addresses: list[str]) -> None:
        """`addresses` are those of stores, without versions.

        Raises ConfigError for two of one name.
        """
        self._stores: dict[str, str] = {}
        self._held: dict[Path, int] = {}
        weakref.finalize(self, _let_go, self._held)
        self._numbers: dict[int, str] = {}
        for address in addresses:
            name = address.rstrip("/").rpartition("/")[2]
            if name in self._stores:
                raise ConfigError(
                    f"{STORES}: two memories are called {name!r}",
                    expected="addresses that end in different names",
                )
            self._stores[name] = address

    def folder_of(self, name: str, base: str) -> Path | None:
        """The directory of `memory@version:adapter`; None where no store has the name before `@`.

        `base` is the model that it is to act on. Raises NotFoundError for a version or an adapter
        that is not there, MismatchError for another model and for what is no whole adapter, and the
        errors of the store.
        """
        place, colon, adapter = name.partition(":")
        memory, _, version = place.partition("@")
        address = self._stores.get(memory)
        if address is None:
            return None
        if not colon or not adapter or adapter == "auto":
            raise MismatchError(
                f"{name!r} names no adapter: what a memory recalls is mixed for every prompt",
                expected="MEMORY@VERSION:ADAPTER; vLLM serves one whole adapter a request",
                remedy="memtool generate, for mixtures",
            )
        from memtool_stores import MemoryStore

        store = MemoryStore.open(address)
        view = store.view(version or "HEAD")
        _require_base(view, base)
        record = _record(view, adapter)
        return _materialised(store, view, record, self._use)

    def _use(self, folder: Path) -> None:
        """Keep others from taking a directory of the cache away while this process lives.

        vLLM reads it again whenever it has dropped an adapter from its own memory.
        """
        if folder not in self._held:
            self._held[folder] = _locked(folder, fcntl.LOCK_SH)

    def number_of(self, name: str, folder: Path) -> int:
        """A number from 1 that only this name of these bytes has, the same in every process."""
        key = f"{name}\0{folder.name}"
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") & 0x7FFFFFFF or 1
        while self._numbers.setdefault(number, key) != key:
            number = number % 0x7FFFFFFF + 1
        return number


def _require_base(view: MemoryView, base: str) -> None:
    """Raise MismatchError unless the memory is one of the model that vLLM serves."""
    backbone = view.space.backbone.name
    family, _, model = backbone.partition(":")
    if family != "hf":
        raise MismatchError(f"a memory of {backbone}", expected=f"one of the language model {base}")
    same = model == base or (
        Path(model).is_dir() and Path(base).is_dir() and Path(model).samefile(base)
    )
    if not same:
        raise MismatchError(
            f"a memory of the model {model!r}, and vLLM serves {base!r}",
            expected="the same model under the same name",
            remedy=f"vllm serve {model}",
        )


def _record(view: MemoryView, adapter: str) -> AdapterRecord:
    names = [record.name for record in view.live]
    if any(record.kind == "atoms" for record in view.live):
        raise MismatchError(
            "its adapters are atoms, of which every token chooses some",
            expected="a memory of whole LoRA adapters",
        )
    try:
        return view.get(adapter)
    except NotFoundError as error:
        raise NotFoundError(
            f"no adapter {adapter!r} at version {view.version}",
            expected=did_you_mean(adapter, names),
        ) from error


def _materialised(
    store: MemoryStore, view: MemoryView, record: AdapterRecord, use: Callable[[Path], None]
) -> Path:
    """The adapter as a PEFT directory that is named by the hash of what is in it.

    `use` holds the directory from before it is there.
    """
    from memtool.memory import load
    from memtool.methods.export import write_stored
    from memtool.methods.home import StoredHome

    config = load(f"{store.url}@{view.version}").config
    home = StoredHome(config, config.seed[0], store, view)
    cache = _cache()
    building = part_folder(cache / "adapter")  # 0700
    try:
        write_stored(building, view, record, home)
        folder = cache / _digest(building)
        use(folder)
        if folder.is_dir() and _digest(folder) != folder.name:
            shutil.rmtree(folder)
        if not folder.is_dir():
            try:
                building.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same bytes
                    raise
            _make_room(cache)
        os.utime(folder)
    except OSError as error:
        raise MemtoolError(
            f"cannot write {record.name!r} in {cache}: {error.strerror or error}",
            remedy="export MEMTOOL_CACHE=FOLDER, one that you may write and that has room",
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _cache() -> Path:
    folder = caches.root() / "vllm"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise MemtoolError(
            f"cannot make the private folder {folder}: {error.strerror or error}",
            remedy="export MEMTOOL_CACHE=FOLDER, one that is yours",
        ) from error
    return folder


def _make_room(cache: Path) -> None:
    """Take directories out of the cache that nobody uses, the oldest first, until it is small."""
    caches.remove_parts(cache)
    folders = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
    sizes, ages = dict[Path, int](), dict[Path, float]()
    for folder in folders:
        with suppress(FileNotFoundError):  # another process makes room, too
            ages[folder] = folder.stat().st_mtime
            sizes[folder] = sum(file.stat().st_size for file in folder.iterdir())
    over = sum(sizes.values()) - KEEP_BYTES
    for folder in sorted(sizes, key=lambda path: ages[path]):
        if over <= 0:
            return
        try:
            lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a process uses it
            continue
        shutil.rmtree(folder, ignore_errors=True)
        _lock_file(folder).unlink(missing_ok=True)
        os.close(lock)
        over -= sizes[folder]


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _let_go(held: dict[Path, int]) -> None:
    for handle in held.values():
        os.close(handle)


def _locked(folder: Path, how: int) -> int:
    """The lock of a directory of the cache, a descriptor that holds it until it is closed.

    Raises BlockingIOError where it cannot be had and nobody is to wait.
    """
    path = _lock_file(folder)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, how)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was taken away while this waited


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        data = file.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
