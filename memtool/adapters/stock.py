"""Adapters of unlike shapes, read when they are first used: ranks, sites and scalings of their own.

What a few of them have in common is made for the few alone: one layout that has room for each, in
which an adapter is zero where it has no number. That changes nothing of what it computes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtool.adapters.layout import MOST_PADDING, Layout, Site
from memtool.adapters.values import AdapterValues
from memtool.errors import MismatchError

RECENT_BYTES = 2**30
"""Of adapters that stay at hand after they were used."""

_READING = threading.RLock()
"""Threads that ask one model read in turn; a stock has none of its own, so that it can be copied.
"""


@dataclass(frozen=True, eq=False)
class OneAdapter:
    """An adapter in its own layout: `value` (numel,), and what multiplies its B A."""

    layout: Layout
    value: Tensor
    scaling: float


class Stock:
    """`count` adapters by number; `read(number)` gives one, and is asked when it is needed.

    `sites` are all that the backbone offers, in its order. None of them changes a block before
    `begin`.
    """

    def __init__(
        self,
        count: int,
        sites: Sequence[Site],
        read: Callable[[int], OneAdapter],
        begin: int = 0,
    ) -> None:
        self.begin = begin
        self._count = count
        self._sites = tuple(sites)
        self._read = read
        self._recent: OrderedDict[int, OneAdapter] = OrderedDict()
        self._nbytes = 0
        self._last: tuple[tuple[tuple[int, ...], str], AdapterValues] | None = None

    def __len__(self) -> int:
        return self._count

    def take(self, used: Sequence[int], device: torch.device | str = "cpu") -> AdapterValues:
        """These adapters, in this order, on the device. Raises the errors of `read`."""
        wanted = (tuple(used), str(device))
        with _READING:
            if self._last is None or self._last[0] != wanted:
                self._last = None  # before others take its place
                found = united([self._one(number) for number in wanted[0]], self._sites)
                self._last = (wanted, found.to(device))
            return self._last[1]

    def _one(self, number: int) -> OneAdapter:
        if number in self._recent:
            self._recent.move_to_end(number)
            return self._recent[number]
        found = self._recent[number] = self._read(number)
        self._nbytes += found.value.nbytes
        while self._nbytes > RECENT_BYTES and len(self._recent) > 1:
            self._nbytes -= self._recent.popitem(last=False)[1].value.nbytes
        return found


def united(adapters: Sequence[OneAdapter], sites: Sequence[Site]) -> AdapterValues:
    """Adapters of any ranks and sites, stacked: exact, what one lacks is zero.

    Of `sites` those stay that an adapter has. Raises MismatchError for none, for an adapter of a
    site that is not among them, and where they would take `MOST_PADDING` times their own numbers.
    """
    if not adapters:
        raise MismatchError("a stack of no adapter", expected="at least one")
    layouts = {one.layout for one in adapters}
    scaling = torch.tensor([one.scaling for one in adapters], dtype=torch.float32)
    if len(layouts) > 1:
        adapters, sites = _alike(adapters, sites)
        layouts = {one.layout for one in adapters}
    if len(layouts) == 1:
        stacked = torch.stack([one.value for one in adapters])
        return AdapterValues.from_flat(stacked, adapters[0].layout, scaling)
    wanted = {site for layout in layouts for site in layout.sites}
    if strange := wanted - {*sites}:
        names = sorted(site.name for site in strange)
        raise MismatchError(f"an adapter of {names[0]}", expected="a site of the backbone")
    layout = Layout(
        tuple(site for site in sites if site in wanted), max(one.rank for one in layouts)
    )
    dtype = adapters[0].value.dtype
    own = sum(one.value.numel() for one in adapters)
    if len(adapters) * layout.numel > MOST_PADDING * own:
        raise MismatchError(
            f"{len(adapters)} adapters of rank {min(one.rank for one in layouts)} to {layout.rank} "
            f"and {own:,} numbers, which would take {len(adapters) * layout.numel:,} together",
            expected=f"at most {MOST_PADDING} times as many",
            remedy="two memories: another --store for those of the largest rank",
        )
    values = torch.zeros(len(adapters), layout.numel, dtype=dtype)
    room = layout.unflatten(values)  # views
    for row, one in enumerate(adapters):
        held = one.layout.unflatten(one.value)
        for site in one.layout.sites:
            a, b = f"{site.name}.lora_A", f"{site.name}.lora_B"
            room[a][row][site.ranks(one.layout.rank, layout.rank)] = held[a]
            room[b][row][:, : held[b].shape[1]] = held[b]
    return AdapterValues.from_flat(values, layout, scaling)


def _alike(
    adapters: Sequence[OneAdapter], sites: Sequence[Site]
) -> tuple[list[OneAdapter], tuple[Site, ...]]:
    """Adapters of which none has slices of a module that another has whole; and their sites."""
    known = {*sites}
    fused = {site.module for site in sites if site.slice}
    of_all = {site for one in adapters for site in one.layout.sites}
    whole = {site.module for site in of_all - known if not site.slice and site.module in fused}
    if not whole:
        return [*adapters], tuple(sites)
    ordered = dict.fromkeys(site.whole if site.module in whole else site for site in sites)
    return [_with_whole(one, whole) for one in adapters], tuple(ordered)


def _with_whole(one: OneAdapter, modules: set[str]) -> OneAdapter:
    """An adapter with these modules whole: exact, the ranks of their slices side by side."""
    slices: dict[str, list[Site]] = {}
    for site in one.layout.sites:
        if site.slice and site.module in modules:
            slices.setdefault(site.module, []).append(site)
    if not slices:
        return one
    rank = one.layout.rank
    layout = Layout(
        tuple(dict.fromkeys(s.whole if s.module in slices else s for s in one.layout.sites)),
        rank * max(map(len, slices.values())),
    )
    value = one.value.new_zeros(layout.numel)
    room, held = layout.unflatten(value), one.layout.unflatten(one.value)
    for site in one.layout.sites:
        a, b = held[f"{site.name}.lora_A"], held[f"{site.name}.lora_B"]
        if site.module not in slices:
            room[f"{site.name}.lora_A"][site.ranks(rank, layout.rank)] = a
            room[f"{site.name}.lora_B"][:, : b.shape[1]] = b
            continue
        place = slices[site.module].index(site) * rank
        rows = slice(site.first_row, site.first_row + site.out_features)
        room[f"{site.module}.lora_A"][place : place + rank] = a
        room[f"{site.module}.lora_B"][rows, place : place + rank] = b
    return OneAdapter(layout, value, one.scaling)


def mixed(values: AdapterValues, weights: Tensor) -> OneAdapter:
    """The sum of t adapters with weights (t,), as one adapter: exact, of t times the rank.

    All ranks stand side by side; weight and scaling are in B, so that its scaling is 1.
    """
    count, rank = len(values), values.layout.rank
    layout = Layout(values.layout.sites, count * rank)
    flat = values.flat().cpu()
    factors = (weights.cpu() * values.scaling.cpu()).to(flat.dtype)
    tensors = values.layout.unflatten(flat)
    parts: dict[str, Tensor] = {}
    for site in layout.sites:
        a, b = f"{site.name}.lora_A", f"{site.name}.lora_B"
        parts[a], parts[b] = side_by_side(tensors[a], tensors[b], factors, site.groups)
    return OneAdapter(layout, layout.flatten(parts), 1.0)


def mixed_by_block(values: AdapterValues, weights: Tensor) -> OneAdapter:
    """As `mixed`, of weights (1, t), or (blocks, t) where every block has its own."""
    if len(weights) == 1:
        return mixed(values, weights[0])
    whole = mixed(values, torch.ones(len(values)))
    tensors = whole.layout.unflatten(whole.value)
    for site in whole.layout.sites:
        each = weights[site.block].repeat_interleave(values.layout.rank)
        tensors[f"{site.name}.lora_B"].mul_(each.to(whole.value.dtype))  # views
    return whole


def side_by_side(a: Tensor, b: Tensor, factors: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A (t · r, d) and B (rows, t · r) whose product is the sum of t products times factors (t,).

    Of A (t, r, d) and B (t, rows, r); of a convolution in groups each group's ranks stay together,
    and B has those of one group.
    """
    scaled = b * factors[:, None, None]
    grouped = a.unflatten(1, (groups, -1)).transpose(0, 1)
    return grouped.flatten(0, 2), scaled.permute(1, 0, 2).flatten(1)
