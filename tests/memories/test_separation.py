"""Separations: oracles, and the laws that each of them keeps."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import ConfigError
from memtool.memories.separation import FLOOR, separation
from memtool.registry import SHIPPED

NAMES = tuple(SHIPPED["separations"])
finite = st.floats(-20, 20)
rows = st.integers(1, 7).flatmap(
    lambda t: st.lists(st.lists(finite, min_size=t, max_size=t), min_size=1, max_size=4)
)


def bisect(total: Callable[[float], float], row: list[float], scale: float) -> float:
    """Where `total`, which falls, is one."""
    low, high = scale * max(row) - 2.0, scale * max(row)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > 1 else (low, middle)
    return low


def oracle(name: str, row: list[float], beta: float, kept: int) -> list[float]:
    count = len(row)
    match name:
        case "softmax":
            powers = [math.exp(beta * (s - max(row))) for s in row]
            return [p / sum(powers) for p in powers]
        case "affine":
            return [1 / count + s - sum(row) / count for s in row]
        case "identity":
            return row
        case "relu":
            return [max(s, 0.0) for s in row]
        case "tanh":
            return [math.tanh(s) for s in row]
        case "normalised":
            whole = sum(row)
            if count == 1:
                return row
            if abs(whole) < FLOOR:
                whole = -FLOOR if whole < 0 else FLOOR
            return [s / whole for s in row]
        case "sigmoid":
            return [1 / (1 + math.exp(-s)) for s in row]
        case "max":
            # Scores within rounding of the largest share.
            slack = 8 * sys.float_info.epsilon * max(abs(s) for s in row)
            hits = [s >= max(row) - slack for s in row]
            return [hit / sum(hits) for hit in hits]
        case "power":
            return [max(s, 0.0) ** 2 for s in row]
        case "sparsemax":
            # The threshold by bisection: Σ max(β s − τ, 0) = 1.
            threshold = bisect(lambda tau: sum(max(beta * s - tau, 0.0) for s in row), row, beta)
            return [max(beta * s - threshold, 0.0) for s in row]
        case "entmax":
            half = beta / 2
            threshold = bisect(
                lambda tau: sum(max(half * s - tau, 0.0) ** 2 for s in row), row, half
            )
            return [max(half * s - threshold, 0.0) ** 2 for s in row]
    best = sorted(range(count), key=lambda i: -row[i])[:kept]
    powers = [math.exp(beta * (row[i] - max(row))) if i in best else 0.0 for i in range(count)]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "topk"])
@settings(deadline=None)
@given(rows=rows, beta=st.floats(0.1, 30))
@example(rows=[[0.0, 0.0, 1e-5]], beta=1.0)  # below the floor of `normalised`
def test_equals_the_obvious_formula(name: str, rows: list[list[float]], beta: float) -> None:
    # The sign of a sum that is all rounding decides nothing.
    assume(name != "normalised" or all(abs(sum(row)) > 1e-9 for row in rows))
    scores = torch.tensor(rows, dtype=torch.float64)
    expected = torch.tensor([oracle(name, row, beta, 0) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(separation(name, beta=beta)(scores), expected, atol=1e-11, rtol=1e-9)


@settings(deadline=None)
@given(
    row=st.lists(finite, min_size=1, max_size=8, unique=True),
    beta=st.floats(0.1, 5),
    kept=st.integers(1, 9),
)
def test_topk_is_a_softmax_over_the_kept(row: list[float], beta: float, kept: int) -> None:
    scores = torch.tensor(row, dtype=torch.float64)
    result = separation("topk", beta=beta, topk=kept)(scores)
    expected = torch.tensor(oracle("topk", row, beta, kept), dtype=torch.float64)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-9)
    if kept >= len(row):
        torch.testing.assert_close(result, separation("softmax", beta=beta)(scores))


@pytest.mark.parametrize("name", ["softmax", "affine", "topk", "max", "sparsemax", "entmax"])
@settings(deadline=None)
@given(rows=rows, shift=st.floats(-100, 100))
def test_sums_to_one_and_ignores_a_shift(name: str, rows: list[list[float]], shift: float) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    # Scores on a grid keep their order, and so what topk keeps, under a shift.
    scores = scores.mul(16).round().div(16) - torch.arange(scores.shape[-1]) / 64
    shift = round(shift * 16) / 16
    coefficients = separation(name)(scores)
    torch.testing.assert_close(coefficients.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    torch.testing.assert_close(separation(name)(scores + shift), coefficients)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_scores_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    result = separation(name, beta=1.5)(scores)
    torch.testing.assert_close(separation(name, beta=1.5)(scores[:, order]), result[:, order])


@pytest.mark.parametrize("name", ["softmax", "topk", "sparsemax", "entmax"])
def test_a_growing_beta_leads_to_the_largest(name: str) -> None:
    scores = torch.tensor([[0.3, 0.1, 0.29, -4.0]], dtype=torch.float64)
    sharp = separation(name, beta=1e5)(scores)
    torch.testing.assert_close(sharp, separation("max")(scores))
    flat = separation(name, beta=1e-9, topk=4)(scores)
    torch.testing.assert_close(flat, torch.full((1, 4), 0.25, dtype=torch.float64))


def test_sparse_ones_are_sparse_and_softmax_is_not() -> None:
    scores = torch.linspace(-3, 3, 20, dtype=torch.float64)
    kept = {
        name: int((separation(name)(scores) > 0).sum())
        for name in ("softmax", "entmax", "sparsemax", "topk", "max")
    }
    assert kept["softmax"] == 20
    assert kept["max"] == 1 < kept["sparsemax"] < kept["entmax"] < 20
    assert kept["topk"] == 2


@pytest.mark.parametrize("name", ["softmax", "topk", "sparsemax"])
def test_large_scores_and_a_large_beta_do_not_overflow(name: str) -> None:
    scores = torch.tensor([3e38, -3e38, 3e38 / 2])
    coefficients = separation(name, beta=1e6)(scores)
    assert torch.equal(coefficients, torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_scores_give_float32_coefficients(name: str) -> None:
    scores = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coefficients = separation(name)(scores)
    assert coefficients.dtype == torch.float32
    torch.testing.assert_close(coefficients, separation(name)(scores.float()))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_autograd(name: str) -> None:
    scores: Tensor = torch.randn(
        3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).requires_grad_()
    assert torch.autograd.gradcheck(separation(name, beta=2.0, topk=3), (scores,))


def test_bad_input_is_an_error_that_helps() -> None:
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        separation("sofmax")
    with pytest.raises(ConfigError, match="beta of 0"):
        separation("softmax", beta=0.0)
    with pytest.raises(ConfigError, match="beta of inf"):
        separation("softmax", beta=math.inf)
    with pytest.raises(ConfigError, match="topk of 0"):
        separation("topk", topk=0)
