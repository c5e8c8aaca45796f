"""Rivals of the memory: each held to the relation that its test names, or to a slow twin."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memtool.adapters.layout import Layout, Site
from memtool.adapters.values import AdapterValues, over_groups
from memtool.errors import ConfigError
from memtool.experiments.baselines import chosen_baselines
from memtool.experiments.plan import plan
from memtool.heads import LinearClassifier
from memtool.learning.learner import Learner
from memtool.methods import open_method
from memtool.methods.baselines import fine_tune
from memtool.methods.baselines.aligned import DRAWS, EPSILON, Gaussian, aligned
from memtool.methods.baselines.der import DerPlusPlus
from memtool.methods.baselines.ease import Ease, completion
from memtool.methods.baselines.fine_tune import FineTune
from memtool.methods.baselines.in_turn import in_turn
from memtool.methods.baselines.mos import Mos, retrieved
from memtool.methods.baselines.mos import apart as told_apart
from memtool.methods.baselines.replay import Er, Reservoir
from memtool.methods.baselines.sd_lora import SdLora, divided, product_norm, sites_of
from memtool.methods.baselines.slca import Slca
from memtool.methods.baselines.tuna import Tuna, elected, surest
from memtool.streams.task import Task
from memtool.workspace import Workspace
from tests.methods.conftest import small_config

FEW = {
    "stream__train_per_task": 40,
    "stream__test_per_task": 40,
    "train__epochs": 1,
    "train__batch_size": 10,  # adapters stay as they are in the first step, as the head is zero
}
CIL = {"stream__setting": "cil", "stream__order": None, "stream__classes_per_task": 4}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three tasks of four, four and two digits."""
    return Workspace(small_config(tmp_path_factory.mktemp("rivals"), **FEW, **CIL), seed=0)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three domains of the same ten digits."""
    return Workspace(small_config(tmp_path_factory.mktemp("rivals-dil"), **FEW), seed=0)


def with_buffer(work: Workspace, size: int) -> Workspace:
    """The same workspace with another `replay.buffer`."""
    replay = work.config.replay.model_copy(update={"buffer": size})
    other = Workspace(work.config.model_copy(update={"replay": replay}), seed=work.seed)
    other.__dict__.update(backbone=work.backbone, stream=work.stream)
    return other


def learned(kind: type[Learner], work: Workspace, count: int = 2, **values: Any) -> Any:
    """A learner after some tasks; `values` are its numbers, changed."""
    changed = type(kind.__name__, (kind,), values)
    learner = changed(work, len(work.stream.tasks))
    for task in work.stream.tasks[:count]:
        learner.learn(task, "test")
    return learner


def assert_equal_parameters(one: Learner, other: Learner) -> None:
    """Bit for bit, in the order of their names."""
    mine = {name: p for name, p in one.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert mine
    for name, parameter in mine.items():
        assert torch.equal(parameter, theirs[name]), name


def images_of(task: Task, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.array(task.train.images[:count]))


# SLCA


def test_slca_at_ratio_one_without_alignment_is_fine_tuning(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tune, "RATE", 1.0)
    plain = learned(FineTune, work)
    assert_equal_parameters(learned(Slca, work, ratio=1.0, alignment_epochs=0), plain)


def test_a_gaussian_has_the_mean_and_covariance_of_its_features() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = Gaussian.of(rows)
    expected = np.cov(rows.numpy(), rowvar=False) + EPSILON * np.eye(5)
    np.testing.assert_allclose(one.mean.numpy(), rows.numpy().mean(axis=0), atol=1e-12)
    np.testing.assert_allclose((one.factor @ one.factor.t()).numpy(), expected, atol=1e-12)
    drawn = one.draw(40_000, torch.Generator().manual_seed(1)).double()
    np.testing.assert_allclose(np.cov(drawn.numpy(), rowvar=False), expected, atol=0.05)
    assert torch.isfinite(Gaussian.of(rows[:1]).factor).all()  # one image has no covariance


@pytest.mark.parametrize(
    ("temperature", "tasks"), [(None, None), (0.1, None), (0.1, [0] * 3 + [1] * 3)]
)
def test_alignment_is_sgd_on_draws(temperature: float | None, tasks: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    known = [
        Gaussian.of(mean + 0.3 * torch.randn(9, 4, generator=generator))
        for mean in torch.randn(3, 4, generator=generator)
    ]
    targets = [4, 1, 4]  # two domains of class 4
    head = LinearClassifier(
        torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    )
    found = aligned(
        head, known, targets, epochs=2, lr=0.05, temperature=temperature,
        generator=torch.Generator().manual_seed(3), tasks=tasks,
    )  # fmt: skip
    again = torch.Generator().manual_seed(3)
    w, b = head.weight[[1, 4]].double(), head.bias[[1, 4]].double()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    for epoch in range(2):
        lr = 0.05 * 0.5 * (1 + np.cos(np.pi * epoch / 2))
        draws = torch.cat([one.draw(DRAWS, again) for one in known]).double()
        wanted = torch.tensor([1] * DRAWS + [0] * DRAWS + [1] * DRAWS)
        order = torch.randperm(len(draws), generator=again)
        for low in range(0, len(draws), DRAWS):
            x, y = draws[order[low : low + DRAWS]], wanted[order[low : low + DRAWS]]
            w.requires_grad_(True), b.requires_grad_(True)
            z = x @ w.t() + b
            if temperature is not None:
                size = z.norm(dim=1) if tasks is None else z.abs().mean(dim=1)  # one row a task
                z = z / (temperature * size[:, None])
            loss = -(z - z.logsumexp(1, keepdim=True))[torch.arange(len(y)), y].mean()
            gw, gb = torch.autograd.grad(loss, (w, b))
            w, b = w.detach(), b.detach()
            vw, vb = 0.9 * vw + gw + 5e-4 * w, 0.9 * vb + gb + 5e-4 * b
            w, b = w - lr * vw, b - lr * vb
    torch.testing.assert_close(found.weight[[1, 4]].double(), w, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bias[[1, 4]].double(), b, atol=1e-4, rtol=1e-4)
    untouched = [0, 2, 3, 5]
    assert torch.equal(found.weight[untouched], head.weight[untouched])


def test_slca_aligns_from_the_second_task_on_and_trains_on_from_before(work: Workspace) -> None:
    slca = learned(Slca, work, 1)
    assert_equal_parameters(slca, learned(Slca, work, 1, alignment_epochs=0))
    slca.learn(work.stream.tasks[1], "test")
    assert slca.before is not None
    assert not torch.equal(slca.objective.classifier().weight, slca.before.weight)
    shorter = [one.nearer(0.95) for one in slca.known[:4]] + slca.known[4:]
    rows = [0 if one in slca.targets[:4] else 1 for one in range(10)]
    seed = work.engine.generator(work.training_seed(2))
    expected = aligned(
        slca.before, shorter, slca.targets, epochs=5, lr=0.01, temperature=0.1, generator=seed,
        tasks=rows,
    )  # fmt: skip
    torch.testing.assert_close(
        slca.objective.classifier().weight[slca.targets], expected.weight[slca.targets]
    )
    slca.before_task(work.stream.tasks[2])
    known = slca.targets
    assert torch.equal(slca.objective.classifier().weight[known], slca.before.weight[known])


def test_alignment_makes_heads_of_tasks_comparable(work: Workspace) -> None:
    """On all classes so far the aligned head is not worse than the one that it began from."""
    slca = learned(Slca, work, alignment_epochs=0)
    tasks = work.stream.tasks[:2]
    features = [slca.features_of(task.train) for task in tasks]
    labels = [torch.from_numpy(task.train.labels) for task in tasks]
    known = [
        Gaussian.of(rows[own == one])
        for rows, own, task in zip(features, labels, tasks, strict=True)
        for one in task.classes
    ]
    targets = [one for task in tasks for one in task.classes]
    before = slca.objective.classifier()
    after = aligned(
        before, known, targets, epochs=5, lr=0.01, temperature=0.1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    test = torch.cat([slca.features_of(task.test) for task in tasks])
    wanted = torch.cat([torch.from_numpy(task.test.labels) for task in tasks])
    right = [(head(test).argmax(dim=1) == wanted).double().mean() for head in (before, after)]
    assert right[1] >= right[0] > 0.2


# EASE


def test_ease_with_one_task_is_nearest_class_mean_under_one_adapter(work: Workspace) -> None:
    """APER without its frozen half: the adapter is that of sequential training, bit for bit."""
    ease, plain = learned(Ease, work, 1), learned(Learner, work, 1)
    assert torch.equal(ease.kept[0], plain.values.flat()[0])
    task = work.stream.tasks[0]
    features, test = plain.features_of(task.train).double(), plain.features_of(task.test).double()
    labels = torch.from_numpy(task.train.labels)
    expected = torch.full((len(test), 10), -torch.inf, dtype=torch.float64)
    for one in np.unique(task.train.labels).tolist():
        mean = features[labels == one].mean(dim=0)
        expected[:, one] = F.cosine_similarity(test, mean[None])
    torch.testing.assert_close(ease.scores(task), expected)


@pytest.mark.parametrize("kind", ["work", "domains"])
def test_ease_scores_are_those_of_the_obvious_loop(
    kind: str, request: pytest.FixtureRequest
) -> None:
    work: Workspace = request.getfixturevalue(kind)
    ease = learned(Ease, work, 3)
    tasks, test = work.stream.tasks, work.stream.tasks[1]

    @functools.cache
    def found(adapter: int, task: int) -> torch.Tensor:
        features: torch.Tensor = ease.features_under(ease.kept[adapter], tasks[task].train)
        return features.double()

    def mean(adapter: int, task: int, label: int) -> torch.Tensor:
        return found(adapter, task)[torch.from_numpy(tasks[task].train.labels == label)].mean(dim=0)

    def cos(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    own = [sorted(set(task.train.labels.tolist())) for task in tasks]
    expected = np.full((4, 10), -np.inf)
    features = [ease.features_under(value, test.test).double()[:4] for value in ease.kept]
    for task, labels in enumerate(own):
        for label in labels:
            total = np.zeros(4)
            for adapter in range(3):
                if adapter <= task:
                    prototype = mean(adapter, task, label)
                else:
                    there = mean(task, task, label)
                    seen = [(later, k) for later in range(adapter, 3) for k in own[later]]
                    like = [np.exp(cos(there, mean(task, *cell))) for cell in seen]
                    here = [mean(adapter, *cell) for cell in seen]
                    prototype = sum(w * p for w, p in zip(like, here, strict=True)) / sum(like)
                weight = 1.0 if adapter == task else 0.1 / 2
                total += [weight * cos(x, prototype) for x in features[adapter]]
            expected[:, label] = np.maximum(expected[:, label], total)
    np.testing.assert_allclose(ease.scores(test)[:4].numpy(), expected, atol=1e-5)


def test_a_completed_prototype_is_that_of_the_class_it_is_like() -> None:
    there = torch.eye(3, dtype=torch.float64)
    here = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).softmax(dim=0)
    torch.testing.assert_close(completion(5 * there[1], there, here), weights @ here)


# MOS


def test_mos_without_merging_trains_every_adapter_alone(work: Workspace) -> None:
    alone = learned(Mos, work, momentum=0.0, contrast=0.0)
    merged = learned(Mos, work, contrast=0.0)
    assert torch.equal(alone.kept[0], merged.kept[0])  # nothing to merge with yet
    assert torch.equal(alone.kept[0], learned(Tuna, work, 1, strength=0.0).kept[0])
    apart = [float((one.kept[1] - one.kept[0]).norm()) for one in (alone, merged)]
    assert 0 < apart[1] < apart[0]


def test_a_step_of_mos_goes_to_the_mean_of_earlier_adapters(work: Workspace) -> None:
    mos = learned(Mos, work)
    mos.before_task(work.stream.tasks[2])
    with torch.no_grad():
        for parameter in mos.values.parameters():
            parameter += 0.1
    before = mos.values.flat()[0]
    mos.after_step()
    expected = 0.9 * before + 0.1 * (mos.kept[0] + mos.kept[1]) / 2
    torch.testing.assert_close(mos.values.flat()[0], expected)


def test_retrieval_goes_to_the_task_of_the_best_class_until_it_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, 9, generator=generator)
    cell_task = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3])
    begun = torch.randint(4, (50,), generator=generator)
    found = retrieved(logits, cell_task, begun, 4)
    for sample in range(50):
        adapter = int(begun[sample])
        for _ in range(3):
            told = int(cell_task[logits[adapter, sample].argmax()])
            if told == adapter:
                break
            adapter = told
        assert int(found[sample]) == adapter
    assert torch.equal(retrieved(logits, cell_task, begun, 1), begun)  # one adapter is asked


def test_mos_begins_where_the_nearest_mean_under_the_first_adapter_is(work: Workspace) -> None:
    mos = learned(Mos, work)
    assert not torch.equal(mos.kept[0], mos.kept[1])
    test = work.stream.tasks[1]
    found = mos.scores(test)[:8]
    first, second = (mos.features_under(value, test.test)[:8] for value in mos.kept)
    means = []
    for task in work.stream.tasks[:2]:
        seen = mos.features_under(mos.kept[0], task.train)
        labels = torch.from_numpy(task.train.labels)
        means += [seen[labels == one].mean(dim=0) for one in sorted(task.classes)]
    classes = [one for task in work.stream.tasks[:2] for one in sorted(task.classes)]
    for row in range(8):
        near = torch.stack([torch.cosine_similarity(first[row], one, dim=0) for one in means])
        adapter = int(near.argmax() >= 4)  # four classes of the first task come first
        for _ in range(3):
            logits = mos.head((first, second)[adapter][row : row + 1])[0]
            adapter = int(logits.argmax() >= 4)
        logits = mos.head((first, second)[adapter][row : row + 1])[0]
        expected = (2 * near).softmax(dim=0) + logits.softmax(dim=0)
        torch.testing.assert_close(found[row, classes], expected, rtol=1e-4, atol=1e-5)


def test_mos_with_one_task_is_sequential_scored_by_its_head_and_its_means(work: Workspace) -> None:
    mos, plain = learned(Mos, work, 1, contrast=0.0), learned(Learner, work, 1)
    assert torch.equal(mos.kept[0], plain.values.flat()[0])
    task = work.stream.tasks[0]
    classes = sorted(task.classes)
    features, test = plain.features_of(task.train), plain.features_of(task.test)
    labels = torch.from_numpy(task.train.labels)
    means = torch.stack([features[labels == one].mean(dim=0) for one in classes])
    near = F.cosine_similarity(test[:, None], means[None], dim=2).softmax(dim=1)
    logits = plain.objective.classifier()(test)[:, classes]
    found = mos.scores(task)
    torch.testing.assert_close(found[:, classes], near + logits.softmax(dim=1))
    assert (found[:, [one for one in range(10) if one not in classes]] == -torch.inf).all()


def test_the_contrastive_term_of_mos_tells_every_row_from_all_others(work: Workspace) -> None:
    mos = learned(Mos, work, 1)
    task = work.stream.tasks[1]
    mos.before_task(task)
    mos.objective.begin(task)
    logits = mos(images_of(task, 5))
    found = mos.penalty(torch.empty(0), torch.empty(0), logits)
    rows = [one.mean for one in mos.known] + [*mos.features.detach().double()]
    assert len(rows) == 4 + 5
    total = 0.0
    for i, row in enumerate(rows):
        products = np.array([float(row @ other) / 0.8 for other in rows])
        top = products.max()
        total += top + np.log(np.exp(products - top).sum()) - products[i]
    assert float(found.detach()) == pytest.approx(0.1 * total / len(rows), rel=1e-4)
    assert total > 0
    (gradient,) = torch.autograd.grad(found, mos.features)
    assert gradient.any()
    apart = torch.stack([*torch.eye(4, dtype=torch.float64) * 20])
    assert float(told_apart(apart, 0.8)) < 1e-6  # far apart and long: nothing is left to tell


# TUNA


def test_the_universal_adapter_is_elected_number_by_number() -> None:
    values = torch.randn(5, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 0] = 0
    found = elected(values)
    for place in range(200):
        column = values[:, place].tolist()
        sign = np.sign(sum(column))
        agreeing = [abs(v) for v in column if np.sign(v) == sign and sign != 0]
        assert float(found[place]) == pytest.approx(sign * max(agreeing, default=0.0))
    assert torch.equal(elected(values[:1]), values[0])


def test_the_surest_adapter_has_the_least_entropy() -> None:
    logits = 3 * torch.randn(4, 30, 6, generator=torch.Generator().manual_seed(0))
    found = surest(logits)
    for sample in range(30):
        p = logits[:, sample].double().softmax(dim=1)
        entropies = [-sum(float(x) * np.log(float(x)) for x in row) for row in p]
        assert int(found[sample]) == int(np.argmin(entropies))


def test_tuna_with_one_task_is_its_one_adapter_and_head(work: Workspace) -> None:
    tuna = learned(Tuna, work, 1)  # one task has nothing to be aligned with
    plain = learned(Learner, work, 1)
    task = work.stream.tasks[0]
    logits = plain.objective.classifier()(plain.features_of(task.test))
    expected = torch.full_like(logits, -torch.inf)
    own = list(task.classes)
    expected[:, own] = 2 * logits[:, own].softmax(dim=1)
    torch.testing.assert_close(tuna.scores(task), expected)


def test_an_adapter_of_tuna_goes_on_from_the_one_before(work: Workspace) -> None:
    tuna = learned(Tuna, work, 1)
    tuna.before_task(work.stream.tasks[1])
    assert torch.equal(tuna.values.flat()[0], tuna.kept[0])


def test_tuna_adds_the_probabilities_of_the_surest_and_the_universal_adapter(
    work: Workspace,
) -> None:
    tuna = learned(Tuna, work)
    task = work.stream.tasks[1]
    universal = tuna.head(tuna.features_under(elected(torch.stack(tuna.kept)), task.test))
    each = [tuna.head(tuna.features_under(value, task.test)) for value in tuna.kept]
    expected = torch.full((len(task.test), 10), -torch.inf)
    cells = tuna.cell_class.tolist()
    for row in range(len(task.test)):
        chances = [one[row].softmax(dim=0) for one in each]
        least = min(chances, key=lambda p: -float((p * p.log()).sum()))
        expected[row, cells] = least + universal[row].softmax(dim=0)
    torch.testing.assert_close(tuna.scores(task), expected)


def test_tuna_presses_adapters_to_be_orthogonal(work: Workspace) -> None:
    tuna = learned(Tuna, work, 2)
    task = work.stream.tasks[2]
    tuna.before_task(task)
    with torch.no_grad():
        for parameter in tuna.values.b:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    found = tuna.penalty(torch.empty(0), torch.empty(0), torch.zeros(()))
    total = 0.0
    for old, new in zip(tuna.past.b, tuna.values.b, strict=True):
        for k in range(2):
            product = old[k].detach().double() @ new[0].detach().double().t()
            total += float(product.square().sum())
    assert float(found.detach()) == pytest.approx(1e-3 * total, rel=1e-4)


# SD-LoRA


def test_sd_lora_with_one_task_is_sequential(work: Workspace) -> None:
    assert_equal_parameters(learned(SdLora, work, 1), learned(Learner, work, 1))


def test_dividing_into_magnitude_and_direction_changes_nothing(work: Workspace) -> None:
    sd = learned(SdLora, work, 2)
    images = images_of(work.stream.tasks[0])
    before = sd.objective.features(images, sd.recall())
    sd.before_task(work.stream.tasks[2])
    torch.testing.assert_close(sd.objective.features(images, sd.recall()), before)
    for _, _, a, b in sites_of(sd.past):
        assert len(a) == 2
        for k in range(2):
            length = (b[k].double().t() @ a[k].double()).norm()
            assert float(length) == pytest.approx(1.0, abs=1e-5)
    assert sd.magnitudes.requires_grad
    assert sd.magnitudes.shape == (2 * len(work.layout.sites),)


def test_convolutions_in_groups_are_divided_too() -> None:
    sites = (
        Site(0, "a", "", 2 * 9, 6, 0, 6, (3, 3), 2),
        Site(0, "b", "", 6, 4, 0, 4),
    )
    layout = Layout(sites, 2)
    flat = torch.randn(2, layout.numel, generator=torch.Generator().manual_seed(0))
    values = AdapterValues.from_flat(flat, layout, 1.0)
    before = [b @ a for a, b in _maps(values)]
    lengths = divided(values)
    for length, whole, (a, b) in zip(lengths, before, _maps(values), strict=True):
        after = b @ a
        assert float(after[1].norm()) == pytest.approx(1.0, abs=1e-5)
        torch.testing.assert_close(after[1] * length, whole[1])
        assert torch.equal(after[0], whole[0])


def _maps(values: AdapterValues) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A (t, r, in) and B (t, out, r) of every site."""
    return [
        (a.detach(), over_groups(b.detach(), site.groups).mT) for _, site, a, b in sites_of(values)
    ]


