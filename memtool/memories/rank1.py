"""The memory of MoRAM: banks of rank-1 atoms that grow by r for every task.

Every adapted linear map (a site) has a bank of its own. Growing freezes what is there: only the
atoms of the newest task learn. The gate that lets tokens choose among them is
`memtool.adapters.atoms`, whose names are repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtool.adapters.atoms import (
    AtomBank,
    AtomGate,
    ModuleAtoms,
    Owners,
    ScoreNorm,
    activations,
    add_atoms,
)
from memtool.adapters.layout import Layout, Site, sites_in_block_order
from memtool.adapters.mixing import Mixture
from memtool.devices import sent
from memtool.errors import MismatchError, NotFoundError, did_you_mean

__all__ = [
    "AtomBank",
    "AtomGate",
    "ModuleAtoms",
    "Rank1Memory",
    "ScoreNorm",
    "activations",
    "add_atoms",
    "init_atoms",
]

_PARTS = ("keys", "values", "scaling", "owner")
"""Of a bank, what is a buffer for every site."""


def init_atoms(
    layout: Layout, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The flat value (numel,) of `layout.rank` fresh atoms at every site; they change nothing.

    Keys are uniform within ±1/√d_in, which is Kaiming-uniform with a = √5, values zero. It lies on
    the generator's device; draws are float32 in the order of the sites.
    """
    flat = torch.zeros(layout.numel, dtype=dtype, device=generator.device)
    for segment, site in zip(layout.segments[::2], layout.sites, strict=True):
        draws = torch.rand(segment.numel, generator=generator, device=generator.device)
        bound = 1 / math.sqrt(site.in_features)
        flat[segment.offset : segment.offset + segment.numel] = (2 * draws - 1) * bound
    return flat


def require_linear(sites: Sequence[Site]) -> None:
    """Raise MismatchError for atoms at a convolution."""
    if kernels := [site.name for site in sites if site.kernel is not None]:
        raise MismatchError(
            f"atoms at {kernels[0]}, which is a convolution",
            expected="atoms at linear layers",
            remedy="--method mira, or backbone.targets without this layer",
        )


