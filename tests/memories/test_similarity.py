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


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.norm() * b.norm()
    return (a * b).sum() / lengths if lengths > 0 else a.sum() * 0


def _variance(a: Tensor) -> Tensor:
    variance = ((a - a.mean()) ** 2).mean()
    return variance if variance > 0 else torch.ones_like(variance)


def _kl(p: Tensor, r: Tensor) -> Tensor:
    return sum(a * (a / b).log() for a, b in zip(p, r, strict=True))


def _js(p: Tensor, r: Tensor) -> Tensor:
    return (_kl(p, (p + r) / 2) + _kl(r, (p + r) / 2)) / 2


def loop(queries: Tensor, keys: Tensor, one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows = [torch.stack([one(q, k) for k in keys]) for q in queries.reshape(-1, queries.shape[-1])]
    return torch.stack(rows).reshape(*queries.shape[:-1], len(keys))


ORACLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dot": lambda q, k: sum(a * b for a, b in zip(q, k, strict=True)),
    "scaled-dot": lambda q, k: (q * k).sum() / math.sqrt(len(q)),
    "cosine": lambda q, k: (q * k).sum() / (q.norm() * k.norm()),
    "euclidean": lambda q, k: -((q - k) ** 2).sum(),
    "centred-cosine": lambda q, k: _cosine(q - q.mean(), k - k.mean()),
    "manhattan": lambda q, k: -sum(abs(a - b) for a, b in zip(q, k, strict=True)),
    "scaled-error": lambda q, k: -((q - k) ** 2).mean() / _variance(q),
    # As Millidge et al. name them: of a stored pattern from the query, and the other way round.
    "kl": lambda q, k: -_kl(k.softmax(0), q.softmax(0)),
    "reverse-kl": lambda q, k: -_kl(q.softmax(0), k.softmax(0)),
    "js": lambda q, k: -_js(q.softmax(0), k.softmax(0)),
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


DISTANCES = ("euclidean", "manhattan", "scaled-error", "kl", "reverse-kl", "js")


@pytest.mark.parametrize("name", DISTANCES)
def test_an_exact_hit_is_exactly_zero_distance(name: str) -> None:
    keys = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) + 1e4
    scores = similarity(name)(keys, keys)
    assert scores.diagonal().abs().max() <= (0 if name in DISTANCES[:3] else 1e-6)
    assert (scores <= 1e-6).all()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_the_order_of_keys_and_of_entries_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    keys = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    order, entries = torch.randperm(5, generator=generator), torch.randperm(11, generator=generator)
    scores = similarity(name)(queries, keys)
    torch.testing.assert_close(similarity(name)(queries, keys[order]), scores[:, order])
    torch.testing.assert_close(similarity(name)(queries[:, entries], keys[:, entries]), scores)


def test_scale_and_shift_where_they_must_not_matter() -> None:
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    keys = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    for name in ("cosine", "centred-cosine"):
        torch.testing.assert_close(
            similarity(name)(3 * queries, 0.2 * keys), similarity(name)(queries, keys)
        )
    torch.testing.assert_close(
        similarity("scaled-error")(7 * queries, 7 * keys), similarity("scaled-error")(queries, keys)
    )
    for name in ("centred-cosine", "euclidean", "manhattan", "kl", "reverse-kl", "js"):
        torch.testing.assert_close(
            similarity(name)(queries + 2, keys + 2), similarity(name)(queries, keys)
        )
    torch.testing.assert_close(similarity("js")(queries, keys), similarity("js")(keys, queries).mT)
    assert (similarity("js")(9 * queries, 9 * keys) >= -math.log(2) - 1e-12).all()


@pytest.mark.parametrize("name", ["euclidean", "js"])
def test_many_entries_are_summed_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(3, 101, generator=generator, dtype=torch.float64)
    keys = torch.randn(4, 101, generator=generator, dtype=torch.float64)
    whole = similarity(name)(queries, keys)
    monkeypatch.setattr("memtool.memories.similarity.TERMS_AT_ONCE", 100)
    torch.testing.assert_close(similarity(name)(queries, keys), whole)


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
