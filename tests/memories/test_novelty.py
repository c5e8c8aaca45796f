"""How unlike what was learned an input is: laws, and the same by brute force."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import CorruptError, NotFoundError
from memtool.memories import novelty as module
from memtool.memories.moments import Moments
from memtool.memories.novelty import (
    ALL_OF,
    LEAST,
    LIMIT,
    OF_MANY,
    SHARE,
    SHRINKAGE,
    TaskReaches,
    novelty,
    reach,
)


def counted(vectors: Tensor, labels: Tensor, *, reaching: bool = True) -> Moments:
    moments = Moments(vectors.shape[0], vectors.shape[2], int(labels.max()) + 1)
    moments.add(vectors, labels)
    moments.reach = reach(moments, vectors, labels) if reaching else None
    return moments


def task(seed: int, n: int, dim: int, classes: int = 3, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Vectors of a task that lies somewhere of its own, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    place = 20 * torch.randn(groups, 1, dim, generator=torch.Generator().manual_seed(seed // 100))
    means = torch.randn(groups, classes, dim, generator=torch.Generator().manual_seed(seed // 100))
    vectors = torch.randn(groups, n, dim, generator=generator) + place + 3 * means[:, labels]
    return vectors.double(), labels


def left_out(vectors: Tensor, labels: Tensor) -> Tensor:
    """The distances (n,) of vectors (n, dim), each from what all others make: one by one."""
    total, found = len(vectors), []
    sums = [(vectors[labels == c].mean(dim=0), vectors[labels == c]) for c in range(3)]
    whole = sum((own - mean).T @ (own - mean) for mean, own in sums)
    size = whole.diagonal().mean()  # the penalty, and the count, are those of all
    for place in range(total):
        others = torch.arange(total) != place
        within = torch.zeros_like(whole)
        for c in range(3):
            own = vectors[others & (labels == c)]
            within += (own - own.mean(dim=0)).T @ (own - own.mean(dim=0))
        mean = vectors[others & (labels == labels[place])].mean(dim=0)
        ridge = SHRINKAGE * size * torch.eye(len(whole))
        covariance = ((1 - SHRINKAGE) * within + ridge) / total
        away = vectors[place] - mean
        found.append((away @ torch.linalg.solve(covariance, away)).sqrt())
    return torch.stack(found)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(12, 30), dim=st.integers(1, 20))
def test_the_reach_is_that_of_every_vector_left_out(seed: int, n: int, dim: int) -> None:
    vectors, labels = task(seed, n, dim)
    labels[:6] = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = left_out(vectors[0], labels).quantile(SHARE)
    found = counted(vectors, labels).reach
    assert found is not None
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(2_000, 8), (400, 64), (90, 64)])
def test_what_is_new_of_a_task_is_known_and_what_is_elsewhere_is_not(n: int, dim: int) -> None:
    tasks = [counted(*task(100 * place, n, dim, groups=2)) for place in (1, 2)]
    fresh, _ = task(101, 500, dim, groups=2)
    far, _ = task(300, 500, dim, groups=2)
    known, unknown = novelty(fresh, tasks), novelty(far, tasks)
    assert known is not None
    assert unknown is not None
    # One of a hundred is beyond the reach; how far that is, few vectors tell only roughly.
    assert float((known > LIMIT).double().mean()) < 0.03
    assert float((unknown > LIMIT).double().mean()) > 0.98
    only = novelty(fresh, tasks[1:])
    assert only is not None
    assert float((only > LIMIT).double().mean()) > 0.98


def test_a_memory_without_reach_says_nothing() -> None:
    vectors, labels = task(1, 50, 4)
    assert novelty(vectors, []) is None
    kept, old = counted(vectors, labels), counted(vectors, labels, reaching=False)
    assert novelty(vectors, [kept, old]) is None
    kept.add(vectors, labels)  # what was measured is not of these any more
    assert novelty(vectors, [kept]) is None


def test_equal_vectors_and_single_ones_have_no_reach() -> None:
    same = torch.ones(1, 10, 4, dtype=torch.float64)
    assert counted(same, torch.zeros(10, dtype=torch.int64)).reach is None
    vectors, _ = task(1, 3, 4)
    assert counted(vectors, torch.arange(3)).reach is None


def test_the_reach_is_kept_in_bytes() -> None:
    moments = counted(*task(5, 60, 4, groups=2))
    again = Moments.from_bytes(moments.to_bytes(), "a blob")
    assert again.reach is not None
    assert moments.reach is not None
    assert torch.equal(again.reach, moments.reach)
    moments.reach = None
    assert Moments.from_bytes(moments.to_bytes(), "a blob").reach is None
    moments.reach = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with pytest.raises(CorruptError, match="a blob"):
        Moments.from_bytes(moments.to_bytes(), "a blob")


# Many tasks -------------------------------------------------------------------------------------


def many(tasks: int, seed: int = 0, *, reaching: bool = True) -> list[Moments]:
    """Moments of two classes a task, of vectors (2, n, 4) about centres of their own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(tasks):
        labels = torch.arange(60) % 2
        centres = 4 * torch.randn(2, 2, 4, generator=generator)
        vectors = centres[:, labels] + torch.randn(2, 60, 4, generator=generator)
        found.append(counted(vectors, labels, reaching=reaching))
    return found


