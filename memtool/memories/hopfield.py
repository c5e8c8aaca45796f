"""Hopfield retrieval: a mixture of values by how alike a query is to their keys.

`recall` is the universal form, separation(similarity(query, keys)) · values (Millidge et al.,
2022). `HopfieldMemory` keeps whole adapters θ_t and completes one from its first entries, the
modern Hopfield memory of the modulation paper: θ̂ = k ⊕ V softmax(β Kᵀ k).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from memtool.errors import ConfigError, DataError, MismatchError, NotFoundError
from memtool.memories.recalled import Recalled, checked_key, novelty
from memtool.memories.separation import SeparationFunction, separation
from memtool.memories.similarity import (
    SimilarityFunction,
    negative_squared_euclidean,
    similarity,
)

PUBLISHED_BETA = 25.0
"""β of the modulation paper; on raw dot products it depends on the scale of the weights."""

ROWS_AT_ONCE = 256
"""Keys whose scores for all keys are in memory at a time."""

ROWS_WORTH_SKIPPING = 4
"""Unless fewer than a quarter of the values are asked for, reading all is as fast as choosing."""

# Scores are float64; two that agree to this share of their size are one score.
_SAME_SCORE = 1e-9


def recall(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    similarity: SimilarityFunction,
    separation: SeparationFunction,
) -> Tensor:
    """Query (..., d), keys (t, d), values (t, v) → mixtures of the values (..., v)."""
    coefficients = separation(similarity(query, keys))
    with torch.autocast(values.device.type, enabled=False):
        return (coefficients.to(values.dtype) @ values).to(values.dtype)


def settled(
    query: Tensor,
    keys: Tensor,
    score: Callable[[Tensor], Tensor],
    separation: SeparationFunction,
    steps: int,
    rate: float = 1.0,
) -> Tensor:
    """A query (..., d) after steps of ξ ← (1 − η) ξ + η Σ_t a_t k_t, a = separation(score(ξ)).

    η is the `rate`, above 0 and at most 1; keys k (t, d), `score` (..., d) → (..., t). With the
    softmax of β times inner products it is the update of Ramsauer et al. (2021, eq. 3), under which
    ½ |ξ|² − log Σ_t exp(β k_t·ξ) / β never rises, for any such rate: the mean of the keys is where
    an upper bound of this energy, touching it at ξ, is least, and the bound is convex. With minus
    squared distances in place of inner products it is mean shift, and − log Σ_t exp(−β |ξ − k_t|²)
    / β never rises.
    """
    for _ in range(steps):
        query = torch.lerp(query, separation(score(query)) @ keys, rate)
    return query


class HopfieldMemory:
    """Whole adapters, recalled from their first entries.

    The key of a pattern θ (numel,) is its first ⌊fraction · numel⌋ entries, the value is the rest.
    Only key entries are scored, in float64: with β as large as the gaps demand, float32 scores
    would decide by their rounding.

    beta "auto" makes every stored key recall its own pattern with a coefficient of at least
    1 / (1 + epsilon): β = log((t − 1) / ε) / min_gap, where min_gap is the smallest
    sim(k_t, k_t) − max over j ≠ t of sim(k_j, k_t). Where that gap is not positive no β can tell
    the two apart; a warning names them, and β comes from the smallest positive gap. Separations
    other than softmax and topk have no β.

    steps > 1 iterates: the query becomes the mixture of the keys before the values are read.
    """

    def __init__(
        self,
        *,
        fraction: float = 0.1,
        similarity: str = "dot",
        separation: str = "softmax",
        beta: float | Literal["auto"] = "auto",
        epsilon: float = 1e-6,
        topk: int = 2,
        steps: int = 1,
    ) -> None:
        """Raises ConfigError for a constant outside its range and for unknown names."""
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction of {fraction}", expected="a share between 0 and 1")
        if not 0 < epsilon < 1:
            raise ConfigError(f"epsilon of {epsilon}", expected="a number between 0 and 1")
        if steps < 1:
            raise ConfigError(f"{steps} retrieval steps", expected="at least 1")
        if isinstance(beta, str) and beta != "auto":
            raise ConfigError(f"beta of {beta!r}", expected='a positive number or "auto"')
        self.fraction = fraction
        self.similarity = similarity
        self.separation = separation
        self.epsilon = epsilon
        self.topk = topk
        self.steps = steps
        self._names: list[str] = []
        self._patterns: Tensor | None = None
        self._given_beta = beta
        self._auto_beta: float | None = None
        self._exact_keys: Tensor | None = None
        self._function_of_beta(1.0 if beta == "auto" else beta)

    @classmethod
    def of(cls, names: Sequence[str], patterns: Tensor, **constants: Any) -> HopfieldMemory:
        """A memory over patterns (t, numel) that are there already, without a copy.

        `constants` as in the constructor; errors as in `write`.
        """
        memory = cls(**constants)
        if len(names):
            memory.write(names[0], patterns[0])
            for name, key in zip(names, memory.key_of(patterns), strict=True):
                checked_key(key, f"the key of {name!r}")
            memory._patterns, memory._names = patterns, list(names)
            memory._exact_keys = None
        return memory

    def __len__(self) -> int:
        return len(self._names)

    @property
    def numel(self) -> int:
        """Number of entries in a pattern."""
        return self.patterns.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored patterns, in the order written."""
        return tuple(self._names)

    @property
    def patterns(self) -> Tensor:
        """The stored patterns (t, numel). Raises NotFoundError when there is none."""
        if self._patterns is None:
            raise NotFoundError("the memory is empty", remedy="write an adapter first")
        return self._patterns

    @property
    def key_length(self) -> int:
        """Number of leading entries that make the key."""
        return key_length(self.fraction, self.patterns.shape[1])

    @property
    def keys(self) -> Tensor:
        """The keys (t, d_k) of the stored patterns."""
        return self.patterns[:, : self.key_length]

    @property
    def beta(self) -> float:
        """The inverse temperature in use; "auto" is worked out once after each write."""
        if self._given_beta != "auto":
            return float(self._given_beta)
        if self._auto_beta is None:
            self._auto_beta = auto_beta(
                self.keys, similarity(self.similarity), self.names, self.epsilon
            )
        return self._auto_beta

    def write(self, name: str, pattern: Tensor) -> None:
        """Append a pattern θ (numel,) under a name.

        Raises MismatchError for a shape or type unlike the stored ones, or a pattern too short to
        have both key and value.
        """
        if pattern.ndim != 1 or not pattern.is_floating_point():
            raise MismatchError(
                f"pattern {name!r} of shape {tuple(pattern.shape)} and type {pattern.dtype}",
                expected="one flat vector of floats",
            )
        if key_length(self.fraction, len(pattern)) < 1:
            raise MismatchError(
                f"pattern {name!r} has {len(pattern)} entries, none of which is the key",
                expected=f"at least {math.ceil(1 / self.fraction)} for fraction {self.fraction}",
            )
        checked_key(self.key_of(pattern), f"the key of {name!r}")
        if not bool(torch.isfinite(pattern).all()):
            raise DataError(f"pattern {name!r} holds numbers that are not finite")
        stored = self._patterns
        if stored is None:
            stored = pattern.new_empty((0, len(pattern)))
        elif (len(pattern), pattern.dtype) != (stored.shape[1], stored.dtype):
            raise MismatchError(
                f"pattern {name!r} has {len(pattern)} entries of type {pattern.dtype}",
                expected=f"{stored.shape[1]} of type {stored.dtype}, as stored",
            )
        self._patterns = torch.cat([stored, pattern.detach().to(stored.device).unsqueeze(0)])
        self._names.append(name)
        self._auto_beta = None
        self._exact_keys = None

    def key_of(self, patterns: Tensor) -> Tensor:
        """The key entries (..., d_k) of patterns (..., numel)."""
        return patterns[..., : key_length(self.fraction, patterns.shape[-1])]

    def coefficients(self, key: Tensor) -> Tensor:
        """How much of every stored pattern the keys (..., d_k) recall: (..., t), float64."""
        return self._looked_up(key)[1]

    def recall(self, keys: Tensor) -> Recalled:
        """Complete keys (n, d_k): the keys as given, then the mixtures of the values.

        The energy is −log Σ_t exp(β sim(q, k_t)) / β, whatever the separation.
        """
        scores, coefficients = self._looked_up(keys)
        # The mixture of the keys tells how much of a query is known; its values are the answer.
        mixture = mixed(coefficients, self.patterns)
        known, values = mixture.tensor_split([self.key_length], dim=-1)
        return Recalled(
            patterns=torch.cat([keys.to(values.dtype), values], dim=-1),
            coefficients=coefficients,
            energy=-torch.logsumexp(self.beta * scores, dim=-1) / self.beta,
            novelty=novelty(keys, known),
        )

    def _looked_up(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the keys as given, and the coefficients after every step: both (..., t)."""
        self._check(key)
        keys, query = self._scored_keys(), key.double()
        score = similarity(self.similarity)
        separate = self._function_of_beta(self.beta)
        scores = score(query, keys)
        if self.steps == 1:
            return scores, separate(scores)
        query = settled(query, keys, lambda one: score(one, keys), separate, self.steps - 1)
        return scores, separate(score(query, keys))

    def _scored_keys(self) -> Tensor:
        """The keys in float64, kept: they are scored at every recall."""
        if self._exact_keys is None:
            self._exact_keys = self.keys.double()
        return self._exact_keys

    def _function_of_beta(self, beta: float) -> SeparationFunction:
        similarity(self.similarity)
        return separation(self.separation, beta=beta, topk=self.topk)

    def _check(self, key: Tensor) -> None:
        if key.shape[-1] != self.key_length:
            raise MismatchError(
                f"a key of {key.shape[-1]} entries", expected=f"{self.key_length} entries"
            )


def mixed(coefficients: Tensor, values: Tensor) -> Tensor:
    """Coefficients (..., t) · values (t, v) → (..., v), in the type of the values.

    Values that no coefficient asks for are not read: an exact recall reads one row, and a dense one
    reads every row once for all queries.
    """
    asked = torch.nonzero((coefficients != 0).reshape(-1, len(values)).any(dim=0)).flatten()
    if len(asked) * ROWS_WORTH_SKIPPING < len(values):
        coefficients, values = coefficients[..., asked], values[asked]
    with torch.autocast(values.device.type, enabled=False):
        return coefficients.to(values.dtype) @ values


def auto_beta(
    keys: Tensor, similarity: SimilarityFunction, names: Sequence[str], epsilon: float
) -> float:
    """β for keys (t, d_k), such that each recalls itself to a coefficient ≥ 1 / (1 + ε).

    Warns, with both names, where a key scores another as high as itself.
    """
    if len(keys) < 2:
        return 1.0
    keys = keys.double()
    rivals = _rivals(keys, similarity)
    pairs = torch.stack([torch.arange(len(keys), device=keys.device), rivals], dim=1)
    own, rival = torch.stack(
        [similarity(key, keys[pair]) for key, pair in zip(keys, pairs, strict=True)]
    ).unbind(dim=1)
    gaps = own - rival
    told_apart = gaps > _SAME_SCORE * own.abs().maximum(rival.abs())
    if not bool(told_apart.all()):
        worst = int(gaps.argmin())
        warnings.warn(
            f"the key of adapter {names[worst]!r} scores adapter {names[int(rivals[worst])]!r} as "
            f"high as itself (gap {float(gaps[worst]):.3g}): no beta can tell them apart. "
            'A similarity that is largest on an exact hit ("cosine", "euclidean") or a larger '
            "fraction may.",
            stacklevel=2,
        )
    if not bool(told_apart.any()):
        return 1.0
    return math.log((len(keys) - 1) / epsilon) / float(gaps[told_apart].min())


def _rivals(keys: Tensor, similarity: SimilarityFunction) -> Tensor:
    """For each of the keys (t, d_k) the place (t,) of the other one that it scores highest."""
    # Inner products rank by distance, too, and are many times faster than differences.
    half = keys.square().sum(dim=1) / 2
    found = []
    for first in range(0, len(keys), ROWS_AT_ONCE):
        some = keys[first : first + ROWS_AT_ONCE]
        if similarity is negative_squared_euclidean:
            scores = some @ keys.mT - half
        else:
            scores = similarity(some, keys)
        scores.diagonal(first).fill_(-math.inf)
        found.append(scores.argmax(dim=1))
    return torch.cat(found)


def key_length(fraction: float, numel: int) -> int:
    """⌊fraction · numel⌋, the entries of a key."""
    # As a decimal: 0.29 * 100 is 28.999999999999996 in floats, and the share meant is 29.
    return math.floor(Fraction(str(fraction)) * numel)
