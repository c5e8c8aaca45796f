"""Few adapters of many for every sample, by torch's grouped matrix product.

The pairs of a sample and an adapter that it uses are sorted by adapter. Their rows are then t
groups, one after another and some of them empty, and one product multiplies every group with the
factor of its adapter. No factor is copied for a sample; instead its rows are, once for every
adapter that it uses. All shapes are known without looking at a number, so nothing waits for a
device.

Strides have to be multiples of 16 bytes: ranks are padded with zeros until theirs are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memtool.adapters.picks import Sorted
from memtool.adapters.values import ModuleValues
from memtool.devices import multiplies_groups

ALIGNED = 16
"""Bytes that a stride is a multiple of."""

MOST = 1023
"""Groups that one product takes on a GPU."""


def padding(rank: int, dtype: torch.dtype) -> int:
    """Zeros behind a rank that its stride lacks."""
    return -rank % (ALIGNED // dtype.itemsize)


def fits(x: Tensor, values: ModuleValues, groups: int) -> bool:
    """Whether x (b, n, d) can be multiplied with these adapters in so many groups."""
    widths = (x.shape[-1], *(factor.shape[-1] for factor in values.b))
    return (
        multiplies_groups(x.dtype, x.device)
        and 0 < groups <= MOST
        and x.numel() > 0
        and not any(padding(width, x.dtype) for width in widths)
        and all(site.groups == 1 for site in values.sites)
    )


def contributions(x: Tensor, values: ModuleValues, gate: Tensor, pairs: Sorted) -> Iterator[Tensor]:
    """What the adapters add at every site, (b, n, rows of the site), for x (b, n, d).

    Sample i has those of its `pairs` with the factors gate[i] (b, k). Everything is of one dtype.
    """
    (batch, tokens, _), each = x.shape, gate.shape[1]
    pad = (0, 0, 0, padding(values.a.shape[2], x.dtype))
    ends = (pairs.ends * tokens).int()
    rows = x.index_select(0, pairs.order // each).flatten(0, 1)
    a = F.pad(values.a, pad) if any(pad) else values.a
    z = F.grouped_mm(rows, a.flatten(1, 2).transpose(1, 2), offs=ends)
    own = gate.flatten().index_select(0, pairs.order).repeat_interleave(tokens)
    z = (z * own.unsqueeze(1)).unflatten(1, a.shape[1:3])
    for reduced, factor in zip(z.unbind(1), values.b, strict=True):
        b = F.pad(factor, pad) if any(pad) else factor
        found = F.grouped_mm(reduced, b, offs=ends).unflatten(0, (-1, tokens))
        found = found.index_select(0, pairs.back)
        yield found if each == 1 else found.unflatten(0, (batch, each)).sum(dim=1)
