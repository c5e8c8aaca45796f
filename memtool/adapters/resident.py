"""Stacked values of which some are on the device at a time: the others are read when they are used.

The device has room for so many adapters. What a batch uses and is not there is read, in the place
of what was not used for longest; the batch computes with a copy of its own, so that nothing that is
read later changes it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memtool.adapters.layout import Layout
from memtool.adapters.picks import Picks
from memtool.adapters.values import AdapterValues, BlockValues
from memtool.devices import sent
from memtool.errors import ConfigError

_READING = threading.RLock()
"""Threads that ask one model read in turn; values have none of their own, so that they copy."""


class ResidentValues(AdapterValues):
    """t adapters, of which `room` are on the device; `read(numbers)` gives the others, (n, numel).

    `scaling` (t,) is on the device whole.
    """

    def __init__(
        self, layout: Layout, scaling: Tensor, room: int, read: Callable[[Sequence[int]], Tensor]
    ) -> None:
        first = AdapterValues.from_flat(read([0]), layout, scaling[:1])

        def empty(factor: Tensor) -> Tensor:
            return factor.new_empty(room, *factor.shape[1:])

        super().__init__(layout, [*map(empty, first.a)], [*map(empty, first.b)], scaling)
        self.room = room
        self._read = read
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._last: tuple[Picks, Tensor, Tensor, Picks] | None = None

    def block(self, index: int) -> BlockValues | None:
        """Raises ConfigError: not all adapters are there at once."""
        self._require_room(len(self))
        return super().block(index)

    def at(self, index: int, picks: Picks) -> tuple[BlockValues, Picks] | None:
        """A copy of the adapters picked, and where in it they are; see `AdapterValues.at`.

        Raises ConfigError where they are more than there is room for; the errors of `read`.
        """
        with _READING:
            here = super().block(index)
            if here is None:
                return None
            if self._last is None or self._last[0] is not picks:
                self._last = (picks, *self._placed(picks))
            _, slots, used, places = self._last
            scaling = self.scaling.index_select(0, used)
            return BlockValues(here.of(slots).modules, scaling), places

    def flat(self) -> Tensor:
        """All values (t, numel), read."""
        return self._read(range(len(self)))

    def _placed(self, picks: Picks) -> tuple[Tensor, Tensor, Picks]:
        """The slots (u,) of all adapters used, these (u,), and where among them each picked is."""
        used = picks.index.unique() if picks.used is None else picks.used
        wanted = used.tolist()
        self._bring(wanted)
        slots = sent(torch.tensor([self._slots[number] for number in wanted]), used.device)
        return slots, used, Picks(torch.searchsorted(used, picks.index))

    @torch.no_grad()
    def _bring(self, wanted: Sequence[int]) -> None:
        """Have these adapters on the device, each of them in its slot."""
        self._require_room(len(wanted))
        missing = [number for number in wanted if number not in self._slots]
        if missing:
            read = AdapterValues.from_flat(self._read(missing), self.layout, 1.0)
        for number in wanted:
            if number in self._slots:
                self._slots.move_to_end(number)
        if not missing:
            return
        for number in missing:
            full = len(self._slots) == self.room
            self._slots[number] = self._slots.popitem(last=False)[1] if full else len(self._slots)
        into = sent(torch.tensor([self._slots[n] for n in missing]), self.scaling.device)
        for mine, new in zip([*self.a, *self.b], [*read.a, *read.b], strict=True):
            mine.index_copy_(0, into, sent(new.to(mine.dtype), mine.device))

    def _require_room(self, wanted: int) -> None:
        if wanted > self.room:
            each = self.layout.numel * self.a[0].element_size()
            raise too_small(self.room, len(self), wanted, each)


def too_small(room: int, adapters: int, wanted: int, nbytes: int) -> ConfigError:
    """The error of too little room for what a batch needs, of adapters of `nbytes` each."""
    return ConfigError(
        f"engine.resident has room for {room} of {adapters} adapters, and a batch needs {wanted}",
        expected=f"at least {wanted * nbytes} bytes, and perhaps more for another batch",
        remedy=f"--set engine.resident={wanted * nbytes}, or none; or smaller batches: "
        "engine.eval_batch_size, --batch of predict, consolidate.batch_size where keys learn",
    )
