"""Closed-form keys: exact over tasks in any order, and equal to what all queries at once give."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from memtool.errors import ConfigError, CorruptError, DataError, MismatchError
from memtool.memories.closed_form import QueryStatistics, for_similarity
from memtool.memories.moments import Moments
from memtool.memories.separation import separation
from memtool.memories.similarity import similarity

Array = npt.NDArray[np.float64]


def tasks(
    count: int, blocks: int, dim: int, samples: int = 40, spread: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Queries (blocks, samples, dim) by task, float64: Gaussians around random centres."""
    generator = torch.Generator().manual_seed(seed)
    return [
        spread * torch.randn(blocks, 1, dim, generator=generator, dtype=torch.float64)
        + torch.randn(blocks, samples, dim, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def counted(queries: list[Tensor]) -> QueryStatistics:
    statistics = QueryStatistics(queries[0].shape[0], queries[0].shape[2])
    for index, task in enumerate(queries):
        statistics.add(index, task)
    return statistics


def homogeneous(queries: Tensor) -> Tensor:
    return torch.nn.functional.pad(queries, (0, 1), value=1.0)


def centred(scores: Tensor) -> Tensor:
    """Without what all tasks share."""
    return scores - scores.mean(dim=-1, keepdim=True)


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 4),
    blocks=st.integers(1, 3),
    dim=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_order_batches_and_merging_do_not_matter(
    count: int, blocks: int, dim: int, seed: int, data: st.DataObject
) -> None:
    queries = tasks(count, blocks, dim, samples=7, seed=seed)
    once = counted(queries)
    parts = [
        (index, part)
        for index, task in enumerate(queries)
        for part in task.split(data.draw(st.integers(1, 7)), dim=1)
    ]
    parts = data.draw(st.permutations(parts))
    cut = data.draw(st.integers(0, len(parts)))
    pieces, rest = QueryStatistics(blocks, dim), QueryStatistics(blocks, dim)
    for index, part in parts[:cut]:
        pieces.add(index, part)
    for index, part in parts[cut:]:
        rest.add(index, part)
    pieces.merge(rest)
    assert torch.equal(pieces.counts, once.counts)
    torch.testing.assert_close(pieces.sums, once.sums, atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(pieces.second, once.second, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(pieces.lda_keys(0.1), once.lda_keys(0.1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(pieces.ridge_keys(0.1), once.ridge_keys(0.1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 0.5, 1.0])
def test_lda_keys_score_as_scikit_learn_does(shrinkage: float) -> None:
    queries = tasks(3, 2, 6)
    keys = counted(queries).lda_keys(shrinkage)
    for block in range(2):
        x = torch.cat([task[block] for task in queries])
        y = np.repeat(np.arange(3), 40)
        peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None)
        peer.fit(x.numpy(), y)
        expected = torch.from_numpy(peer.decision_function(x.numpy()))
        scores = homogeneous(x) @ keys[block].double().T
        torch.testing.assert_close(centred(scores), centred(expected), atol=1e-4, rtol=1e-5)
        posterior = separation("softmax")(scores)
        torch.testing.assert_close(
            posterior, torch.from_numpy(peer.predict_proba(x.numpy())), atol=1e-4, rtol=1e-4
        )


def test_priors_are_equal_or_the_shares_of_the_counts() -> None:
    queries = [task[:, :size] for task, size in zip(tasks(2, 1, 4), (10, 30), strict=True)]
    equal = counted(queries).lda_keys(0.1)
    shares = counted(queries).lda_keys(0.1, equal_priors=False)
    assert torch.equal(equal[..., :-1], shares[..., :-1])
    difference = (shares - equal)[0, :, -1]
    assert float(difference[1] - difference[0]) == pytest.approx(np.log(3), abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 4),
    dim=st.integers(1, 6),
    samples=st.integers(1, 9),
    ridge=st.floats(1e-3, 10),
    seed=st.integers(0, 2**31),
)
def test_ridge_keys_equal_an_augmented_least_squares(
    count: int, dim: int, samples: int, ridge: float, seed: int
) -> None:
    queries = tasks(count, 1, dim, samples=samples, seed=seed)
    keys = counted(queries).ridge_keys(ridge)[0].double()
    x: Array = torch.cat([task[0] for task in queries]).numpy()
    y = np.repeat(np.eye(count), samples, axis=0)
    penalty = ridge * np.square(x - x.mean(0)).sum() / dim or 1.0
    rows = np.vstack(
        [np.hstack([x, np.ones((len(x), 1))]), np.sqrt(penalty) * np.eye(dim, dim + 1)]
    )
    expected = np.linalg.lstsq(rows, np.vstack([y, np.zeros((dim, count))]), rcond=None)[0]
    np.testing.assert_allclose(keys.T, expected, atol=2e-5, rtol=1e-4)
    sums = (homogeneous(torch.from_numpy(x)) @ keys.T).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


def test_ridge_keys_give_nearly_one_hot_coefficients() -> None:
    queries = tasks(4, 2, 16, spread=6.0)
    keys = for_similarity(counted(queries).ridge_keys(1e-3), "scaled-dot")
    for separate in ("identity", "affine"):
        for index, task in enumerate(queries):
            for block in range(2):
                scores = similarity("scaled-dot")(homogeneous(task[block]), keys[block].double())
                coefficients = separation(separate)(scores)
                one_hot = torch.nn.functional.one_hot(torch.tensor(index), 4)
                assert float((coefficients.mean(0) - one_hot).abs().max()) < 0.05
                assert float((coefficients - one_hot).abs().mean()) < 0.1


def test_mean_keys_are_the_mean_homogeneous_queries() -> None:
    queries = tasks(3, 2, 5)
    expected = torch.stack([homogeneous(task).mean(1) for task in queries], dim=1)
    torch.testing.assert_close(counted(queries).mean_keys(), expected.float())


@pytest.mark.parametrize("name", ["dot", "scaled-dot", "euclidean"])
@pytest.mark.parametrize("kind", ["lda", "ridge"])
def test_every_linear_similarity_scores_the_same_tasks(name: str, kind: str) -> None:
    queries = tasks(4, 2, 6, spread=2.0)
    statistics = counted(queries)
    keys = statistics.lda_keys(0.1) if kind == "lda" else statistics.ridge_keys(0.1)
    fitted = for_similarity(keys, name)
    for block in range(2):
        x = homogeneous(torch.cat([task[block] for task in queries]))
        scores = similarity(name)(x, fitted[block].double())
        meant = x @ keys[block].double().T
        torch.testing.assert_close(centred(scores), centred(meant), atol=2e-4, rtol=1e-4)
        if name != "euclidean":
            torch.testing.assert_close(scores, meant, atol=1e-4, rtol=1e-5)


def test_round_trip_through_bytes() -> None:
    statistics = counted(tasks(3, 2, 5))
    data = statistics.to_bytes()
    again = QueryStatistics.from_bytes(data, "here")
    assert again.to_bytes() == data
    assert torch.equal(again.lda_keys(0.1), statistics.lda_keys(0.1))
    assert (again.blocks, again.dim, again.tasks) == (2, 5, 3)
    again.add(3, tasks(1, 2, 5, seed=1)[0])
    assert again.tasks == 4
    assert statistics.tasks == 3


def test_corrupt_bytes_are_refused() -> None:
    from safetensors.torch import save

    data = counted(tasks(2, 1, 3)).to_bytes()
    for bad in (b"", b"nonsense", data[:-1], data[: len(data) // 2]):
        with pytest.raises(CorruptError, match="here is no safetensors file"):
            QueryStatistics.from_bytes(bad, "here")
    whole = {
        "counts": torch.zeros(2).double(),
        "sums": torch.zeros(1, 2, 3).double(),
        "second": torch.zeros(1, 3, 3).double(),
    }
    Moments.from_bytes(save(whole), "here")
    for name, tensor in (
        ("counts", torch.zeros(3).double()),
        ("sums", torch.zeros(2, 3).double()),
        ("second", torch.zeros(1, 3, 3)),
        ("extra", torch.zeros(1)),
    ):
        with pytest.raises(CorruptError, match="here holds"):
            Moments.from_bytes(save(whole | {name: tensor}), "here")


def test_bad_input_is_an_error_that_helps_and_leaves_the_statistics() -> None:
    statistics = counted(tasks(2, 2, 3))
    before = statistics.to_bytes()
    with pytest.raises(MismatchError, match=r"\(2, n, 3\)"):
        statistics.add(1, torch.zeros(2, 4, 5))
    with pytest.raises(MismatchError, match=r"\(2, n, 3\)"):
        statistics.add(1, torch.zeros(4, 3))
    with pytest.raises(MismatchError, match="task index -1"):
        statistics.add(-1, torch.zeros(2, 4, 3))
    with pytest.raises(DataError, match="not finite"):
        statistics.add(0, torch.full((2, 4, 3), torch.nan))
    with pytest.raises(MismatchError, match="statistics of 1 x 3"):
        statistics.merge(QueryStatistics(1, 3))
    assert statistics.to_bytes() == before
    with pytest.raises(ConfigError, match="shrinkage of 2"):
        statistics.lda_keys(2)
    with pytest.raises(ConfigError, match="ridge of 0"):
        statistics.ridge_keys(0)
    keys = statistics.lda_keys(0.1)
    with pytest.raises(ConfigError, match="cosine"):
        for_similarity(keys, "cosine")
    with pytest.raises(ConfigError, match="did you mean 'euclidean'"):
        for_similarity(keys, "euclid")
    statistics.add(3, torch.zeros(2, 1, 3))
    for solve in (statistics.mean_keys, statistics.lda_keys, statistics.ridge_keys):
        with pytest.raises(DataError, match=r"task indices \[2\]"):
            solve()
    with pytest.raises(DataError, match="any task"):
        QueryStatistics(2, 3).mean_keys()