def asking(parts: list[list[Moments]], owners: Sequence[int]) -> tuple[TaskReaches, list[int]]:
    """The reaches of looks, and the places that were read of the first."""
    read: list[int] = []

    def first(place: int) -> Moments:
        read.append(place)
        return parts[0][place]

    others = [one.__getitem__ for one in parts[1:]]
    return TaskReaches(len(parts[0]), [first, *others], owners), read


def test_few_tasks_are_all_asked_whatever_the_weights() -> None:
    parts = [many(ALL_OF, seed) for seed in (0, 1)]
    reaches, read = asking(parts, range(ALL_OF))
    assert read == [*range(ALL_OF)]
    looks = [torch.randn(2, 5, 4), torch.randn(2, 5, 4)]
    found = reaches(looks, torch.rand(5, ALL_OF))
    each = [novelty(look, part) for look, part in zip(looks, parts, strict=True)]
    torch.testing.assert_close(found, torch.stack(each).square().mean(dim=0).sqrt())
    assert len(read) == ALL_OF


def recalled(weights: Tensor, owners: Sequence[int], tasks: int) -> list[list[int]]:
    """The tasks that each input recalls, one by one."""
    found = []
    for row in weights.tolist():
        by_task = [0.0] * tasks
        for owner, weight in zip(owners, row, strict=True):
            by_task[owner] += weight
        best = sorted(range(tasks), key=lambda task: -by_task[task])[:OF_MANY]
        found.append([one for one in best if by_task[one] > LEAST * by_task[best[0]]] or best[:1])
    return found


@pytest.mark.parametrize("sharp", [1, 8, 60])
def test_of_many_those_that_an_input_recalls_most_are_asked(sharp: int) -> None:
    tasks, adapters = 20, 40
    parts = [many(tasks, seed) for seed in (0, 1)]
    owners = [place % tasks for place in range(adapters)]
    reaches, read = asking(parts, owners)
    assert read == []
    looks = [torch.randn(2, 6, 4), torch.randn(2, 6, 4)]
    weights = torch.rand(6, adapters, dtype=torch.float64) ** sharp
    found = reaches(looks, weights)
    wanted = recalled(weights, owners, tasks)
    for row, asked in enumerate(wanted):
        each = [
            novelty(look[:, row : row + 1], [part[task] for task in asked])
            for look, part in zip(looks, parts, strict=True)
        ]
        torch.testing.assert_close(found[row], torch.stack(each).square().mean().sqrt())
    once = {task for asked in wanted for task in asked}
    assert sorted(read) == sorted(once)
    assert torch.equal(reaches(looks, weights), found)
    assert len(read) == len(once)  # they are held
    copied = copy.deepcopy(reaches)  # which reads nothing any more
    read.clear()
    torch.testing.assert_close(copied(looks, weights), found)
    reaches.hold_all()
    torch.testing.assert_close(reaches(looks, weights), found)
    assert read == []
    again = pickle.loads(pickle.dumps(reaches))  # noqa: S301
    torch.testing.assert_close(again(looks, weights), found)


def test_an_input_of_one_task_asks_that_one_alone() -> None:
    reaches, read = asking([many(20)], range(20))
    reaches([torch.zeros(2, 3, 4)], torch.eye(20)[[15, 3, 15]])
    assert sorted(read) == [3, 15]
    assert reaches.asked(-torch.eye(20)[:2]).sum(dim=1).tolist() == [1, 1]


def test_what_is_held_of_many_tasks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    reaches, read = asking([many(12)], range(12))
    reaches([torch.zeros(2, 1, 4)], torch.eye(12)[:1])
    monkeypatch.setattr(module, "HELD_BYTES", 5 * module._nbytes(reaches._held[0]) + 1)
    weights = torch.eye(12)
    for _ in range(2):
        reaches([torch.zeros(2, 12, 4)], weights)
    assert len(reaches._held) == 5
    assert len(read) == 12 + 12 - 5  # what is held is asked first


def test_a_task_that_cannot_tell_leaves_its_inputs_unknown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = [many(10)]
    parts[0][3] = many(1, 9, reaching=False)[0]
    reaches, _ = asking(parts, range(10))
    found = reaches([torch.zeros(2, 2, 4)], torch.eye(10)[[3, 5]])
    assert found.isnan().tolist() == [True, False]
    assert not caplog.text

    def gone(place: int) -> Moments:
        raise NotFoundError("the version is gone")

    lost = TaskReaches(10, [gone], range(10))
    for _ in range(2):
        assert bool(lost([torch.zeros(2, 1, 4)], torch.eye(10)[:1]).isnan().all())
    assert caplog.text.count("the version is gone") == 1
