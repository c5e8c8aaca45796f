"""What can be adapted is found by running a model, and what cannot is named with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from memtool.adapters.layout import Layout
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.backbones.as_written import AsWritten
from memtool.backbones.listing import described, names_of
from memtool.backbones.survey import Reading, surveyed
from memtool.errors import ConfigError, MismatchError, NotFoundError
from memtool.memories.rank1 import Rank1Memory


class Folding(nn.Module):
    """Two blocks that fold a map's rows into the batch, as windows, and multiply."""

    def __init__(self, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Folded(fold), Folded(fold)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3))


class Folded(nn.Module):
    def __init__(self, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fold = fold
        self.fc = nn.Linear(3, 3)
        self.table = nn.Linear(2, 3)
        self.hidden = nn.Linear(3, 3)
        self.wide = nn.Conv2d(3, 3, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, _ = x.shape
        bias = self.table(torch.ones(5, 2, dtype=x.dtype)).mean(dim=0)
        tokens = self.fc(self.fold(x.movedim(1, -1))) + bias
        tokens = nn.functional.linear(tokens, self.hidden.weight)
        if self.fold is stacked_last:
            tokens = tokens.unflatten(0, (height, batch)).transpose(0, 1).flatten(0, 1)
        return self.wide(tokens.unflatten(0, (batch, height)).movedim(-1, 1))


def sample_after_sample(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def stacked_last(x: Tensor) -> Tensor:
    """Windows before samples: row 0 of all images, then row 1."""
    return x.transpose(0, 1).flatten(0, 1)


def run(model: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = model(pixels)
    return features


def opened(model: nn.Module, reading: Reading | None = None, size: int = 8) -> AsWritten:
    half = [0.5] * 3
    return AsWritten(model, "m", reading or Reading(run), image_size=size, mean=half, std=half)


def test_layers_that_take_no_mixture_are_left_out_with_the_reason() -> None:
    found = surveyed(Folding(sample_after_sample), Reading(run), 8)
    assert [block.name for block in found.blocks] == ["blocks.0", "blocks.1"]
    assert found.targets == ("fc",)
    said = {name.rpartition(".")[2]: why for name, why in found.left_out.items()}
    assert said["table"] == "called with something that is of no image"
    assert said["hidden"].startswith("never called")
    assert "dilation" in said["wide"]


def test_windows_before_samples_are_noticed() -> None:
    found = surveyed(Folding(stacked_last), Reading(run), 8)
    assert found.layers == ()
    assert "not stacked image after image" in found.left_out["blocks.0.fc"]
    with pytest.raises(ConfigError, match=r"blocks.0.fc is called with windows that are not"):
        opened(Folding(stacked_last))


def test_quantised_layers_are_named_with_what_can_be_adapted() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
    for block in model.blocks:
        block[0] = Packed()

    def along(model: nn.Module, pixels: Tensor) -> Tensor:
        x = pixels.mean(dim=1)
        for block in model.blocks:  # type: ignore[union-attr]
            x = block(x)
        return x.mean(dim=1)

    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"Packed, which may be more(.|\n)*Linear and Conv2d"):
        opened(model, Reading(along))


class Packed(nn.Linear):
    """Weights in eight bits."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * 127).round() / 127)


def test_a_size_that_a_model_does_not_read_is_refused_with_its_own() -> None:
    model = timm.create_model("levit_128s", pretrained=False, num_classes=0)
    with pytest.raises(ConfigError, match=r"images of 64 pixels(.|\n)*backbone.image_size=224"):
        opened(model, Reading(run, made_for=224), 64)


def test_models_are_told_without_their_numbers_as_they_are_opened() -> None:
    (found,) = described(["timm:resnet18"])
    assert found.name == "timm:resnet18"
    assert found.targets == ("conv1", "conv2", "downsample")
    assert (found.blocks, found.widths, found.dim) == (8, (64, 128, 256, 512), 512)
    assert (found.parameters, found.image_size) == (11_176_512, 224)
    (refused,) = described(["timm:tnt_s_legacy_patch16_224"])
    assert refused.problem is not None
    assert refused.targets == ()


class Counting(nn.Module):
    """A model that looks at the numbers of its input."""

    def __init__(self, look: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return self.blocks(x.movedim(1, -1)).mean(dim=(1, 2))


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), Tensor.nonzero, Tensor.tolist])
def test_a_model_that_looks_at_numbers_is_not_told_without_them(
    look: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened(Counting(look)).targets == ("linear",)
    monkeypatch.setattr(timm, "create_model", lambda *given, **more: Counting(look))
    (found,) = described(["timm:resnet18"])
    assert found.problem == "not told without its weights: try it"


class Named(nn.Module):
    """Blocks and layers that go by several names, and run under the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Pair(), Pair())
        self.stages = nn.ModuleList([nn.Sequential(one) for one in self.blocks])
        self.blocks[1].own = self.blocks[0].own  # one layer of both blocks

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1).flatten(1, 2)
        for stage in self.stages:
            x = stage[0](x)
        return x.mean(dim=1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.own = nn.Linear(3, 3)
        self.layers = nn.ModuleList([self.fc])

    def forward(self, x: Tensor) -> Tensor:
        return self.own(torch.tanh(self.layers[0](x)))


@pytest.mark.parametrize("candidates", [(), ("blocks.0", "blocks.1"), ("stages.0.0", "stages.1.0")])
@torch.no_grad()
def test_what_has_several_names_is_adapted_under_all_of_them(candidates: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    plain = Named().double()
    backbone = opened(copy.deepcopy(plain), Reading(run, candidates))
    assert (backbone.depth, backbone.targets) == (2, ("fc", "own"))
    layout = Layout(backbone.sites(backbone.targets), 1)
    flat = torch.randn(1, layout.numel, dtype=torch.float64)
    values = AdapterValues.from_flat(flat, layout, torch.ones(1, dtype=torch.float64))
    added = layout.unflatten(flat[0])
    blocks = [copy.deepcopy(one) for one in plain.blocks]  # now without a layer in common
    for site in layout.sites:
        layer = getattr(blocks[site.block], site.module.rpartition(".")[2])
        layer.weight += added[f"{site.name}.lora_B"] @ added[f"{site.name}.lora_A"]
    given = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x = given.movedim(1, -1).flatten(1, 2)
    for block in blocks:
        x = block.own(torch.tanh(block.fc(x)))
    torch.testing.assert_close(backbone.features(given, every(values)), x.mean(dim=1))
    torch.testing.assert_close(backbone.features(given), plain(given))


def test_names_are_found_by_word_and_pattern() -> None:
    assert len(names_of(None)) > 1000
    assert names_of("timm:resnet18") == ["timm:resnet18"]
    assert {"timm:convnext_atto", "timm:convnext_pico"} <= {*names_of("convnext_*o")}
    with pytest.raises(NotFoundError, match=r"did you mean 'resnet"):
        names_of("resnet81")
    with pytest.raises(NotFoundError, match=r"no model 'zz\*'") as refused:
        names_of("zz*")
    assert names_of("resnet1*")  # the pattern of the remedy
    assert "memtool backbones 'resnet1*'" in (refused.value.remedy or "")


def test_where_no_target_is_so_called_those_are_named_that_take_any_rank() -> None:
    from memtool.backbones import create_backbone
    from memtool.settings import BackboneSettings

    backbone = create_backbone(BackboneSettings(name="timm:test_convnext", weights="random"))
    with pytest.raises(ConfigError, match="no target 'q'") as refused:
        backbone.sites(("q", "v"))
    assert refused.value.remedy is not None
    named = refused.value.remedy.removeprefix("--set backbone.targets=").split(",")
    assert Layout(backbone.sites(named), 3).numel > 0
    with pytest.raises(MismatchError, match="groups"):
        Layout(backbone.sites(backbone.targets), 3).segments  # noqa: B018


def test_atoms_at_a_convolution_and_ranks_in_no_groups_are_refused() -> None:
    from memtool.backbones import create_backbone
    from memtool.settings import BackboneSettings

    settings = BackboneSettings(name="timm:test_efficientnet", weights="random")
    backbone = create_backbone(settings)
    with pytest.raises(MismatchError, match=r"convolution of \d+ groups(.|\n)*without this"):
        Layout(backbone.sites(("conv_dw",)), 4).segments  # noqa: B018
    with pytest.raises(MismatchError, match=r"atoms at .*, which is a convolution"):
        Rank1Memory(backbone.sites(("conv_pw",)))
