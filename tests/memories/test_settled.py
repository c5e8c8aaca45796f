"""A query that settles among the keys: no step is the mixture, and no step raises the energy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.memories.hopfield import HopfieldMemory, settled
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.memories.separation import separation
from memtool.memories.similarity import similarity
from memtool.sections import MemorySettings, Similarity

DIM = 7
SIMILARITIES: tuple[Similarity, ...] = ("dot", "scaled-dot", "euclidean")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(keys: Tensor, alike: Similarity, **more: object) -> BlockMemory:
    chosen = MemorySettings(similarity=alike, read="energy", query_norm=False, **more)  # type: ignore[arg-type]
    return KeyedMemory.from_settings(chosen, (0,), DIM, keys[None]).double()[0]


def energy(query: Tensor, keys: Tensor, alike: Similarity, beta: float) -> float:
    """Ramsauer et al. (2021), eq. 2, of a query whose last entry is its constant; slow."""
    if alike == "euclidean":
        scores = [-float((query - key).square().sum()) for key in keys]
        return -math.log(sum(math.exp(beta * s) for s in scores)) / beta
    sharp = beta / math.sqrt(len(query)) if alike == "scaled-dot" else beta
    scores = [float(query @ key) for key in keys]
    largest = max(scores)
    total = sum(math.exp(sharp * (s - largest)) for s in scores)
    return 0.5 * float(query.square().sum()) - largest - math.log(total) / sharp


def one_step(query: Tensor, keys: Tensor, alike: Similarity, beta: float, rate: float) -> Tensor:
    """The step of the page for one query, entry by entry."""
    scores = []
    for key in keys:
        inner = sum(float(q) * float(k) for q, k in zip(query, key, strict=True))
        apart = sum((float(q) - float(k)) ** 2 for q, k in zip(query, key, strict=True))
        scaled = inner / math.sqrt(len(query))
        scores.append({"dot": inner, "scaled-dot": scaled, "euclidean": -apart}[alike])
    largest = max(scores)
    exponentials = [math.exp(beta * (s - largest)) for s in scores]
    shares = [e / sum(exponentials) for e in exponentials]
    moved = [
        (1 - rate) * float(query[entry])
        + rate * sum(a * float(key[entry]) for a, key in zip(shares, keys, strict=True))
        for entry in range(DIM)
    ]
    return torch.tensor([*moved, float(query[-1])], dtype=torch.float64)


@given(
    alike=st.sampled_from(SIMILARITIES),
    beta=st.floats(0.1, 4),
    rate=st.floats(0.05, 1),
    steps=st.integers(1, 4),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_loop_and_the_energy_never_rises(
    alike: Similarity, beta: float, rate: float, steps: int, seed: int
) -> None:
    keys, query = draw(4, DIM + 1, seed=seed).float().double(), draw(DIM, seed=seed + 1000)
    query = torch.cat([query, torch.ones(1, dtype=torch.float64)])
    slow, before = query, energy(query, keys, alike, beta)
    for _ in range(steps):
        slow = one_step(slow, keys, alike, beta, rate)
        after = energy(slow, keys, alike, beta)
        assert after <= before + 1e-9 * max(1, abs(before))
        before = after
    here = memory(keys, alike, beta=beta, read_rate=rate, read_steps=steps)
    with torch.no_grad():
        got = here.settled(query[None])[0]
    torch.testing.assert_close(got, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alike", SIMILARITIES)
def test_no_step_is_the_mixture_bit_for_bit(alike: Similarity) -> None:
    keys, hidden = draw(4, DIM + 1, seed=0), draw(5, 3, DIM, seed=1)
    still = memory(keys, alike, read_steps=0)
    plain = KeyedMemory.from_settings(
        MemorySettings(similarity=alike, query_norm=False), (0,), DIM, keys[None]
    ).double()[0]
    assert torch.equal(still.coefficients(hidden), plain.coefficients(hidden))
    moving = memory(keys, alike, read_steps=2)
    assert not torch.allclose(moving.coefficients(hidden), plain.coefficients(hidden))


@pytest.mark.parametrize("alike", SIMILARITIES)
def test_keys_far_apart_are_fixed_points_and_draw_what_is_near(alike: Similarity) -> None:
    keys = torch.cat([10 * torch.eye(DIM, dtype=torch.float64)[:4], torch.zeros(4, 1)], dim=1)
    here = memory(keys, alike, beta=2.0, read_steps=3)
    asked = torch.cat([keys[:, :DIM], torch.ones(4, 1, dtype=torch.float64)], dim=1)
    near = asked.clone()
    near[:, :DIM] += 0.3 * draw(4, DIM, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(here.settled(asked), asked, rtol=0, atol=1e-9)
        torch.testing.assert_close(here.settled(near), asked, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            here.answer(near), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6
        )


def test_one_key_draws_everything() -> None:
    keys, query = draw(1, DIM, seed=0), draw(3, DIM, seed=1)
    separate = separation("softmax", beta=1.0)
    found = settled(query, keys, lambda q: similarity("dot")(q, keys), separate, 1)
    assert torch.equal(found, keys.expand(3, -1))


@pytest.mark.parametrize("alike", SIMILARITIES)
def test_gradients_by_finite_differences(alike: Similarity) -> None:
    here = memory(draw(3, DIM + 1, seed=0), alike, read_steps=3, read_rate=0.7)
    asked = torch.cat([draw(2, DIM, seed=1), torch.ones(2, 1, dtype=torch.float64)], dim=1)

    def answer(keys: Tensor, queries: Tensor) -> Tensor:
        return torch.func.functional_call(Answering(here), {"here.keys": keys}, (queries,))

    keys = here.keys.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(answer, (keys, asked.requires_grad_()))


class Answering(torch.nn.Module):
    """A memory asked by queries as they are."""

    def __init__(self, here: BlockMemory) -> None:
        super().__init__()
        self.here = here

    def forward(self, queries: Tensor) -> Tensor:
        return self.here.answer(queries)


def test_a_memory_of_patterns_settles_in_the_same_way() -> None:
    patterns = draw(4, 20, seed=0)
    memory = HopfieldMemory.of(
        list("abcd"), patterns, fraction=0.5, beta=0.3, similarity="dot", steps=3
    )
    keys, asked = patterns[:, :10], draw(10, seed=1)
    score = similarity("dot")
    query = settled(asked, keys, lambda q: score(q, keys), separation("softmax", beta=0.3), 2)
    expected = separation("softmax", beta=0.3)(score(query, keys))
    assert torch.equal(memory.coefficients(asked), expected)