def test_sd_lora_adds_its_directions_as_their_magnitudes_say(work: Workspace) -> None:
    sd = learned(SdLora, work, 3)
    assert (sd.magnitudes != 0).all()
    block = work.layout.blocks[0]
    mixture = sd.recall()(block, torch.zeros(2, 1, 1))
    name, module = next(iter(mixture.values.modules.items()))
    x = torch.randn(2, 3, module.sites[0].in_features, generator=torch.Generator().manual_seed(0))
    y = mixture.add_to(torch.zeros(2, 3, module.sites[0].module_rows), x, name).detach()
    expected = torch.zeros_like(y, dtype=torch.float64)
    magnitudes = sd.magnitudes.detach().view(2, -1)
    for place, (past, new) in enumerate(zip(sites_of(sd.past), sites_of(sd.values), strict=True)):
        if past[0] != name:
            continue
        site = module.sites[place]
        rows = slice(site.first_row, site.first_row + site.out_features)
        a, b = new[2][0].detach().double(), new[3][0].detach().double().t()
        delta = float(sd.values.scaling[0]) * b @ a
        for k in range(2):
            ba = past[3][k].double().t() @ past[2][k].double()
            delta = delta + float(magnitudes[k, place]) * ba / ba.norm()
        expected[..., rows] += x.double() @ delta.t()
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-4)


