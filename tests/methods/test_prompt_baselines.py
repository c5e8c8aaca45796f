"""L2P, DualPrompt, CODA-Prompt and S-Prompts: rules against slow loops, relations, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from memtool.adapters.prefix import Prefix
from memtool.backbones.interface import Backbone
from memtool.config import resolve
from memtool.errors import ConfigError
from memtool.experiments.baselines import chosen_baselines, known_baselines
from memtool.experiments.run import run as run_experiment
from memtool.methods import open_method
from memtool.methods.baselines import BASELINES, RIVALS, baselines_of
from memtool.methods.baselines import coda_prompt as coda
from memtool.methods.baselines.coda_prompt import CodaPrompt, orthogonal
from memtool.methods.baselines.dual_prompt import EXPERT_LENGTH, GENERAL_LENGTH, DualPrompt
from memtool.methods.baselines.l2p import LENGTH, POOL, PULL, TAKEN, L2p
from memtool.methods.baselines.prompted import cosines
from memtool.methods.baselines.s_prompts import CLUSTERS, SPrompts
from memtool.streams.task import Images
from memtool.workspace import Workspace
from tests.methods.conftest import small_config

KINDS = (L2p, DualPrompt, CodaPrompt, SPrompts)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    few = {"stream__train_per_task": 60, "stream__test_per_task": 30, "train__epochs": 1}
    return Workspace(small_config(folder, **few), seed=0)


@pytest.fixture(scope="module")
def tasks(work):
    return work.stream.tasks


def images_of(task, count=6):
    return torch.from_numpy(np.array(task.train.images[:count]))


def learned(kind, work, tasks, count=1):
    learner = kind(work, len(tasks))
    for task in tasks[:count]:
        learner.learn(task, "test")
    return learner


def frozen(work, images):
    return work.backbone.features(work.backbone.preprocess(images))


def under(work, images, prefix):
    return work.backbone.features(work.backbone.preprocess(images), prefix=prefix)


def cosine(a, b):
    return float((a @ b / (a.norm() * b.norm())).detach())


# What all of them share


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_prompts_keys_and_head_and_nothing_else(kind, work, tasks):
    learner = learned(kind, work, tasks)
    learner.before_task(tasks[1])
    learner.objective.begin(tasks[1])
    learner.train()
    torch.nn.init.ones_(learner.objective.head.weight[0])  # at zero it would hide what is below
    images, labels = images_of(tasks[1], 12), torch.from_numpy(tasks[1].train.labels[:12])
    logits = learner(images)
    found = learner.objective.loss(logits, images, labels)
    (found + learner.penalty(images, labels, logits)).backward()
    reached = {
        name
        for name, parameter in learner.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    own = {
        L2p: {"keys", "prompts"},
        DualPrompt: {"general", "experts.1", "keys.1"},
        CodaPrompt: {"parts.1.keys", "parts.1.attention", "parts.1.prompts"},
        SPrompts: {"prompts.1"},
    }[kind]
    assert reached == own | {"objective.head.weight", "objective.head.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_same_twice(kind, work, tasks):
    one, two = learned(kind, work, tasks), learned(kind, work, tasks)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.objective.head.weight.any()
    assert not any(p.requires_grad for p in work.backbone.parameters())


def test_cosines_are_those_of_a_slow_loop_and_float32_in_bf16():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    keys = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    expected = torch.tensor([[cosine(q, k) for k in keys] for q in query], dtype=torch.float64)
    assert torch.allclose(cosines(query, keys), expected, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert cosines(query.bfloat16(), keys.float()).dtype == torch.float32


# L2P


def test_l2p_takes_the_prompts_of_the_nearest_keys(work, tasks):
    learner = learned(L2p, work, tasks)
    images = images_of(tasks[0])
    expected, pulled = [], 0.0
    for image in images:
        query = frozen(work, image[None])[0].double()
        near = [cosine(query, key.double()) for key in learner.keys]
        nearest = sorted(range(POOL), key=lambda m: -near[m])[:TAKEN]
        pulled += sum(1 - near[m] for m in nearest) / len(images)
        tokens = torch.cat([learner.prompts[m] for m in nearest])
        assert tokens.shape == (TAKEN * LENGTH, work.backbone.dim)
        expected.append(under(work, image[None], Prefix(tokens[None]))[0])
    assert torch.allclose(learner.features(images), torch.stack(expected), atol=1e-5)
    found = learner.penalty(images, None, None).item()
    assert found == pytest.approx(PULL * pulled, rel=1e-4)


# DualPrompt


def test_dual_prompt_with_one_task_is_prefix_tuning(work, tasks):
    """One task: all images have the same keys and values in front."""
    learner = learned(DualPrompt, work, tasks)
    images = images_of(tasks[1])
    assert (learner.general_blocks, learner.expert_blocks) == ((0, 1), (2, 3))  # of nano's four
    parts = {0: learner.general[0], 1: learner.general[1]}
    parts |= {2: learner.experts[0][0], 3: learner.experts[0][1]}
    assert [part.shape[:2] for part in parts.values()] == [(2, GENERAL_LENGTH)] * 2 + [
        (2, EXPERT_LENGTH)
    ] * 2
    fixed = Prefix(attended={b: p.expand(len(images), -1, -1, -1) for b, p in parts.items()})
    assert torch.allclose(learner.features(images), under(work, images, fixed), atol=1e-5)


def test_dual_prompt_keeps_old_tasks_and_finds_one_by_its_key(work, tasks):
    learner = learned(DualPrompt, work, tasks)
    old = [learner.keys[0].detach().clone(), learner.experts[0].detach().clone()]
    learner.before_task(tasks[1])
    assert torch.equal(learner.experts[1], old[1])  # goes on from there, and finds a key of its own
    assert not torch.equal(learner.keys[1], old[0])
    learner = learned(DualPrompt, work, tasks)
    learner.learn(tasks[1], "test")
    assert torch.equal(learner.keys[0], old[0])
    assert torch.equal(learner.experts[0], old[1])
    assert not torch.equal(learner.experts[1], old[1])
    images = torch.cat([images_of(task) for task in tasks[:2]])
    query = frozen(work, images)
    near = [[cosine(q, key) for key in learner.keys] for q in query]
    assert learner.task_of(query).tolist() == [int(np.argmax(row)) for row in near]
    found = learner.prefix(query).attended
    for i, task in enumerate(learner.task_of(query)):
        assert torch.equal(found[3][i], learner.experts[task][1])
    learner.features(images)
    mean = sum(1 - row[1] for row in near) / len(near)  # the newest task's key is pulled
    assert learner.penalty(images, None, None).item() == pytest.approx(mean, rel=1e-4)
    learner.train()
    assert learner.task_of(query).tolist() == [1] * len(query)


# CODA-Prompt


def test_coda_weights_and_penalty_are_those_of_slow_loops(work, tasks):
    learner = learned(CodaPrompt, work, tasks, 2)
    learner.parts.double().requires_grad_(False)
    query = frozen(work, images_of(tasks[0], 3)).double()
    keys, attention, prompts = learner.joined()
    count = coda.COMPONENTS // len(tasks)
    assert keys.shape == (4, 2 * count, work.backbone.dim)
    weights = learner.weights(query)
    for block, image, m in ((0, 0, 0), (1, 2, count), (3, 1, 2 * count - 1)):
        wanted = cosine(query[image] * attention[block, m], keys[block, m])
        assert float(weights[block, image, m]) == pytest.approx(wanted, rel=1e-9)
    mixed = learner.prefix(query).attended[2]
    wanted = sum(weights[2, 1, m] * prompts[2, m] for m in range(2 * count))
    assert torch.allclose(mixed[1].flatten(), wanted, atol=1e-12)
    penalty = 0.0
    for rows in (keys, attention, prompts):
        for block in rows:
            gram = [
                [float(a @ b) - (i == j) for j, b in enumerate(block)] for i, a in enumerate(block)
            ]
            penalty += float(np.square(gram).mean())
    found = learner.penalty(query, None, query).item()
    assert found == pytest.approx(coda.ORTHOGONAL * penalty, rel=1e-6)


def test_coda_components_start_orthogonal_to_old_ones_which_stay(work, tasks):
    learner = learned(CodaPrompt, work, tasks)
    old = [parameter.detach().clone() for parameter in learner.parts[0].parameters()]
    learner.before_task(tasks[1])
    for first, new in zip(old, learner.parts[1].requires_grad_(False).parameters(), strict=True):
        assert float((first @ new.mT).abs().max()) < 1e-4 * float(first.abs().max() + 1)
        assert torch.allclose(new @ new.mT, torch.eye(new.shape[1]).expand(4, -1, -1), atol=1e-5)
    learner = learned(CodaPrompt, work, tasks, 2)
    for first, kept in zip(old, learner.parts[0].parameters(), strict=True):
        assert torch.equal(first, kept)
    full = orthogonal(torch.randn(1, 3, 4), torch.eye(4)[None, :2])  # no room for three
    assert torch.allclose(full.norm(dim=-1), torch.ones(1, 3))


def test_coda_with_one_component_and_constant_attention_is_prefix_tuning(work, tasks, monkeypatch):
    """One component whose weight is 1 for every image: its keys and values, as DualPrompt's."""
    monkeypatch.setattr(coda, "COMPONENTS", 1)
    learner = CodaPrompt(work, 1)
    learner.before_task(tasks[0])
    images = images_of(tasks[0], 4)
    query = frozen(work, images)
    alike = int((query > 0).all(dim=0).nonzero()[0])  # attention looks at this entry alone
    with torch.no_grad():
        for rows in (learner.parts[0].keys, learner.parts[0].attention):
            rows.zero_()
            rows[:, :, alike] = 1.0
    assert torch.allclose(learner.weights(query), torch.ones(4, 4, 1))
    pairs = learner.parts[0].prompts.detach()[:, 0].unflatten(-1, (2, coda.LENGTH // 2, -1))
    fixed = {block: pair.expand(4, -1, -1, -1) for block, pair in enumerate(pairs)}
    expected = under(work, images, Prefix(attended=fixed))
    assert torch.allclose(learner.features(images), expected, atol=1e-5)
    dual = DualPrompt(work, 1)
    dual.before_task(tasks[0])
    monkeypatch.setattr(dual, "general_blocks", ())
    monkeypatch.setattr(dual, "expert_blocks", (0, 1, 2, 3))
    dual.general = torch.nn.Parameter(dual.general[:0])
    dual.experts[0] = torch.nn.Parameter(pairs)
    assert torch.allclose(dual.features(images), expected, atol=1e-5)


# S-Prompts


def test_s_prompts_with_one_domain_is_prompt_tuning(work, tasks):
    learner = learned(SPrompts, work, tasks)
    images = images_of(tasks[2])
    tokens = learner.prompts[0].expand(len(images), -1, -1)
    features = under(work, images, Prefix(tokens))
    assert torch.allclose(learner.features(images), features, atol=1e-5)
    assert torch.allclose(learner(images), learner.objective.head(features), atol=1e-4)


def test_s_prompts_find_a_domain_by_centroids_and_keep_old_ones(work, tasks):
    learner = learned(SPrompts, work, tasks)
    prompt, centroids = learner.prompts[0].detach().clone(), learner.centroids[0].clone()
    weight = learner.heads[0].weight.clone()
    learner.learn(tasks[1], "test")
    assert torch.equal(learner.prompts[0], prompt)
    assert torch.equal(learner.centroids[0], centroids)
    assert torch.equal(learner.heads[0].weight, weight)
    assert centroids.shape == (CLUSTERS, work.backbone.dim)
    images = torch.cat([images_of(task) for task in tasks[:2]])
    domains = []
    for query in F.normalize(frozen(work, images), dim=1):
        far = [min(float((query - c).abs().sum()) for c in each) for each in learner.centroids]
        domains.append(int(np.argmin(far)))
    query = frozen(work, images)
    assert learner.domain_of(query).tolist() == domains
    assert set(domains) == {0, 1}
    logits = learner(images)
    for i, domain in enumerate(domains):
        one = under(work, images[i : i + 1], Prefix(learner.prompts[domain][None]))
        assert torch.allclose(logits[i], learner.heads[domain](one)[0], atol=1e-4)


# Rows, and where there are none


def test_rows_are_whole_and_a_task_that_was_learned_is_known(work, tasks):
    few = [
        dataclasses.replace(t, test=Images(t.test.images[:20], t.test.labels[:20])) for t in tasks
    ]
    (row,) = BASELINES["s-prompts"](work, few[:2])
    assert row.id == "s-prompts"
    assert not np.isnan(row.matrix([t.name for t in few[:2]]).values[1:]).any()
    rows = BASELINES["coda-prompt"](work, few[:2])
    ids = [f"coda-prompt{ending}" for ending in ("", "-ridge", "-lda", "-routed")]
    assert [one.id for one in rows] == ids
    assert rows[2].accuracy[2][0] > 0.3


def test_they_are_measured_where_they_are_named(tmp_path):
    every = open_method(small_config(tmp_path), seed=0)
    assert set(RIVALS) >= {kind.id for kind in KINDS}
    assert not set(chosen_baselines(every)) & set(RIVALS)
    assert set(known_baselines(every)) >= {kind.id for kind in KINDS}
    classes = small_config(tmp_path, stream__setting="cil", stream__order=None)
    assert set(known_baselines(every)) - set(known_baselines(open_method(classes, seed=0))) == {
        "s-prompts"
    }
    named = small_config(tmp_path, baselines=("frozen", "l2p", "s-prompts"))
    assert chosen_baselines(open_method(named, seed=0)) == ("frozen", "l2p", "s-prompts")


@pytest.mark.parametrize(
    ("setting", "name", "match"),
    [
        ("cil", "s-prompts", "S-Prompts under stream.setting cil.*\n.*dil"),
        ("dg", "s-prompts", "S-Prompts under stream.setting dg"),
        ("dg", "l2p", "no baseline l2p under stream.setting dg"),
        ("til", "coda-prompt", "no baseline coda-prompt under stream.setting til"),
    ],
)
def test_a_setting_that_has_none_is_named_before_anything_is_learned(
    tmp_path, setting, name, match
):
    order = ("rot0", "rot30") if setting == "dg" else None
    cut = {"stream__setting": setting, "stream__order": order}
    config = small_config(tmp_path, **cut, baselines=("frozen", name))
    with pytest.raises(ConfigError, match=match):
        chosen_baselines(open_method(config, seed=0))
    if setting == "cil":
        with pytest.raises(ConfigError, match=match):
            run_experiment(config)
        assert not (tmp_path / "memory").exists()
        with pytest.raises(ConfigError, match=match):
            SPrompts(Workspace(config, seed=0), 2)


class Convolution(Backbone):
    """A model without attention."""

    name = "small-convolution"
    blocks = ()
    preprocess = features = hidden = None


def test_what_cannot_take_prompts_is_refused(tmp_path):
    texts = resolve(preset="moram-trace", ambient=False).config
    fixed = small_config(tmp_path, method="moram", head__kind="prototype")
    other = Workspace(small_config(tmp_path), seed=0)
    other.__dict__["backbone"] = Convolution()
    cases = [
        (Workspace(texts, seed=0), "baseline l2p on texts"),
        (Workspace(fixed, seed=0), "baseline l2p under head.kind prototype"),
        (other, "baseline l2p with backbone small-convolution, which takes no prompts.*\n.*nano"),
    ]
    for work, match in cases:
        with pytest.raises(ConfigError, match=match):
            L2p(work, 2)
    for kind in KINDS:
        assert kind.id not in baselines_of("texts")
        assert kind.id not in baselines_of("images", fixed_head=True)
