"""Analytic heads: equal to scikit-learn on all data at once, in whatever order the data came."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from memtool.errors import ConfigError, DataError, MismatchError
from memtool.heads import FeatureStatistics, LinearClassifier, solve_head
from memtool.settings import HeadSettings

KINDS = ("ncm", "ridge", "lda")


def problem(
    count: int = 150, dim: int = 8, classes: int = 5, seed: int = 0, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Features (count, dim) float64 around class means, labels (count,), each class present."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(classes), torch.randint(classes, (count - classes,), generator=generator)]
    )
    means = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return means[labels] + noise + offset, labels


def counted(features: Tensor, labels: Tensor, classes: int = 5) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], classes)
    statistics.add(features, labels)
    return statistics


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


def in_float64(classifier: LinearClassifier, features: Tensor) -> Tensor:
    return features @ classifier.weight.double().T + classifier.bias.double()


@pytest.mark.parametrize("shrinkage", [0.0, 0.02, 0.7])
def test_lda_equals_scikit_learn(shrinkage: float) -> None:
    features, labels = problem()
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None)
    peer.fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(peer.decision_function(features.numpy()))
    logits = in_float64(counted(features, labels).lda(shrinkage), features)
    torch.testing.assert_close(centred(logits), centred(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("count", [150, 6])
def test_ridge_equals_scikit_learn(strength: float, count: int) -> None:
    features, labels = problem(count)
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    penalty = strength * float((features - features.mean(0)).square().sum()) / 8
    peer = Ridge(alpha=penalty, solver="cholesky").fit(features.numpy(), one_hot.numpy())
    classifier = counted(features, labels).ridge(strength)
    np.testing.assert_allclose(classifier.weight, peer.coef_, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(classifier.bias, peer.intercept_, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_ncm_equals_scikit_learn(offset: float) -> None:
    features, labels = problem(offset=offset)
    peer = NearestCentroid().fit(features.numpy(), labels.numpy())
    classifier = counted(features, labels).ncm()
    expected: npt.NDArray[np.int64] = peer.predict(features.numpy())
    np.testing.assert_array_equal(in_float64(classifier, features).argmax(1), expected)
    distances = torch.cdist(features, torch.from_numpy(peer.centroids_)).square()
    logits = in_float64(classifier, features)
    torch.testing.assert_close(
        centred(logits), centred(-distances / 2), atol=1e-5 * (1 + offset), rtol=1e-5
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_exact_over_tasks_in_any_order_and_split(seed: int, data: st.DataObject) -> None:
    features, labels = problem(60, seed=seed)
    whole = counted(features, labels)
    # Class-incremental tasks, in any order, in batches of any size, some counted elsewhere.
    order = data.draw(st.permutations(range(5)))
    size = data.draw(st.integers(1, 20))
    running, other = FeatureStatistics(8), FeatureStatistics(8, 5)
    for place, label in enumerate(order):
        running.grow(max(0, label + 1 - running.classes))
        chosen = labels == label
        for part in zip(features[chosen].split(size), labels[chosen].split(size), strict=True):
            (running if place % 2 == 0 else other).add(*part)
    running.merge(other)
    assert torch.equal(running.counts, whole.counts)
    torch.testing.assert_close(running.sums, whole.sums, atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(running.second, whole.second, atol=1e-10, rtol=1e-12)
    for kind in KINDS:
        one = solve_head(kind, running, HeadSettings())
        two = solve_head(kind, whole, HeadSettings())
        torch.testing.assert_close(one.weight, two.weight, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.bias, two.bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_never_seen_are_never_chosen(kind: str) -> None:
    features, labels = problem()
    kept = (labels != 1) & (labels != 4)
    classifier = solve_head(kind, counted(features[kept], labels[kept]), HeadSettings())
    assert classifier.weight.dtype == classifier.bias.dtype == torch.float32
    assert classifier.weight.isfinite().all()
    logits = classifier(features.float())
    assert torch.equal(logits[:, [1, 4]], torch.full((150, 2), -torch.inf))
    assert logits[:, [0, 2, 3]].isfinite().all()
    relabelled = torch.tensor([0, -1, 1, 2, -1])[labels[kept]]
    alone = solve_head(kind, counted(features[kept], relabelled, 3), HeadSettings())
    torch.testing.assert_close(logits[:, [0, 2, 3]], alone(features.float()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_with_fewer_samples_than_features(kind: str) -> None:
    features, labels = problem(count=20, dim=300)
    classifier = solve_head(kind, counted(features, labels), HeadSettings())
    assert classifier.weight.isfinite().all()
    assert (classifier(features.float()).argmax(1) == labels).all()


def test_lda_without_shrinkage_uses_the_pseudo_inverse() -> None:
    features, labels = problem()
    flat = torch.cat([features, features[:, :1]], dim=1)  # one dimension says nothing new
    one = counted(features, labels).lda(0.0)(features.float())
    two = counted(flat, labels).lda(0.0)(flat.float())
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-4)


def test_lda_shrinkage_of_solve_head_is_the_ratio_of_the_ridge_setting() -> None:
    features, labels = problem()
    statistics = counted(features, labels)
    solved = solve_head("lda", statistics, HeadSettings(ridge=0.25))
    assert torch.equal(solved.weight, statistics.lda(0.2).weight)


def test_equal_priors_only_move_the_bias() -> None:
    features, labels = problem()
    statistics = counted(features, labels)
    shares, equal = statistics.lda(0.1), statistics.lda(0.1, equal_priors=True)
    assert torch.equal(shares.weight, equal.weight)
    expected = (statistics.counts / 150).log().float()
    torch.testing.assert_close(shares.bias - equal.bias, expected, atol=1e-5, rtol=1e-5)


def test_one_class_and_constant_features_have_their_limits() -> None:
    same = counted(torch.ones(4, 3), torch.tensor([0, 0, 0, 1]), 2)
    classifier = same.ridge(0.1)
    torch.testing.assert_close(classifier.weight, torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(classifier.bias, torch.tensor([0.75, 0.25]))
    nothing = counted(torch.zeros(2, 3), torch.tensor([0, 1]), 2).ridge(0.1)
    torch.testing.assert_close(nothing.bias, torch.tensor([0.5, 0.5]))
    one_class = counted(torch.randn(5, 3), torch.zeros(5, dtype=torch.long), 1)
    for kind in KINDS:
        assert solve_head(kind, one_class, HeadSettings())(torch.randn(2, 3)).isfinite().all()


def test_round_trip_through_bytes() -> None:
    statistics = counted(*problem())
    data = statistics.to_bytes()
    again = FeatureStatistics.from_bytes(data, "here")
    assert again.to_bytes() == data
    assert (again.dim, again.classes) == (8, 5)
    assert torch.equal(again.ridge().weight, statistics.ridge().weight)


def test_bad_input_is_an_error_that_helps_and_counts_nothing() -> None:
    features, labels = problem()
    statistics = counted(features, labels)
    before = statistics.to_bytes()
    with pytest.raises(MismatchError, match="labels from 0 to 5") as caught:
        statistics.add(features[:2], torch.tensor([0, 5]))
    assert "grow" in str(caught.value)
    with pytest.raises(MismatchError, match="labels from -1"):
        statistics.add(features[:2], torch.tensor([0, -1]))
    with pytest.raises(MismatchError, match="integers"):
        statistics.add(features[:2], torch.tensor([0.0, 1.0]))
    with pytest.raises(MismatchError, match=r"\(n,\)"):
        statistics.add(features[:2], labels[:3])
    with pytest.raises(DataError, match="not finite"):
        statistics.add(torch.full((1, 8), torch.inf), labels[:1])
    statistics.add(features[:0], labels[:0])
    assert statistics.to_bytes() == before
    with pytest.raises(MismatchError, match="growth by -1"):
        statistics.grow(-1)
    with pytest.raises(ConfigError, match="trained by gradient"):
        solve_head("grown", statistics, HeadSettings())
    with pytest.raises(ConfigError, match="did you mean 'ridge'"):
        solve_head("rigde", statistics, HeadSettings())
    with pytest.raises(DataError, match="no vectors"):
        FeatureStatistics(8, 5).ncm()
    single = counted(features[:5], torch.arange(5))
    with pytest.raises(DataError, match="no class has two different vectors"):
        single.lda(0.1)
    with pytest.raises(ConfigError, match="too small for this data"):
        counted(torch.ones(4, 3) * torch.arange(4.0)[:, None], torch.arange(4), 4).ridge(1e-18)