def test_the_norm_of_a_product_needs_no_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    b = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product_norm(a, b), (b.t() @ a).norm())


# Replay


def test_a_reservoir_keeps_each_sample_equally_likely() -> None:
    counts = np.zeros(60)
    for seed in range(2000):
        reservoir, held = Reservoir(10, seed), {}
        for first, count in ((0, 7), (7, 30), (37, 23)):
            held.update({place: first + i for place, i in reservoir.offer(count).items()})
        assert sorted(held) == list(range(10))
        assert len(set(held.values())) == 10
        counts[list(held.values())] += 1
    expected = 2000 * 10 / 60
    # Chi-squared with 59 degrees of freedom is above 110 in one of 20,000 draws.
    assert ((counts - expected) ** 2 / (expected * 50 / 60)).sum() < 110


@given(size=st.integers(0, 12), parts=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(0))
def test_what_is_offered_in_parts_is_offered_in_all(size: int, parts: list[int], seed: int) -> None:
    seed %= 2**32
    held: dict[int, int] = {}
    reservoir, first = Reservoir(size, seed), 0
    for count in parts:
        held.update({place: first + i for place, i in reservoir.offer(count).items()})
        first += count
    assert held == Reservoir(size, seed).offer(first)
    assert len(held) == min(size, first)


