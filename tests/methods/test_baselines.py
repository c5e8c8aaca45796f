"""Baselines: every penalty against its closed form, then every row on real digits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.errors import DivergedError
from memtool.heads.losses import TEMPERATURE, distillation
from memtool.learning.adapt import Lesson, adapt
from memtool.learning.learner import Learner
from memtool.learning.past_inputs import free_directions
from memtool.memories.dual_gpm import DualGPM
from memtool.methods.baselines import DG_BASELINES, RIVALS, baselines_of
from memtool.methods.baselines.ewc import STRENGTH as EWC_STRENGTH
from memtool.methods.baselines.ewc import Ewc
from memtool.methods.baselines.in_turn import in_turn
from memtool.methods.baselines.inf_lora import InfLora
from memtool.methods.baselines.lwf import Lwf
from memtool.methods.baselines.moe_lora import MoeLora
from memtool.methods.baselines.o_lora import STRENGTH as O_LORA_STRENGTH
from memtool.methods.baselines.o_lora import OLora, overlap
from memtool.methods.baselines.reading import ClosedForms, accuracy
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace
from tests.methods.conftest import small_config

BASELINES = {k: v for k, v in baselines_of("images").items() if k not in RIVALS}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Workspace(small_config(tmp_path_factory.mktemp("baselines")), seed=0)


@pytest.fixture(scope="module")
def tasks(work):
    return work.stream.tasks


def images_of(task, count=8):
    return torch.from_numpy(np.array(task.train.images[:count]))


def learned(kind, work, tasks, count=1):
    learner = kind(work, len(tasks))
    for task in tasks[:count]:
        learner.learn(task, "test")
    return learner


def moved(learner, size=0.05):
    """Every parameter that learns, moved at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return learner


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


# What all of them share


def test_learners_start_alike_and_change_nothing_at_first(work, tasks):
    images = images_of(tasks[0])
    plain = work.backbone.features(work.backbone.preprocess(images))
    for kind in (Learner, Ewc, Lwf, OLora, InfLora, MoeLora):
        learner = kind(work, len(tasks))
        learner.before_task(tasks[0])
        assert torch.allclose(
            learner.objective.features(images, learner.recall()), plain, atol=1e-5
        ), kind.id
        assert not learner(images).any(), kind.id
        if kind is not InfLora:  # its A comes from the images
            assert torch.equal(learner.values.flat()[:1], Learner(work, 3).values.flat()), kind.id


def test_learners_do_not_differ_during_the_first_task(work, tasks):
    """Penalties begin with the second task; the linear head has learned the same until then."""
    plain = learned(Learner, work, tasks)
    for kind in (Ewc, Lwf, OLora):
        assert torch.equal(learned(kind, work, tasks).values.flat(), plain.values.flat()), kind.id


def test_old_classes_keep_their_weights_while_new_ones_learn(tmp_path):
    work = Workspace(small_config(tmp_path, stream__setting="cil", stream__order=None), seed=0)
    first, second = work.stream.tasks[:2]
    learner = Learner(work, 2)
    learner.learn(first, "test")
    before = learner.objective.head.weight.detach().clone()
    learner.learn(second, "test")
    # Only weight decay touches them: at most the sum of rate times decay over the steps.
    assert torch.allclose(
        learner.objective.head.weight[list(first.classes)], before[list(first.classes)], rtol=1e-2
    )
    assert learner.objective.head.weight[list(second.classes)].any()


def test_divergence_names_the_baseline(tmp_path):
    work = Workspace(small_config(tmp_path, train__lr=1e30, train__clip=1e30), seed=0)
    with pytest.raises(DivergedError, match="baseline, EWC"):
        in_turn(Ewc, work, work.stream.tasks)


def test_the_first_adapter_is_that_of_the_memory(work, tasks):
    seed = work.seed * 1000 + tasks[0].number
    (memory,) = adapt(
        work.engine,
        work.backbone,
        work.layout,
        [Lesson(tasks[0].train, tasks[0].classes, seed)],
        class_count=10,
        adapter=work.config.adapter,
        train=work.config.train,
    )
    found = learned(Learner, work, tasks).values.flat()
    assert torch.allclose(found, memory.values, atol=2e-3)  # the head's bias decays there
    assert F.cosine_similarity(found, memory.values) > 0.999


# EWC


