"""How unlike what was learned an input is: laws, and the same by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import CorruptError
from memtool.memories.moments import Moments
from memtool.memories.novelty import LIMIT, SHARE, SHRINKAGE, novelty, reach


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
