"""PEFT directories: lossless both ways, and the same outputs in the real peft."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from memtool.adapters.layout import Layout, Site
from memtool.adapters.peft_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    PeftAdapter,
    read_peft,
    restore_peft,
    write_peft,
)
from memtool.errors import (
    AlreadyExistsError,
    CorruptError,
    DataError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)

DIM, DEPTH, HIDDEN = 16, 2, 32


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=2, mlp_ratio=2
    )
    return model.eval().double()


def sites(targets: Sequence[str] = ("q", "k", "v", "proj", "fc1", "fc2")) -> tuple[Site, ...]:
    """The sites of `vit`, as its backbone offers them."""
    found: list[Site] = []
    for block in range(DEPTH):
        attention, mlp = f"blocks.{block}.attn", f"blocks.{block}.mlp"
        every = {
            part: Site(block, f"{attention}.qkv", part, DIM, DIM, place * DIM, 3 * DIM)
            for place, part in enumerate("qkv")
        } | {
            "proj": Site(block, f"{attention}.proj", "", DIM, DIM, 0, DIM),
            "fc1": Site(block, f"{mlp}.fc1", "", DIM, HIDDEN, 0, HIDDEN),
            "fc2": Site(block, f"{mlp}.fc2", "", HIDDEN, DIM, 0, DIM),
        }
        found += [site for name, site in every.items() if name in targets]
    return tuple(found)


def random_value(layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(
    folder: Path, targets: Sequence[str], rank: int = 2, alpha: float = 3.0
) -> tuple[Tensor, Layout]:
    layout = Layout(sites(targets), rank)
    value = random_value(layout)
    write_peft(folder, value, layout, alpha=alpha, base_model="vit")
    return value, layout


def merged(value: Tensor, layout: Layout, scaling: float) -> VisionTransformer:
    """The model with scaling · B A added to the rows of every site: the slow oracle."""
    model = vit()
    parts = layout.unflatten(value.double())
    for site in layout.sites:
        linear = model.get_submodule(site.module)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight[site.first_row : site.first_row + site.out_features] += (
                scaling * parts[f"{site.name}.lora_B"] @ parts[f"{site.name}.lora_A"]
            )
    return model


def by_peft(folder: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(vit(), str(folder))
    return model.double().eval()


def trained_by_peft(folder: Path, **config: Any) -> nn.Module:
    """A directory saved by peft, after its B has moved away from zero."""
    model = peft.get_peft_model(vit().float(), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    result: nn.Module = model.double().eval()
    return result


def images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)


def same_function(one: nn.Module, two: nn.Module) -> None:
    """Both compute the same, and something else than the frozen model."""
    with torch.no_grad():
        torch.testing.assert_close(one(images()), two(images()), atol=1e-9, rtol=1e-9)
        assert not torch.allclose(one(images()), vit()(images()), atol=1e-3)


TARGETS = [("q", "v"), ("v",), ("q", "k", "v"), ("k",), ("q", "v", "proj"), ("fc1", "fc2")]


# Ours → peft


@pytest.mark.parametrize("targets", [*TARGETS, ("q", "v", "proj", "fc1", "fc2")])
def test_peft_computes_what_the_merged_weights_compute(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    value, layout = written(tmp_path / "a", targets)
    same_function(by_peft(tmp_path / "a"), merged(value, layout, 3.0 / 2))


@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "fc1")])
def test_what_peft_saves_again_comes_back_bit_for_bit(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    value, layout = written(tmp_path / "a", targets, alpha=0.1)
    model = peft.PeftModel.from_pretrained(vit().float(), str(tmp_path / "a"))
    # Without this option peft would ask the hub about the base model's vocabulary.
    model.save_pretrained(str(tmp_path / "b"), save_embedding_layers=False)
    again = read_peft(tmp_path / "b", sites())
    assert again.layout == layout
    assert torch.equal(again.value, value)
    assert again.alpha == pytest.approx(0.1)


@settings(deadline=None, max_examples=40)
@given(
    targets=st.lists(
        st.sampled_from(["q", "k", "v", "proj", "fc1", "fc2"]), min_size=1, unique=True
    ),
    rank=st.integers(1, 4),
    alpha=st.floats(0.01, 100),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    zeros=st.sampled_from(["none", "B", "all"]),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_bit_exact(
    tmp_path_factory: pytest.TempPathFactory,
    targets: list[str],
    rank: int,
    alpha: float,
    dtype: torch.dtype,
    zeros: str,
    shuffled: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    chosen = sites(targets)
    layout = Layout(tuple(reversed(chosen)) if shuffled else chosen, rank)
    value = random_value(layout, seed, dtype)
    if zeros == "B":
        for name, part in layout.unflatten(value).items():
            if name.endswith("lora_B"):
                part.zero_()
    elif zeros == "all":
        value.zero_()
    extra = {"task": 3, "name": "photo · café"}
    write_peft(folder / "a", value, layout, alpha=alpha, base_model="vit", extra=extra)
    adapter = read_peft(folder / "a", sites())
    assert adapter.layout == layout
    assert adapter.value.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(
        adapter.value.view(torch.uint8), value.to(adapter.value.dtype).view(torch.uint8)
    )
    assert adapter.scaling == alpha / rank
    assert adapter.alpha == pytest.approx(alpha)
    assert (adapter.base_model, adapter.extra) == ("vit", extra)
    restore_peft(folder / "b", adapter)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (folder / "b" / name).read_bytes() == (folder / "a" / name).read_bytes()


def test_a_fused_layer_becomes_one_module_of_stacked_blocks(tmp_path: Path) -> None:
    value, layout = written(tmp_path, ("q", "v"), rank=2, alpha=3.0)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    parts = layout.unflatten(value)
    a = tensors["base_model.model.blocks.1.attn.qkv.lora_A.weight"]
    b = tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    assert len(tensors) == 2 * DEPTH
    assert torch.equal(a[:2], parts["blocks.1.attn.qkv[q].lora_A"])
    assert torch.equal(a[2:], parts["blocks.1.attn.qkv[v].lora_A"])
    assert torch.equal(b[:DIM, :2], parts["blocks.1.attn.qkv[q].lora_B"])
    assert torch.equal(b[2 * DIM :, 2:], parts["blocks.1.attn.qkv[v].lora_B"])
    assert float(b.abs().sum()) == pytest.approx(
        float(sum(parts[f"blocks.1.attn.qkv[{s}].lora_B"].abs().sum() for s in "qv"))
    )
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 6, {})


# peft → ours


CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["qkv"]},
    {"r": 3, "lora_alpha": 5, "target_modules": ["qkv", "attn.proj", "fc1", "fc2"]},
    {"r": 4, "lora_alpha": 2, "target_modules": ["fc1"], "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "target_modules": r".*blocks\.1.*(qkv|fc2)"},
    {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["qkv", "fc1"],
        "rank_pattern": {"fc1": 2},
        "alpha_pattern": {"fc1": 4},
    },
]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_of_peft_is_read_exactly(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = trained_by_peft(tmp_path / "a", **config)
    adapter = read_peft(tmp_path / "a", sites())
    same_function(theirs, merged(adapter.value, adapter.layout, adapter.scaling))
    assert {site.slice for site in adapter.layout.sites} == {""}
    restore_peft(tmp_path / "b", adapter)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    # Written as one of ours, it is still the same function to peft.
    write_peft(tmp_path / "c", adapter.value, adapter.layout, alpha=adapter.alpha, base_model="vit")
    same_function(theirs, by_peft(tmp_path / "c"))
    assert torch.equal(read_peft(tmp_path / "c", sites()).value, adapter.value)


@pytest.mark.parametrize(
    "pattern",
    [
        {"alpha_pattern": {"fc1": 3}},
        {"rank_pattern": {"fc1": 2, r"blocks\.0\.mlp\.fc2": 3}},
        {"rank_pattern": {"^blocks.1.mlp.fc1": 1}, "use_rslora": True},
    ],
)
def test_differing_scalings_are_folded_into_b(tmp_path: Path, pattern: dict[str, Any]) -> None:
    theirs = trained_by_peft(
        tmp_path / "a",
        r=4,
        lora_alpha=8,
        target_modules=["qkv", "fc1", "fc2", "attn.proj"],
        **pattern,
    )
    adapter = read_peft(tmp_path / "a", sites())
    ours = merged(adapter.value, adapter.layout, adapter.scaling)
    with torch.no_grad():  # the fold rounds in float32
        torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=1e-5)
    assert adapter.scaling == (4.0 if "use_rslora" in pattern else 2.0)
    assert adapter.layout.rank == 4
    restore_peft(tmp_path / "b", adapter)
    before = load_file(tmp_path / "a" / WEIGHTS_NAME)
    after = load_file(tmp_path / "b" / WEIGHTS_NAME)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_blocks_made_by_others_are_found(tmp_path: Path) -> None:
    trained_by_peft(tmp_path, r=6, lora_alpha=6, target_modules=["qkv"])
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor[:DIM, 3:] = 0  # q owns the first three ranks
            tensor[DIM : 2 * DIM] = 0  # k has none
            tensor[2 * DIM :, :3] = 0  # v owns the rest
    save_file(tensors, tmp_path / WEIGHTS_NAME, {"format": "pt"})
    adapter = read_peft(tmp_path, sites())
    assert [site.name for site in adapter.layout.sites[:2]] == [
        "blocks.0.attn.qkv[q]",
        "blocks.0.attn.qkv[v]",
    ]
    assert (adapter.layout.rank, adapter.scaling) == (3, 1.0)
    same_function(merged(adapter.value, adapter.layout, 1.0), by_peft(tmp_path))
    restore_peft(tmp_path / "b", adapter)
    assert (tmp_path / "b" / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()


def test_a_backbone_without_that_slice_still_reads_the_whole_layer(tmp_path: Path) -> None:
    value, layout = written(tmp_path / "a", ("q", "k"))
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)  # without our note
    adapter = read_peft(tmp_path / "a", sites(("q", "v")))
    assert {site.slice for site in adapter.layout.sites} == {""}
    same_function(
        merged(adapter.value, adapter.layout, adapter.scaling), merged(value, layout, 3.0 / 2)
    )


def test_a_negative_zero_outside_the_blocks_is_kept(tmp_path: Path) -> None:
    written(tmp_path / "a", ("q", "v"))
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"][DIM, 0] = -0.0
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    restore_peft(tmp_path / "b", read_peft(tmp_path / "a", sites()))
    assert (tmp_path / "b" / WEIGHTS_NAME).read_bytes() == (
        tmp_path / "a" / WEIGHTS_NAME
    ).read_bytes()


def test_an_untrained_adapter_of_peft_is_read(tmp_path: Path) -> None:
    model = peft.get_peft_model(vit().float(), peft.LoraConfig(r=4, target_modules=["qkv"]))
    model.save_pretrained(str(tmp_path))
    adapter = read_peft(tmp_path, sites())
    assert [site.name for site in adapter.layout.sites] == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
    ]


def test_names_that_end_in_another_name_keep_their_rank_apart(tmp_path: Path) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.text = nn.ModuleDict({"fc": nn.Linear(4, 4), "fused": nn.Linear(4, 8)})
            self.visual = nn.ModuleDict({"text": nn.ModuleDict({"fused": nn.Linear(4, 8)})})
            for parameter in self.parameters():
                nn.init.normal_(parameter, generator=generator)

        def forward(self, x: Tensor) -> Tensor:
            text, visual = self.text, self.visual["text"]
            assert isinstance(visual, nn.ModuleDict)
            result: Tensor = text["fused"](text["fc"](x)) + visual["fused"](x)
            return result

    layout = Layout(
        (
            Site(0, "text.fc", "", 4, 4, 0, 4),
            Site(0, "text.fused", "q", 4, 4, 0, 8),
            Site(0, "text.fused", "k", 4, 4, 4, 8),
            Site(0, "visual.text.fused", "q", 4, 4, 0, 8),
        ),
        2,
    )
    value = random_value(layout)
    write_peft(tmp_path, value, layout, alpha=2.0, base_model="towers")
    assert torch.equal(read_peft(tmp_path, layout.sites).value, value)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    expected = Towers()
    parts = layout.unflatten(value)
    with torch.no_grad():
        for site in layout.sites:
            linear = expected.get_submodule(site.module)
            assert isinstance(linear, nn.Linear)
            linear.weight[site.first_row : site.first_row + site.out_features] += (
                parts[f"{site.name}.lora_B"] @ parts[f"{site.name}.lora_A"]
            )
        result = peft.PeftModel.from_pretrained(Towers(), str(tmp_path))(x)
        torch.testing.assert_close(result, expected(x), atol=1e-5, rtol=1e-5)


# What cannot be represented


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_more_than_a_plain_lora_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    trained_by_peft(tmp_path, r=2, target_modules=["fc1"], **config)
    with pytest.raises(MismatchError, match=said):
        read_peft(tmp_path, sites())


def test_a_convolution_that_no_block_has_is_refused(tmp_path: Path) -> None:
    trained_by_peft(tmp_path, r=2, target_modules=["patch_embed.proj"])
    with pytest.raises(MismatchError, match="has no such layer to adapt"):
        read_peft(tmp_path, sites())


def test_other_methods_of_peft_are_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        vit().float(), peft.IA3Config(target_modules=["fc1"], feedforward_modules=[])
    )
    model.save_pretrained(str(tmp_path))
    with pytest.raises(MismatchError, match="type 'IA3'"):
        read_peft(tmp_path, sites())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"init_lora_weights": "pissa"}, MismatchError, "'pissa' changes the weights"),
        ({"lora_bias": True}, MismatchError, "lora_bias is True"),
        ({"some_new_idea": {"k": 1}}, MismatchError, "some_new_idea is {'k': 1}"),
        ({"lora_alpha": 0}, MismatchError, "lora_alpha is 0"),
        ({"lora_alpha": None}, CorruptError, "lora_alpha is None"),
        ({"r": 5}, CorruptError, "rank 5"),
        ({"alpha_pattern": {"(": 3}}, CorruptError, "no regular expression"),
        ({"rank_pattern": [1]}, CorruptError, "rank_pattern"),
    ],
)
def test_configurations_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, Any], error: type[MemtoolError], said: str
) -> None:
    written(tmp_path, ("q", "v"))
    change_config(tmp_path, **changes)
    with pytest.raises(error, match=re.escape(said)) as caught:
        read_peft(tmp_path, sites())
    assert CONFIG_NAME in str(caught.value)


A_NAME = "base_model.model.blocks.0.mlp.fc1.lora_A.weight"


def no_b(tensors: dict[str, Tensor]) -> None:
    del tensors[A_NAME.replace("lora_A", "lora_B")]


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[A_NAME][0, 0] = torch.nan


def other_name(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.norm.weight"] = torch.ones(3)


def other_layer(tensors: dict[str, Tensor]) -> None:
    for part in "AB":
        name = A_NAME.replace("lora_A", f"lora_{part}")
        tensors[name.replace("fc1", "fc3")] = tensors.pop(name)


def other_width(tensors: dict[str, Tensor]) -> None:
    tensors[A_NAME] = torch.zeros(2, 7)


def integers(tensors: dict[str, Tensor]) -> None:
    tensors[A_NAME] = torch.zeros(2, DIM, dtype=torch.int32)


def nothing(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (no_b, CorruptError, "has lora_A only"),
        (not_finite, DataError, "not finite"),
        (other_name, MismatchError, "norm.weight"),
        (other_layer, MismatchError, "layers such as blocks.0.attn.proj"),
        (other_width, MismatchError, "(rank, 16) on this backbone"),
        (integers, MismatchError, "int32"),
        (nothing, CorruptError, "no tensors"),
    ],
)
def test_tensors_that_cannot_be_used(
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    error: type[MemtoolError],
    said: str,
) -> None:
    written(tmp_path, ("fc1",))
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(error) as caught:
        read_peft(tmp_path, sites())
    assert said in str(caught.value)
    assert WEIGHTS_NAME in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=CONFIG_NAME):
        read_peft(tmp_path / "nowhere", sites())
    written(tmp_path, ("q", "v"))
    weights, config = tmp_path / WEIGHTS_NAME, tmp_path / CONFIG_NAME
    good, settled = weights.read_bytes(), config.read_bytes()
    for bad in (b"", good[:7], good[: len(good) // 2], good[:-1], good + b"x", b"\xff" * 64):
        weights.write_bytes(bad)
        with pytest.raises(CorruptError, match=WEIGHTS_NAME):
            read_peft(tmp_path, sites())
    weights.unlink()
    with pytest.raises(NotFoundError, match=WEIGHTS_NAME):
        read_peft(tmp_path, sites())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(NotFoundError, match="safe_serialization"):
        read_peft(tmp_path, sites())
    weights.write_bytes(good)
    for bad in (b"", b"{", b"[1]", b"\xff\xfe"):
        config.write_bytes(bad)
        with pytest.raises(CorruptError, match=CONFIG_NAME):
            read_peft(tmp_path, sites())
    config.write_bytes(settled)
    read_peft(tmp_path, sites())


def test_tensors_that_contradict_our_note_are_corrupt(tmp_path: Path) -> None:
    from safetensors import safe_open

    written(tmp_path, ("q", "v"))
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    outside = copy.deepcopy(tensors)
    outside["base_model.model.blocks.0.attn.qkv.lora_B.weight"][DIM, 0] = 1.0
    save_file(outside, tmp_path / WEIGHTS_NAME, metadata)
    with pytest.raises(CorruptError, match="not zero outside its slices"):
        read_peft(tmp_path, sites())
    fewer = {name: tensor for name, tensor in tensors.items() if "blocks.0" in name}
    save_file(fewer, tmp_path / WEIGHTS_NAME, metadata)
    with pytest.raises(CorruptError, match="not what the metadata says"):
        read_peft(tmp_path, sites())
    for text in ("{", "{}", "[]", '{"sites": 3, "rank": 1, "alpha": 1, "extra": {}}'):
        save_file(tensors, tmp_path / WEIGHTS_NAME, {"memtool": text})
        with pytest.raises(CorruptError, match="the memtool metadata"):
            read_peft(tmp_path, sites())


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    value, layout = written(tmp_path, ("q", "v"))
    before = (tmp_path / WEIGHTS_NAME).read_bytes()
    with pytest.raises(AlreadyExistsError, match=WEIGHTS_NAME):
        write_peft(tmp_path, 2 * value, layout, alpha=3.0, base_model="vit")
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == before
    write_peft(tmp_path, 2 * value, layout, alpha=3.0, base_model="vit", overwrite=True)
    assert torch.equal(read_peft(tmp_path, sites()).value, 2 * value)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME}


def test_values_that_cannot_be_written_leave_no_file(tmp_path: Path) -> None:
    layout = Layout(sites(("q", "v")), 2)
    value = random_value(layout)

    def write(value: Tensor, layout: Layout = layout, alpha: float = 1.0) -> None:
        write_peft(tmp_path / "a", value, layout, alpha=alpha, base_model="vit")

    with pytest.raises(DataError, match="not finite"):
        write(torch.full_like(value, torch.inf))
    with pytest.raises(MismatchError, match="numbers for this layout"):
        write(value[:-1])
    with pytest.raises(MismatchError, match="one flat vector"):
        write(value[None])
    with pytest.raises(MismatchError, match="alpha of 0"):
        write(value, alpha=0.0)
    whole = Site(0, "blocks.0.attn.qkv", "", DIM, 3 * DIM, 0, 3 * DIM)
    overlapping = Layout((whole, layout.sites[0]), 2)
    with pytest.raises(MismatchError, match="same rows"):
        write(random_value(overlapping), overlapping)
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").write_text("a file where the folder should be")
    with pytest.raises(MemtoolError, match="cannot write"):
        write(value)


def test_restoring_with_another_header_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", ("q", "v"))
    written(tmp_path / "b", ("fc1",))
    one, two = read_peft(tmp_path / "a", sites()), read_peft(tmp_path / "b", sites())
    mixed = PeftAdapter(one.numbers, one.layout, one.scaling, two.header, one.sha256, one.config)
    with pytest.raises(MismatchError, match="a header of the same layout"):
        restore_peft(tmp_path / "c", mixed)
    assert not (tmp_path / "c").exists()