def test_ewc_fisher_is_the_mean_of_squared_gradients_of_single_samples(work, tasks):
    task = tasks[0]
    learner = moved(learned(Ewc, work, tasks), 0.02)
    few = Images(task.train.images[:53], task.train.labels[:53])  # a whole batch and a rest
    mask = torch.full((learner.objective.head.classes,), -torch.inf)
    mask[list(task.classes)] = 0
    expected = [torch.zeros_like(parameter) for parameter in learner.held()]
    for image, label in zip(few.images, few.labels, strict=True):
        logits = learner(torch.from_numpy(np.array(image))[None]) + mask
        loss = F.cross_entropy(logits, torch.tensor([label]))
        gradients = torch.autograd.grad(loss, learner.held())
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient.square() / len(few)
    for found, wanted in zip(
        learner.fisher(dataclasses.replace(task, train=few)), expected, strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))
        assert float(wanted.max()) > 0


def test_ewc_penalty_is_the_quadratic_form(work, tasks):
    learner = learned(Ewc, work, tasks)
    images = images_of(tasks[0])
    logits = learner(images)
    assert learner.penalty(images, None, logits).item() == 0
    anchor = flat(learner.held())
    difference = flat(moved(learner).held()) - anchor
    fisher = flat(learner.importance)
    expected = EWC_STRENGTH / 2 * float(difference @ (fisher * difference))
    assert learner.penalty(images, None, logits).item() == pytest.approx(expected, rel=1e-4)


def test_ewc_importance_adds_up_and_holds_parameters(work, tasks, monkeypatch):
    monkeypatch.setattr("memtool.methods.baselines.ewc.STRENGTH", 1e3)
    learner = learned(Ewc, work, tasks)
    first = flat(learner.importance)
    start = flat(learner.held())
    learner.learn(tasks[1], "test")
    assert torch.all(flat(learner.importance) >= first)
    free = learned(Learner, work, tasks, 2)
    loose = flat([*free.values.parameters(), free.objective.head.weight, free.objective.head.bias])
    held = flat(learner.held())

    def moved_by(end):  # in the metric of what mattered to the first task
        return float((first * (end - start).square()).sum())

    assert moved_by(held) < 0.5 * moved_by(loose)


# LwF


def test_distillation_is_the_divergence_and_flat_at_the_old_model():
    generator = torch.Generator().manual_seed(0)
    wanted, other = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    p = (wanted / TEMPERATURE).softmax(dim=1)
    q = (other / TEMPERATURE).softmax(dim=1)
    expected = TEMPERATURE**2 * (p * (p / q).log()).sum(dim=1).mean()
    assert float(distillation(other, wanted)) == pytest.approx(float(expected), rel=1e-5)
    same = wanted.clone().requires_grad_(True)
    distillation(same, wanted).backward()
    assert float(same.grad.abs().max()) < 1e-7


def test_lwf_has_no_gradient_at_the_old_model_and_one_elsewhere(work, tasks):
    learner = learned(Lwf, work, tasks)
    learner.before_task(tasks[1])
    images = images_of(tasks[1])
    trained = [p for p in learner.parameters() if p.requires_grad]

    def largest():
        loss = learner.penalty(images, None, learner(images))
        gradients = torch.autograd.grad(loss, trained)
        return float(loss.detach()), max(float(g.abs().max()) for g in gradients)

    assert max(largest()) < 1e-5
    moved(learner, 0.01)
    assert min(largest()) > 1e-3


# O-LoRA


def test_overlap_is_the_sum_of_absolute_products(work):
    learner = Learner(work, 3)
    old = learner.fresh(2)
    learner.seen.append(work.stream.tasks[0])  # another draw
    new = learner.fresh(1)
    names = [segment.name for segment in work.layout.segments if "lora_A" in segment.name]
    past, added = work.layout.unflatten(old.flat()), work.layout.unflatten(new.flat())
    expected = sum(
        float((past[name][task] @ added[name][0].T).abs().sum())
        for name in names
        for task in range(2)
    )
    assert overlap(old, new).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1


def test_o_lora_penalty_is_not_zero_and_falls_in_training(work, tasks):
    learner = learned(OLora, work, tasks)
    learner.before_task(tasks[1])
    images = images_of(tasks[1])
    penalty = learner.penalty(images, None, learner(images))
    expected = O_LORA_STRENGTH * overlap(learner.past, learner.values)
    assert penalty.item() == pytest.approx(expected.item())
    gradients = torch.autograd.grad(penalty, [*learner.values.a])
    assert all(float(gradient.abs().min()) > 0 for gradient in gradients)
    learner = learned(OLora, work, tasks, 2)
    assert 0 < learner.penalty(images, None, learner(images)).item() < 0.5 * penalty.item()