def test_er_without_a_buffer_is_sequential(work: Workspace) -> None:
    assert_equal_parameters(learned(Er, with_buffer(work, 0)), learned(Learner, work))


def test_der_without_its_terms_is_sequential(work: Workspace) -> None:
    found = learned(DerPlusPlus, work, alpha=0.0, beta=0.0)
    assert_equal_parameters(found, learned(Learner, work))
    assert len(found.buffer) == len(found.said) == 80


def test_der_without_logits_is_er(work: Workspace) -> None:
    one = learned(DerPlusPlus, with_buffer(work, 30), alpha=0.0, beta=1.0)
    assert_equal_parameters(one, learned(Er, with_buffer(work, 30)))


def test_the_buffer_holds_samples_of_the_tasks_with_the_logits_of_then(work: Workspace) -> None:
    der = DerPlusPlus(with_buffer(work, 15), 3)
    at_the_time: dict[bytes, torch.Tensor] = {}
    for task in work.stream.tasks:
        der.learn(task, "test")
        with torch.no_grad():
            logits = der(torch.from_numpy(np.array(task.train.images)))
        for image, label, row in zip(task.train.images, task.train.labels, logits, strict=True):
            at_the_time[image.tobytes() + bytes([label])] = row
    assert len(der.buffer) == len(der.said) == 15
    assert len(set(der.buffer.labels.tolist())) > 4  # of more than one task
    for image, label, said in zip(der.buffer.images, der.buffer.labels, der.said, strict=True):
        wanted = at_the_time[image.tobytes() + bytes([label])]
        torch.testing.assert_close(said, wanted, atol=1e-4, rtol=1e-4)


