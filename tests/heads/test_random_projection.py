"""Ridge on random features: equal to a solve on all data at once, in whatever order it came."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtool.errors import ConfigError, CorruptError, DataError, MismatchError
from memtool.heads import FeatureStatistics, ProjectedMoments, RecalledHead, solve_head
from memtool.heads.random_projection import PENALTIES, Projection
from memtool.heads.solve import merged
from memtool.settings import HeadSettings
from tests.heads.test_analytic import problem

WIDTHS = (300, 40)
"""More random features than samples, and fewer."""


def counted(features: Tensor, labels: Tensor, width: int = 40, seed: int = 3) -> FeatureStatistics:
    projected = ProjectedMoments(features.shape[1], width, seed, 5)
    statistics = FeatureStatistics(features.shape[1], 5, projected)
    statistics.add(features, labels)
    return statistics


def direct(features: Tensor, labels: Tensor, width: int, penalty: float) -> tuple[Tensor, Tensor]:
    """The twin: a column of ones that is not penalised, and one system of all samples."""
    weight = torch.randn(width, features.shape[1], generator=torch.Generator().manual_seed(3))
    h = (features.double() @ weight.double().T).clamp_min(0)
    y = torch.nn.functional.one_hot(labels, 5).double()
    design = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], dim=1)
    penalties = torch.diag(torch.tensor([penalty] * width + [0.0], dtype=torch.float64))
    solved = torch.linalg.solve(design.T @ design + penalties, design.T @ y)
    return solved[:-1].T, solved[-1]


def penalty_of(features: Tensor, width: int, strength: float) -> float:
    weight = torch.randn(width, features.shape[1], generator=torch.Generator().manual_seed(3))
    h = (features.double() @ weight.double().T).clamp_min(0)
    return strength * float((h - h.mean(0)).square().sum()) / width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_it_equals_a_direct_solve_of_all_data(width: int, strength: float) -> None:
    features, labels = problem()
    projected = counted(features, labels, width).projected
    assert projected is not None
    weight, bias = projected.ridge(strength)
    expected = direct(features, labels, width, penalty_of(features, width, strength))
    torch.testing.assert_close(weight, expected[0], atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(bias, expected[1], atol=1e-9, rtol=1e-7)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), width=st.sampled_from([5, 30, 90]), data=st.data())
def test_it_is_exact_over_tasks_in_any_order_and_split(
    seed: int, width: int, data: st.DataObject
) -> None:
    features, labels = problem(60, seed=seed)
    whole = counted(features, labels, width).projected
    order = data.draw(st.permutations(range(5)))
    size = data.draw(st.integers(1, 20))
    running = ProjectedMoments(8, width, 3)
    other = FeatureStatistics(8, 5, ProjectedMoments(8, width, 3, 5))
    for place, label in enumerate(order):
        running.grow(label + 1)
        chosen = labels == label
        for part in zip(features[chosen].split(size), labels[chosen].split(size), strict=True):
            (running if place % 2 == 0 else other).add(*part)
    stored = FeatureStatistics.from_bytes(other.to_bytes(), "a blob").projected
    assert whole is not None
    assert stored is not None
    running.merge(stored)
    for one, two in zip(running.ridge(1e-2), whole.ridge(1e-2), strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-6)


def test_the_factor_never_has_more_than_twice_as_many_rows_as_columns() -> None:
    features, labels = problem(400)
    projected = ProjectedMoments(8, 20, 3, 5)
    for part in zip(features.split(7), labels.split(7), strict=True):
        projected.add(*part)
        assert projected.factor.shape[0] <= 50
    gram = projected.factor.T @ projected.factor
    h = Projection.drawn(8, 20, 3)(features)
    rows = torch.cat([h, torch.nn.functional.one_hot(labels, 5).double()], dim=1)
    torch.testing.assert_close(gram, rows.T @ rows, atol=1e-8, rtol=1e-10)
    assert projected.tensors()["factor"].shape == (25, 25)


def test_without_a_projection_it_is_the_ridge_head() -> None:
    features, labels = problem()
    positive = features - features.min()  # so that ReLU leaves them as they are
    statistics = counted(positive, labels, width=8)
    assert statistics.projected is not None
    statistics.projected.projection = Projection(torch.eye(8))
    statistics.projected.factor = statistics.projected.factor[:0]
    statistics.projected.add(positive, labels)
    plain = statistics.ridge(0.1)
    classifier = statistics.rp_ridge(0.1)
    torch.testing.assert_close(classifier.weight, plain.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(classifier.bias, plain.bias, atol=1e-6, rtol=1e-5)


def test_folds_choose_the_penalty_with_the_least_error_on_one_of_five() -> None:
    features, labels = problem(150, offset=1.0)
    statistics = counted(features, labels)
    assert statistics.projected is not None
    with pytest.raises(DataError, match="no λ was measured"):
        statistics.rp_ridge(None)
    statistics.projected.measure(features, labels)
    held = torch.zeros(150, dtype=torch.bool)
    for label in range(5):
        held[(labels == label).nonzero()[4::5, 0]] = True
    for place in (6, 8, 10, 12):
        weight, bias = direct(features[~held], labels[~held], 40, PENALTIES[place])
        h = Projection.drawn(8, 40, 3)(features[held])
        y = torch.nn.functional.one_hot(labels[held], 5).double()
        error = (y - h @ weight.T - bias).square().sum()
        torch.testing.assert_close(statistics.projected.errors[place], error, rtol=1e-6, atol=1e-6)
    best = PENALTIES[int(statistics.projected.errors.argmin())]
    expected = direct(features, labels, 40, best)
    classifier = solve_head("rp-ridge", statistics, HeadSettings(penalty="folds"))
    torch.testing.assert_close(classifier.weight.double(), expected[0], atol=1e-5, rtol=1e-4)


def test_errors_of_tasks_add_up() -> None:
    parts = {}
    for task in (1, 2):
        features, labels = problem(60, seed=task)
        parts[task] = counted(features, labels)
        projected = parts[task].projected
        assert projected is not None
        projected.measure(features, labels)
    whole = merged(parts).projected
    errors = [one.projected.errors for one in parts.values() if one.projected is not None]
    assert whole is not None
    torch.testing.assert_close(whole.errors, errors[0] + errors[1])


@pytest.mark.parametrize("width", WIDTHS)
def test_random_features_tell_apart_what_no_line_does(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 2, generator=generator)
    labels = (features.prod(dim=1) > 0).long()  # exclusive or
    statistics = counted(features, labels, width)
    lines = (statistics.ridge()(features).argmax(1) == labels).double().mean()
    random = (statistics.rp_ridge()(features).argmax(1) == labels).double().mean()
    assert lines < 0.65
    assert random > 0.9


def test_a_recalled_head_keeps_its_projection() -> None:
    features, labels = problem()
    solved = [counted(features[labels == a], labels[labels == a]).rp_ridge() for a in range(2)] + [
        counted(features, labels).rp_ridge()
    ]
    head = RecalledHead.of_tasks(solved[:2], [0, 0, 1])
    read = RecalledHead.from_bytes(head.to_bytes(), "blob 'head'")
    weights = torch.tensor([[0.2, 0.3, 0.5]]).expand(150, -1)
    assert read.projection is not None
    assert torch.equal(read(features.float(), weights), head(features.float(), weights))
    shared = RecalledHead.shared(solved[2])
    torch.testing.assert_close(shared(features.float(), weights), solved[2](features.float()))


def test_classes_never_seen_are_never_chosen() -> None:
    features, labels = problem()
    kept = labels != 1
    classifier = counted(features[kept], labels[kept]).rp_ridge()
    assert torch.equal(classifier(features.float())[:, 1], torch.full((150,), -torch.inf))


def test_what_does_not_fit_is_refused() -> None:
    features, labels = problem()
    plain = FeatureStatistics(8, 5)
    plain.add(features, labels)
    with pytest.raises(ConfigError, match="not counted under a random projection"):
        solve_head("rp-ridge", plain, HeadSettings())
    with pytest.raises(MismatchError, match="some tasks were counted under a random projection"):
        plain.merge(counted(features, labels))
    with pytest.raises(MismatchError, match="8 features to 40, seed 4"):
        counted(features, labels).merge(counted(features, labels, seed=4))
    with pytest.raises(DataError, match="no vectors"):
        FeatureStatistics(8, 5, ProjectedMoments(8, 40, 3, 5)).rp_ridge()
    with pytest.raises(ConfigError, match="ridge of -1"):
        counted(features, labels).rp_ridge(-1)
    with pytest.raises(MismatchError, match="features of width 3"):
        counted(features, labels).rp_ridge()(torch.zeros(1, 3))


def test_a_blob_of_another_drawing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = counted(*problem()).to_bytes()
    drawn = Projection.drawn
    monkeypatch.setattr(Projection, "drawn", lambda dim, width, seed: drawn(dim, width, seed + 1))
    with pytest.raises(CorruptError, match="does not draw from seed 3"):
        FeatureStatistics.from_bytes(data, "blob 'features.1'")
