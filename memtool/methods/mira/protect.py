"""What learning may not change: a memory's answers to the queries of earlier tasks.

Keys, and the linear maps of query modules, are linear in what they are given. For each of them a
`DualGPM` basis holds what past tasks gave it; what an optimiser's step moves inside that span is
taken back. The applied step is projected, not the gradient: Adam would turn a projected gradient
out of the free space again.

The code of MIRA's authors projects the gradient all the same, of keys and head, by the tokens of
one batch; that is `consolidate.guard` gradient (`project_gradients`, and `observe` of every token).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.devices import exact
from memtool.engine import Engine
from memtool.memories.dual_gpm import DualGPM, spaces_from_bytes, spaces_to_bytes
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.memories.query import QueryModule
from memtool.methods.mira.recall import MemoryModel

KEYS = "keys"
HEAD = "head"
"""The past of a shared head, by what it reads; under `consolidate.guard` gradient alone."""


class Protection:
    """The past of every linear map of a keyed memory, by name: `<block>.keys`, `<block>.g…`.

    Of a decoder these are `<block>.decoder.inner` and `<block>.decoder.outer`.

    Inputs are homogeneous: a query ends in the constant that meets the key's bias, and an input of
    a linear map is followed by a 1 that meets its bias.
    """

    def __init__(self, pasts: dict[str, DualGPM] | None = None) -> None:
        """No past yet."""
        self.pasts = pasts or {}

    def free_keys(self, blocks: Sequence[int], keys: Tensor) -> Tensor:
        """The part of keys (memories, t, d_k) that scores zero on past queries of their blocks."""
        if not self.pasts:
            return keys
        return torch.stack(
            [
                self.pasts[f"{block}.{KEYS}"].project(here)
                for block, here in zip(blocks, keys, strict=True)
            ]
        )

    def guard(self, memory: KeyedMemory) -> Callable[[], None]:
        """A call that takes back what moved inside the past since the call before, or since now."""
        maps = list(_maps(memory))
        free = [self._free(each) for each in maps]
        before = [each.rows() for each in maps]

        def take_back() -> None:
            for place, each in enumerate(maps):
                before[place] = before[place] + (each.rows() - before[place]) @ free[place]
                each.put(before[place])

        return take_back

    def _free(self, each: _Map) -> Tensor:
        """The projector (d, d) onto what is free, on the device of the map."""
        return self._projector(each.name, each.rows())

    def _projector(self, name: str, rows: Tensor) -> Tensor:
        """The projector (d, d) onto what the map of a name may move in, like its rows (..., d)."""
        width = rows.shape[-1]
        past = self.pasts.get(name, DualGPM(width))
        free = past.project(torch.eye(width, dtype=torch.float64))
        return free.to(rows.dtype).to(rows.device)

    def project_gradients(self, memory: KeyedMemory, head: nn.Parameter) -> Callable[[], None]:
        """From now on gradients of keys, and of a head (..., d) that learns, lose their past part.

        The call that is given back ends it. What AdamW makes of such a gradient leaves the free
        space again, entry by entry: it is the published form, not protection.
        """
        learning = [(f"{block}.{KEYS}", memory[block].keys) for block in memory.blocks]
        handles = []
        for name, parameter in [*learning, (HEAD, head)]:
            if parameter.requires_grad:
                free = self._projector(name, parameter.detach())
                handles.append(parameter.register_hook(partial(torch.matmul, other=free)))

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def observe(
        self,
        engine: Engine,
        model: MemoryModel,
        images: npt.NDArray[np.uint8],
        *,
        start: float,
        progress: float,
        every_token: bool = False,
    ) -> None:
        """Add what the memory is asked about a task's images, as it recalls now, to the past.

        `start` and `progress` as in `DualGPM`. With `every_token` keys count as asked by every
        token of a block's input, each query at length one, and what the head reads is kept, too.
        """
        moments: dict[str, Tensor] = {}
        watching = _watched_tokens if every_token else _watched
        with watching(model.memory, moments):
            features = exact(engine.predict(model, images))
        if every_token:
            moments[HEAD] = features.mT @ features
        for name, moment in moments.items():
            past = self.pasts.setdefault(name, DualGPM(len(moment), start))
            past.update_moment(moment, progress)

    def to_bytes(self) -> bytes:
        """As `spaces_to_bytes`."""
        return spaces_to_bytes(self.pasts)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Protection:
        """What `to_bytes` wrote. Raises CorruptError for anything else."""
        return cls(spaces_from_bytes(data, where))


@dataclass(frozen=True, eq=False)
class _Map:
    """A linear map of a memory: weight (n, d), perhaps with a bias (n,) that a 1 meets."""

    name: str
    weight: Tensor
    bias: Tensor | None

    def rows(self) -> Tensor:
        """What meets the homogeneous input: (n, d), or (n, d + 1) with a bias; a copy."""
        if self.bias is None:
            return self.weight.detach().clone()
        return torch.cat([self.weight.detach(), self.bias.detach().unsqueeze(1)], dim=1)

    @torch.no_grad()
    def put(self, rows: Tensor) -> None:
        """Set them."""
        width = self.weight.shape[1]
        self.weight.copy_(rows[:, :width])
        if self.bias is not None:
            self.bias.copy_(rows[:, width])


def _maps(memory: KeyedMemory) -> Iterator[_Map]:
    """The keys of every block, which have their bias inside, and its maps as in `_layers`."""
    for block in memory.blocks:
        here = memory[block]
        yield _Map(f"{block}.{KEYS}", here.keys, None)
        for name, layer in _layers(here):
            yield _Map(f"{block}.{name}", layer.weight, layer.bias)


def _layers(here: BlockMemory) -> list[tuple[str, nn.Linear]]:
    """The linear maps of a query module, by their names in it, and of a decoder."""
    named = [*here.query.named_modules()]
    if here.decoder is not None:
        named += here.decoder.named_modules(prefix="decoder")
    return [(name, module) for name, module in named if isinstance(module, nn.Linear)]


@contextmanager
def _watched_tokens(memory: KeyedMemory, moments: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the second moment (d, d) of the queries that all tokens of a block would be."""

    def count(name: str) -> Callable[[QueryModule, tuple[Tensor]], None]:
        def hook(query: QueryModule, given: tuple[Tensor]) -> None:
            asked = F.normalize(exact(query.of_every_token(given[0])), dim=-1)
            moments[name] = moments.get(name, 0) + asked.mT @ asked

        return hook

    hooks = []
    for block in memory.blocks:
        query = memory[block].query
        hooks.append(query.register_forward_pre_hook(count(f"{block}.{KEYS}")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched(memory: KeyedMemory, moments: dict[str, Tensor]) -> Iterator[None]:
    """Inside, what every linear map is given is added to its second moment (d, d)."""

    def count(name: str, inputs: Tensor) -> None:
        inputs = exact(inputs)
        moments[name] = moments.get(name, 0) + inputs.mT @ inputs

    def queries(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, output: count(name, output)

    def inputs(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, given: count(name, F.pad(given[0], (0, 1), value=1.0))

    hooks = []
    for block in memory.blocks:
        query = memory[block].query
        hooks.append(query.register_forward_hook(queries(f"{block}.{KEYS}")))
        for name, layer in _layers(memory[block]):
            hooks.append(layer.register_forward_pre_hook(inputs(f"{block}.{name}")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
