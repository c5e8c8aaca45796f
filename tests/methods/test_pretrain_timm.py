"""A model of timm that learns from nothing, and is a backbone afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memtool.backbones import create_backbone
from memtool.experiments.pretrain_timm import main
from memtool.settings import BackboneSettings


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_a_model_learns_the_classes_and_is_a_backbone(model, chain, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    asked = f"--model {model} --source {chain} --image-size 32 --steps 40 --batch-size 18"
    assert main([*asked.split(), "--lr", "3e-3", "--out", str(out)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["accuracy"].keys() == {"warm", "cold"}
    assert sum(made["accuracy"].values()) / 2 > 2 * made["chance"]
    named = BackboneSettings(name=f"timm:{model}", weights=Path(out), image_size=32)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    backbone = create_backbone(named)
    assert backbone.features(backbone.preprocess(images)).isfinite().all()
    # A second time it would write over what is there.
    assert main([*asked.split(), "--out", str(out)]) == 4
    assert "remove it" in capsys.readouterr().err
