"""A decoder of queries: what is added to the weight of every rank of every adapter, per sample.

The mixture of MIRA gives all ranks of an adapter the one weight a_t of its key. A decoder, a
network with one hidden layer, tells them apart, and one adapted block from another:

    g_ptk = a_t + G(q)_ptk        G(q) = V gelu(U q + c) + e        V = e = 0 at the start

for block p, adapter t and rank k, so that ΔW_p = Σ_tk g_ptk s_t b_tk a_tkᵀ over the T · r rank-1
pieces that the adapters of a layer are made of, a row of A and a column of B each. With V = e = 0
it is the mixture. The gain is diagonal in rank space: pieces are weighed, not recombined.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from memtool.devices import in_float32
from memtool.errors import MismatchError


class RankDecoder(nn.Module):
    """Queries (b, dim) → what is added to the weight of every rank: (b, places, adapters, rank).

    `places` are the blocks that are adapted through it. `inner` is U and c, `outer` V and e, whose
    rows are those of one adapter after another: (adapters · places · rank, width).
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear, *, places: int, rank: int) -> None:
        """Raises MismatchError where the layers do not fit, or rows are of no whole adapter."""
        super().__init__()
        self.places, self.rank = places, rank
        each, rows = places * rank, outer.out_features
        if each < 1 or rows < 1 or rows % each or outer.in_features != inner.out_features:
            raise MismatchError(
                f"a decoder of {inner.in_features} to {inner.out_features}, and of "
                f"{outer.in_features} to {rows}, for {places} places and rank {rank}",
                expected=f"a hidden layer of one width, and {max(each, 1)} rows for every adapter",
            )
        self.adapters = rows // each
        self.inner = inner
        self.outer = outer

    @classmethod
    def fresh(
        cls,
        dim: int,
        width: int,
        *,
        places: int,
        adapters: int,
        rank: int,
        generator: torch.Generator | None = None,
    ) -> RankDecoder:
        """One that adds nothing yet, of so many hidden units: `generator` draws U, nothing else.

        Raises MismatchError for a size below 1.
        """
        sizes = {"dim": dim, "width": width, "places": places, "adapters": adapters, "rank": rank}
        for name, size in sizes.items():
            if size < 1:
                raise MismatchError(f"a decoder of {name} {size}", expected="at least 1")
        drawn = torch.empty(width, dim)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        rows = adapters * places * rank
        return cls(
            layer_of(drawn, torch.zeros(width)),
            layer_of(torch.zeros(rows, width), torch.zeros(rows)),
            places=places,
            rank=rank,
        )

    @property
    def rows_each(self) -> int:
        """Rows of the outer layer that belong to one adapter."""
        return self.places * self.rank

    @property
    def numbers(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, queries: Tensor) -> Tensor:
        """As the class says, float32 or better, also under autocast."""
        with torch.autocast(queries.device.type, enabled=False):
            flat: Tensor = self.outer(F.gelu(self.inner(in_float32(queries))))
        return flat.unflatten(-1, (self.adapters, self.places, self.rank)).transpose(-3, -2)

    def grown(self, adapters: int) -> RankDecoder:
        """A copy for so many adapters: the first are those of before, the others add zero.

        Raises MismatchError for fewer than there are.
        """
        if adapters < self.adapters:
            raise MismatchError(
                f"a decoder of {self.adapters} adapters, grown to {adapters}",
                expected=f"at least {self.adapters}",
            )
        new = (adapters - self.adapters) * self.rows_each
        inner = layer_of(self.inner.weight.detach(), self.inner.bias.detach())
        outer = layer_of(
            F.pad(self.outer.weight.detach(), (0, 0, 0, new)),
            F.pad(self.outer.bias.detach(), (0, new)),
        )
        return RankDecoder(inner, outer, places=self.places, rank=self.rank)


def width_for(numbers: int, dim: int, rows: int) -> int:
    """The widest hidden layer with which a decoder has at most so many numbers; 0 for none.

    `rows` is adapters · places · rank: it has width · (dim + 1) + rows · (width + 1) numbers.
    """
    return max(0, (numbers - rows) // (dim + 1 + rows))


def numbers_of(width: int, dim: int, rows: int) -> int:
    """How many numbers a decoder has; arguments as of `width_for`."""
    return width * (dim + 1) + rows * (width + 1)


def layer_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of a copy of these, in their type; draws no random numbers."""
    kind = {"dtype": weight.dtype, "device": weight.device}
    layer = skip_init(nn.Linear, weight.shape[1], weight.shape[0], **kind)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
