"""LoRA of convolutions in PEFT's files: lossless both ways, and what the real peft computes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memtool.adapters import mixing
from memtool.adapters.layout import Layout
from memtool.adapters.mixing import Mix, Mixture
from memtool.adapters.peft_files import (
    WEIGHTS_NAME,
    parse_peft,
    read_peft,
    restore_peft,
    write_peft,
)
from memtool.adapters.picks import Picks
from memtool.adapters.recalls import every, given_for_each
from memtool.adapters.stock import OneAdapter, mixed, united
from memtool.adapters.values import AdapterValues
from memtool.backbones.as_written import AsWritten
from memtool.backbones.survey import Reading
from memtool.errors import CorruptError, MismatchError

ALPHA = 6.0


class Small(nn.Module):
    """Two blocks of what a ConvNet is made of: k x k, strides, 1 x 1, groups, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Part(3), Part(8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3))


class Part(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.flat = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2)
        self.point = nn.Conv2d(8, 12, 1, bias=False)
        self.fc = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.flat(torch.tanh(self.wide(x))))
        return self.fc(torch.tanh(x).movedim(1, -1)).movedim(-1, 1)


def small() -> Small:
    torch.manual_seed(0)
    return Small().double().eval()


def read(model: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = model(pixels)
    return features


def wrapped() -> AsWritten:
    half = [0.5] * 3
    return AsWritten(small(), "small", Reading(read), image_size=16, mean=half, std=half)


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=generator)


def value(layout: Layout) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(layout.numel, dtype=torch.float64, generator=generator)


def under(backbone: AsWritten, one: OneAdapter) -> Tensor:
    values = AdapterValues.from_flat(one.value[None], one.layout, one.scaling)
    return backbone.features(pixels(), every(values))


def under_peft(folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers in groups cannot be merged
        model = peft.PeftModel.from_pretrained(small(), str(folder)).eval()
    # peft makes its layers in float32.
    for name, tensor in load_file(folder / WEIGHTS_NAME).items():
        place = name.removesuffix(".weight") + ".default.weight"
        model.get_parameter(place).data = tensor.double()
    found: Tensor = model(pixels())
    return found


@pytest.mark.parametrize("targets", [("wide", "flat", "point", "fc"), ("flat",), ("wide", "fc")])
def test_what_is_written_peft_computes_alike_and_comes_back_whole(
    targets: tuple[str, ...], tmp_path: Path
) -> None:
    backbone = wrapped()
    assert backbone.targets == ("wide", "flat", "point", "fc")
    layout = Layout(backbone.sites(targets), 4)
    flat = value(layout)
    folder = write_peft(tmp_path / "one", flat, layout, alpha=ALPHA, base_model="small")
    own = under(backbone, OneAdapter(layout, flat, ALPHA / 4))
    torch.testing.assert_close(under_peft(folder), own, rtol=1e-12, atol=1e-12)
    assert (own - backbone.features(pixels())).abs().max() > 1e-3
    back = read_peft(folder, backbone.all_sites)
    assert (back.layout, back.scaling) == (layout, ALPHA / 4)
    assert torch.equal(back.value, flat)
    again = restore_peft(tmp_path / "again", back)
    assert (again / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("mix", ["delta", "params"])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kernel", ["dense", "mixed", "gathered", "blended"])
def test_few_adapters_of_each_image_are_the_dense_mixture(
    mix: Mix, told: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = wrapped()
    layout = Layout(backbone.all_sites, 4)
    flat = torch.stack([value(layout) * factor for factor in (1.0, -0.5, 0.3, 2.0, 0.7)])
    values = AdapterValues.from_flat(flat, layout, 0.5)
    index = torch.tensor([[4, 1], [1, 0], [4, 0]])
    weights = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.5, -0.2]], dtype=torch.float64)
    dense = torch.zeros(3, 5, dtype=torch.float64).scatter(1, index, weights)
    wanted = backbone.features(pixels(), given_for_each(values, dense.unsqueeze(1), mix))
    costs = mixing.Costs(*(float(name != kernel) for name in mixing.Costs._fields))
    monkeypatch.setattr(mixing, "costs", lambda *_: costs)
    picks = Picks(index, index.unique() if told else None)

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        del hidden
        here = values.block(block)
        return None if here is None else Mixture.weighted(here, weights, mix, picks)

    found = backbone.features(pixels(), recall)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_shapes_are_those_of_peft(tmp_path: Path) -> None:
    layout = Layout(wrapped().all_sites, 4)
    folder = write_peft(tmp_path, value(layout), layout, alpha=ALPHA, base_model="small")
    shapes = {name: tuple(t.shape) for name, t in load_file(folder / WEIGHTS_NAME).items()}
    start = "base_model.model.blocks.0."
    assert shapes[f"{start}wide.lora_A.weight"] == (4, 3, 3, 3)
    assert shapes[f"{start}flat.lora_A.weight"] == (4, 8, 1, 3)
    assert shapes[f"{start}flat.lora_B.weight"] == (8, 2, 1, 1)
    assert shapes[f"{start}point.lora_B.weight"] == (12, 4, 1, 1)


