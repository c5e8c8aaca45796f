"""A decoder of queries: what it adds to every rank, how it grows and shrinks, its size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import MismatchError
from memtool.memories.decoder import RankDecoder, numbers_of, width_for

DIM, WIDTH, PLACES, ADAPTERS, RANK = 6, 5, 3, 2, 4


def made(*, adapters: int = ADAPTERS, learned: bool = True, seed: int = 0) -> RankDecoder:
    generator = torch.Generator().manual_seed(seed)
    decoder = RankDecoder.fresh(
        DIM, WIDTH, places=PLACES, adapters=adapters, rank=RANK, generator=generator
    ).double()
    if learned:
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder


def queries(count: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)).double()


def loops(decoder: RankDecoder, given: Tensor) -> Tensor:
    """V gelu(U q + c) + e, one number at a time; row ((t · places) + p) · rank + k is rank k."""
    found = torch.zeros(len(given), PLACES, decoder.adapters, RANK, dtype=torch.float64)
    for sample, query in enumerate(given):
        hidden = []
        for unit in range(WIDTH):
            total = decoder.inner.bias[unit]
            for entry in range(DIM):
                total = total + decoder.inner.weight[unit, entry] * query[entry]
            hidden.append(float(total * 0.5 * (1 + math.erf(float(total) / math.sqrt(2)))))
        for adapter in range(decoder.adapters):
            for place in range(PLACES):
                for rank in range(RANK):
                    row = (adapter * PLACES + place) * RANK + rank
                    total = decoder.outer.bias[row]
                    for unit in range(WIDTH):
                        total = total + decoder.outer.weight[row, unit] * hidden[unit]
                    found[sample, place, adapter, rank] = total
    return found


def test_it_is_the_network_of_the_page() -> None:
    decoder, asked = made(), queries()
    with torch.no_grad():
        torch.testing.assert_close(decoder(asked), loops(decoder, asked), rtol=1e-12, atol=1e-12)


def test_a_fresh_one_adds_nothing_and_learns_at_once() -> None:
    decoder, asked = made(learned=False), queries()
    added = decoder(asked)
    assert torch.equal(added, torch.zeros(4, PLACES, ADAPTERS, RANK, dtype=torch.float64))
    added.sum().backward()
    assert decoder.outer.weight.grad is not None
    assert bool(decoder.outer.weight.grad.any())
    assert torch.equal(made(learned=False).inner.weight, decoder.inner.weight)
    assert not torch.equal(made(learned=False, seed=1).inner.weight, decoder.inner.weight)


def test_gradients_by_finite_differences() -> None:
    decoder = made()
    assert torch.autograd.gradcheck(decoder, (queries(2).requires_grad_(),))


def test_more_adapters_change_nothing_of_the_others_and_begin_at_zero() -> None:
    decoder, asked = made(), queries()
    with torch.no_grad():
        old, new = decoder(asked), decoder.grown(5)(asked)
    torch.testing.assert_close(new[:, :, :ADAPTERS], old, rtol=1e-12, atol=1e-12)
    assert not new[:, :, ADAPTERS:].any()
    with pytest.raises(MismatchError, match="grown to 1"):
        decoder.grown(1)


@given(numbers=st.integers(0, 5000), dim=st.integers(1, 40), rows=st.integers(1, 60))
def test_the_width_is_the_largest_that_fits(numbers: int, dim: int, rows: int) -> None:
    width = width_for(numbers, dim, rows)
    if width:
        assert numbers_of(width, dim, rows) <= numbers
    assert numbers_of(width + 1, dim, rows) > numbers


def test_how_many_numbers_learn() -> None:
    assert made().numbers == numbers_of(WIDTH, DIM, PLACES * ADAPTERS * RANK)


def test_layers_that_do_not_fit_are_refused() -> None:
    for name in ("width", "places", "adapters", "rank"):
        sizes = {"width": 2, "places": 1, "adapters": 1, "rank": 1, name: 0}
        width = sizes.pop("width")
        with pytest.raises(MismatchError, match=f"{name} 0"):
            RankDecoder.fresh(DIM, width, **sizes)
    linear = torch.nn.Linear
    with pytest.raises(MismatchError, match="one width"):
        RankDecoder(linear(DIM, 3), linear(4, 8), places=2, rank=2)
    with pytest.raises(MismatchError, match="4 rows for every adapter"):
        RankDecoder(linear(DIM, 3), linear(3, 6), places=2, rank=2)
