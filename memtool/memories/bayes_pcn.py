"""BayesPCN: an associative memory that is a small network with a belief over its weights.

Yoo & Wood (2022). Layers of activity x_0 (a pattern, numel wide) and x_1 … x_{L−1} (hidden, h
wide); x_l given x_{l+1} is normal around z W_l with z = gelu(x_{l+1}) and variance σ², and every
W_l is matrix-normal with mean R_l and row covariance U_l. With the weights integrated out the
energy of a set of activities is

    E = Σ_l [ D_l/2 · log v_l + |e_l|² / (2 v_l) ] + |x_{L−1} − r|² / (2 (σ² + u))
    v_l = σ² + z U_l zᵀ        e_l = x_l − z R_l

write clamps a pattern, finds hidden activities of low energy, and updates every layer by the exact
rank-1 rule of Bayesian linear regression. read clamps the key entries only.

Two exact identities make it independent of the width of the patterns inside the loops, and free
of state as large as they are:

  * With a prior mean of zero R_0 = C X: every row of R_0 is a combination of written patterns X
    (t, numel), and the memory keeps C (h, t) only. The patterns stay where they are, in the store.
  * The best free entries are x_F = z R_F, so that only |e_O|² of the observed entries counts:
    x_O·x_O − 2 z·b + z G zᵀ with b = C (X_O x_O) and G = C (X_O X_Oᵀ) Cᵀ.

The relative error of a recall has a floor of about (numel / key) (σ / rms)² with rms that of the
pattern: patterns are scaled by the rms of their key first, which a query has, too.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save
from torch import Tensor

from memtool.errors import (
    AlreadyExistsError,
    CapacityError,
    ConfigError,
    CorruptError,
    DataError,
    MismatchError,
    NotFoundError,
)
from memtool.memories.recalled import Recalled, checked_key, novelty
from memtool.tensor_bytes import read_tensors

CROWDED_SHARE = 0.8
"""Share of the hidden width beyond which a memory warns: recall breaks down at t ≈ h."""

MOST_STEPS = 100_000
"""Steps of a search; what asks for more is no memory of ours."""

_SAME_KEY = 1e-10
"""Two keys whose squared distance is this share of their squared length are one key."""


@dataclass(frozen=True)
class BayesPCNSettings:
    """Constants of the network and of the search for hidden activities.

    `decay` lowers the step size of the search to zero by a cosine. `logdet` counts in D_0 the
    observed entries of a read, or all ("joint"). `scaled` divides patterns by the rms of their
    key. `profiled` puts the best free entries in place of searching for them.
    """

    hidden: int = 256
    layers: int = 4
    sigma: float = 0.01
    steps: int = 500
    step_size: float = 0.01
    decay: bool = True
    logdet: Literal["observed", "joint"] = "observed"
    scaled: bool = True
    profiled: bool = True

    def __post_init__(self) -> None:
        for name, at_least in (("hidden", 1), ("layers", 2), ("steps", 1)):
            if getattr(self, name) < at_least:
                raise ConfigError(
                    f"BayesPCN with {name} {getattr(self, name)}", expected=f"at least {at_least}"
                )
        if self.steps > MOST_STEPS:
            raise ConfigError(f"BayesPCN with {self.steps} steps", expected=f"at most {MOST_STEPS}")
        for name in ("sigma", "step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"BayesPCN with {name} {getattr(self, name)}", expected="above 0")
        if self.logdet not in ("observed", "joint"):
            raise ConfigError(f"logdet {self.logdet!r}", expected="observed or joint")


PRESETS: Mapping[str, BayesPCNSettings] = MappingProxyType(
    {
        "default": BayesPCNSettings(),
        "published": BayesPCNSettings(decay=False, logdet="joint", scaled=False, profiled=False),
    }
)
"""`published` searches for the free entries too, over patterns as they are."""


@dataclass(frozen=True, eq=False)
class Belief:
    """What the network believes: U (layers − 1, h, h), R of the layers between hidden ones
    (layers − 2, h, h), C (h, t), the top mean r (h,) and its variance u. All float64.
    """

    covariance: Tensor
    means: Tensor
    mixture: Tensor
    top: Tensor
    top_variance: float

    @classmethod
    def prior(cls, settings: BayesPCNSettings) -> Belief:
        """Nothing written: means of zero, variances of one."""
        h, count = settings.hidden, settings.layers - 1
        return cls(
            torch.eye(h, dtype=torch.float64).repeat(count, 1, 1),
            torch.zeros(count - 1, h, h, dtype=torch.float64),
            torch.zeros(h, 0, dtype=torch.float64),
            torch.zeros(h, dtype=torch.float64),
            1.0,
        )


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the observed entries of n patterns say of z: |e_O|² = square − 2 z·pull + z gram zᵀ.

    `square` (n,), `pull` (n, h), `gram` (h, h); `entries` is D_0.
    """

    square: Tensor
    pull: Tensor
    gram: Tensor
    entries: int


