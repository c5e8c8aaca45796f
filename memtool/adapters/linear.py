"""The linear layer of a frozen model that takes a mixture of adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool.adapters.layout import SLICES, Site
from memtool.adapters.mixing import Mixture


def for_autocast(x: Tensor) -> Tensor:
    """The input of a frozen and an adapter's product as autocast would convert it for each."""
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(kind))
    return x


class Adapted(nn.Module):
    """A layer that a mixture adds to; `name` is the module's in the sites of the backbone."""

    name: str

    def tokens(self, x: Tensor) -> Tensor:
        """An input of the layer as tokens (b, *tokens, in_features)."""
        return x


class AdaptedLinear(Adapted):
    """Stands where a frozen `nn.Linear` stood: y = W x + b, plus what a mixture adds.

    `weight` and `bias` are the very parameters of `linear`, frozen, under the same state_dict
    keys. `name` is the module's name in the sites of the backbone.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.name = name
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor, mixture: Mixture | None = None) -> Tensor:
        """Map x (b, *tokens, in_features) to (b, *tokens, out_features)."""
        if mixture is None:
            return F.linear(x, self.weight, self.bias)
        x = for_autocast(x)
        return mixture.add_to(F.linear(x, self.weight, self.bias), x, self.name)

    def site(self, block: int, part: str = "") -> Site:
        """The layer as a site of a block; of a fused projection the part "q", "k" or "v"."""
        rows = self.out_features // 3 if part else self.out_features
        return Site(
            block=block,
            module=self.name,
            slice=part,
            in_features=self.in_features,
            out_features=rows,
            first_row=SLICES.index(part) * rows if part else 0,
            module_rows=self.out_features,
        )

    def extra_repr(self) -> str:
        """`blocks.0.attn.qkv, in_features=192, out_features=576, bias=True`."""
        return (
            f"{self.name}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
