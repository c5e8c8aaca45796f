"""The image tower of a CLIP alone, also from the hub's cache, and MIRA of its authors on it."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from memtool.backbones import create_backbone
from memtool.backbones.clip_image import ClipImageBackbone
from memtool.config import resolve
from memtool.errors import ConfigError, NotFoundError
from memtool.experiments import run as experiment
from memtool.methods.mira.about import ABOUT
from memtool.methods.mira.method import Mira
from memtool.settings import BackboneSettings
from tests.backbones.test_open_clip import CONFIGURATION, model, wrapped
from tests.methods.conftest import learn


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a repository of the hub has it."""
    folder = tmp_path_factory.mktemp("clip")
    about = {"model_cfg": CONFIGURATION, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    tensors = {name: one.clone() for name, one in model().state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def of_file(files: Path) -> BackboneSettings:
    name = f"open_clip_image:{files / 'open_clip_config.json'}"
    return BackboneSettings(name=name, weights=files / "open_clip_model.safetensors", image_size=32)


@torch.no_grad()
def test_it_is_the_image_tower_and_nothing_else(files):
    backbone = create_backbone(of_file(files))
    whole = wrapped(model())
    assert isinstance(backbone, ClipImageBackbone)
    assert (backbone.dim, backbone.depth, backbone.block_dim(0)) == (24, 3, 32)
    assert {site.block for site in backbone.all_sites} == {0, 1, 2}
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    pixels = backbone.preprocess(images)
    assert torch.equal(pixels, whole.preprocess(images))
    assert torch.allclose(backbone.features(pixels), whole.features(pixels), atol=1e-6)
    assert torch.allclose(backbone.hidden(pixels, 2), whole.hidden(pixels, 2), atol=1e-6)
    later = backbone.features_from(2, backbone.hidden(pixels, 2))
    assert torch.allclose(later, backbone.features(pixels), atol=1e-6)
    assert not [
        name for name, _ in backbone.named_parameters() if "text" in name or "token_" in name
    ]


def test_a_model_of_the_hub_is_found_in_its_cache(files, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shown = repository / "snapshots" / commit
    shown.mkdir(parents=True)
    for file in files.iterdir():
        (shown / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = BackboneSettings(name="open_clip_image:hf-hub:somebody/tiny", image_size=32)
    found, local = create_backbone(settings), create_backbone(of_file(files))
    assert (found.sha256, found.name) == (local.sha256, settings.name)
    missing = settings.model_copy(update={"name": "open_clip_image:hf-hub:somebody/other"})
    with pytest.raises(NotFoundError, match=r"open_clip_config\.json of somebody/other"):
        create_backbone(missing)


def small(files: Path, folder: Path, **more: object) -> dict[str, object]:
    """What makes a preset of the authors one of seconds, over the tiny tower."""
    given = of_file(files)
    return {
        "backbone.name": given.name,
        "backbone.weights": str(given.weights),
        "backbone.image_size": 32,
        "stream.source": "digits",
        "stream.train_per_task": 40,
        "stream.test_per_task": 20,
        "adapter.per_task": 2,
        "train.epochs": 1,
        "engine.device": "cpu",
        "engine.precision": "fp32",
        "store": str(folder / "memory"),
        "runs": str(folder / "runs"),
        **more,
    }


def test_the_authors_preset_runs_on_it(files, tmp_path):
    order = {"stream.order": ("upright", "inverted")}
    few = {"consolidate.first_epochs": 1, "consolidate.epochs": 2}
    values = small(files, tmp_path, **order, **few)
    config = resolve(preset="mira-dil-authors", overrides=values, environ={}, cwd=tmp_path).config
    mira = learn(Mira.open(config, seed=0), 2)
    _, memory, head = mira.snapshot().consolidated()
    assert memory.memory.keys().shape == (3, 4, 32)
    assert not head.bias.any()
    row = mira.evaluate(history=True).row("memory")
    assert {"floored", "coefficient_drift"} <= row.metrics.keys()
    assert "head" in mira.snapshot().past_queries().pasts
    shown = mira.explain(task="1")
    assert shown.same_for_every_input == (0,)
    assert shown.familiar


@pytest.mark.usefixtures("no_page")
def test_classes_in_turn_grow_the_head_of_the_authors_preset(files, tmp_path):
    values = small(files, tmp_path, **{"stream.splits": 2, "consolidate.epochs": 1})
    config = resolve(preset="mira-cil-authors", overrides=values, environ={}, cwd=tmp_path).config
    (record,) = experiment.run(config, baselines=False)
    _, memory, head = Mira.open(config, seed=0).snapshot().consolidated()
    assert head.weight.shape[-2:] == (10, 24)
    assert memory.memory.keys().shape == (3, 4, 32)
    row = record.row("memory")
    assert len(row.accuracy[-1]) == 2
    assert row.metrics["faa"] > 0.1  # better than chance, of ten classes that compete


@pytest.mark.usefixtures("no_page")
def test_sources_at_once_leave_the_keys_of_the_authors_preset_nearly_random(files, tmp_path):
    order = {"stream.order": ("rot0", "rot30", "rot60"), "stream.held_out": "rot60"}
    config = resolve(
        preset="mira-dg-authors",
        overrides=small(files, tmp_path, **order),
        environ={},
        cwd=tmp_path,
    ).config
    (record,) = experiment.run(config, baselines=False)
    _, memory, head = Mira.open(config, seed=0).snapshot().consolidated()
    assert memory.memory.keys().shape == (3, 4, 32)
    assert memory.memory.keys().abs().max() <= 1 + 1e-3  # uniform, and a thousandth of a rate
    assert head.weight.any()
    assert not head.bias.any()
    (accuracy,) = record.row("memory").accuracy[-1]  # of the domain that was held out
    assert 0 <= accuracy <= 1


def test_both_towers_are_refused_with_the_one_that_fits():
    config = resolve(preset="mira-dil", overrides={"backbone.name": "open_clip:ViT-B-16"}).config
    with pytest.raises(ConfigError) as refused:
        ABOUT.require(config)
    assert "backbone.name=open_clip_image:ViT-B-16" in refused.value.remedy