def energy(
    hidden: Tensor, evidence: Evidence, belief: Belief, sigma: float
) -> tuple[Tensor, Tensor]:
    """Energy (n,) of hidden activities (layers − 1, n, h) and its gradient, of the same shape."""
    variance = sigma**2
    z = torch.nn.functional.gelu(hidden)
    to_z = []
    gradient = torch.zeros_like(hidden)
    total = hidden.new_zeros(hidden.shape[1])
    for layer, code in enumerate(z):
        spread = code @ belief.covariance[layer]
        v = variance + (spread * code).sum(dim=1, keepdim=True)
        if layer == 0:
            count = evidence.entries
            fitted = code @ evidence.gram
            square = (
                evidence.square[:, None]
                + ((fitted - 2 * evidence.pull) * code).sum(dim=1, keepdim=True)
            ).clamp_min(0.0)
            slope = fitted - evidence.pull
        else:
            mean = belief.means[layer - 1]
            error = hidden[layer - 1] - code @ mean
            count = error.shape[1]
            square = error.square().sum(dim=1, keepdim=True)
            slope = -(error @ mean.T)
            gradient[layer - 1] += error / v
        total += (count / 2 * v.log() + square / (2 * v))[:, 0]
        to_z.append((count / v - square / v.square()) * spread + slope / v)
    above = hidden[-1] - belief.top
    spread_of_top = variance + belief.top_variance
    total += above.square().sum(dim=1) / (2 * spread_of_top)
    gradient[-1] += above / spread_of_top
    gradient += torch.stack(to_z) * _gelu_slope(hidden)
    return total, gradient


def _gelu_slope(x: Tensor) -> Tensor:
    """The derivative of the exact GELU."""
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * torch.exp(-x.square() / 2) / math.sqrt(
        2 * math.pi
    )


