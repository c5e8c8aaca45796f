"""Adapters of an image model of unlike ranks, layers and modules, in one memory."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import memtool
from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.backbones.nano import build_nano, create_nano
from memtool.backbones.plain_vit import PlainViT
from memtool.errors import ConfigError, MismatchError
from memtool.methods.export import export_peft
from memtool.methods.merge import merge
from memtool.methods.mira.method import Mira
from memtool.methods.modulation.method import Modulation
from memtool.settings import BackboneSettings
from memtool_stores import MemoryStore
from tests.methods.conftest import learn, small_config

SETTINGS = BackboneSettings(name="nano", image_size=32)
FILES = ("adapter_model.safetensors", "adapter_config.json")

THEIRS: Mapping[str, Mapping[str, Any]] = {
    # Names are those of the tasks; each has another rank, and other layers.
    "upright": {"r": 2, "lora_alpha": 4, "target_modules": ["qkv"]},
    "inverted": {
        "r": 5,
        "lora_alpha": 3,
        "target_modules": ["qkv", "attn.proj", "fc1", "fc2"],
        "layers_to_transform": [1, 3],
        "layers_pattern": "blocks",
        "use_rslora": True,
    },
    "rot90": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["fc1", "attn.proj"],
        "rank_pattern": {"fc1": 1},
        "alpha_pattern": {"fc1": 5},
    },
}


def plain() -> PlainViT:
    """The backbone as timm would have it, its layers not made ready for adapters."""
    found, vit = build_nano(), create_nano(SETTINGS).vit
    found.load_state_dict({key: vit.state_dict()[key] for key in found.state_dict()})
    return found


def theirs(folder: Path) -> list[Path]:
    """Adapters as peft makes them: none of their numbers is zero."""
    made = []
    for number, (name, settings) in enumerate(THEIRS.items()):
        torch.manual_seed(number)
        lora = peft.get_peft_model(plain(), peft.LoraConfig(init_lora_weights=False, **settings))
        for key, parameter in lora.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        made.append(folder / name)
        lora.save_pretrained(str(made[-1]))
    return made


def merged(folder: Path, images: Tensor) -> Tensor:
    """What PEFT's own model gives with this adapter merged into its weights."""
    whole = peft.PeftModel.from_pretrained(plain(), str(folder)).merge_and_unload()
    with torch.no_grad():
        found: Tensor = whole(create_nano(SETTINGS).preprocess(images))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return theirs(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 32, 32, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def _collected(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    mira = Mira.open(small_config(folder), seed=0)
    mira.adapt("1")
    mira.write()
    mira.write(folders)
    mira.consolidate()
    return folder


@pytest.fixture
def collected(_collected: Path, tmp_path: Path) -> Mira:
    """Ours of task 1, whose slices stand beside their whole layers, and theirs."""
    shutil.copytree(_collected, tmp_path / "mine")
    return Mira.open(small_config(tmp_path / "mine"), seed=0)


def test_each_answers_as_in_peft(collected: Mira, folders: list[Path], images: Tensor) -> None:
    snapshot, backbone = collected.read(), collected.workspace.backbone
    records = [snapshot.view.get(folder.name) for folder in folders]
    assert all(record.ragged for record in records)
    values = snapshot.values_of([*records, snapshot.view.get("task-1-seed-0")])
    with torch.no_grad():
        for number, folder in enumerate(folders):
            chosen = torch.zeros(len(images), 4)
            chosen[:, number] = 1
            alone = snapshot.values_of([records[number]])
            found = backbone.features(backbone.preprocess(images), every(alone))
            torch.testing.assert_close(found, merged(folder, images), atol=2e-5, rtol=1e-4)
            mixed = backbone.features(
                backbone.preprocess(images),
                partial(_weighted, values, chosen),
            )
            torch.testing.assert_close(mixed, found, atol=2e-5, rtol=1e-4)


def _weighted(values: AdapterValues, weights: Tensor, block: int, _: Tensor) -> Mixture | None:
    own = values.block(block)
    return None if own is None else Mixture.weighted(own, weights, "delta")


def test_a_mixture_is_the_sum_of_what_each_adds(collected: Mira, images: Tensor) -> None:
    """Weights by weights: the deltas of all adapters added to a copy of the model, by a loop."""
    backbone, snapshot = collected.workspace.backbone, collected.read()
    _, model, _ = snapshot.consolidated()
    with torch.no_grad():
        features, weights = model.with_coefficients(images)
        for row, image in enumerate(images):
            whole = plain()
            layers = dict(whole.named_modules())
            for record, weight in zip(snapshot.records, weights[row, 0], strict=True):
                for name, delta in _deltas(snapshot, record).items():
                    layers[name].weight += weight * delta
            found = whole(backbone.preprocess(image[None]))
            torch.testing.assert_close(features[row], found[0], atol=2e-5, rtol=1e-4)


def _deltas(snapshot: Any, record: Any) -> dict[str, Tensor]:
    """scaling · B A of every module that an adapter has, whole."""
    values = snapshot.values_of([record])
    tensors = values.layout.unflatten(values.flat()[0])
    found: dict[str, Tensor] = {}
    for site in values.layout.sites:
        whole = found.setdefault(site.module, torch.zeros(site.module_rows, site.in_features))
        rows = slice(site.first_row, site.first_row + site.out_features)
        product = tensors[f"{site.name}.lora_B"] @ tensors[f"{site.name}.lora_A"]
        whole[rows] += values.scaling[0] * product
    return found


def test_they_come_out_byte_for_byte(collected: Mira, folders: list[Path], tmp_path: Path) -> None:
    for folder, out in zip(
        folders,
        export_peft(collected.workspace, [f.name for f in folders], out=tmp_path / "out"),
        strict=True,
    ):
        for name in FILES:
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        assert json.loads((out / "memtool_catalog.json").read_text())["byte_identical"]
    assert collected.write(folders).unchanged


def test_a_wider_adapter_rewrites_no_value(folders: list[Path], tmp_path: Path) -> None:
    mira = learn(Mira.open(small_config(tmp_path / "mine"), seed=0), tasks=1)
    before = mira.workspace.store.view()
    mira.write(folders)
    view = mira.workspace.store.view()
    assert view.get("task-1-seed-0") == before.get("task-1-seed-0")
    assert view.space == before.space


def test_a_memory_of_them_is_loaded_asked_and_measured(
    collected: Mira, images: Tensor, tmp_path: Path
) -> None:
    record = collected.evaluate(compare=True)
    assert {"memory", "uniform"} <= {row.id for row in record.metrics.rows}
    memory = memtool.load(collected.config.store)
    attached = memory.attach()
    found = attached(images)
    snapshot = collected.read()
    _, weights = snapshot.consolidated()[1].with_coefficients(images)
    torch.testing.assert_close(found.weights, weights.mean(1), atol=1e-5, rtol=1e-4)
    result = collected.retrieve(task="3", out=tmp_path / "mixture")
    assert result.out == tmp_path / "mixture"
    again = peft.PeftModel.from_pretrained(build_nano(), str(tmp_path / "mixture"))
    assert again.peft_config["default"].r >= 5


def test_forgotten_and_merged(collected: Mira, folders: list[Path], tmp_path: Path) -> None:
    other = small_config(tmp_path / "other")
    learn(Mira.open(other, seed=0), tasks=1)
    result = merge(other.store, collected.config.store, ["inverted"])
    assert [one.name for one in result.added] == ["inverted"]
    digest = hashlib.sha256((folders[1] / FILES[0]).read_bytes()).hexdigest()
    assert MemoryStore.open(other.store).view().get("inverted").meta["file_sha256"] == digest
    joined = Mira.open(other, seed=0)
    joined.consolidate()
    assert joined.read().consolidated()[1].values.layout.rank >= 5


def test_what_cannot_take_them_says_so(folders: list[Path], tmp_path: Path) -> None:
    config = small_config(tmp_path / "mine", method="modulation", stream__setting="til")
    with pytest.raises(MismatchError, match="rank") as found:
        Modulation.open(config, seed=0).write(folders[:1])
    assert "--method mira" in str(found.value.remedy)
    config = small_config(tmp_path / "learned", adapter__warm_start="previous")
    mira = Mira.open(config, seed=0)
    mira.write(folders[:1])
    with pytest.raises(ConfigError, match=re.escape("adapter.warm_start previous from 'upright'")):
        mira.adapt("2")


def test_values_that_are_files_do_not_learn_on(folders: list[Path], tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "mine",
        consolidate__value_lr=1e-3,
        consolidate__epochs=1,
        head__features="recalled",
    )
    mira = Mira.open(config, seed=0)
    mira.write(folders)
    with pytest.raises(ConfigError, match="kept as the file") as found:
        mira.consolidate()
    assert found.value.remedy == "--set consolidate.value_lr=0"