def test_branches_sum_and_old_ones_stay(work, tasks):
    learner = learned(OLora, work, tasks, 2)
    kept = learner.values.flat()
    learner.before_task(tasks[2])
    assert torch.equal(learner.past.flat()[1:], kept)
    moved(learner)
    images = work.backbone.preprocess(images_of(tasks[0], 4))
    branches = torch.cat([learner.past.flat(), learner.values.flat()])
    # One adapter of three times the rank: A stacked by rows, B by columns.
    merged = {
        name: tensor.flatten(0, 1) if "lora_A" in name else torch.cat(tensor.unbind(), dim=1)
        for name, tensor in work.layout.unflatten(branches).items()
    }
    layout = type(work.layout)(work.layout.sites, 3 * work.layout.rank)
    settings = work.config.adapter
    scaling = settings.alpha / settings.rank
    whole = AdapterValues.from_flat(layout.flatten(merged)[None], layout, scaling)
    found = work.backbone.features(images, learner.recall())
    assert torch.allclose(found, work.backbone.features(images, every(whole)), atol=1e-4)
    before = learner.past.flat()
    learner.learn(tasks[2], "test")
    assert torch.equal(learner.past.flat()[: len(before)], before)


# InfLoRA


def test_free_directions_are_the_leading_ones_outside_the_past():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, -2, 12, dtype=torch.float64)
    space = DualGPM(12, start=0.9)
    space.update(inputs[:, [2, 0, 1, *range(3, 12)]], 0.0)
    free = space.project(inputs)
    expected = torch.linalg.svd(free).Vh[:3]
    rows = free_directions(space, inputs.T @ inputs, 3)
    assert torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose((rows * expected).sum(dim=1).abs(), torch.ones(3).double(), atol=1e-6)
    assert torch.allclose(space.project(rows), rows, atol=1e-9)


def test_no_direction_is_left_when_the_past_holds_them_all():
    space = DualGPM(6)
    inputs = torch.eye(6, dtype=torch.float64)
    space.update(inputs, 1.0)
    assert not free_directions(space, inputs, 2).any()


def test_a_new_branch_hardly_sees_old_inputs(work, tasks):
    learner = learned(InfLora, work, tasks)
    old = learner.moments(tasks[0])
    learner.before_task(tasks[1])
    new = learner.moments(tasks[1])
    random = Learner(work, 3).values.flat()

    def seen(values, moments):  # mean share of |x|² that A, with rows of length one, sees
        shares = []
        for site in work.layout.sites:
            a = work.layout.unflatten(values)[f"{site.name}.lora_A"][0].double()
            a = F.normalize(a, dim=1)
            moment = moments[site.module]
            shares.append(float((a @ moment @ a.T).trace() / moment.trace()))
        return sum(shares) / len(shares)

    ours = learner.values.flat()
    assert seen(ours, old) < 0.35 * seen(random, old)
    assert seen(ours, new) > 2 * seen(ours, old)


def test_inf_lora_learns_b_only(work, tasks):
    learner = InfLora(work, 3)
    learner.before_task(tasks[0])
    start = work.layout.unflatten(learner.values.flat())
    learner = learned(InfLora, work, tasks)
    end = work.layout.unflatten(learner.values.flat())
    for name in start:
        if "lora_A" in name:
            assert torch.allclose(end[name].abs(), start[name].abs(), atol=1e-5), name
        else:
            assert end[name].any(), name


# MoE-LoRA


def test_router_coefficients_sum_to_one_and_learn(work, tasks):
    learner = MoeLora(work, 3)
    assert len(learner.values) == 3
    hidden = work.backbone.hidden(work.backbone.preprocess(images_of(tasks[0])), 2)
    start = learner.coefficients(2, hidden)
    assert torch.allclose(start, torch.full((8, 3), 1 / 3))
    for task in tasks[:2]:
        learner.learn(task, "test")
    found = learner.coefficients(2, hidden)
    assert torch.allclose(found.sum(dim=1), torch.ones(8), atol=1e-6)
    assert found.min() > 0
    assert (found - start).abs().max() > 0.01
    assert found.std(dim=0).max() > 1e-3  # it depends on the image


# Reading the features


