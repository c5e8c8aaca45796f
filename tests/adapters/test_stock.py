"""Adapters of unlike shapes in one stack: what each computes alone, it computes there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtool.adapters import stock
from memtool.adapters.layout import Layout, Site
from memtool.adapters.stock import OneAdapter, Stock, mixed, united
from memtool.errors import MismatchError

SITES = tuple(
    Site(block, f"layers.{block}.{name}", "", width, rows, 0, rows)
    for block in range(2)
    for name, width, rows in (("q", 5, 4), ("up", 5, 7))
)


def drawn(sites: tuple[Site, ...], rank: int, seed: int) -> OneAdapter:
    layout = Layout(sites, rank)
    value = torch.randn(
        layout.numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return OneAdapter(layout, value, 0.5 + seed)


def products(one: OneAdapter) -> dict[str, torch.Tensor]:
    """scaling · B A of every site, slow and obvious."""
    tensors = one.layout.unflatten(one.value)
    return {
        site.name: one.scaling * tensors[f"{site.name}.lora_B"] @ tensors[f"{site.name}.lora_A"]
        for site in one.layout.sites
    }


SHAPES = st.lists(
    st.tuples(st.sets(st.sampled_from(SITES), min_size=1), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(SHAPES, st.data())
def test_a_stack_and_a_sum_compute_what_the_adapters_do(
    shapes: list[tuple[set[Site], int]], data: st.DataObject
) -> None:
    adapters = [
        drawn(tuple(site for site in SITES if site in sites), rank, seed)
        for seed, (sites, rank) in enumerate(shapes)
    ]
    weights = torch.tensor([data.draw(st.floats(-2, 2)) for _ in adapters], dtype=torch.float64)
    values = united(adapters, SITES)
    whole = values.flat()
    for row, one in enumerate(adapters):
        alone = products(OneAdapter(values.layout, whole[row], float(values.scaling[row])))
        for site in values.layout.sites:
            expected = products(one).get(site.name, torch.zeros_like(alone[site.name]))
            torch.testing.assert_close(alone[site.name], expected)
    found = products(mixed(values, weights))
    for site in values.layout.sites:
        expected = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
        for weight, one in zip(weights, adapters, strict=True):
            expected = expected + weight * products(one).get(site.name, 0.0)
        torch.testing.assert_close(found[site.name], expected, atol=1e-9, rtol=1e-6)


def test_only_what_is_used_is_read_and_what_was_used_last_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def of(number: int) -> OneAdapter:
        read.append(number)
        return drawn(SITES[: 1 + number % 3], 2, number)

    shelf = Stock(9, SITES, of)
    assert (len(shelf), read) == (9, [])
    first = shelf.take([3, 1])
    assert (len(first), read) == (2, [3, 1])
    shelf.take([1])
    assert read == [3, 1]
    monkeypatch.setattr(stock, "RECENT_BYTES", 1)
    shelf.take([4])
    assert read == [3, 1, 4]
    shelf.take([4, 3])
    assert read == [3, 1, 4, 3]


def test_nothing_and_what_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(MismatchError, match="no adapter"):
        united([], SITES)
    with pytest.raises(MismatchError, match=r"layers\.1\.up"):
        united([drawn(SITES, 1, 0), drawn(SITES, 2, 0)], SITES[:-1])