def test_er_learns_batch_and_buffer_among_all_classes_so_far(work: Workspace) -> None:
    er = learned(Er, with_buffer(work, 20))
    task = work.stream.tasks[2]
    er.before_task(task)
    er.objective.begin(task)
    images, labels = images_of(task), torch.from_numpy(task.train.labels[:6])
    with torch.no_grad():
        logits = er(images, labels)
        whole = er.objective.loss(logits, images, labels) + er.old_classes(logits)
        draws = er._draws.get_state()
        found = whole + er.replayed(6)
        er._draws.set_state(draws)
        rows = er.draw(6)[0].tolist()
        again = er(torch.from_numpy(er.buffer.images[rows]))
        batch = F.cross_entropy(logits[:, :10], labels)
        replayed = F.cross_entropy(again, torch.from_numpy(er.buffer.labels[rows]))
    torch.testing.assert_close(found, batch + replayed)


# Rows, and where they are


@pytest.mark.parametrize("kind", [Slca, Ease, Mos, Tuna, SdLora, Er, DerPlusPlus])
def test_every_rival_gives_whole_rows(domains: Workspace, kind: type[Learner]) -> None:
    tasks = domains.stream.tasks[:2]
    rows = in_turn(kind, with_buffer(domains, 20), tasks)
    own = kind in (Ease, Mos, Tuna)
    assert [row.id for row in rows] == [
        kind.id + more for more in (("",) if own else ("", "-ridge", "-lda", "-routed"))
    ]
    assert max(row.accuracy[-1][-1] or 0 for row in rows) > 0.2  # better than chance
    for row in rows:
        values = row.matrix([task.name for task in tasks]).values
        assert not np.isnan(values[1:]).any()
        assert row.kind == "baseline"
        assert ("replays 20 samples" in row.label) == (kind in (Er, DerPlusPlus))


