"""Mixup: what a step learns from is the mixture, and its loss that of the mixed labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memtool.engine import Batch, Engine, Joint
from memtool.errors import ConfigError
from memtool.learning.learner import Learner
from memtool.learning.mixup import mixing
from memtool.methods import open_method
from memtool.methods.mira.method import Mira
from tests.methods.conftest import learn, small_config

OF_KEYS = {
    "consolidate__epochs": 1,
    "consolidate__keys": "random",
    "head__kind": "shared",
    "head__scope": "shared",
}


def batch(count: int = 6, seed: int = 3) -> Batch:
    images = torch.randint(0, 256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 3
    return Batch(images.byte(), labels, labels, torch.ones(count), seed)


def by_hand(one: Batch, alpha: float, groups: int) -> tuple[Tensor, Tensor]:
    """The mixed images and their labels as shares of classes (n, 10), sample by sample."""
    drawn = mixing(one, alpha, groups)
    assert drawn.partners is not None
    images, labels = [], torch.zeros(len(one.labels), 10, dtype=torch.float64)
    for place, partner in enumerate(drawn.partners.tolist()):
        own, other = one.inputs[place].double(), one.inputs[partner].double()
        images.append((drawn.share * own + (1 - drawn.share) * other).round().byte())
        labels[place, one.labels[place]] += drawn.share
        labels[place, one.labels[partner]] += 1 - drawn.share
    return torch.stack(images), labels


@pytest.mark.parametrize("groups", [1, 2])
def test_partners_are_drawn_from_the_seed_within_a_group(groups):
    shares = []
    for seed in range(200):
        drawn = mixing(batch(seed=seed), 0.4, groups)
        again = mixing(batch(seed=seed), 0.4, groups)
        assert drawn.share == again.share
        assert torch.equal(drawn.partners, again.partners)
        shares.append(drawn.share)
        for rows in torch.arange(6).view(groups, -1):
            assert sorted(drawn.partners[rows].tolist()) == rows.tolist()
    assert 0 <= min(shares) < 0.1 < 0.9 < max(shares) <= 1
    # Of Beta(a, a): mean one half, variance 1 / (4 (2 a + 1)).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.08)
    assert np.var(shares) == pytest.approx(1 / 7.2, abs=0.03)


def test_without_mixup_nothing_is_touched():
    one, drawn = batch(), mixing(batch(), 0.0)
    assert drawn.inputs(one.inputs) is one.inputs
    loss = torch.rand(())
    assert drawn.loss(lambda labels: loss if labels is one.labels else -loss, one.labels) is loss


class Caught(Exception):
    """A training that was about to begin: its module and its loss."""


def caught(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], Any]) -> tuple[nn.Module, Any]:
    """The module and the loss that a step would train by."""

    def fit(engine: Engine, module: nn.Module, batches: Any, loss: Any, *_: Any, **__: Any) -> Any:
        raise Caught(module, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "fit", fit)
        with pytest.raises(Caught) as told:
            begin()
    module, loss = told.value.args
    with torch.no_grad():  # a head at zero has the same loss for all images
        for name, parameter in module.named_parameters():
            if name in ("weight", "objective.head.weight"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return module, loss


@pytest.mark.parametrize("who", ["adapter", "adapters of a task", "baseline", "keys"])
def test_the_loss_of_a_step_is_that_of_the_mixed_images(who, monkeypatch, tmp_path):
    groups = 2 if who == "adapters of a task" else 1
    more = OF_KEYS if who == "keys" else {}
    made = small_config(tmp_path, train__mixup=0.4, adapter__per_task=groups, **more)
    mira = Mira.open(made, seed=0)
    task = mira.workspace.task("1")
    if who == "baseline":
        module, loss = caught(monkeypatch, lambda: Learner(mira.workspace, 1).learn(task, "t"))
    elif who == "keys":
        mira.adapt("1")
        mira.write()
        module, loss = caught(monkeypatch, mira.consolidate)
    else:
        module, loss = caught(monkeypatch, lambda: mira.adapt("1"))
    one = batch()
    images, labels = by_hand(one, 0.4, groups)
    said = module(images).double().log_softmax(dim=-1).reshape(6, 10)
    each = -(labels * said).sum(dim=1).view(groups, -1).mean(dim=1)
    given = Joint((one,)) if who.startswith("adapter") else one
    told = loss(module, given).reshape(-1).tolist()
    assert each.detach().tolist() == pytest.approx(told, abs=1e-5)
    plain = -said[torch.arange(6), one.labels].view(groups, -1).mean(dim=1)
    assert not torch.allclose(each, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"stream__setting": "trace", "stream__source": "text_cl5"}, "on a stream of texts"),
        ({"method": "moram", "head__kind": "text", "stream__setting": "xtail"}, "head.kind text"),
    ],
)
def test_what_has_no_mean_is_refused(values, what, tmp_path):
    config = small_config(tmp_path, train__mixup=0.2, stream__order=None, **values)
    with pytest.raises(ConfigError, match=what) as told:
        open_method(config, seed=0)
    assert "--set train.mixup=0" in str(told.value)


@pytest.mark.parametrize("settings", [{"train__mixup": 0.4}, {"train__average": "half"}])
def test_mixed_and_averaged_trainings_give_other_adapters_that_work(settings, tmp_path):
    few = {"stream__train_per_task": 60, "stream__test_per_task": 40, "train__epochs": 4}
    found = []
    for place, more in enumerate(({}, settings, settings)):
        mira = learn(Mira.open(small_config(tmp_path / str(place), **few, **more), seed=0), 1)
        found.append(mira.workspace.store.view("HEAD").values())
        assert mira.evaluate().row("memory").metrics["faa"] > 0.3
    assert np.array_equal(found[1], found[2])
    assert not np.allclose(found[0], found[1])
