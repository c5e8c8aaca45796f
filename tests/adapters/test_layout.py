"""The flat order of a value, its stacking for the device, and how an adapter begins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtool.adapters.layout import Layout, Site, sites_in_block_order
from memtool.adapters.lora import init_lora
from memtool.adapters.values import AdapterValues
from memtool.errors import MismatchError


def fused(block: int, width: int, *slices: str) -> list[Site]:
    rows = {"q": 0, "k": width, "v": 2 * width}
    name = f"blocks.{block}.attn.qkv"
    return [Site(block, name, s, width, width, rows[s], 3 * width) for s in slices]


def whole(block: int, name: str, width: int, rows: int) -> Site:
    return Site(block, f"blocks.{block}.{name}", "", width, rows, 0, rows)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    width = draw(st.integers(1, 6))
    sites: list[Site] = []
    for block in draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True)):
        chosen = draw(st.lists(st.sampled_from("qkv"), unique=True))
        sites += fused(block, width, *chosen)
        if not chosen or draw(st.booleans()):
            sites.append(whole(block, "mlp.fc1", width, draw(st.integers(1, 7))))
    return Layout(sites_in_block_order(sites), draw(st.integers(1, 4)))


def test_the_flat_order_is_a_then_b_of_every_site() -> None:
    layout = Layout((*fused(0, 3, "q", "v"), whole(1, "mlp.fc1", 3, 5)), rank=2)
    assert [(s.name, s.shape, s.offset) for s in layout.segments] == [
        ("blocks.0.attn.qkv[q].lora_A", (2, 3), 0),
        ("blocks.0.attn.qkv[q].lora_B", (3, 2), 6),
        ("blocks.0.attn.qkv[v].lora_A", (2, 3), 12),
        ("blocks.0.attn.qkv[v].lora_B", (3, 2), 18),
        ("blocks.1.mlp.fc1.lora_A", (2, 3), 24),
        ("blocks.1.mlp.fc1.lora_B", (5, 2), 30),
    ]
    assert layout.numel == 40
    assert layout.blocks == (0, 1)


@given(layout=layouts(), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_values_survive_every_change_of_form_bit_for_bit(
    layout: Layout, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(count, layout.numel, generator=generator)
    for one in flat:
        assert torch.equal(layout.flatten(layout.unflatten(one)), one)
    values = AdapterValues.from_flat(flat, layout, 2.0)
    assert torch.equal(values.flat(), flat)
    assert len(values) == count
    assert not values.flat().requires_grad


def test_special_numbers_keep_their_bits() -> None:
    layout = Layout((whole(0, "fc", 2, 2),), rank=1)
    flat = torch.tensor([[math.nan, -0.0, math.inf, 1e-45]])
    back = AdapterValues.from_flat(flat, layout, 1.0).flat()
    assert torch.equal(back.view(torch.int32), flat.view(torch.int32))


def test_values_are_a_copy_and_so_is_flat() -> None:
    layout = Layout((whole(0, "fc", 1, 1),), rank=1)
    flat = torch.ones(1, 2)
    values = AdapterValues.from_flat(flat, layout, 1.0)
    flat.zero_()
    values.flat().zero_()
    assert torch.equal(values.flat(), torch.ones(1, 2))


def test_a_block_holds_the_tensors_themselves() -> None:
    layout = Layout((*fused(2, 4, "v", "q"), whole(2, "mlp.fc1", 4, 7)), rank=3)
    flat = torch.randn(5, layout.numel, generator=torch.Generator().manual_seed(0))
    values = AdapterValues.from_flat(flat, layout, torch.arange(5.0), trainable=True)
    assert values.block(0) is None
    block = values.block(2)
    assert block is not None
    assert len(block) == 5
    qkv = block.modules["blocks.2.attn.qkv"]
    assert [site.slice for site in qkv.sites] == ["q", "v"]
    assert qkv.a.shape == (5, 2, 3, 4)
    named = layout.unflatten(flat)
    assert torch.equal(qkv.a[:, 1], named["blocks.2.attn.qkv[v].lora_A"])
    assert torch.equal(qkv.b[0].mT, named["blocks.2.attn.qkv[q].lora_B"])
    assert torch.equal(block.modules["blocks.2.mlp.fc1"].b[0].mT, named["blocks.2.mlp.fc1.lora_B"])
    assert all(tensor.is_contiguous() for m in block.modules.values() for tensor in (m.a, *m.b))
    parameters = {id(p) for p in values.parameters()}
    assert {id(t) for m in block.modules.values() for t in (m.a, *m.b)} == parameters
    assert all(p.requires_grad for p in values.parameters())


def test_a_state_dict_carries_values_and_scaling() -> None:
    layout = Layout((whole(0, "fc", 3, 2),), rank=2)
    generator = torch.Generator().manual_seed(0)
    one = AdapterValues.from_flat(torch.randn(2, layout.numel, generator=generator), layout, 0.5)
    other = AdapterValues.from_flat(torch.zeros(2, layout.numel), layout, 1.0)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.flat(), one.flat())
    assert torch.equal(other.scaling, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("shape", "scaling", "says"),
    [
        ((2, 9), 1.0, "shape (2, 9)"),
        ((10,), 1.0, "shape (10,)"),
        ((0, 10), 1.0, "at least one"),
        ((2, 10), torch.ones(3), "scaling of shape (3,)"),
    ],
)
def test_values_that_do_not_fit_are_refused(
    shape: tuple[int, ...], scaling: float | torch.Tensor, says: str
) -> None:
    layout = Layout((whole(0, "fc", 3, 2),), rank=2)
    with pytest.raises(MismatchError) as caught:
        AdapterValues.from_flat(torch.zeros(shape), layout, scaling)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "sites",
    [
        (Site(0, "m", "q", 4, 4, 0, 12), Site(0, "m", "k", 4, 4, 2, 12)),
        (Site(0, "m", "q", 4, 4, 10, 12),),
        (Site(0, "m", "q", 4, 4, 0, 12), Site(0, "m", "k", 5, 4, 4, 12)),
    ],
    ids=["overlap", "beyond the module", "two widths"],
)
def test_sites_that_cannot_be_slices_of_one_layer_are_refused(sites: tuple[Site, ...]) -> None:
    layout = Layout(sites, rank=1)
    with pytest.raises(MismatchError):
        AdapterValues.from_flat(torch.zeros(1, layout.numel), layout, 1.0)


def test_tensors_that_do_not_fit_the_layout_are_named() -> None:
    layout = Layout((whole(0, "fc", 3, 2),), rank=2)
    tensors = layout.unflatten(torch.zeros(layout.numel))
    with pytest.raises(MismatchError, match="lora_C"):
        layout.flatten({**tensors, "blocks.0.fc.lora_C": torch.zeros(1)})
    with pytest.raises(MismatchError, match="lora_B"):
        layout.flatten({**tensors, "blocks.0.fc.lora_B": torch.zeros(3, 2)})
    with pytest.raises(MismatchError, match="11 numbers"):
        layout.unflatten(torch.zeros(11))
    with pytest.raises(MismatchError, match="rank 0"):
        Layout(layout.sites, 0)
    with pytest.raises(MismatchError, match="without sites"):
        Layout((), 1)


def test_a_new_adapter_has_random_a_and_zero_b() -> None:
    layout = Layout((*fused(0, 256, "q", "v"), whole(1, "fc", 64, 32)), rank=16)
    values = init_lora(layout, 3, generator=torch.Generator().manual_seed(1))
    assert values.shape == (3, layout.numel)
    for name, tensor in layout.unflatten(values).items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            variance = tensor.var().item() * tensor.shape[-1]
            assert variance == pytest.approx(1.0, rel=0.1)
            assert tensor.mean().abs().item() < 0.1 / math.sqrt(tensor.shape[-1])


def test_new_adapters_follow_from_the_seed_alone() -> None:
    layout = Layout((whole(0, "fc", 8, 4),), rank=2)

    def draw(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return init_lora(layout, count, generator=torch.Generator().manual_seed(7), dtype=dtype)

    assert torch.equal(draw(5)[:2], draw(2))
    assert torch.equal(draw(2, torch.bfloat16), draw(2).bfloat16())
    assert not torch.equal(draw(2)[0], draw(2)[1])
    with pytest.raises(MismatchError, match="0 adapters"):
        draw(0)
