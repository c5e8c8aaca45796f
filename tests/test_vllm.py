"""The LoRA resolver of vLLM: the contract of its documentation, and vLLM itself where it is."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import logging
import os
import shutil
import stat
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import memtool.vllm
from memtool.config import resolve
from memtool.errors import ConfigError, MismatchError, NotFoundError
from memtool.methods.mira.prompts import PromptMemory
from memtool.program import export_model
from memtool.vllm import Adapters
from memtool_stores import Backbone, MemoryStore, Space
from memtool_stores.files import part_folder
from memtool_stores.testing import fill, small_space, some_values
from tests.methods.facts import settings_of
from tests.methods.test_collection import write_collection

ROOT = Path(__file__).parents[1]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model in `model`, and `memory` with three LoRA of it, tagged `good`."""
    folder = write_collection(tmp_path_factory.mktemp("collection"))
    overrides = {**settings_of(folder, folder), "engine.device": "cpu"}
    config = resolve(preset="mira-trace", overrides=overrides, ambient=False).config
    method = PromptMemory.open(config, seed=0)
    assert isinstance(method, PromptMemory)
    method.collect([str(folder / "adapters")], folder / "prompts.jsonl")
    MemoryStore.open(folder / "memory").tag("good")
    return folder


@pytest.fixture
def base(place: Path) -> str:
    return str(place / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The two modules of vLLM that a resolver is written against, as documented.

    docs.vllm.ai, vllm.lora.resolver and vllm.lora.request: an abstract coroutine `resolve_lora`, a
    registry with `register_resolver(name, resolver)`, a request whose number must be positive.
    """

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...

    class Registry:
        def __init__(self) -> None:
            self.resolvers: dict[str, LoRAResolver] = {}

        def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
            assert isinstance(resolver, LoRAResolver)
            self.resolvers[resolver_name] = resolver

    @dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str = ""

        def __post_init__(self) -> None:
            if self.lora_int_id < 1:
                raise ValueError(f"id must be > 0, got {self.lora_int_id}")
            assert self.lora_path

    resolver = types.ModuleType("vllm.lora.resolver")
    resolver.LoRAResolver = LoRAResolver  # type: ignore[attr-defined]
    resolver.LoRAResolverRegistry = Registry()  # type: ignore[attr-defined]
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for name, module in {
        "vllm": types.ModuleType("vllm"),
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.resolver": resolver,
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return resolver


def _registered(vllm: types.ModuleType) -> Any:
    memtool.vllm.register()
    return vllm.LoRAResolverRegistry.resolvers["memtool"]


def test_a_request_is_resolved_to_the_files_that_were_taken_in(vllm, place, base, monkeypatch):
    monkeypatch.setenv(memtool.vllm.STORES, str(place / "memory"))
    resolver = _registered(vllm)
    assert inspect.iscoroutinefunction(resolver.resolve_lora)
    numbers = set()
    for name in ("letters", "sums", "turned"):
        asked = f"memory@good:{name}"
        request = asyncio.run(resolver.resolve_lora(base, asked))
        again = asyncio.run(resolver.resolve_lora(base_model_name=base, lora_name=asked))
        assert request == again
        assert request.lora_name == asked
        request.lora_int_id = 7  # as vLLM numbers them
        request = again
        numbers.add(request.lora_int_id)
        folder = Path(request.lora_path)
        assert sorted(file.name for file in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        original = place / "adapters" / name / "adapter_model.safetensors"
        assert (folder / original.name).read_bytes() == original.read_bytes()
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        assert load_file(folder / original.name)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert len(numbers) == 3
    assert asyncio.run(resolver.resolve_lora(base, "memory:sums")) is not None


def test_what_is_not_ours_or_refused_is_none_and_logged(vllm, place, base, monkeypatch, caplog):
    monkeypatch.setenv(memtool.vllm.STORES, str(place / "memory"))
    resolver = _registered(vllm)
    for name in ("poems", "other@good:sums", str(place / "memory") + ":sums", "../memory:sums"):
        assert asyncio.run(resolver.resolve_lora(base, name)) is None
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "memtool.vllm"):
        for name, model in (
            ("memory@good", base),
            ("memory:auto", base),
            ("memory:sum", base),
            ("memory@none:sums", base),
            ("memory:sums", "meta/llama"),
        ):
            assert asyncio.run(resolver.resolve_lora(model, name)) is None
    said = caplog.text
    for part in ("mixed for every prompt", "did you mean 'sums'", "vllm serve", "none"):
        assert part in said
    assert len(caplog.records) == 5


def test_without_stores_nothing_is_registered_and_names_are_unique(vllm, monkeypatch):
    monkeypatch.delenv(memtool.vllm.STORES, raising=False)
    memtool.vllm.register()
    assert vllm.LoRAResolverRegistry.resolvers == {}
    with pytest.raises(ConfigError, match="two memories are called 'memory'"):
        Adapters(["a/memory", "s3://b/memory/"])


def test_the_base_is_compared(place, base, tmp_path):
    found = Adapters([str(place / "memory")])
    (tmp_path / "link").symlink_to(base)
    assert found.folder_of("memory:sums", str(tmp_path / "link")) is not None
    shutil.copytree(base, tmp_path / "other")
    with pytest.raises(MismatchError, match="vLLM serves"):
        found.folder_of("memory:sums", str(tmp_path / "other"))
    with pytest.raises(NotFoundError, match="no adapter"):
        found.folder_of("memory:nothing", base)


def test_atoms_and_adapters_of_images_are_refused(tmp_path):
    images = MemoryStore.create(tmp_path / "images", small_space())
    with images.transaction("write") as txn:
        fill(txn, small_space(), "t0", 0)
    with pytest.raises(MismatchError, match="a memory of"):
        Adapters([images.url]).folder_of("images:t0", "model")
    one = small_space()
    space = Space(Backbone("hf:model", "", one.backbone.sha256), one.layout)
    atoms = MemoryStore.create(tmp_path / "atoms", space)
    with atoms.transaction("write") as txn:
        txn.add_atoms("t0", some_values(space, 0))
    with pytest.raises(MismatchError, match="are atoms"):
        Adapters([atoms.url]).folder_of("atoms:t0", "model")


def test_files_that_somebody_changed_are_written_anew(place, base):
    found = Adapters([str(place / "memory")])
    folder = found.folder_of("memory:sums", base)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"something else")
    assert found.folder_of("memory:sums", base) == folder
    assert file.read_bytes() == whole
    folders = [one.name for one in folder.parent.iterdir() if not one.name.startswith(".")]
    assert folders == [folder.name]


def test_numbers_are_one_for_one(tmp_path, monkeypatch):
    found = Adapters([])
    one, other = found.number_of("a", tmp_path / "x"), found.number_of("b", tmp_path / "x")
    assert one == Adapters([]).number_of("a", tmp_path / "x")
    assert 1 <= one != other <= 0x7FFFFFFF
    again = Adapters([])
    again._numbers[one] = "taken by another name"
    assert again.number_of("a", tmp_path / "x") == one % 0x7FFFFFFF + 1


def test_a_memory_of_texts_is_no_program(place, tmp_path):
    with pytest.raises(ConfigError, match="is no one program"):
        export_model(place / "memory", tmp_path / "memory.pt2")
    assert not (tmp_path / "memory.pt2").exists()


def test_vllm_finds_it_by_its_entry_point():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    for name, value in points.items():
        loaded = EntryPoint(name, value, "vllm.general_plugins").load()
        assert loaded is memtool.vllm.register


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllm_itself_takes_the_resolver(place, base, monkeypatch):
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    monkeypatch.setenv(memtool.vllm.STORES, str(place / "memory"))
    memtool.vllm.register()
    resolver = LoRAResolverRegistry.get_resolver(memtool.vllm.RESOLVER)
    request = asyncio.run(resolver.resolve_lora(base, "memory@good:sums"))
    assert isinstance(request, LoRARequest)
    assert Path(request.lora_path, "adapter_config.json").is_file()


def test_the_cache_is_bounded_and_what_a_process_uses_stays(place, base, cache, monkeypatch):
    adapters = Adapters([str(place / "memory")])
    one, two, *_ = (record.name for record in MemoryStore.open(place / "memory").view().live)
    first = adapters.folder_of(f"memory@good:{one}", base)
    size = sum(file.stat().st_size for file in first.iterdir())
    folders = [cache / "vllm" / f"{number:064d}" for number in range(3)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(bytes(100 * size))
        os.utime(folder, (number + 1, number + 1))
    dead = part_folder(cache / "vllm" / "adapter")
    os.utime(dead, (0, 0))
    monkeypatch.setattr(memtool.vllm, "KEEP_BYTES", 250 * size)
    other = Adapters([])  # as of another process
    other._used.add(folders[0])
    second = adapters.folder_of(f"memory@good:{two}", base)
    there = [folder.is_dir() for folder in (first, second, *folders)]
    assert there == [True, True, True, False, True]
    assert not dead.exists()
    del other
    monkeypatch.setattr(memtool.vllm, "KEEP_BYTES", 0)
    memtool.vllm._make_room(cache / "vllm")
    there = [folder.is_dir() for folder in (first, second, *folders)]
    assert there == [True, True, False, False, False]  # in use, as long as this process lives


def test_one_descriptor_keeps_all_that_a_process_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(memtool.vllm, "KEEP_BYTES", 0)
    folders = [tmp_path / f"{number:064d}" for number in range(40)]
    adapters, before = Adapters([]), len([*Path("/dev/fd").iterdir()])
    for folder in folders:
        folder.mkdir()
        adapters._used.add(folder)
        adapters._used.add(folder)
    assert len([*Path("/dev/fd").iterdir()]) == before + 1
    memtool.vllm._make_room(tmp_path)
    (folders[0] / "adapter_model.safetensors").write_bytes(bytes(100))
    memtool.vllm._make_room(tmp_path)
    assert all(folder.is_dir() for folder in folders)
    del adapters
    memtool.vllm._make_room(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".used")] == []
    assert not folders[0].exists()


def test_room_is_made_by_two_processes_at_once(tmp_path, monkeypatch):
    folders = [tmp_path / f"{number:064d}" for number in range(3)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(bytes(100))
        os.utime(folder, (number + 1, number + 1))
    listed = Path.iterdir

    def iterdir(path):  # the other one was faster
        if path == folders[0]:
            shutil.rmtree(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(memtool.vllm, "KEEP_BYTES", 100)
    memtool.vllm._make_room(tmp_path)
    assert [folder.is_dir() for folder in folders] == [False, False, True]