def test_what_peft_trained_with_unlike_ranks_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["wide", "flat", "point"],
        rank_pattern={"flat": 2, "point": 3},
        alpha_pattern={"flat": 4, "point": 6},
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(small().float(), config)
    model.save_pretrained(str(tmp_path))
    backbone = wrapped()
    adapter = read_peft(tmp_path, backbone.all_sites)
    assert adapter.layout.rank == 4
    values = OneAdapter(adapter.layout, adapter.value.double(), adapter.scaling)
    torch.testing.assert_close(under(backbone, values), under_peft(tmp_path), rtol=1e-9, atol=1e-9)
    again = restore_peft(tmp_path / "again", adapter)
    assert (again / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()


def test_adapters_of_unlike_ranks_are_stacked_and_summed_exactly() -> None:
    backbone = wrapped()
    layouts = [Layout(backbone.all_sites, 2), Layout(backbone.sites(("flat", "fc")), 6)]
    stock = [OneAdapter(layout, value(layout) / 3, 0.5) for layout in layouts]
    values = united(stock, backbone.all_sites)
    weights = torch.tensor([0.7, -0.4], dtype=torch.float64)
    for number, one in enumerate(stock):
        hot = torch.eye(2, dtype=torch.float64)[number]
        alone = under(backbone, one)
        torch.testing.assert_close(under(backbone, mixed(values, hot)), alone)
    both = mixed(values, weights)
    layer = {site.module: site for site in both.layout.sites}["blocks.1.flat"]
    tensors = both.layout.unflatten(both.value)
    blocks = tensors[f"{layer.name}.lora_B"].chunk(layer.groups)
    found = torch.block_diag(*blocks) @ tensors[f"{layer.name}.lora_A"]
    due = torch.zeros_like(found)
    for weight, one in zip(weights, stock, strict=True):
        parts = one.layout.unflatten(one.value)
        blocks = parts[f"{layer.name}.lora_B"].chunk(layer.groups)
        due += 0.5 * weight * torch.block_diag(*blocks) @ parts[f"{layer.name}.lora_A"]
    torch.testing.assert_close(found, due)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    backbone = wrapped()
    with pytest.raises(MismatchError, match=r"flat is a convolution of 2 groups, and the rank"):
        Layout(backbone.all_sites, 3).segments  # noqa: B018
    flat = {site.module: site for site in backbone.all_sites}["blocks.0.flat"]
    several = [replace(flat, groups=groups, out_features=12) for groups in (1, 2, 4, 6)]
    with pytest.raises(MismatchError, match="2 groups, and the rank is 3") as refused:
        Layout(tuple(several), 3).segments  # noqa: B018
    assert refused.value.expected == "a multiple of 12, as PEFT has it"
    assert str(refused.value.remedy).startswith("--set adapter.rank=12, or backbone.targets")
    assert Layout(tuple(several), 12).segments
    narrow = [replace(one, out_features=4) for one in several]
    with pytest.raises(MismatchError) as refused:
        Layout(tuple(narrow), 3).segments  # noqa: B018
    assert refused.value.remedy == "backbone.targets without this layer"
    layout = Layout(backbone.sites(("point",)), 4)
    folder = write_peft(tmp_path, value(layout), layout, alpha=ALPHA, base_model="small")
    other = copy.deepcopy(small())
    for block in other.blocks:
        block.point = nn.Conv2d(8, 12, 3, padding=1).double()
    half = [0.5] * 3
    wide = AsWritten(other, "other", Reading(read), image_size=16, mean=half, std=half)
    with pytest.raises(MismatchError, match=r"lora_A of blocks.\d.point .*\n.*\(rank, 8, 3, 3\)"):
        read_peft(folder, wide.all_sites)
    data = (folder / WEIGHTS_NAME).read_bytes().replace(b"[12,4,1,1]", b"[12,4,1,2]")
    config = (folder / "adapter_config.json").read_bytes()
    with pytest.raises(CorruptError):
        parse_peft(data, config, backbone.all_sites, "here")
