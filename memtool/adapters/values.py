"""Stacked values of several adapters, on the device once and in the order the kernels want.

A flat value is one adapter as a vector (`layout.py`). Here t of them are cut up and stacked: for
every adapted module one A over all its sites and adapters, for every site one B, each contiguous.
A is (t, sites, r, d_in): with every adapter in one piece, mixing A of whole adapters is one matrix
product, choosing one is one copy, and the rank products of all sites share one pass over the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Layout, Segment, Site
from memtool.adapters.picks import Picks
from memtool.errors import MismatchError

if TYPE_CHECKING:
    from memtool.adapters.mixing import Mixture

Recall = Callable[[int, Tensor], "Mixture | None"]
"""What a backbone calls with (block, the block's input (b, n, d)) to learn how to adapt it."""


@dataclass(frozen=True, eq=False)
class ModuleValues:
    """The adapters of one linear module: all its sites, which share the module's input.

    `sites` ascend by `first_row`; `a` is (t, sites, r, d_in); `b` holds for every site
    (t, r / groups, out_features of the site): B transposed, of a convolution in groups as it is
    stored.
    """

    sites: tuple[Site, ...]
    a: Tensor
    b: tuple[Tensor, ...]

    def of(self, adapters: Tensor | None, dtype: torch.dtype) -> ModuleValues:
        """These adapters (n,) in this order, None: all; only what is taken is copied and cast.

        B of a convolution in groups is (n, r, out_features): zero where a group is not made of a
        rank.
        """

        def taken(factor: Tensor) -> Tensor:
            some = factor if adapters is None else factor.index_select(0, adapters)
            return some.to(dtype)

        b = (over_groups(taken(f), s.groups) for f, s in zip(self.b, self.sites, strict=True))
        return ModuleValues(self.sites, taken(self.a), tuple(b))


@dataclass(frozen=True, eq=False)
class BlockValues:
    """The adapters of one block: values by module name, and the scaling (t,) that they share."""

    modules: Mapping[str, ModuleValues]
    scaling: Tensor

    def __len__(self) -> int:
        return self.scaling.shape[0]

    def of(self, adapters: Tensor) -> BlockValues:
        """A copy of these adapters (n,), in this order."""

        def taken(one: ModuleValues) -> ModuleValues:
            b = tuple(factor.index_select(0, adapters) for factor in one.b)
            return ModuleValues(one.sites, one.a.index_select(0, adapters), b)

        modules = {name: taken(one) for name, one in self.modules.items()}
        return BlockValues(modules, self.scaling.index_select(0, adapters))


@dataclass(frozen=True)
class _Module:
    """One module of the layout: its sites, ascending by row, and where their A and B lie flat."""

    block: int
    name: str
    sites: tuple[Site, ...]
    segments: tuple[tuple[Segment, Segment], ...]


def _modules(layout: Layout) -> tuple[_Module, ...]:
    """The modules in the order in which the layout first names them."""
    members: dict[tuple[int, str], list[tuple[Site, tuple[Segment, Segment]]]] = {}
    pairs = zip(layout.segments[::2], layout.segments[1::2], strict=True)
    for site, pair in zip(layout.sites, pairs, strict=True):
        members.setdefault((site.block, site.module), []).append((site, pair))
    modules: list[_Module] = []
    for (block, name), found in members.items():
        found.sort(key=lambda member: member[0].first_row)
        sites = tuple(site for site, _ in found)
        _check_sites(name, sites)
        modules.append(_Module(block, name, sites, tuple(pair for _, pair in found)))
    return tuple(modules)


def _check_sites(name: str, sites: tuple[Site, ...]) -> None:
    """Sites of one module read the same input and write disjoint rows inside the module."""
    end = 0
    for site in sites:
        if (site.in_features, site.module_rows) != (sites[0].in_features, sites[0].module_rows):
            raise MismatchError(
                f"the sites of {name} differ in input width or in rows of the module",
                expected="slices of one and the same linear layer",
            )
        if site.first_row < end or site.first_row + site.out_features > site.module_rows:
            raise MismatchError(
                f"{site.name} covers rows {site.first_row} to "
                f"{site.first_row + site.out_features} of {site.module_rows}",
                expected=f"rows from {end} on, inside the module and not shared by two sites",
            )
        end = site.first_row + site.out_features


def over_groups(b: Tensor, groups: int) -> Tensor:
    """B (t, r / groups, rows) of a convolution in groups as (t, r, rows), zero between them."""
    if groups == 1:
        return b
    ranks, rows = b.shape[1] * groups, b.shape[2]
    of_rank = torch.arange(ranks, device=b.device) // b.shape[1]
    of_row = torch.arange(rows, device=b.device) // (rows // groups)
    return b.repeat(1, groups, 1) * (of_rank[:, None] == of_row).to(b.dtype)


class AdapterValues(nn.Module):
    """A and B of t adapters, stacked per module and shared by all layers that use them.

    Made by `from_flat`. `a` has one parameter a module, `b` one a site, shaped as in
    `ModuleValues`; they learn if `trainable`, else they are
    frozen. `scaling` is a buffer (t,): the effective alpha / r of every adapter.
    """

    layout: Layout
    scaling: Tensor

    def __init__(
        self,
        layout: Layout,
        a: list[Tensor],
        b: list[Tensor],
        scaling: Tensor,
        *,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.a = nn.ParameterList(nn.Parameter(tensor, requires_grad=trainable) for tensor in a)
        self.b = nn.ParameterList(nn.Parameter(tensor, requires_grad=trainable) for tensor in b)
        self.register_buffer("scaling", scaling)
        # Per block: (module, index of its A, index of the B of its first site).
        self._of_block: dict[int, list[tuple[_Module, int, int]]] = {}
        first = 0
        for index, module in enumerate(_modules(layout)):
            self._of_block.setdefault(module.block, []).append((module, index, first))
            first += len(module.sites)

    @classmethod
    def from_flat(
        cls,
        values: Tensor,
        layout: Layout,
        scaling: Tensor | float,
        *,
        trainable: bool = False,
    ) -> AdapterValues:
        """Stack flat values (t, numel) of one layout; dtype and device are those of `values`.

        `scaling` is alpha / r: (t,), or one number for all. The values are copied. Raises
        MismatchError when shapes and layout do not fit.
        """
        if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] != layout.numel:
            raise MismatchError(
                f"adapter values of shape {tuple(values.shape)}",
                expected=f"(adapters, {layout.numel}), at least one adapter",
            )
        count = values.shape[0]
        if not isinstance(scaling, Tensor):
            scaling = torch.full((count,), float(scaling))
        if tuple(scaling.shape) != (count,):
            raise MismatchError(
                f"scaling of shape {tuple(scaling.shape)}", expected=f"({count},), one an adapter"
            )
        tensors = layout.unflatten(values.detach())
        a: list[Tensor] = []
        b: list[Tensor] = []
        for module in _modules(layout):
            a.append(torch.stack([tensors[segment.name] for segment, _ in module.segments], dim=1))
            for _, segment in module.segments:
                # clone, as a transposed view may count as contiguous and would share `values`.
                columns = tensors[segment.name].transpose(1, 2)
                b.append(columns.clone(memory_format=torch.contiguous_format))
        scaling = scaling.detach().to(values.device, copy=True)
        return cls(layout, a, b, scaling, trainable=trainable)

    def flat(self) -> Tensor:
        """The flat values (t, numel): the exact inverse of `from_flat`, a detached copy."""
        values = self.a[0].new_empty((len(self), self.layout.numel))
        with torch.no_grad():
            tensors = self.layout.unflatten(values)
            for module, index, first in (m for found in self._of_block.values() for m in found):
                for site, (a, b) in enumerate(module.segments):
                    tensors[a.name].copy_(self.a[index][:, site])
                    tensors[b.name].copy_(self.b[first + site].transpose(1, 2))
        return values

    def __len__(self) -> int:
        return self.scaling.shape[0]

    def block(self, index: int) -> BlockValues | None:
        """The values of one block (no copy), or None where the block has no site."""
        found = self._of_block.get(index)
        if found is None:
            return None
        modules = {
            module.name: ModuleValues(
                module.sites,
                self.a[i],
                tuple(self.b[first + place] for place in range(len(module.sites))),
            )
            for module, i, first in found
        }
        return BlockValues(modules, self.scaling)

    @property
    def begin(self) -> int:
        """The first block that they change."""
        return self.layout.blocks[0]

    def at(self, index: int, picks: Picks) -> tuple[BlockValues, Picks] | None:
        """The values of one block that hold the adapters picked, and where in them these are."""
        found = self.block(index)
        return None if found is None else (found, picks)

    def extra_repr(self) -> str:
        """`adapters=3, rank=8, sites=24`."""
        return f"adapters={len(self)}, rank={self.layout.rank}, sites={len(self.layout.sites)}"
