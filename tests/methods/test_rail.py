"""RAIL: the recursion against ridge on all samples at once, the fusion against a slow loop."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

from memtool.errors import ConfigError
from memtool.experiments.baselines import chosen_baselines
from memtool.heads import CosineHead
from memtool.methods import open_method
from memtool.methods.baselines import baselines_of
from memtool.methods.baselines.rail import FUSION, RIDGE, Rail
from tests.methods.conftest import small_config

WIDTH, DIM, CLASSES = 40, 6, 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    module = import_module(Rail.__module__)  # by its name the package has the function
    monkeypatch.setattr(module, "WIDTH", WIDTH)
    monkeypatch.setattr(module, "ROWS", 7)


def samples(classes, count=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat(count // len(classes))
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 0.3 * torch.randn(len(labels), DIM, generator=generator), labels


def fresh():
    return Rail(DIM, CLASSES, torch.Generator().manual_seed(3))


TASKS = (samples([0, 1], seed=1), samples([2, 3], seed=2))


def test_counting_task_after_task_is_ridge_on_all_samples_in_any_order():
    model, other = fresh(), fresh()
    for part in TASKS:
        model.count(*part)
    for part in reversed(TASKS):
        other.count(*part)
    features, labels = (torch.cat(parts) for parts in zip(*TASKS, strict=True))
    phi = torch.stack([(model.projection @ (x / x.norm())).relu() for x in features.double()])
    gram = phi.T @ phi + RIDGE * torch.eye(WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(gram, phi.T @ F.one_hot(labels, CLASSES).double())
    torch.testing.assert_close(model.weight, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(other.weight, expected, rtol=1e-6, atol=1e-8)
    assert model.learned.tolist() == [True] * 4 + [False]
    assert float(model.projection.abs().max()) <= DIM**-0.5


def test_scores_are_fused_where_zero_shot_names_a_class_that_was_learned():
    model = fresh()
    head = CosineHead.of_classes(torch.eye(CLASSES, DIM), range(CLASSES), CLASSES, 3.0)
    features = torch.cat([TASKS[0][0][:6], TASKS[1][0][:6], torch.randn(8, DIM)])
    zero_shot = head(features).softmax(dim=1).double()
    torch.testing.assert_close(model.scores(features, head), zero_shot)
    model.count(*TASKS[0])
    found = model.scores(features, head)
    fused = 0
    for feature, p, score in zip(features, zero_shot, found, strict=True):
        if int(p.argmax()) in (0, 1):
            unit = feature.double() / feature.double().norm()
            phi = (model.projection @ unit).relu()
            p = (1 - FUSION) * p + FUSION * (phi @ model.weight)
            fused += 1
        torch.testing.assert_close(score, p, rtol=1e-5, atol=1e-6)
    assert 0 < fused < len(features)


def test_it_is_of_known_classes_alone(tmp_path):
    assert "rail" in baselines_of("images", fixed_head=True)
    assert "rail" not in {**baselines_of("images"), **baselines_of("texts")}
    config = small_config(tmp_path, baselines=("rail",))
    with pytest.raises(ConfigError, match=r"no baseline rail under stream\.setting dil"):
        chosen_baselines(open_method(config, seed=0))
