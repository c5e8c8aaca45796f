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
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

_USED = ".used-"

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
        self._used = _Used()
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
        return _materialised(store, view, record, self._used.add)

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
    if over <= 0:
        return
    with _alone(cache):
        used = _in_use(cache)
        for folder in sorted(sizes, key=lambda path: ages[path]):
            if over > 0 and folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)
                over -= sizes[folder]


class _Used:
    """The directories of caches that a process uses: nobody takes them away while it lives.

    vLLM reads one again whenever it has dropped an adapter from its own memory. Their names are in
    a file of each cache that stays locked: one descriptor, however many they are.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._folders: set[Path] = set()
        weakref.finalize(self, _let_go, self._files)

    def add(self, folder: Path) -> None:
        """Keep a directory, which need not be there yet."""
        if folder in self._folders:
            return
        cache = folder.parent
        with _alone(cache):
            if cache not in self._files:
                path = cache / f"{_USED}{uuid.uuid4().hex}"
                self._files[cache] = os.open(
                    path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
                )
                fcntl.flock(self._files[cache], fcntl.LOCK_EX)
            os.write(self._files[cache], f"{folder.name}\n".encode())
        self._folders.add(folder)


def _let_go(files: dict[Path, int]) -> None:
    for handle in files.values():
        os.close(handle)


def _in_use(cache: Path) -> set[str]:
    """Names of the directories that processes use; what dead ones wrote goes. Needs `_alone`."""
    names = set[str]()
    for path in cache.glob(f"{_USED}*"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                names.update(file.read().decode().split())
            else:
                path.unlink()
    return names


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """While the block runs, no other says what it uses or makes room."""
    handle = os.open(cache / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        data = file.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
