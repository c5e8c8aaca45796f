"""Several recalls side by side in one pass: every group of rows of a batch has its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memtool.adapters.convolution import Window
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall


@dataclass(frozen=True, eq=False)
class SideBySide(Mixture):
    """The mixtures of contiguous groups of a batch; `sizes` are their rows. None adds nothing."""

    parts: tuple[Mixture | None, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Mixture | None], sizes: Sequence[int]) -> SideBySide | None:
        """The groups in one; None where no group has a mixture."""
        first = next((part for part in parts if part is not None), None)
        if first is None:
            return None
        return cls(first.values, first.kind, parts=tuple(parts), sizes=tuple(sizes))

    def add_to(self, y: Tensor, x: Tensor, module: str) -> Tensor:
        """As `Mixture.add_to`, group by group."""
        groups = zip(self.parts, y.split(self.sizes), x.split(self.sizes), strict=True)
        return torch.cat(
            [
                own if part is None else part.add_to(own, given, module)
                for part, own, given in groups
            ]
        )

    def add_to_map(self, y: Tensor, x: Tensor, module: str, window: Window) -> Tensor:
        """As `Mixture.add_to_map`, group by group."""
        groups = zip(self.parts, y.split(self.sizes), x.split(self.sizes), strict=True)
        return torch.cat(
            [
                own if part is None else part.add_to_map(own, given, module, window)
                for part, own, given in groups
            ]
        )

    def over(self, rows: int, module: str) -> SideBySide:
        """As `Mixture.over`, every group by itself."""
        windows = rows // sum(self.sizes)
        sizes = tuple(size * windows for size in self.sizes)
        parts = tuple(
            None if part is None else part.over(size, module)
            for part, size in zip(self.parts, sizes, strict=True)
        )
        return replace(self, parts=parts, sizes=sizes)


def side_by_side(recalls: Sequence[Recall | None], sizes: Sequence[int]) -> Recall:
    """What a batch recalls whose first `sizes[0]` rows recall by `recalls[0]`, and so on."""

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        groups = zip(recalls, hidden.split(tuple(sizes)), strict=True)
        parts = [None if one is None else one(block, rows) for one, rows in groups]
        return SideBySide.of(parts, sizes)

    return recall