class Rank1Memory(nn.Module):
    """The atoms of all sites of a backbone.

        memory = Rank1Memory(sites)
        memory.grow(init_atoms(Layout(sites, 16), generator=generator), rank=16, owner=0)
        ...                                     train memory.parameters()
        flat = memory.fresh()                   what the store keeps of task 0
        memory.grow(...)                        freezes task 0

    Frozen atoms are buffers and not part of the state dict, as they come from a store; the newest
    are the parameters. An empty memory changes nothing.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.sites = sites_in_block_order(sites)
        self._places = {site.name: place for place, site in enumerate(self.sites)}
        # The owners of the atoms of every site, and how many they are, on the CPU.
        self._owners: list[list[int]] = [[] for _ in self.sites]
        self._counts = [0] * len(self.sites)
        if len(self._places) != len(self.sites) or not self.sites:
            raise MismatchError(
                f"{len(self.sites)} sites, {len(self._places)} of them different",
                expected="at least one, each of its own name",
            )
        require_linear(self.sites)
        for place, site in enumerate(self.sites):
            self._keep(
                place,
                AtomBank(
                    torch.empty(0, site.in_features),
                    torch.empty(0, site.out_features),
                    torch.empty(0),
                    torch.empty(0, dtype=torch.int64),
                ),
                [],
            )
        self.fresh_keys = nn.ParameterList()
        self.fresh_values = nn.ParameterList()
        self.fresh_owner: int | None = None
        self.fresh_scaling = 1.0
        self._frozen_blocks: dict[int, dict[str, ModuleAtoms]] = {}

    def __len__(self) -> int:
        """Atoms of the largest bank; they differ where atoms were pruned."""
        return max(len(self.bank(site.name)) for site in self.sites)

    @property
    def fresh_rank(self) -> int:
        """How many atoms of every site learn: r, or 0 when all are frozen."""
        return len(self.fresh_keys[0]) if len(self.fresh_keys) else 0

    def grow(
        self,
        flat: Tensor,
        *,
        rank: int,
        owner: int,
        scaling: float = 1.0,
        keys_learn: bool = True,
    ) -> None:
        """Freeze all atoms and add `rank` that learn at every site, from a flat value (numel,).

        `owner` is their task and `scaling` alpha / r; unless `keys_learn` only values learn. Their
        dtype and device are those of `flat`. Raises MismatchError when `flat` is not of the layout
        of these sites and that rank, and when that task has atoms already.
        """
        layout = Layout(self.sites, rank)
        if tuple(flat.shape) != (layout.numel,):
            raise MismatchError(
                f"atoms of shape {tuple(flat.shape)}",
                expected=f"({layout.numel},): {rank} at each of {len(self.sites)} sites",
                remedy="atoms made for this backbone",
            )
        if any(owner in owners for owners in self._owners):
            raise MismatchError(f"task {owner} has atoms already", expected="a new task")
        self.freeze()
        tensors = layout.unflatten(flat.detach())
        contiguous = torch.contiguous_format
        for a, b in zip(layout.segments[::2], layout.segments[1::2], strict=True):
            keys = tensors[a.name].clone(memory_format=contiguous)
            self.fresh_keys.append(nn.Parameter(keys, requires_grad=keys_learn))
            values = tensors[b.name].t().clone(memory_format=contiguous)
            self.fresh_values.append(nn.Parameter(values))
        self.fresh_owner, self.fresh_scaling = owner, scaling
        for place, owners in enumerate(self._owners):
            self._own(place, [*owners, *[owner] * rank], flat.device)

    def append(self, name: str, bank: AtomBank) -> None:
        """Add frozen atoms to the bank of one site, behind those that are there.

        Raises NotFoundError for a site that is not here; MismatchError for a bank of another width
        and while atoms learn, as those must stay the last.
        """
        if self.fresh_rank:
            raise MismatchError("atoms added behind some that learn", remedy="freeze() first")
        place = self._place(name)
        site, old = self.sites[place], self.bank(name)
        ModuleAtoms((site,), (bank,))  # refuses a bank of another width
        mine = bank.owner.tolist()
        if not len(old):
            self._keep(place, bank, mine)
            return
        self._keep(
            place,
            AtomBank(
                torch.cat((old.keys, bank.keys.detach().to(old.keys))),
                torch.cat((old.values, bank.values.detach().to(old.values))),
                torch.cat((old.scaling, bank.scaling.to(old.scaling))),
                torch.cat((old.owner, bank.owner.to(old.owner))),
            ),
            [*self._owners[place], *mine],
        )

    def freeze(self) -> None:
        """Make the newest atoms constants, too."""
        if not self.fresh_rank:
            return
        banks = [self.bank(site.name) for site in self.sites]
        self.fresh_keys, self.fresh_values = nn.ParameterList(), nn.ParameterList()
        self.fresh_owner = None
        for place, bank in enumerate(banks):
            self._keep(place, bank, self._owners[place])

    def fresh(self) -> Tensor:
        """The atoms that learn as a flat value (numel,) in the layout of their rank, detached.

        Raises NotFoundError when none does.
        """
        if not self.fresh_rank:
            raise NotFoundError("no atoms that learn", remedy="grow(...) adds some")
        layout = Layout(self.sites, self.fresh_rank)
        tensors: dict[str, Tensor] = {}
        pairs = zip(layout.segments[::2], layout.segments[1::2], strict=True)
        for place, (a, b) in enumerate(pairs):
            tensors[a.name] = self.fresh_keys[place].detach()
            tensors[b.name] = self.fresh_values[place].detach().t()
        return layout.flatten(tensors)

    def bank(self, name: str) -> AtomBank:
        """All atoms of a site, those that learn last. Raises NotFoundError for another name."""
        place = self._place(name)
        keys, values, scaling, owner, tasks = (
            getattr(self, f"{part}_{place}") for part in (*_PARTS, "tasks")
        )
        owners = Owners(tasks, self._counts[place])
        if self.fresh_owner is None:
            return AtomBank(keys, values, scaling, owner, owners=owners)
        rank = self.fresh_rank
        new_keys, new_values = self.fresh_keys[place], self.fresh_values[place]
        return AtomBank(
            torch.cat((keys.to(new_keys), new_keys)),
            torch.cat((values.to(new_values), new_values)),
            torch.cat((scaling, scaling.new_full((rank,), self.fresh_scaling))).to(new_keys.device),
            torch.cat((owner, owner.new_full((rank,), self.fresh_owner))).to(new_keys.device),
            fresh=rank,
            owners=owners,
        )

    def block(self, block: int) -> Mapping[str, ModuleAtoms]:
        """The atoms of a block by module; empty for a block without a site."""
        if block in self._frozen_blocks:
            return self._frozen_blocks[block]
        members: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.block == block:
                members.setdefault(site.module, []).append(site)
        modules: dict[str, ModuleAtoms] = {}
        for module, sites in members.items():
            ascending = tuple(sorted(sites, key=lambda site: site.first_row))
            modules[module] = ModuleAtoms(
                ascending, tuple(self.bank(site.name) for site in ascending)
            )
        if not self.fresh_rank:
            self._frozen_blocks[block] = modules
        return modules

    def recall(self, gate: AtomGate) -> Callable[[int, Tensor], Mixture | None]:
        """What a backbone calls for every block; the threshold is off while this module trains."""

        def of_block(block: int, hidden: Tensor) -> Mixture | None:
            del hidden
            modules = self.block(block)
            return Mixture.atoms(modules, gate, training=self.training) if modules else None

        return of_block

    def check_topk(self, topk: int) -> None:
        """Raises MismatchError for more atoms to keep than every bank has: for a user's own k."""
        smallest = min(self.sites, key=lambda site: len(self.bank(site.name)))
        count = len(self.bank(smallest.name))
        if topk > count:
            raise MismatchError(
                f"topk of {topk} with {count} atoms at {smallest.name}",
                expected=f"at most {count}",
                remedy=f"a topk of {max(count, 2)}, or a memory with more atoms",
            )

    def extra_repr(self) -> str:
        """`sites=24, atoms=160, fresh=16`."""
        return f"sites={len(self.sites)}, atoms={len(self)}, fresh={self.fresh_rank}"

    def _place(self, name: str) -> int:
        if name not in self._places:
            raise NotFoundError(
                f"no atoms at {name!r}", remedy=did_you_mean(name, list(self._places))
            )
        return self._places[name]

    def _keep(self, place: int, bank: AtomBank, owners: list[int]) -> None:
        for part in _PARTS:
            tensor = getattr(bank, part).detach()
            self.register_buffer(f"{part}_{place}", tensor, persistent=False)
        self._own(place, owners, bank.keys.device)

    def _own(self, place: int, owners: list[int], device: torch.device) -> None:
        """Say whose the atoms of a site are, those that learn last."""
        found = Owners.of(torch.tensor(owners, dtype=torch.int64))
        self._owners[place], self._counts[place] = owners, found.count
        self.register_buffer(f"tasks_{place}", sent(found.tasks, device), persistent=False)
        self._frozen_blocks = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._frozen_blocks = {}  # they would stay on the old device
        return super()._apply(fn, recurse)
