"""The few adapters that each sample of a batch uses, of many that are stored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtool.devices import sent


@dataclass(frozen=True, eq=False)
class Sorted:
    """Pairs of a sample and an adapter, p = b · k of them, one adapter after another.

    `order` (p,) are the pairs as they are sorted, `back` (p,) where each of them went, `ends` (t,)
    where in the order the pairs of every adapter end.
    """

    order: Tensor
    back: Tensor
    ends: Tensor

    @classmethod
    def of(cls, adapters: Tensor, count: int) -> Sorted:
        """The pairs with these adapters (p,), of so many; no number of them is looked at."""
        owners, order = adapters.sort(stable=True)
        numbers = torch.arange(count, device=adapters.device)
        return cls(order, order.argsort(), torch.searchsorted(owners, numbers, right=True))


@dataclass(frozen=True, eq=False)
class Picks:
    """Which adapters each sample uses: those of its row of `index` (b, k) int64, of a stack of t.

    `used` (u,) are all adapters that the batch uses, ascending and each once; None: perhaps all.
    `ready` holds the pairs sorted, for the layers that come after the first.
    """

    index: Tensor
    used: Tensor | None = None
    ready: dict[int, Sorted] = field(default_factory=dict)

    @classmethod
    def of(cls, coefficients: Tensor, among: Tensor | None = None) -> tuple[Tensor, Picks]:
        """The coefficients (b, k) that are not zero of (b, t), and the adapters they are of.

        k is the most that a sample has; one with fewer has zeros behind them. All that are not zero
        are `among` these adapters (a,), which ascend. Which they are is found on the CPU: a device
        is waited for once.
        """
        some = coefficients if among is None else coefficients.index_select(1, among)
        rows, columns = some.detach().cpu().nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(some))
        most = max(1, int(counts.max())) if len(rows) else 1
        places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        used, inverse = columns.unique(return_inverse=True)
        if not len(used):
            used = columns.new_zeros(1)
        at = used[0].repeat(len(some), most)
        at[rows, places] = used[inverse]
        real = torch.arange(most) < counts.unsqueeze(1)
        at, used, real = (sent(one, some.device) for one in (at, used, real))
        weights = some.gather(1, at) * real
        if among is not None:
            at, used = among[at], among[used]
        return weights, cls(at, used)

    def spread(self, weights: Tensor, count: int) -> Tensor:
        """Weights (b, k) as those (b, count) of all adapters that are used."""
        at = self._among_used()
        return weights.new_zeros(at.shape[0], count).scatter_add(1, at, weights)

    def sorted(self, count: int) -> Sorted:
        """Its pairs by adapter, of a whole stack of `count`; of fewer, of those that are used."""
        if count not in self.ready:
            few = self.used is not None and len(self.used) == count
            at = self._among_used() if few else self.index
            self.ready[count] = Sorted.of(at.flatten(), count)
        return self.ready[count]

    def _among_used(self) -> Tensor:
        return self.index if self.used is None else torch.searchsorted(self.used, self.index)