def test_rivals_are_measured_where_they_are_named(tmp_path: Path) -> None:
    def chosen(*names: str, **more: Any) -> tuple[str, ...]:
        config = small_config(tmp_path, baselines=names, **more)
        return chosen_baselines(open_method(config, seed=0))

    assert "joint" in chosen("all")
    assert not {"slca", "er"} & set(chosen("all"))
    assert chosen("all", "er") == (*chosen("all"), "er")
    assert chosen("tuna", "frozen", "slca") == ("frozen", "slca", "tuna")


def test_a_plan_says_how_often_an_image_runs(tmp_path: Path) -> None:
    config = small_config(tmp_path, baselines=("tuna", "slca", "er", "ease", "aper"), **FEW)
    facts = plan(config, seed=0, verb="run")
    assert facts["baseline_passes"] == {
        "aper": {"step": 1, "test": 2},
        "ease": {"step": 1, "test": 3},
        "tuna": {"step": 1, "test": 4},
        "er": {"step": 2, "test": 1},
    }
    assert plan(config, seed=0, verb="write")["baseline_passes"] == {}


@pytest.mark.parametrize(
    ("setting", "name", "match"),
    [
        ({"stream__setting": "dg"}, "er", "no baseline er under stream.setting dg"),
        ({"stream__setting": "til", "stream__order": None}, "mos", "no baseline mos under .* til"),
        (
            {
                "stream__setting": "xtail",
                "stream__source": "x",
                "method": "moram",
                "head__kind": "prototype",
            },
            "ease",
            "no baseline ease under head.kind prototype",
        ),
        (
            {"method": "moram", "stream__setting": "trace", "stream__source": "facts"},
            "der++",
            "no baseline der",
        ),
    ],
)
def test_a_rival_that_a_setting_does_not_have_is_refused(
    tmp_path: Path, setting: dict[str, Any], name: str, match: str
) -> None:
    config = small_config(tmp_path, baselines=(name,), **setting)
    method = open_method(config, seed=0)
    with pytest.raises(ConfigError, match=match) as caught:
        chosen_baselines(method)
    assert caught.value.remedy == f"leave {name} out of --baselines"


@pytest.mark.parametrize("kind", [Slca, Ease, Mos, Tuna, DerPlusPlus])
def test_a_rival_with_a_head_of_its_own_is_no_learner_of_known_classes(
    work: Workspace, kind: type[Learner]
) -> None:
    head = work.config.head.model_copy(update={"kind": "prototype"})
    other = Workspace(work.config.model_copy(update={"head": head}), seed=0)
    with pytest.raises(ConfigError, match=f"baseline {kind.id[:3]}.* under head.kind prototype"):
        kind(other, 3)
