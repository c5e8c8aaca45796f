"""How what is seen meets keys, of which a task may have several: scores, and what adds up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memtool.devices import sent


def joined(keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys (memories, m, d + 1) of every task as one tensor, and the task (k,) of each of them."""
    sizes = torch.tensor([one.shape[1] for one in keys])
    owners = torch.arange(len(keys)).repeat_interleave(sizes)
    return torch.cat([*keys], dim=1), sent(owners, keys[0].device)


def added_up(shares: Tensor, owners: Tensor, tasks: int) -> Tensor:
    """The weights (..., tasks) of tasks that have keys of these weights (..., k)."""
    if len(owners) == tasks:
        return shares
    return shares.new_zeros(*shares.shape[:-1], tasks).index_add(-1, owners, shares)


def asked(seen: Tensor, keys: Tensor) -> Tensor:
    """Scores (n, memories, k) of what memories see (n, memories, d), by keys (memories, k, d + 1).

    The last entry of a key is its bias.
    """
    return torch.einsum("nld,lkd->nlk", seen, keys[..., :-1]) + keys[..., -1]
