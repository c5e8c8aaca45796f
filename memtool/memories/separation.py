"""Separations: how scores become coefficients.

The second half of the universal Hopfield form (Millidge et al., 2022). Every function maps scores
(..., t) to coefficients (..., t) over the last axis, in float32 or better. Only `normalised`, which
is here because MIRA's authors have it, divides by the sum of the scores: that sum may be negative,
and then the largest score becomes the smallest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from memtool import registry
from memtool.devices import in_float32
from memtool.errors import ConfigError, MismatchError

SeparationFunction = Callable[[Tensor], Tensor]
"""scores (..., t) → coefficients (..., t)."""


def softmax(scores: Tensor, beta: float = 1.0) -> Tensor:
    """exp(β s) / Σ exp(β s): positive, sums to one. `beta` is the inverse temperature.

    >>> softmax(torch.tensor([0.0, 0.0]))
    tensor([0.5000, 0.5000])
    """
    # The largest score goes before β does: a large β times a large score may overflow first.
    scores = in_float32(scores)
    if beta == 1:
        return torch.softmax(scores, dim=-1)
    shifted = scores - scores.amax(dim=-1, keepdim=True).detach()
    return torch.softmax(beta * shifted, dim=-1)


def affine(scores: Tensor) -> Tensor:
    """1/t + (s − mean s): sums to one, may be negative, linear in the scores.

    >>> affine(torch.tensor([1.0, 0.0]))
    tensor([1., 0.])
    >>> affine(torch.tensor([2.0, 0.0]))
    tensor([ 1.5000, -0.5000])
    """
    scores = in_float32(scores)
    return 1.0 / scores.shape[-1] + (scores - scores.mean(dim=-1, keepdim=True))


FLOOR = 1e-3
"""The least size of the sum of scores that `normalised` divides by."""


def normalised(scores: Tensor) -> Tensor:
    """Scores over their sum, s / Σ s: sums to one, may be negative, and is singular at Σ s = 0.

    A single score stays as it is. What the code of MIRA's authors calls affine. The divisor has at
    least the size `FLOOR`, with the sign of Σ s; where it met that floor, the coefficients do not
    sum to one (see `floored`).

    >>> normalised(torch.tensor([0.75, 0.25]))
    tensor([0.7500, 0.2500])
    >>> normalised(torch.tensor([0.5, -0.25]))
    tensor([ 2., -1.])
    >>> normalised(torch.tensor([0.3]))
    tensor([0.3000])
    """
    scores = in_float32(scores)
    if scores.shape[-1] == 1:
        return scores
    whole = scores.sum(dim=-1, keepdim=True)
    least = torch.full_like(whole, FLOOR)  # two numbers alone would be of float32
    least = torch.where(whole < 0, -least, least)
    return scores / torch.where(whole.abs() < FLOOR, least, whole)


def floored(coefficients: Tensor) -> Tensor:
    """Which of coefficients (..., t) of `normalised` met its floor: bool (...).

    They are those that do not sum to one: within the floor the sum is Σ s / FLOOR, below one.
    """
    if coefficients.shape[-1] == 1:
        return torch.zeros(coefficients.shape[:-1], dtype=torch.bool, device=coefficients.device)
    sums, sizes = coefficients.double().sum(dim=-1), coefficients.double().abs().sum(dim=-1)
    rounding = 8 * torch.finfo(torch.float32).eps * sizes.clamp_min(1)
    return (sums - 1).abs() > rounding


def identity(scores: Tensor) -> Tensor:
    """The scores themselves."""
    return in_float32(scores)


def relu(scores: Tensor) -> Tensor:
    """The positive part of the scores."""
    return torch.relu(in_float32(scores))


def tanh(scores: Tensor) -> Tensor:
    """The hyperbolic tangent of the scores: signed, within (−1, 1)."""
    return torch.tanh(in_float32(scores))


def sigmoid(scores: Tensor) -> Tensor:
    """1 / (1 + exp(−s)): each within (0, 1), whatever the others are."""
    return torch.sigmoid(in_float32(scores))


def topk(scores: Tensor, topk: int = 2, beta: float = 1.0) -> Tensor:
    """Softmax over the so many largest scores, zero elsewhere.

    With fewer scores all are kept: a memory has one adapter before it has several.

    >>> topk(torch.tensor([3.0, 3.0, 1.0]), topk=2)
    tensor([0.5000, 0.5000, 0.0000])
    """
    scores = in_float32(scores)
    kept, places = scores.topk(min(topk, scores.shape[-1]), dim=-1)
    return torch.zeros_like(scores).scatter(-1, places, softmax(kept, beta))


def largest_shares(shares: Tensor, topk: int) -> Tensor:
    """Shares of one (..., t) of which the so many largest are kept, and scaled to sum to one."""
    kept, places = shares.topk(min(topk, shares.shape[-1]), dim=-1)
    whole = kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, places, kept / whole)


def largest(scores: Tensor) -> Tensor:
    """One for the largest score, zero elsewhere; equal largest ones share it.

    Equal up to a few roundings: two columns of one matrix product may differ by those.
    """
    scores = in_float32(scores)
    slack = 8 * torch.finfo(scores.dtype).eps * scores.abs().amax(dim=-1, keepdim=True)
    hit = (scores >= scores.amax(dim=-1, keepdim=True) - slack).to(scores.dtype)
    return hit / hit.sum(dim=-1, keepdim=True)


def power(scores: Tensor, exponent: int = 2) -> Tensor:
    """The positive part of the scores to a power, the dense associative memory: not normalised."""
    return torch.relu(in_float32(scores)) ** exponent


def sparsemax(scores: Tensor, beta: float = 1.0) -> Tensor:
    """The point of the simplex nearest to β s (Martins & Astudillo, 2016): sums to one, sparse.

    >>> sparsemax(torch.tensor([1.0, 0.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    scores = in_float32(scores)
    scaled = beta * (scores - scores.amax(dim=-1, keepdim=True).detach())
    ordered = scaled.sort(dim=-1, descending=True).values
    count = torch.arange(1, scaled.shape[-1] + 1, device=scaled.device, dtype=scaled.dtype)
    excess = ordered.cumsum(dim=-1) - 1
    kept = (count * ordered > excess).sum(dim=-1, keepdim=True)
    threshold = excess.gather(-1, kept - 1) / kept
    return torch.relu(scaled - threshold)


def entmax(scores: Tensor, beta: float = 1.0) -> Tensor:
    """1.5-entmax of β s (Peters, Niculae & Martins, 2019): between softmax and sparsemax."""
    scores = in_float32(scores)
    half = beta * (scores - scores.amax(dim=-1, keepdim=True).detach()) / 2
    ordered = half.sort(dim=-1, descending=True).values
    count = torch.arange(1, half.shape[-1] + 1, device=half.device, dtype=half.dtype)
    mean = ordered.cumsum(dim=-1) / count
    spread = ordered.square().cumsum(dim=-1) - count * mean.square()
    # With the first n scores kept, Σ (s_i − τ)² = 1 has the smaller root τ_n.
    thresholds = mean - torch.relu((1 - spread) / count).sqrt()
    kept = (thresholds <= ordered).sum(dim=-1, keepdim=True)
    return torch.relu(half - thresholds.gather(-1, kept - 1)).square()


def separation(name: str, *, beta: float = 1.0, topk: int = 2) -> SeparationFunction:
    """The separation of that name with its constants bound.

    `beta` scales the scores of "softmax", "topk", "sparsemax" and "entmax"; `topk` is the number
    that "topk" keeps; "power" squares. A function of another package gets those of the two that it
    has arguments for.

    Raises ConfigError for an unknown name, a `beta` that is not positive and finite, and a `topk`
    below 1; NotFoundError for one of another package that only a memory names.
    """
    if not 0 < beta < float("inf"):
        raise ConfigError(f"beta of {beta}", expected="a positive, finite number")
    if topk < 1:
        raise ConfigError(f"topk of {topk}", expected="at least 1")
    if registry.known("separations", name):
        registry.require_installed("separations", name, f"--set memory.separation={name}")
    function = registry.find("separations", name)
    takes = inspect.signature(function).parameters
    given = {"beta": beta, "topk": topk}
    bound = partial(function, **{word: value for word, value in given.items() if word in takes})
    return bound if name in registry.SHIPPED["separations"] else partial(_of_others, name, bound)


def _of_others(name: str, function: SeparationFunction, scores: Tensor) -> Tensor:
    """What a function of another package makes of scores.

    Raises MismatchError for another shape, and for numbers that are none of finite scores.
    """
    found = function(scores)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(scores.shape):
        raise MismatchError(
            f"separation {name} gave {shape} for scores of shape {tuple(scores.shape)}",
            expected="a tensor of one coefficient for every score",
        )
    strange = ~found.isfinite() & scores.isfinite().all(dim=-1, keepdim=True)
    if not torch.compiler.is_compiling() and bool(strange.any()):
        raise MismatchError(
            f"separation {name} gave numbers that are not finite", expected="finite numbers"
        )
    return found
