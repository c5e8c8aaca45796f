"""Random-projection heads in a memory and under baselines, and the rivals of one session."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import memtool
from memtool import workspace
from memtool.errors import CapacityError, ConfigError, MemtoolError
from memtool.experiments import run as experiment
from memtool.experiments.baselines import chosen_baselines
from memtool.experiments.plan import plan
from memtool.heads import Projection, RecalledHead
from memtool.learning.learner import Learner
from memtool.methods import open_method
from memtool.methods.baselines import baselines_of
from memtool.methods.baselines.aper import APER
from memtool.methods.baselines.fsa import FSA
from memtool.methods.baselines.in_turn import in_turn
from memtool.methods.baselines.ranpac import RANPAC
from memtool.methods.baselines.sources import frozen_sources, trained_sources
from memtool.methods.forget import forget
from memtool.methods.mira.count import count_task
from memtool.methods.mira.method import Mira
from memtool.workspace import Workspace
from tests.methods.conftest import learn, small_config

FEW = {"train__epochs": 1, "head__kind": "rp-ridge", "head__width": 60, "head__scope": "shared"}


def twin(features, labels, width, strength):
    """All features at once, a column of ones that is not penalised."""
    weight = torch.randn(width, features.shape[1], generator=torch.Generator().manual_seed(0))
    h = (features.double() @ weight.double().T).clamp_min(0)
    penalty = strength * (h - h.mean(0)).square().sum() / width
    design = torch.cat([h, torch.ones(len(h), 1).double()], dim=1)
    penalties = torch.diag(torch.cat([penalty.expand(width), torch.zeros(1).double()]))
    return torch.linalg.solve(
        design.T @ design + penalties, design.T @ F.one_hot(labels, 10).double()
    )


# In a memory


@pytest.fixture(scope="module")
def remembered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("projected")
    return learn(Mira.open(small_config(folder, **FEW), seed=0), 2)


def test_the_head_of_a_memory_is_that_of_all_images_at_once(remembered):
    snapshot, work = remembered.snapshot(), remembered.workspace
    _, model, head = snapshot.consolidated()
    features, labels = [], []
    for task in work.stream.tasks[:2]:
        own = snapshot.own_values(task.number, work.engine.device)
        settings = remembered.config.memory
        found, _ = count_task(
            work.engine, work.backbone, model.memory, model.look, settings, own, task.train
        )
        features.append(found)
        labels.append(torch.from_numpy(np.array(task.train.labels)))
    expected = twin(torch.cat(features), torch.cat(labels), 60, 1e-2)
    torch.testing.assert_close(head.weight[0].T.double(), expected[:-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bias[0].double(), expected[-1], atol=1e-5, rtol=1e-4)


def test_it_is_read_back_without_a_stream(remembered):
    task = remembered.workspace.stream.tasks[0]
    images = torch.from_numpy(np.array(task.test.images[:20]))
    attached = memtool.load(remembered.workspace.store_path).attach()
    _, model, head = remembered.snapshot().consolidated()
    with torch.no_grad():
        features, weights = model.with_coefficients(images)
    expected = head(features, weights.mean(dim=1))
    assert torch.allclose(attached(images).logits, expected, atol=1e-4)
    record = remembered.evaluate(compare=True)
    assert record.row("memory").metrics["faa"] > 0.25
    assert record.row("uniform").metrics["faa"] > 0.25


def test_features_of_the_first_adapter_stand_beside_under_a_projection(tmp_path):
    config = small_config(tmp_path, **{**FEW, "head__features": "recalled+first"})
    mira = learn(Mira.open(config, seed=0), 2)
    projection = mira.snapshot().head.projection
    assert projection.dim == 2 * mira.workspace.backbone.dim
    images = torch.from_numpy(np.array(mira.workspace.stream.tasks[0].test.images[:4]))
    attached = memtool.load(mira.workspace.store_path).attach()
    assert attached(images).logits.isfinite().all()


def test_consolidation_goes_on_and_a_forgotten_task_leaves_no_trace(tmp_path):
    config = small_config(tmp_path, **{**FEW, "head__scope": "task"})
    mira = learn(Mira.open(config, seed=0), 1)
    then = mira.snapshot().head
    again = Mira.open(config, seed=0)
    again.adapt("2")
    again.write()
    again.consolidate()
    assert again.snapshot().head.weight.shape == (2, 10, 60)
    assert torch.equal(again.snapshot().head.weight[0], then.weight[0])
    memtool.load(again.workspace.store_path)
    forget(again.workspace.store, ["2"])
    assert torch.equal(again.snapshot().head.weight, then.weight)


def test_a_memory_that_was_begun_without_cannot_go_on_with_it(tmp_path):
    learn(Mira.open(small_config(tmp_path, train__epochs=1), seed=0), 1)
    mira = Mira.open(small_config(tmp_path, **FEW), seed=0)
    with pytest.raises(ConfigError, match="not counted under a random projection"):
        mira.consolidate()


def test_a_plan_says_what_it_takes(tmp_path):
    facts = plan(small_config(tmp_path, **FEW, stream__train_per_task=100), seed=0, verb="run")
    columns = 60 + 10
    factors = 3 * columns + 2 * 2 * columns  # of three tasks, and of all, centred and not
    assert facts["head_bytes"] == 8 * (factors * columns + 2 * 60 * 60)
    assert plan(small_config(tmp_path), seed=0, verb="run")["head_bytes"] is None


def test_too_wide_a_projection_is_refused_before_any_work(remembered, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "available_bytes", lambda device: 10**6)
    config = small_config(tmp_path, **{**FEW, "head__width": 5000})
    there = config.model_copy(update={"store": remembered.config.store})
    for verb in (partial(experiment.run, config), Mira.open(there, seed=0).consolidate):
        with pytest.raises(CapacityError, match=r"head.width 5,000 takes about .* bytes") as error:
            verb()
        assert "1,000,000 bytes" in error.value.expected
        fits = int(error.value.remedy.rpartition("=")[2])
        assert Mira.open(config, seed=0).workspace.projection_bytes(fits).total <= 10**6 / 2
    assert not list(tmp_path.rglob("*.safetensors"))


# Under baselines


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sessions")
    return Workspace(small_config(folder, **{**FEW, "stream__train_per_task": 60}), seed=0)


@pytest.fixture(scope="module")
def tasks(work):
    return work.stream.tasks[:2]


@pytest.fixture(scope="module")
def learner(work, tasks):
    """What every rival here adapts: one LoRA on the first task."""
    learner = Learner(work, 1)
    learner.learn(tasks[0], "test")
    return learner


def labels_of(samples):
    return torch.from_numpy(np.array(samples.labels))


def test_baselines_are_read_under_the_same_head(work, tasks, tmp_path):
    rows = {row.id: row for row in in_turn(Learner, work, tasks)}
    assert "sequential-rp" in rows
    frozen = {row.id: row for row in baselines_of("images")["frozen"](work, tasks)}
    assert frozen["frozen-rp"].label == "frozen + random-projection ridge head"
    found = {
        one.id
        for one in (
            *frozen_sources(work, tasks, tasks[0].test),
            *trained_sources(Learner, "erm", "ERM", work, tasks, tasks[0].test),
        )
    }
    assert {"frozen-rp", "erm-rp"} < found
    plain = Workspace(small_config(tmp_path, train__epochs=1), seed=0)
    assert not [row for row in in_turn(Learner, plain, tasks[:1]) if row.id.endswith("-rp")]


def test_fsa_is_sequential_lora_under_lda_as_long_as_there_is_one_task(work, tasks):
    (row,) = FSA.in_turn(work, tasks)
    rows = {row.id: row for row in in_turn(Learner, work, tasks)}
    assert row.accuracy[1][0] == rows["sequential-lda"].accuracy[1][0]


def test_ranpac_is_ridge_on_projected_features_of_the_first_adapter(work, tasks, learner):
    (row,) = RANPAC.in_turn(work, tasks)
    features = [learner.features_of(task.train) for task in tasks]
    counted = work.statistics(work.backbone.dim)
    for found, task in zip(features, tasks, strict=True):
        counted.add(found, labels_of(task.train))
        counted.projected.measure(found, labels_of(task.train))
    head = counted.rp_ridge(None)
    for place, task in enumerate(tasks):
        right = head(learner.features_of(task.test)).argmax(1) == labels_of(task.test)
        assert row.accuracy[-1][place] == pytest.approx(float(right.double().mean()))


def test_aper_is_the_nearest_mean_of_both_features_by_cosine(work, tasks, learner):
    (row,) = APER.in_turn(work, tasks)

    def both(samples):
        return torch.cat([work.features(samples.images), learner.features_of(samples)], dim=1)

    features = torch.cat([both(task.train) for task in tasks])
    labels = torch.cat([labels_of(task.train) for task in tasks])
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(10)])
    for place, task in enumerate(tasks):
        cosines = F.cosine_similarity(both(task.test)[:, None], means[None], dim=2)
        right = cosines.argmax(1) == labels_of(task.test)
        assert row.accuracy[-1][place] == pytest.approx(float(right.double().mean()), abs=0.02)


def test_first_sessions_have_epochs_of_their_own(work, tasks, learner):
    config = work.config.model_copy(
        update={"first_session": work.config.first_session.model_copy(update={"epochs": 2})}
    )
    longer = Workspace(config, seed=0)
    assert FSA._adapted(longer, tasks[0], "test").work.config.train.epochs == 2
    assert longer.config.train.epochs == 1
    same = FSA._adapted(work, tasks[0], "test")
    assert torch.equal(same.values.flat(), learner.values.flat())


def test_sources_are_one_session(work, tasks):
    for one in (RANPAC, APER):
        (found,) = one.on_sources(work, tasks, tasks[0].test)
        assert found.accuracy > 0.15


def test_rivals_are_measured_where_they_are_named(tmp_path):
    def chosen(**settings):
        return chosen_baselines(open_method(small_config(tmp_path, **settings), seed=0))

    assert not {"ranpac", "aper", "fsa"} & {*chosen()}
    assert chosen(baselines=("fsa", "joint")) == ("joint", "fsa")
    dg = {"stream__setting": "dg", "stream__order": ("rot0", "rot30", "rot60")}
    assert chosen(baselines=("ranpac",), **dg) == ("ranpac",)
    with pytest.raises(ConfigError, match=r"no baseline fsa under stream.setting dg"):
        chosen(baselines=("fsa",), **dg)


@pytest.mark.parametrize("name", ["ranpac", "aper", "fsa"])
def test_texts_and_heads_that_know_all_classes_have_none_of_them(name):
    assert name not in baselines_of("texts")
    assert name not in baselines_of("images", fixed_head=True)


def test_a_projection_leaves_some_memory_to_model_and_images(work, monkeypatch):
    total = work.projection_bytes(work.config.head.width).total
    monkeypatch.setattr(workspace, "available_bytes", lambda device: round(total / 0.7))
    work.require_room_for_projection()
    monkeypatch.setattr(workspace, "available_bytes", lambda device: round(total / 0.8))
    with pytest.raises(CapacityError, match="width"):
        work.require_room_for_projection()


def test_ranpac_that_is_too_wide_is_refused_before_the_memory_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "available_bytes", lambda device: 10**6)
    config = small_config(tmp_path, baselines=("ranpac",))
    with pytest.raises(CapacityError, match=r"head.width 10,000 takes about"):
        experiment.run(config)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_heads_of_tasks_share_a_projection():
    projection = Projection.drawn(4, 6, 0)
    head = RecalledHead(torch.randn(2, 3, 6), torch.zeros(2, 3), torch.tensor([0, 1]), projection)
    moved = dataclasses.replace(head).to("cpu")
    features, weights = torch.randn(5, 4), torch.tensor([[1.0, 0.0]]).expand(5, -1)
    expected = (projection(features) @ head.weight[0].T).softmax(dim=1)
    torch.testing.assert_close(moved(features, weights), expected)
    with pytest.raises(MemtoolError, match="features of width 6"):
        head(torch.zeros(1, 6), weights[:1])