def test_prototypes_choose_one_head_and_posteriors_weigh_them(work, tasks):
    generator = torch.Generator().manual_seed(0)
    dim = work.backbone.dim
    closed = ClosedForms(work, 3)
    means = torch.randn(2, dim, generator=generator) * 3
    features = []
    for mean, task in zip(means, tasks, strict=False):
        classes = torch.randn(10, dim, generator=generator)
        labels = torch.from_numpy(np.asarray(task.train.labels))
        noise = 0.3 * torch.randn(len(labels), dim, generator=generator)
        features.append(mean + classes[labels] + noise)
        closed.count(features[-1], task)
    for reading in ("prototype", "routed", "lda"):
        scores = [
            accuracy(closed.solve(reading), f, t.train)
            for f, t in zip(features, tasks, strict=False)
        ]
        assert min(scores) > (0.5 if reading == "lda" else 0.95), reading


# Every row, whole


@pytest.fixture(scope="module")
def rows(work, tasks):
    return {name: measure(work, tasks) for name, measure in BASELINES.items()}


def test_every_baseline_gives_whole_matrices(rows, tasks):
    assert list(rows) == [
        "frozen",
        "sequential",
        "ewc",
        "lwf",
        "o-lora",
        "inf-lora",
        "moe-lora",
        "joint",
    ]
    ids = [row.id for found in rows.values() for row in found]
    assert len(set(ids)) == len(ids) == 5 + 6 * 4 + 2
    for name, found in rows.items():
        for row in found:
            matrix = row.matrix([task.name for task in tasks]).values
            learned = matrix[len(tasks) :] if name == "joint" else matrix[1:]
            assert row.kind == ("upper bound" if name == "joint" else "baseline")
            assert row.seconds > 0
            assert not np.isnan(learned).any(), row.id
            assert np.isnan(matrix[: -len(learned)]).all(), row.id
            # Better than chance on what was learned last.
            assert learned[-1, -1] > 0.2, row.id


def test_joint_training_is_above_sequential_training(rows):
    sequential, upper = rows["sequential"][0], rows["joint"][0]
    assert upper.metrics["faa"] > sequential.metrics["faa"]


def test_a_baseline_is_the_same_twice(work, tasks, rows):
    again = BASELINES["moe-lora"](work, tasks)
    assert [row.accuracy for row in again] == [row.accuracy for row in rows["moe-lora"]]


def test_one_task_and_tasks_of_classes_work(tmp_path):
    cil = {"stream__setting": "cil", "stream__order": None, "stream__classes_per_task": 4}
    few = {"stream__train_per_task": 40, "stream__test_per_task": 20, "train__epochs": 1}
    work = Workspace(small_config(tmp_path, **cil, **few), seed=0)
    for name, measure in BASELINES.items():
        for tasks in (work.stream.tasks[:2], work.stream.tasks[:1]):
            for row in measure(work, tasks):
                assert len(row.accuracy) == len(tasks) + 1, name


# Domain generalisation


def test_pooled_tasks_hold_every_image_once(tasks):
    whole = Task.pooled(tasks)
    assert len(whole.train) == sum(len(task.train) for task in tasks)
    low = len(tasks[0].train)
    assert np.array_equal(whole.train.images[low], tasks[1].train.images[0])
    assert whole.classes == tuple(range(10))


@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_sources_are_learned_and_an_unseen_domain_is_tested(tmp_path, validation):
    dg = {"stream__setting": "dg", "stream__order": ("rot0", "rot30", "rot60")}
    if not validation:  # nothing is asked of how good they are
        dg |= {"stream__test_per_task": 10, "train__epochs": 1}
    config = small_config(tmp_path, stream__validation=validation, head__width=100, **dg)
    work = Workspace(config, seed=0)
    *sources, target = work.stream.tasks
    found = {name: DG_BASELINES[name](work, sources, target.test) for name in DG_BASELINES}
    assert {one.id for one in found["frozen"]} == {
        f"frozen-{kind}" for kind in ("linear", "ncm", "ridge", "lda", "routed", "prototype")
    }
    assert [one.id for one in found["erm"]] == ["erm-linear", "erm-lda"]
    assert [one.id for one in found["moe-lora"]] == ["moe-lora-linear", "moe-lora-lda"]
    for one in (one for parts in found.values() for one in parts):
        assert 0 <= one.accuracy <= 1
        assert one.kind == "baseline"
        assert one.seconds > 0
        if validation:
            assert one.validation > 0.2, one.id
        else:
            assert one.validation is None
