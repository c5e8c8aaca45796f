"""DualGPM against singular value decompositions of the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import ConfigError, DataError, MismatchError
from memtool.memories.dual_gpm import DualGPM, spaces_from_bytes, spaces_to_bytes


def inputs(n: int, width: int, seed: int, *, decay: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(width, dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * scale @ mixed


def free_energy(memory: DualGPM, seen: Tensor) -> float:
    return float(memory.project(seen).square().sum() / seen.square().sum())


def slow_first_rank(seen: Tensor, share: float) -> int:
    """Leading singular vectors until their energy reaches the share: the definition, by SVD."""
    energy = torch.linalg.svdvals(seen).square()
    for rank in range(len(energy) + 1):
        if energy[:rank].sum() >= share * energy.sum() - 1e-9:
            return rank
    raise AssertionError


@given(st.integers(3, 12), st.integers(1, 40), st.integers(0, 10_000))
def test_first_task_keeps_as_many_directions_as_its_svd_says(width: int, n: int, seed: int) -> None:
    seen = inputs(n, width, seed)
    memory = DualGPM(width, start=0.9)
    memory.update(seen, 0.0)
    assert memory.kept == slow_first_rank(seen, 0.9)
    assert free_energy(memory, seen) <= 0.1 + 1e-9


@given(st.integers(4, 12), st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 0.99]))
def test_laws_over_tasks(width: int, seed: int, start: float) -> None:
    memory = DualGPM(width, start)
    past: list[tuple[Tensor, float]] = []
    before = torch.eye(width, dtype=torch.float64)
    for task in range(4):
        seen = inputs(2 * width, width, seed + task)
        memory.update(seen, task / 4)
        past.append((seen, memory.share(task / 4)))
        free = memory.project(torch.eye(width, dtype=torch.float64))
        assert torch.allclose(free @ free, free, atol=1e-10)  # a projection
        assert torch.allclose(free, free.mT, atol=1e-10)  # an orthogonal one
        assert torch.allclose(before @ free, free, atol=1e-9)  # free space only shrinks
        assert memory.basis.shape[1] <= width / 2
        columns = memory.basis.mT @ memory.basis
        assert torch.allclose(columns, torch.eye(len(columns), dtype=torch.float64), atol=1e-10)
        assert memory.kept == width - round(float(free.trace()))
        for old, share in past:
            assert free_energy(memory, old) <= 1 - share + 1e-9
        before = free


def slow_squares(tasks: list[Tensor], start: float, width: int) -> list[int]:
    """How many directions the rule "squares" keeps after each task, with numpy and a loop.

    Of the covariance C the squares of the singular values are cumulated: before the first task
    the directions below the share count, later ones are added one by one until it is reached.
    """
    past, sizes = np.zeros((width, 0)), []
    for number, seen in enumerate(tasks):
        covariance = seen.numpy().T @ seen.numpy() / len(seen)
        share = start + (1 - start) * number / len(tasks)
        free = covariance - past @ past.T @ covariance
        left, values, _ = np.linalg.svd(free)
        total, added = (covariance**2).sum(), 0
        if number == 0:
            cumulated = 0.0
            for value in values:
                cumulated += value**2
                added += cumulated / total < share
            added = max(added, 1)
        else:
            reached = 1 - (values**2).sum() / total
            while added < width and reached < share:
                reached += values[added] ** 2 / total
                added += 1
        past = np.linalg.qr(np.hstack([past, left[:, :added]]))[0][:, :width]
        sizes.append(past.shape[1])
    return sizes


@given(st.integers(4, 12), st.integers(0, 10_000), st.sampled_from([0.5, 0.95, 0.98]))
def test_squares_of_the_covariance_equal_the_slow_loop(width: int, seed: int, start: float) -> None:
    tasks = [inputs(3 * width, width, seed + number, decay=0.8) for number in range(4)]
    memory, sizes = DualGPM(width, start, rule="squares"), []
    for number, seen in enumerate(tasks):
        memory.update(seen, number / 4)
        sizes.append(memory.kept)
    assert sizes == slow_squares(tasks, start, width)
    # Read back it goes on by the same rule.
    (again,) = spaces_from_bytes(spaces_to_bytes({"a": memory}), "here").values()
    assert (again.rule, again.start, again.kept) == ("squares", start, memory.kept)


def test_squares_keep_fewer_directions_than_energy() -> None:
    by_energy, by_squares = DualGPM(20, 0.95), DualGPM(20, 0.95, rule="squares")
    for number in range(3):
        seen = inputs(100, 20, number)
        by_energy.update(seen, number / 10)
        by_squares.update(seen, number / 10)
        assert by_squares.kept < by_energy.kept


def test_a_map_that_moves_in_the_free_space_answers_the_past_as_before() -> None:
    width, low_rank = 12, 4
    seen = inputs(50, low_rank, 0) @ torch.randn(low_rank, width, dtype=torch.float64)
    memory = DualGPM(width, start=1.0)
    memory.update(seen, 0.0)
    assert memory.kept == low_rank
    assert memory.kind == "remove"
    weight = torch.randn(3, width, dtype=torch.float64)
    moved = weight + memory.project(torch.randn(3, width, dtype=torch.float64))
    assert not torch.allclose(weight, moved)
    assert torch.allclose(seen @ weight.mT, seen @ moved.mT, atol=1e-9)


def test_more_than_half_is_kept_by_its_complement() -> None:
    memory = DualGPM(10, start=1.0)
    memory.update(inputs(7, 10, 1), 0.0)
    assert (memory.kind, memory.kept, memory.basis.shape[1]) == ("retain", 7, 3)
    memory.update(inputs(50, 10, 2), 0.0)
    assert (memory.kept, memory.basis.shape[1]) == (10, 0)
    assert not memory.project(torch.ones(10, dtype=torch.float64)).any()


def test_no_past_and_no_energy_leave_everything_free() -> None:
    memory = DualGPM(5)
    vectors = torch.randn(2, 3, 5)
    assert torch.equal(memory.project(vectors), vectors)
    memory.update(torch.zeros(4, 5), 0.5)
    assert memory.kept == 0


def test_share_rises_to_one() -> None:
    memory = DualGPM(4, start=0.9)
    assert [memory.share(p) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([0.9, 0.95, 1.0, 1.0])


def test_errors() -> None:
    with pytest.raises(ConfigError, match="share of energy"):
        DualGPM(3, start=0.0)
    memory = DualGPM(3)
    with pytest.raises(MismatchError, match="inputs of shape"):
        memory.update(torch.zeros(2, 4), 0.0)
    with pytest.raises(MismatchError, match="second moment"):
        memory.update_moment(torch.zeros(4, 4), 0.0)
    with pytest.raises(DataError, match="not finite"):
        memory.update(torch.full((2, 3), torch.nan), 0.0)
    with pytest.raises(MismatchError, match="vectors of shape"):
        memory.project(torch.zeros(4))
