"""Hopfield retrieval: the universal form, and whole adapters from their first entries."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import ConfigError, DataError, MismatchError, NotFoundError
from memtool.memories.hopfield import PUBLISHED_BETA, HopfieldMemory, auto_beta, mixed, recall
from memtool.memories.separation import separation
from memtool.memories.similarity import SIMILARITIES, similarity


def filled(patterns: Tensor, **constants: object) -> HopfieldMemory:
    memory = HopfieldMemory(**constants)  # type: ignore[arg-type]
    for index, pattern in enumerate(patterns):
        memory.write(f"task{index}", pattern)
    return memory


def random_patterns(count: int, numel: int, std: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(count, numel, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    adapters=st.integers(1, 5),
    dim=st.integers(1, 6),
    width=st.integers(1, 6),
    name=st.sampled_from(["softmax", "affine", "identity", "relu", "tanh", "topk"]),
    alike=st.sampled_from(["dot", "scaled-dot", "cosine", "euclidean"]),
    seed=st.integers(0, 2**31),
)
def test_recall_is_the_sum_over_values(
    batch: int, adapters: int, dim: int, width: int, name: str, alike: str, seed: int
) -> None:
    query = random_patterns(batch, dim, seed=seed)
    keys, values = random_patterns(adapters, dim, seed=seed + 1), random_patterns(adapters, width)
    result = recall(query, keys, values, similarity(alike), separation(name))
    for row in range(batch):
        coefficients = separation(name)(similarity(alike)(query[row], keys))
        expected = sum(a * v for a, v in zip(coefficients, values, strict=True))
        torch.testing.assert_close(result[row], expected, atol=1e-12, rtol=1e-9)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 8), numel=st.integers(200, 400), seed=st.integers(0, 2**31))
def test_auto_beta_recalls_every_pattern_within_its_bound(
    count: int, numel: int, seed: int
) -> None:
    patterns = random_patterns(count, numel, std=0.02, seed=seed)
    memory = filled(patterns, similarity="euclidean", epsilon=1e-4)
    coefficients = memory.coefficients(memory.key_of(patterns))
    assert coefficients.diagonal().min() >= 1 / (1 + 1e-4) - 1e-12
    error = (memory.recall(memory.key_of(patterns)).patterns - patterns).abs().max()
    assert error <= 1e-4 * 2 * patterns.abs().max()


def test_auto_beta_is_the_formula_of_the_smallest_gap() -> None:
    patterns = random_patterns(4, 300)
    memory = filled(patterns, epsilon=1e-3)
    keys = patterns[:, :30]
    gaps = [
        float(keys[t] @ keys[t]) - max(float(keys[j] @ keys[t]) for j in range(4) if j != t)
        for t in range(4)
    ]
    assert min(gaps) > 0
    assert memory.beta == pytest.approx(math.log(3 / 1e-3) / min(gaps))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_auto_beta_is_that_of_all_scores_at_once(name: str) -> None:
    keys = random_patterns(600, 5) + 3.0
    scores = similarity(name)(keys, keys)
    gaps = scores.diagonal() - scores.masked_fill(torch.eye(600).bool(), -math.inf).amax(dim=1)
    gaps = gaps[gaps > 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # under some similarities long keys win over short ones
        found = auto_beta(keys, similarity(name), [str(place) for place in range(600)], 1e-6)
    assert found == pytest.approx(math.log(599 / 1e-6) / float(gaps.min()), rel=1e-6)


def test_auto_beta_does_not_depend_on_the_scale_but_the_published_one_does() -> None:
    patterns = random_patterns(5, 1000)
    small = 0.02 * patterns
    sharp = filled(small)
    torch.testing.assert_close(sharp.recall(sharp.key_of(small)).patterns, small, atol=1e-6, rtol=0)
    published = filled(small, beta=PUBLISHED_BETA)
    assert published.coefficients(published.key_of(small)).diagonal().max() < 0.9


def test_the_key_comes_back_as_given_and_the_type_stays() -> None:
    patterns = random_patterns(3, 50).float()
    memory = filled(patterns)
    key = memory.key_of(patterns[1]) + 0.01
    result = memory.recall(key).patterns
    assert result.dtype == torch.float32
    assert result.shape == (50,)
    assert torch.equal(result[:5], key)
    assert torch.equal(memory.patterns, patterns)
    assert memory.names == ("task0", "task1", "task2")
    assert (len(memory), memory.key_length) == (3, 5)


def test_one_pattern_is_always_recalled_exactly() -> None:
    pattern = random_patterns(1, 40)
    memory = filled(pattern)
    assert torch.equal(memory.recall(memory.key_of(pattern)).patterns, pattern)


def test_only_key_entries_are_scored() -> None:
    patterns = random_patterns(3, 100)
    memory = filled(patterns)
    other = patterns.clone()
    other[:, 10:] *= 1000
    torch.testing.assert_close(
        memory.coefficients(memory.key_of(patterns)), filled(other).coefficients(other[:, :10])
    )


def test_indistinguishable_adapters_are_named_and_the_rest_stays_sharp() -> None:
    patterns = random_patterns(4, 400)
    patterns[3, :40] = patterns[1, :40]
    memory = filled(patterns, similarity="cosine")
    with pytest.warns(UserWarning, match="'task1' scores adapter 'task3'"):
        coefficients = memory.coefficients(memory.key_of(patterns))
    torch.testing.assert_close(coefficients[1], coefficients[3])
    assert coefficients[1, 1] == pytest.approx(0.5, abs=1e-5)
    assert coefficients[0, 0] > 1 - 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.coefficients(memory.key_of(patterns))  # worked out once, said once


def test_a_larger_norm_wins_under_dot_and_is_reported() -> None:
    patterns = random_patterns(2, 100).abs()
    patterns[1] *= 10
    with pytest.warns(UserWarning, match="'task0' scores adapter 'task1'"):
        assert filled(patterns).beta > 0
    memory = filled(patterns, similarity="euclidean")
    assert memory.coefficients(memory.key_of(patterns)).diagonal().min() > 1 - 1e-5


def test_all_alike_gives_a_uniform_mixture() -> None:
    patterns = torch.ones(2, 20)
    patterns[:, 0] = 0.5
    patterns[1, 2:] = 3.0
    memory = filled(patterns)
    with pytest.warns(UserWarning, match="no beta can tell them apart"):
        result = memory.recall(patterns[0, :2]).patterns
    torch.testing.assert_close(result, torch.cat([patterns[0, :2], torch.full((18,), 2.0)]))


def test_values_that_nobody_asks_for_are_not_read() -> None:
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    coefficients = torch.zeros(3, 40, dtype=torch.float64)
    coefficients[0, 5], coefficients[1, 9], coefficients[2, 5] = 1.0, -0.5, 0.25
    expected = torch.stack([values[5], -0.5 * values[9], 0.25 * values[5]])
    values[11] = math.nan
    torch.testing.assert_close(mixed(coefficients, values), expected)
    torch.testing.assert_close(mixed(coefficients[0], values), expected[0])
    dense = torch.full((40,), 1 / 40, dtype=torch.float64)
    values[11] = 0.0
    torch.testing.assert_close(mixed(dense, values), values.mean(0))


def test_a_known_key_is_not_new_and_an_unknown_one_is() -> None:
    patterns = random_patterns(6, 2000)
    memory = filled(patterns, similarity="euclidean")
    recalled = memory.recall(memory.key_of(patterns))
    assert recalled.nearest.tolist() == list(range(6))
    assert float(recalled.novelty.max()) < 1e-9
    unknown = memory.recall(random_patterns(2, 2000, seed=5)[:, :200])
    assert float(unknown.novelty.min()) > 0.8
    assert float(unknown.energy.min()) > float(recalled.energy.max())


def test_a_memory_of_given_patterns_is_that_of_written_ones() -> None:
    patterns = random_patterns(4, 100)
    given = HopfieldMemory.of([f"task{i}" for i in range(4)], patterns)
    keys = given.key_of(patterns)
    assert torch.equal(given.recall(keys).patterns, filled(patterns).recall(keys).patterns)
    assert given.patterns.data_ptr() == patterns.data_ptr()
    patterns[2, :10] = 0.25
    with pytest.raises(DataError, match="the key of 'task2' is constant"):
        HopfieldMemory.of([f"task{i}" for i in range(4)], patterns)
    patterns[2, 3] = math.nan
    with pytest.raises(DataError, match="not finite"):
        HopfieldMemory.of([f"task{i}" for i in range(4)], patterns)


def test_iterated_retrieval_cleans_a_noisy_key() -> None:
    patterns = random_patterns(4, 100)
    key = patterns[2, :10] + 0.6 * random_patterns(1, 10, seed=9)[0]
    one = filled(patterns, beta=0.4).coefficients(key)[2]
    many = filled(patterns, beta=0.4, steps=20).coefficients(key)[2]
    assert many > one
    query = key
    for _ in range(19):
        query = torch.softmax(0.4 * query @ patterns[:, :10].T, dim=0) @ patterns[:, :10]
    assert many == pytest.approx(float(torch.softmax(0.4 * query @ patterns[:, :10].T, dim=0)[2]))


@pytest.mark.parametrize(
    ("fraction", "numel", "length"), [(0.1, 294_912, 29_491), (0.29, 100, 29), (0.1, 19, 1)]
)
def test_the_key_is_the_floor_of_the_share(fraction: float, numel: int, length: int) -> None:
    memory = HopfieldMemory(fraction=fraction)
    memory.write("a", torch.arange(float(numel)))
    assert memory.key_length == length


def test_bad_input_is_an_error_that_helps() -> None:
    for wrong in ({"fraction": 1.0}, {"epsilon": 0.0}, {"steps": 0}, {"beta": -1.0}):
        with pytest.raises(ConfigError):
            HopfieldMemory(**wrong)
    with pytest.raises(ConfigError, match='"auto"'):
        HopfieldMemory(beta="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        HopfieldMemory(similarity="cosien")
    memory = HopfieldMemory()
    with pytest.raises(NotFoundError, match="empty"):
        memory.recall(torch.zeros(3))
    with pytest.raises(MismatchError, match="none of which is the key"):
        memory.write("a", torch.zeros(9))
    with pytest.raises(MismatchError, match="one flat vector"):
        memory.write("a", torch.zeros(2, 10))
    memory.write("a", torch.arange(30.0))
    with pytest.raises(MismatchError, match="as stored"):
        memory.write("b", torch.arange(31.0))
    with pytest.raises(MismatchError, match="a key of 4 entries"):
        memory.recall(torch.zeros(4))
    assert len(memory) == 1
