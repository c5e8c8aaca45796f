"""Values of which some are on the device compute what all of them do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from memtool.adapters.layout import Layout, Site
from memtool.adapters.mixing import Mixture
from memtool.adapters.picks import Picks
from memtool.adapters.resident import ResidentValues
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError

LAYOUT = Layout(
    tuple(Site(block, f"blocks.{block}.fc", "", 5, 6, 0, 6) for block in range(2)), rank=2
)


class Disk:
    """Flat values of some adapters, and which were read."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.flat = torch.randn(count, LAYOUT.numel, generator=generator, dtype=torch.float64)
        self.scaling = torch.rand(count, generator=generator)
        self.asked: list[int] = []

    def read(self, numbers: Sequence[int]) -> Tensor:
        self.asked += numbers
        return self.flat[list(numbers)]

    def resident(self, room: int) -> ResidentValues:
        made = ResidentValues(LAYOUT, self.scaling, room, self.read)
        self.asked.clear()
        return made


def added(values: AdapterValues, index: list[list[int]]) -> Tensor:
    picks = Picks(torch.tensor(index), torch.tensor(index).unique())
    weights = torch.sin(torch.arange(picks.index.numel())).view(picks.index.shape).double()
    x = torch.cos(torch.arange(len(index) * 15.0)).view(len(index), 3, 5).double()
    found = []
    for block in range(2):
        here = values.at(block, picks)
        assert here is not None
        mixture = Mixture.weighted(here[0], weights, "delta", here[1])
        found.append(mixture.add_to(x.new_zeros(len(index), 3, 6), x, f"blocks.{block}.fc"))
    return torch.stack(found)


def test_what_a_batch_uses_is_read_once_and_computes_as_all_do() -> None:
    disk = Disk(9)
    whole = AdapterValues.from_flat(disk.flat, LAYOUT, disk.scaling)
    values = disk.resident(4)
    assert len(values) == 9
    for index in ([[8, 2], [2, 5]], [[5, 8]], [[0, 1]], [[7, 3], [6, 0]], [[8, 8]]):
        torch.testing.assert_close(added(values, index), added(whole, index))
    # 0 and 1 take what is free and the place of 2; then 5, 8 and 1 make room.
    assert disk.asked == [2, 5, 8, 0, 1, 3, 6, 7, 8]
    assert torch.equal(values.flat(), disk.flat)


def test_a_batch_keeps_what_it_was_given() -> None:
    disk = Disk(6)
    values = disk.resident(2)
    picks = Picks(torch.tensor([[0, 1]]))
    before = values.at(0, picks)
    values.at(0, Picks(torch.tensor([[4, 5]])))
    after = values.at(0, picks)
    assert before is not None
    assert after is not None
    for one, other in zip(before[0].modules.values(), after[0].modules.values(), strict=True):
        assert torch.equal(one.a, other.a)
    assert values.at(7, picks) is None


def test_too_little_room_says_how_many_fit_and_how_many_are_needed() -> None:
    values = Disk(9).resident(4)
    each = LAYOUT.numel * 8
    with pytest.raises(ConfigError, match=r"room for 4 of 9 adapters, and a batch needs 5") as five:
        added(values, [[0, 1, 2, 3, 4]])
    assert f"engine.resident={5 * each}" in str(five.value.remedy)
    with pytest.raises(ConfigError, match=r"and a batch needs 9"):
        values.block(0)
    torch.testing.assert_close(added(values, [[0, 1]]), added(Disk(9).resident(2), [[0, 1]]))


def test_what_cannot_be_read_leaves_the_others_where_they_are() -> None:
    disk = Disk(5)
    values = disk.resident(2)
    wanted = added(values, [[0, 1]])

    def broken(numbers: Sequence[int]) -> Tensor:
        raise OSError(str(numbers))

    values._read = broken
    with pytest.raises(OSError, match="3"):
        added(values, [[3, 0]])
    torch.testing.assert_close(added(values, [[0, 1]]), wanted)