class BayesPCN:
    """A BayesPCN memory of patterns (numel,), each with its first `key_length` entries as its key.

    Its state (`to_bytes`) is small: what was written stays outside, and `from_bytes` gets it back.
    """

    def __init__(
        self,
        numel: int,
        key_length: int,
        settings: BayesPCNSettings = PRESETS["default"],
        *,
        seed: int = 0,
    ) -> None:
        """An empty memory. Raises ConfigError for a key that is not a part of the pattern."""
        if not 0 < key_length < numel:
            raise ConfigError(
                f"a key of {key_length} of {numel} entries", expected=f"1 to {numel - 1} entries"
            )
        self.numel = numel
        self.key_length = key_length
        self.settings = settings
        self.seed = seed
        self._written = 0
        self._empty()

    def _empty(self) -> None:
        """Nothing but the prior; what was ever written still counts, for the next seed."""
        settings = self.settings
        self.belief = Belief.prior(settings)
        self._names: list[str] = []
        self._codes = torch.zeros(0, settings.layers - 1, settings.hidden, dtype=torch.float64)
        self._forgot_at = 0
        self._since: list[int] = []
        self._patterns = torch.zeros(0, self.numel)
        # Inner products of the stored patterns, whole and key entries only, as they are.
        self._whole = torch.zeros(0, 0, dtype=torch.float64)
        self._keys = torch.zeros(0, 0, dtype=torch.float64)
        self._scales = torch.zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the patterns, in the order written."""
        return tuple(self._names)

    @property
    def capacity(self) -> int:
        """How many patterns it can hold: the hidden width."""
        return self.settings.hidden

    def key_of(self, patterns: Tensor) -> Tensor:
        """The key entries (..., key_length) of patterns (..., numel)."""
        return patterns[..., : self.key_length]

    # Writing

    def write(self, name: str, pattern: Tensor) -> None:
        """Learn a pattern (numel,).

        Raises AlreadyExistsError for a name or key that is there, CapacityError when it is full,
        DataError for a key that is constant or entries that are not finite, MismatchError for
        another length.
        """
        self._check_room(name)
        if pattern.ndim != 1 or len(pattern) != self.numel or not pattern.is_floating_point():
            raise MismatchError(
                f"pattern {name!r} of shape {tuple(pattern.shape)}",
                expected=f"({self.numel},) floats",
            )
        if not bool(torch.isfinite(pattern).all()):
            raise DataError(
                f"pattern {name!r} holds numbers that are not finite",
                remedy="train the adapter again, with a smaller learning rate",
            )
        if not len(self):
            self._patterns = pattern.new_zeros(0, self.numel)
        pattern = pattern.to(self._patterns)
        key = self.key_of(pattern).double()
        checked_key(key, f"the key of {name!r}")
        scale = self._scale(key)
        keys = _bordered(self._keys, self.key_of(self._patterns), key)
        self._refuse_same_key(name, keys, torch.cat([self._scales, key.new_tensor([scale])]))
        whole = _bordered(self._whole, self._patterns, pattern)
        mixture, scales = self.belief.mixture, self._scales
        evidence = Evidence(
            square=whole[-1:, -1] / scale**2,
            pull=(whole[-1:, :-1] / (scales * scale)) @ mixture.T,
            gram=mixture @ (self._whole / (scales[:, None] * scales)) @ mixture.T,
            entries=self.numel,
        )
        hidden = self._settle(evidence, 1, self._generator(self._written + 1))[0][:, 0]
        self.belief = _learned(self.belief, hidden, self.settings.sigma)
        self._names.append(name)
        self._codes = torch.cat([self._codes, hidden[None]])
        self._patterns = torch.cat([self._patterns, pattern[None]])
        self._scales = torch.cat([self._scales, key.new_tensor([scale])])
        self._whole, self._keys = whole, keys
        self._written += 1
        self._since.append(self._written)

    def _refuse_same_key(self, name: str, keys: Tensor, scales: Tensor) -> None:
        """Keys (t + 1, t + 1) as inner products: is the last one among the others?"""
        scaled = keys / (scales[:, None] * scales)
        own = float(scaled[-1, -1])
        apart = scaled.diagonal()[:-1] + own - 2 * scaled[-1, :-1]
        for place in torch.nonzero(apart <= _SAME_KEY * own).flatten().tolist():
            raise AlreadyExistsError(
                f"adapters {self._names[place]!r} and {name!r} have the same key",
                expected="adapters that differ in their first numbers, which are the key",
                remedy="a larger modulation.key_share, or train one with another seed",
            )

    def _check_room(self, name: str) -> None:
        if name in self._names:
            raise AlreadyExistsError(f"a pattern named {name!r} is in memory")
        count, h = len(self) + 1, self.settings.hidden
        if count > h:
            raise CapacityError(
                f"a BayesPCN memory of hidden width {h} is full: it holds {len(self)} adapters",
                expected=f"at most {h}",
                remedy="--set modulation.hidden with a larger width, and write all adapters anew",
            )
        if count > CROWDED_SHARE * h:
            warnings.warn(
                f"{count} adapters in a BayesPCN memory of hidden width {h}: beyond "
                f"{CROWDED_SHARE:.0%} of its width recall gets worse",
                stacklevel=3,
            )

    def forget(self, share: float) -> None:
        """Let the belief fade toward the prior: 0 changes nothing, 1 leaves an empty memory.

        Every layer fades, the top one too: means by √(1 − share), variances toward those of the
        prior by `share`.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"forget {share}", expected="a share from 0 to 1")
        if share == 0:
            return
        if share == 1:
            self._empty()
            return
        keep, belief = math.sqrt(1 - share), self.belief
        eye = torch.eye(self.settings.hidden, dtype=torch.float64)
        self.belief = replace(
            belief,
            covariance=(1 - share) * belief.covariance + share * eye,
            means=keep * belief.means,
            mixture=keep * belief.mixture,
            top=keep * belief.top,
            top_variance=(1 - share) * belief.top_variance + share,
        )
        self._forgot_at = self._written

    def delete(self, name: str) -> None:
        """Take a pattern out as if it had never been written: the inverse of its write.

        Raises NotFoundError for an unknown name, and ConfigError for one that was written before a
        `forget`, which no longer has an inverse.
        """
        if name not in self._names:
            raise NotFoundError(f"no pattern {name!r} in memory")
        place = self._names.index(name)
        if self._since[place] <= self._forgot_at:
            raise ConfigError(
                f"{name!r} was written before forget and cannot be taken out exactly",
                remedy="a new memory of the other patterns",
            )
        self.belief = _unlearned(self.belief, self._codes[place], place, self.settings.sigma)
        keep = [t for t in range(len(self)) if t != place]
        self._codes, self._patterns = self._codes[keep], self._patterns[keep]
        self._whole, self._keys = self._whole[keep][:, keep], self._keys[keep][:, keep]
        self._scales = self._scales[keep]
        del self._names[place], self._since[place]

    # Reading

    def recall(self, keys: Tensor) -> Recalled:
        """Complete keys (n, key_length): patterns, how much of each stored one, energy, novelty.

        What is recalled for a key does not depend on the other keys. Raises NotFoundError when the
        memory is empty.
        """
        if not len(self):
            raise NotFoundError("the memory is empty", remedy="write an adapter first")
        if keys.ndim != 2 or keys.shape[1] != self.key_length:
            raise MismatchError(
                f"keys of shape {tuple(keys.shape)}", expected=f"(n, {self.key_length})"
            )
        keys = keys.double()
        for row in keys:
            checked_key(row, "a query")
        scale = torch.tensor([self._scale(row) for row in keys], dtype=torch.float64)
        stored = self.key_of(self._patterns)
        toward = _gram(keys, stored) / (scale[:, None] * self._scales)
        mixture = self.belief.mixture
        inner = self._keys / (self._scales[:, None] * self._scales)
        evidence = Evidence(
            square=keys.square().sum(dim=1) / scale.square(),
            pull=toward @ mixture.T,
            gram=mixture @ inner @ mixture.T,
            entries=self.key_length if self.settings.logdet == "observed" else self.numel,
        )
        generator = self._generator(0)
        if self.settings.profiled:
            hidden, found = self._settle(evidence, len(keys), generator)
            free = None
        else:
            hidden, found, free = self._settle_all(evidence, len(keys), generator)
        code = torch.nn.functional.gelu(hidden[0])
        # The share of pattern t, in its own units, in what is recalled for a key in the key's.
        shares = code @ mixture / self._scales * scale[:, None]
        values = self._patterns[:, self.key_length :]
        if free is None:
            recalled = shares.to(values.dtype) @ values
        else:
            recalled = free * scale[:, None].to(free)
        fitted = shares.to(values.dtype) @ stored
        return Recalled(
            patterns=torch.cat([keys.to(values.dtype), recalled], dim=1),
            coefficients=shares,
            energy=found,
            novelty=novelty(keys, fitted.double()),
        )

    def _settle(
        self, evidence: Evidence, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Hidden activities (layers − 1, count, h) of low energy, and that energy (count,)."""
        settings = self.settings
        hidden = self._start(count, generator)
        search = _Adam(settings)
        for step in range(settings.steps):
            _, gradient = energy(hidden, evidence, self.belief, settings.sigma)
            hidden = search.step(step, 0, hidden, gradient)
        return hidden, energy(hidden, evidence, self.belief, settings.sigma)[0]

    def _settle_all(
        self, evidence: Evidence, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the free entries (count, numel − key) searched for as well, from zero.

        What is as wide as a pattern has the type of the patterns.
        """
        settings, belief = self.settings, self.belief
        hidden = self._start(count, generator)
        wide = self._patterns.dtype
        mean = (belief.mixture / self._scales).to(wide) @ self._patterns[:, self.key_length :]
        free = mean.new_zeros(count, mean.shape[1])
        search = _Adam(settings)

        def slopes() -> tuple[Tensor, Tensor, Tensor]:
            code = torch.nn.functional.gelu(hidden[0])
            error = free - code.to(wide) @ mean
            square = error.square().sum(dim=1, keepdim=True).double()
            spread = code @ belief.covariance[0]
            v = settings.sigma**2 + (spread * code).sum(dim=1, keepdim=True)
            found, gradient = energy(hidden, evidence, belief, settings.sigma)
            more = -(error @ mean.T).double() / v - square / v.square() * spread
            gradient[0] += more * _gelu_slope(hidden[0])
            return found + (square / (2 * v))[:, 0], gradient, error / v.to(wide)

        for step in range(settings.steps):
            _, toward_hidden, toward_free = slopes()
            hidden = search.step(step, 0, hidden, toward_hidden)
            free = search.step(step, 1, free, toward_free)
        return hidden, slopes()[0], free

    def _start(self, count: int, generator: torch.Generator) -> Tensor:
        """The same start for every pattern of a batch: a recall has no neighbours."""
        settings = self.settings
        shape = (settings.layers - 1, 1, settings.hidden)
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        return start.expand(-1, count, -1) / math.sqrt(settings.hidden)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def _scale(self, key: Tensor) -> float:
        return float(key.square().mean().sqrt()) if self.settings.scaled else 1.0

    # As bytes

    def to_bytes(self) -> bytes:
        """The belief and codes as a safetensors file; the patterns are not in it."""
        about = {
            "numel": self.numel,
            "key_length": self.key_length,
            "seed": self.seed,
            "written": self._written,
            "forgot_at": self._forgot_at,
            "since": self._since,
            "names": self._names,
            "settings": asdict(self.settings),
        }
        belief = self.belief
        return save(
            {
                "covariance": belief.covariance.contiguous(),
                "means": belief.means.contiguous(),
                "mixture": belief.mixture.contiguous(),
                "top": belief.top.contiguous(),
                "top_variance": torch.tensor(belief.top_variance, dtype=torch.float64),
                "codes": self._codes.contiguous(),
                "whole": self._whole.contiguous(),
                "keys": self._keys.contiguous(),
                "scales": self._scales.contiguous(),
            },
            {"memory": json.dumps(about, sort_keys=True)},
        )

    @classmethod
    def from_bytes(cls, data: bytes, patterns: Tensor, where: str) -> BayesPCN:
        """The memory that `to_bytes` wrote, over its patterns (t, numel) in the order of `names`.

        Raises CorruptError for other bytes, and MismatchError for other patterns.
        """
        about = _about(data, where)
        tensors = read_tensors(data, where, **_SHAPES)
        settings = about.settings
        layers, hidden = tensors["covariance"].shape[:2]
        count = len(tensors["codes"])
        if (settings.hidden, settings.layers - 1, len(tensors["means"])) != (
            hidden,
            layers,
            layers - 1,
        ) or not count == len(about.names) == len(about.since):
            raise CorruptError(
                f"{where} holds {count} patterns in {layers} layers of {hidden}",
                expected=f"{len(about.names)} patterns in the layers of {settings}",
            )
        memory = cls(about.numel, about.key_length, settings, seed=about.seed)
        memory.belief = Belief(
            tensors["covariance"],
            tensors["means"],
            tensors["mixture"],
            tensors["top"],
            float(tensors["top_variance"]),
        )
        memory._codes = tensors["codes"]
        memory._whole, memory._keys = tensors["whole"], tensors["keys"]
        memory._scales = tensors["scales"]
        memory._names, memory._since = list(about.names), list(about.since)
        memory._written, memory._forgot_at = about.written, about.forgot_at
        if tuple(patterns.shape) != (len(memory), memory.numel):
            raise MismatchError(
                f"patterns of shape {tuple(patterns.shape)} for {where}",
                expected=f"({len(memory)}, {memory.numel}), in the order of its names",
            )
        memory._patterns = patterns
        return memory


def names_in(data: bytes, where: str) -> tuple[str, ...]:
    """The names of the patterns behind the bytes of a memory, in order. Raises CorruptError."""
    return _about(data, where).names


_SHAPES = {
    "covariance": "float64 l h h",
    "means": "float64 m h h",
    "mixture": "float64 h t",
    "top": "float64 h",
    "top_variance": "float64",
    "codes": "float64 t l h",
    "whole": "float64 t t",
    "keys": "float64 t t",
    "scales": "float64 t",
}


class _About(BaseModel):
    """What the header of a stored memory says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    numel: int
    key_length: int
    settings: BayesPCNSettings
    seed: int
    names: tuple[str, ...]
    since: tuple[int, ...]
    written: int
    forgot_at: int


def _about(data: bytes, where: str) -> _About:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return _About.model_validate_json(header["__metadata__"]["memory"])
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptError(
            f"{where} holds no BayesPCN memory: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    # RecursionError: what is nested too deep for json.
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        raise CorruptError(f"{where} holds no BayesPCN memory: {error}") from error


def _learned(belief: Belief, hidden: Tensor, sigma: float) -> Belief:
    """After one more pattern with hidden activities (layers − 1, h): exact, one rank a layer."""
    covariance, means = belief.covariance.clone(), belief.means.clone()
    codes = torch.nn.functional.gelu(hidden)
    mixture = belief.mixture
    for layer, code in enumerate(codes):
        spread = belief.covariance[layer] @ code
        gain = spread / (sigma**2 + code @ spread)
        covariance[layer] -= gain[:, None] * spread
        if layer == 0:
            # R += g (x − z R) with R = C X: the new pattern is one more row of X.
            mixture = torch.cat([mixture - gain[:, None] * (code @ mixture), gain[:, None]], dim=1)
        else:
            error = hidden[layer - 1] - code @ means[layer - 1]
            means[layer - 1] += gain[:, None] * error
    variance = 1 / (1 / belief.top_variance + 1 / sigma**2)
    top = variance * (belief.top / belief.top_variance + hidden[-1] / sigma**2)
    return Belief(covariance, means, mixture, top, variance)


def _unlearned(belief: Belief, hidden: Tensor, place: int, sigma: float) -> Belief:
    """Before the pattern in column `place` was learned with these activities: the inverse."""
    covariance, means = belief.covariance.clone(), belief.means.clone()
    codes = torch.nn.functional.gelu(hidden)
    mixture = belief.mixture
    for layer, code in enumerate(codes):
        spread = belief.covariance[layer] @ code
        covariance[layer] += spread[:, None] * spread / (sigma**2 - code @ spread)
        back = covariance[layer] @ code / sigma**2
        if layer == 0:
            error = -(code @ mixture)
            error[place] += 1.0
            kept = [t for t in range(mixture.shape[1]) if t != place]
            mixture = (mixture - back[:, None] * error)[:, kept]
        else:
            error = hidden[layer - 1] - code @ means[layer - 1]
            means[layer - 1] -= back[:, None] * error
    precision = 1 / belief.top_variance - 1 / sigma**2
    # Rounding may leave less than the prior's own precision when little else was written.
    variance = 1 / max(precision, 1.0)
    top = variance * (belief.top / belief.top_variance - hidden[-1] / sigma**2)
    return Belief(covariance, means, mixture, top, variance)


class _Adam:
    """Adam (Kingma & Ba) over a few tensors, with the step size that the settings say."""

    def __init__(self, settings: BayesPCNSettings) -> None:
        self._settings = settings
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, number: int, which: int, value: Tensor, gradient: Tensor) -> Tensor:
        """`value` after step `number` (from 0) against its gradient."""
        settings = self._settings
        first, second = self._moments.get(which) or (
            torch.zeros_like(gradient),
            torch.zeros_like(gradient),
        )
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        self._moments[which] = first, second
        size = settings.step_size
        if settings.decay:
            size *= 0.5 * (1 + math.cos(math.pi * number / settings.steps))
        corrected = first / (1 - 0.9 ** (number + 1))
        spread = (second / (1 - 0.999 ** (number + 1))).sqrt()
        return value - size * corrected / (spread + 1e-8)


def _gram(a: Tensor, b: Tensor, entries: int = 1 << 16) -> Tensor:
    """A bᵀ in float64, some entries at a time: no float64 copy of all of them."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for low in range(0, a.shape[1], entries):
        total += a[:, low : low + entries].double() @ b[:, low : low + entries].double().T
    return total


def _bordered(inner: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Inner products of rows (t, d), with one more row (d,): (t + 1, t + 1)."""
    row = _gram(rows, new[None])[:, 0]
    own = _gram(new[None], new[None])[0]
    return torch.cat([torch.cat([inner, row[:, None]], dim=1), torch.cat([row, own])[None]])
