"""Which adapters a forward pass uses: recalls that know their answer beforehand.

A recall is a function of one forward pass: `recall(block, hidden)` gives the mixture of a block for
its input, or None. What every input chooses for itself is in `memtool.memories`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.convolution import Window
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, BlockValues, ModuleValues, Recall
from memtool.errors import MismatchError
from memtool.sections import Mix


def every(values: AdapterValues) -> Recall:
    """A single adapter for the whole batch, or adapter j for group j of the batch."""

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        del hidden
        here = values.block(block)
        if here is None:
            return None
        return Mixture.whole(here) if len(values) == 1 else Mixture.grouped(here)

    return recall


def same_for_all(values: AdapterValues, coefficients: Tensor, mix: Mix) -> Recall:
    """The same coefficients (t,) for every sample and block."""

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        here = values.block(block)
        if here is None:
            return None
        return Mixture.weighted(here, coefficients.expand(len(hidden), -1), mix)

    return recall


def equally(values: AdapterValues, mix: Mix) -> Recall:
    """Adapters in equal parts for every sample and block; a single one as it is."""
    count = len(values)
    if count == 1:
        return every(values)
    return same_for_all(values, torch.full((count,), 1 / count, device=values.scaling.device), mix)


def chosen(values: AdapterValues, index: Tensor) -> Recall:
    """Sample i of the batch uses adapter index[i]; index (batch,) int64."""

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        del hidden
        here = values.block(block)
        return None if here is None else Mixture.chosen(here, index)

    return recall


def on_top(base: Recall, values: AdapterValues, shares: Tensor | None = None) -> Recall:
    """What `base` recalls plus t more adapters: adapter j for group j of the batch.

    With `shares` (t,), all of them for every sample, with these coefficients. For residual
    adapters: ΔW = ΔW of the base + Σ_j s_j B_j A_j, so the base must mix by delta. A block where it
    recalls nothing has the adapters alone.
    """
    alone = every(values) if shares is None else same_for_all(values, shares, "delta")

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        under, own = base(block, hidden), values.block(block)
        if under is None or own is None:
            return under or alone(block, hidden)
        under = under.dense()
        stored = under.values
        sums = under.kind in ("delta", "ranks")
        if not sums or under.gate is None or not isinstance(stored, BlockValues):
            raise MismatchError(
                f"an adapter on top of a mixture of kind {under.kind!r}",
                expected="a sum of adapters, memory.mix delta",
            )
        if shares is None:
            group = torch.arange(len(own), device=hidden.device)
            each = group.repeat_interleave(len(hidden) // len(own))
            mine = F.one_hot(each, len(own)).to(under.gate.dtype)
        else:
            mine = shares.to(under.gate).expand(len(hidden), -1)
        joined = _stacked(stored, own)
        if under.kind == "ranks":
            each = mine.unsqueeze(-1).expand(-1, -1, under.gate.shape[-1])
            return Mixture.ranked(joined, torch.cat([under.gate, each], dim=1))
        both = torch.cat([under.gate, mine], dim=-1)
        return Mixture.weighted(joined, both, "delta")

    return recall


def equal_shares(count: int, values: BlockValues) -> Tensor:
    """Coefficients (count, t) of adapters in equal parts."""
    return torch.full((count, len(values)), 1 / len(values), device=values.scaling.device)


def given_for_each(
    values: AdapterValues, coefficients: Tensor, mix: Mix, blocks: Sequence[int] | None = None
) -> Recall:
    """Coefficients (batch, memories, t): one memory for all adapted blocks, or one for each.

    `blocks` are those that have a memory, where not all have: in the others adapters mix in equal
    parts.
    """
    alone = coefficients.shape[1] == 1 and blocks is None
    places = {block: place for place, block in enumerate(blocks or values.layout.blocks)}

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        del hidden
        here = values.block(block)
        if here is None:
            return None
        if blocks is not None and block not in places:
            return Mixture.weighted(here, equal_shares(len(coefficients), here), mix)
        return Mixture.weighted(here, coefficients[:, 0 if alone else places[block]], mix)

    return recall


def _stacked(first: BlockValues, second: BlockValues) -> BlockValues:
    """The adapters of both, one after another."""
    modules = {}
    for name, one in first.modules.items():
        other = second.modules[name]
        b = tuple(torch.cat(pair) for pair in zip(one.b, other.b, strict=True))
        modules[name] = ModuleValues(one.sites, torch.cat([one.a, other.a]), b)
    return BlockValues(modules, torch.cat([first.scaling, second.scaling]))


@dataclass(frozen=True, eq=False)
class Dropped(Mixture):
    """A mixture whose adapters do not see a random share of their inputs, the rest scaled up.

    Every adapted layer draws for itself from `generator`, which is of the device of the inputs.
    """

    share: float = 0.0
    generator: torch.Generator | None = None

    @classmethod
    def of(cls, mixture: Mixture, share: float, generator: torch.Generator) -> Dropped:
        """The same mixture, with inputs dropped."""
        return cls(**vars(mixture), share=share, generator=generator)

    def add_to(self, y: Tensor, x: Tensor, module: str) -> Tensor:
        """As `Mixture.add_to`."""
        if module not in self.values.modules:
            return y
        return super().add_to(y, self._dropped(x), module)

    def add_to_map(self, y: Tensor, x: Tensor, module: str, window: Window) -> Tensor:
        """As `Mixture.add_to_map`; a place of a channel is dropped from all patches."""
        if module not in self.values.modules:
            return y
        if window.is_a_place:  # which is added as a linear layer's, and dropped there
            return super().add_to_map(y, x, module, window)
        return super().add_to_map(y, self._dropped(x), module, window)

    def _dropped(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.share
        return x * (kept / (1 - self.share)).to(x.dtype)


def dropping(recall: Recall | None, share: float, seed: int, device: torch.device) -> Recall | None:
    """The recall with inputs dropped, by a generator of this seed; as it is for a share of 0."""
    if recall is None or share == 0:
        return recall
    generator = torch.Generator(device).manual_seed(seed)

    def dropped(block: int, hidden: Tensor) -> Mixture | None:
        mixture = recall(block, hidden)
        return None if mixture is None else Dropped.of(mixture, share, generator)

    return dropped
