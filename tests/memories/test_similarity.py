"""Similarities against the obvious loops in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import ConfigError, MismatchError
from memtool.memories.similarity import SIMILARITIES, similarity


def loop(queries: Tensor, keys: Tensor, one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows = [torch.stack([one(q, k) for k in keys]) for q in queries.reshape(-1, queries.shape[-1])]
    return torch.stack(rows).reshape(*queries.shape[:-1], len(keys))


ORACLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dot": lambda q, k: sum(a * b for a, b in zip(q, k, strict=True)),
    "scaled-dot": lambda q, k: (q * k).sum() / math.sqrt(len(q)),
    "cosine": lambda q, k: (q * k).sum() / (q.norm() * k.norm()),
    "euclidean": lambda q, k: -((q - k) ** 2).sum(),
}


@pytest.mark.parametrize("name", SIMILARITIES)
@settings(deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    adapters=st.integers(1, 5),
    dim=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loop(name: str, lead: list[int], adapters: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(*lead, dim, generator=generator, dtype=torch.float64)
    keys = torch.randn(adapters, dim, generator=generator, dtype=torch.float64)
    expected = loop(queries, keys, ORACLES[name])
    torch.testing.assert_close(similarity(name)(queries, keys), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_half_precision_and_autocast_still_score_in_float32(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 300, generator=generator)
    keys = torch.randn(3, 300, generator=generator)
    exact = similarity(name)(queries.double(), keys.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = similarity(name)(queries, keys)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, atol=1e-3, rtol=1e-5)
    large = similarity(name)(300 * queries.half(), 300 * keys.half())
    assert large.dtype == torch.float32
    assert large.isfinite().all()


def test_an_exact_hit_is_exactly_zero_distance() -> None:
    keys = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) + 1e4
    scores = similarity("euclidean")(keys, keys)
    assert torch.equal(scores.diagonal(), torch.zeros(5))
    assert (scores <= 0).all()


def test_a_zero_query_has_no_direction() -> None:
    assert torch.equal(similarity("cosine")(torch.zeros(2, 3), torch.ones(4, 3)), torch.zeros(2, 4))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_gradients_are_those_of_autograd(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(similarity(name), (queries, keys))


def test_bad_input_is_an_error_that_helps() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        similarity("cosin")
    with pytest.raises(MismatchError, match=r"\(2, 3\) against keys \(4, 5\)"):
        similarity("dot")(torch.zeros(2, 3), torch.zeros(4, 5))
