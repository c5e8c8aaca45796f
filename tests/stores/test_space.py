"""Spaces: JSON round trip, files, and every difference by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from memtool_stores import Backbone, Layout, SchemaError, Segment, Space, SpaceMismatchError
from memtool_stores.testing import small_space


def test_json_round_trip() -> None:
    space = small_space("bfloat16")
    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space


def test_check_names_every_difference() -> None:
    space = small_space()
    other = replace(
        space,
        backbone=replace(space.backbone, sha256="00"),
        layout=replace(space.layout, alpha=1.0, segments=(Segment("other", (22,), 0),)),
    )
    space.check(space)
    with pytest.raises(SpaceMismatchError) as caught:
        space.check(other)
    for word in ("backbone sha256", "alpha", "lora_A", "lora_B", "'other'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int8"}, {"segments": ()}, {"segments": (Segment("a", (2,), 1),)}],
)
def test_impossible_layouts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        replace(small_space().layout, **change)


def test_from_safetensors_takes_the_order_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    rank = 3
    tensors = {
        "m.lora_B.weight": np.zeros((6, rank), np.float32),
        "m.lora_A.weight": np.ones((rank, 4), np.float32),
    }
    save_file(tensors, path)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6, "target_modules": ["v", "q"]}')
    backbone = Backbone("b", "r", "00")
    space = Space.from_safetensors(path, backbone=backbone)
    layout = space.layout
    assert isinstance(layout, Layout)
    assert (layout.rank, layout.alpha, layout.targets) == (3, 6.0, ("q", "v"))
    assert space.numel == 30
    assert [s.offset for s in layout.segments] == [0, layout.segments[0].numel]


def test_from_safetensors_refuses_what_it_cannot_know(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({"lora_A": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(SchemaError, match="alpha"):
        Space.from_safetensors(path, backbone=Backbone("b", "r", "00"))
    path.write_bytes(b"no tensors here")
    with pytest.raises(SchemaError, match="not a safetensors file"):
        Space.from_safetensors(path, backbone=Backbone("b", "r", "00"), alpha=1)
