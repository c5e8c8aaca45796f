"""Setting xtail: heads that know all classes in advance, baselines, MoRAM, and a tiny CLIP."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from memtool.adapters.recalls import every
from memtool.backbones.open_clip import CLIP_TARGETS
from memtool.errors import AlreadyExistsError, ConfigError, DataError
from memtool.evaluation.metrics import average_xtail, transfer_xtail
from memtool.experiments.pretrain_clip import pretrain_clip
from memtool.experiments.run import run
from memtool.heads import CosineHead, both_ways, over_seen_texts
from memtool.learning.known import (
    compared,
    fixed_head,
    head_under,
    learned_under,
)
from memtool.learning.learner import Learner
from memtool.learning.objective import Known
from memtool.methods import open_method
from memtool.methods.baselines import RIVALS, baselines_of
from memtool.methods.baselines.ewc import Ewc
from memtool.methods.baselines.fine_tune import FineTune
from memtool.methods.baselines.inf_lora import InfLora
from memtool.methods.baselines.lwf import Lwf
from memtool.methods.baselines.text_keys import TextKeys
from memtool.methods.forget import forget
from memtool.methods.moram.explain import explain_atoms
from memtool.methods.moram.method import Moram
from memtool.settings import TrainSettings
from memtool.streams import load_image
from memtool.streams.prompts import prompts
from memtool.streams.task import Images
from memtool.workspace import Workspace
from tests.methods.colours import chain_config as config

pytestmark = pytest.mark.usefixtures("cache")

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {
        "context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def work(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(config(chain, tmp_path_factory.mktemp("work")), seed=0)


@pytest.fixture(scope="module")
def clip_settings(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A tiny CLIP that saw the chain for a few steps: its features are not those of chance."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "clip.json").write_text(json.dumps(CLIP))
    stream = config(chain, folder).stream
    made = pretrain_clip(
        str(folder / "clip.json"), stream, 32, folder / "clip.safetensors",
        steps=40, batch_size=18, lr=3e-3,
    )  # fmt: skip
    assert made.steps == 40
    assert made.chance == pytest.approx(1 / 6)
    assert made.accuracy.keys() == {"warm", "cold"}
    assert sum(made.accuracy.values()) / 2 > 2 * made.chance
    return {
        "backbone.name": f"open_clip:{folder / 'clip.json'}",
        "backbone.weights": str(folder / "clip.safetensors"),
        "backbone.targets": CLIP_TARGETS,
        "head.kind": "text",
    }


@pytest.fixture(scope="module")
def clip_work(
    chain: Path, clip_settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    folder = tmp_path_factory.mktemp("clip work")
    return Workspace(config(chain, folder, **clip_settings), seed=0)


def images_of(work: Workspace, task: int = 0, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.array(work.stream.tasks[task].train.images[:count]))


def labels_of(work: Workspace, task: int = 0, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.array(work.stream.tasks[task].train.labels[:count]))


# The head


def test_prototypes_are_of_frozen_features_and_know_every_class(work: Workspace) -> None:
    head = fixed_head(work)
    assert head.prototypes.shape == (6, work.backbone.dim)
    assert head.prototypes.any(dim=1).all()
    task = work.stream.tasks[1]
    with torch.no_grad():
        features = work.backbone.features(
            work.backbone.preprocess(torch.from_numpy(np.array(task.train.images)))
        )
    units = F.normalize(features, dim=1)
    for label in task.classes:
        mean = units[torch.from_numpy(task.train.labels == label)].mean(dim=0)
        torch.testing.assert_close(
            head.prototypes[label], F.normalize(mean, dim=0), atol=1e-5, rtol=0
        )


def test_a_text_head_reads_the_prompts(clip_work: Workspace) -> None:
    head, backbone = fixed_head(clip_work), clip_work.backbone
    texts = prompts(clip_work.stream)
    assert texts[:3] == ("a warm both (warm).", "a warm dark yellow.", "a warm red.")
    with torch.no_grad():
        for label, text in enumerate(texts):
            direction = backbone.text_features(backbone.tokenize([text]))[0]
            torch.testing.assert_close(
                head.prototypes[label], F.normalize(direction, dim=0), atol=1e-5, rtol=1e-4
            )
    assert head.scale == pytest.approx(backbone.logit_scale)


def test_heads_that_cannot_be_are_told(chain: Path, work: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no text tower(.|\n)*open_clip"):
        fixed_head(Workspace(config(chain, tmp_path, head__kind="text"), seed=0))
    with pytest.raises(ConfigError, match="does not know classes before"):
        fixed_head(Workspace(config(chain, tmp_path, head__kind="lda"), seed=0))
    with pytest.raises(ConfigError, match=r"EWC under head\.kind prototype"):
        Ewc(work, 2)


def test_equal_prompts_are_an_error(clip_work: Workspace) -> None:
    twice = Workspace(clip_work.config, seed=0)
    twice.backbone = clip_work.backbone
    twice.stream = replace(clip_work.stream, class_names=("a", "b", "c", "d", "d_", "e"))
    with pytest.raises(DataError, match=r"two classes of chain have the prompt 'a cold d.'"):
        fixed_head(twice)


# Learning under it


def test_iterations_are_whole_epochs() -> None:
    train = TrainSettings(iterations=500, batch_size=64, epochs=7)
    assert train.epochs_for(160) == math.ceil(500 / 3)
    assert train.epochs_for(160 * 7, 7) == math.ceil(7 * 500 / 18)
    assert TrainSettings(epochs=7).epochs_for(160) == 7


def test_every_baseline_fills_the_whole_matrix(work: Workspace) -> None:
    tasks = work.stream.tasks
    known = baselines_of("images", fixed_head=True)
    rows = {row.id: row for run in known.values() for row in run(work, tasks)}
    assert set(known) - set(RIVALS) == {
        "zero-shot", "fine-tune", "sequential", "lwf", "o-lora", "inf-lora", "moe-lora", "joint",
    }  # fmt: skip
    zero_shot = rows["zero-shot"].accuracy
    assert len(set(zero_shot)) == 1  # nothing learns
    learned = ("fine-tune", "sequential", "lwf", "o-lora", "inf-lora", "moe-lora", "sd-lora", "er")
    for id in learned:
        values = rows[id].matrix([task.name for task in tasks]).values
        assert not np.isnan(values).any(), id
        assert rows[id].accuracy[0] == zero_shot[0], id
        assert rows[id].metrics["transfer.xtail"] == transfer_xtail(values) == values[1, 1], id
        assert rows[id].metrics["average.xtail"] == average_xtail(values), id
        # LDA counts what was learned: it cannot name a class of a later task.
        assert rows[f"{id}-lda"].metrics["transfer.xtail"] == 0, id
    assert rows["zero-shot"].metrics["transfer.xtail"] > 0
    joint = rows["joint"].accuracy
    assert joint[0] == joint[1] == (None, None)
    assert None not in joint[2]


def test_fine_tuning_moves_a_copy_only(work: Workspace) -> None:
    images = images_of(work)
    before = work.backbone.features(work.backbone.preprocess(images))
    learner = FineTune(work, 2)
    torch.testing.assert_close(learner.objective.features(images, None), before)
    learner.learn(work.stream.tasks[0], "test")
    assert not torch.allclose(learner.objective.features(images, None), before)
    assert torch.equal(work.backbone.features(work.backbone.preprocess(images)), before)
    assert not any(parameter.requires_grad for parameter in work.backbone.parameters())
    assert learner.rate_of("objective.backbone.vit.norm.weight") < 1
    assert learner.rate_of("objective.head.weight") == 1


def test_the_loss_is_over_the_classes_of_the_task(work: Workspace) -> None:
    task = work.stream.tasks[0]
    objective = Known(work)
    objective.begin(task)
    images, labels = images_of(work), labels_of(work)
    logits = objective.logits(images)
    compared_only = logits.clone()
    compared_only[:, list(work.stream.tasks[1].classes)] = -torch.inf
    loss = objective.loss(logits, images, labels)
    torch.testing.assert_close(loss, F.cross_entropy(compared_only, labels))
    assert loss < F.cross_entropy(logits, labels)
    torch.testing.assert_close(objective.losses(logits, images, labels).mean(), loss)
    head = fixed_head(work)
    learned = objective.learned_head(None)
    torch.testing.assert_close(learned.weight, float(head.scale) * head.prototypes)


def test_prototypes_of_earlier_tasks_compete_where_they_are_asked_to(
    work: Workspace, clip_work: Workspace
) -> None:
    first, second = work.stream.tasks
    assert compared(work.config, work.stream, second) == second.classes
    head = work.config.head.model_copy(update={"rivals": "seen"})
    config = work.config.model_copy(update={"head": head})
    assert compared(config, work.stream, first) == first.classes
    assert compared(config, work.stream, second) == (*first.classes, *second.classes)
    pooled = replace(second, number=0)
    assert compared(config, work.stream, pooled) == second.classes
    # The words of a text tower move with every task: only those of the batch are read.
    second = clip_work.stream.tasks[1]
    assert compared(clip_work.config, clip_work.stream, second) == second.classes


# CLIP: both towers


def test_both_towers_learn_and_the_head_follows(clip_work: Workspace) -> None:
    learner = Learner(clip_work, 2)
    before = learner.objective.head
    assert isinstance(before, CosineHead)
    learner.learn(clip_work.stream.tasks[0], "test")
    after = learner.objective.head
    assert isinstance(after, CosineHead)
    assert not torch.allclose(before.prototypes, after.prototypes, atol=1e-4)
    expected = head_under(clip_work, every(learner.values), "text")
    torch.testing.assert_close(after.prototypes, expected.prototypes)
    # B of a fresh adapter is zero: what is not zero has learned.
    tensors = clip_work.layout.unflatten(learner.values.flat()[0])
    learned = {name for name, tensor in tensors.items() if name.endswith("B") and tensor.any()}
    assert any(name.startswith("visual.") for name in learned)
    assert any(name.startswith("transformer.") for name in learned)


def test_the_loss_of_clip_reads_the_batchs_classes_anew(clip_work: Workspace) -> None:
    learner = Learner(clip_work, 2)
    images, labels = images_of(clip_work), labels_of(clip_work)
    logits = learner(images, labels)
    present = labels.unique()
    absent = [one for one in range(6) if one not in present.tolist()]
    assert (logits[:, absent] == -torch.inf).all()
    torch.testing.assert_close(logits[:, present], learner(images)[:, present])
    both_ways(logits, labels).backward()
    grown = [parameter.grad is not None for parameter in learner.values.b]
    assert all(grown)


def test_under_texts_seen_a_step_reads_all_texts_of_the_task(
    chain: Path, clip_settings: dict[str, object], tmp_path: Path
) -> None:
    settings = config(chain, tmp_path, head__texts="seen", **clip_settings)
    work = Workspace(settings, seed=0)
    learner, tasks = Learner(work, 2), work.stream.tasks
    for task in tasks:
        learner.objective.begin(task)
        own = list(task.classes)
        images, labels = images_of(work, task.number - 1), labels_of(work, task.number - 1)
        few = labels == labels[0]  # a batch of one class reads the others' texts, too
        logits = learner(images[few], labels[few])
        assert logits[:, own].isfinite().all()
        assert (logits[:, [c for c in range(6) if c not in own]] == -torch.inf).all()
        torch.testing.assert_close(logits[:, own], learner(images[few])[:, own])
        so_far = len({c for other in tasks[: task.number] for c in other.classes})
        found = learner.objective.loss(logits, images[few], labels[few])
        torch.testing.assert_close(found, over_seen_texts(logits, labels[few], so_far))
        found.backward()
        assert all(parameter.grad is not None for parameter in learner.values.b)
    # Atoms that learned by the one loss are no atoms of the other.
    batch = config(chain, tmp_path, **clip_settings)
    assert learned_under(settings, work.stream) != learned_under(batch, work.stream)


def test_lwf_holds_what_both_towers_say_against_the_old_ones(clip_work: Workspace) -> None:
    learner = Lwf(clip_work, 2)
    images, labels = images_of(clip_work), labels_of(clip_work)
    learner.before_task(clip_work.stream.tasks[0])
    assert not learner.penalty(images, labels, learner(images))
    learner.learn(clip_work.stream.tasks[0], "test")
    learner.before_task(clip_work.stream.tasks[1])
    assert learner.penalty(images, labels, learner(images)).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for factor in learner.values.b:
            factor += 0.3
    loss = learner.penalty(images, labels, learner(images))
    assert loss.item() > 1e-4
    loss.backward()
    of_text = [
        factor.grad
        for site, factor in zip(clip_work.layout.sites, learner.values.b, strict=False)
        if site.block >= 2
    ]
    assert any(grad is not None and grad.any() for grad in of_text)


def test_inf_lora_sees_the_inputs_of_both_towers(clip_work: Workspace) -> None:
    learner = InfLora(clip_work, 2)
    moments = learner.moments(clip_work.stream.tasks[0])
    assert moments.keys() == {site.module for site in clip_work.layout.sites}


def test_text_keys_ask_each_task_as_its_class_names_say(clip_work: Workspace) -> None:
    work, tasks = clip_work, clip_work.stream.tasks
    learner = TextKeys(work, 2)
    images = np.concatenate([task.test.images for task in tasks])
    both = Images(images, np.concatenate([task.test.labels for task in tasks]))
    assert learner.weights(images).shape == (len(images), 0)
    zero_shot = learner.features_of(both)
    torch.testing.assert_close(zero_shot, work.features(images))
    # The slow twin: one image and one prompt after another, of the frozen towers.
    texts, shares = prompts(work.stream), []
    with torch.no_grad():
        keys = [work.backbone.text_features(work.backbone.tokenize([text]))[0] for text in texts]
        for query in zero_shot:
            cosines = [F.cosine_similarity(query, key, dim=0) for key in keys]
            each = (work.backbone.logit_scale * torch.stack(cosines)).softmax(dim=0)
            shares.append([float(each[list(task.classes)].sum()) for task in tasks])
    learner.learn(tasks[0], "test")
    torch.testing.assert_close(
        learner.weights(images), torch.tensor(shares)[:, :1], atol=1e-4, rtol=1e-3
    )
    # A later task's names are keys already: the texts of its classes are as the frozen model reads.
    later = list(tasks[1].classes)
    frozen = fixed_head(work).prototypes
    assert torch.equal(learner.objective.classifier().prototypes[later], frozen[later])
    first = learner.objective.classifier().prototypes[list(tasks[0].classes)]
    assert not torch.allclose(first, frozen[list(tasks[0].classes)], atol=1e-3)
    learner.learn(tasks[1], "test")
    assert torch.equal(learner.objective.classifier().prototypes[list(tasks[0].classes)], first)
    weights = learner.weights(images)
    torch.testing.assert_close(weights, torch.tensor(shares), atol=1e-4, rtol=1e-3)
    assert torch.allclose(weights.sum(dim=1), torch.ones(len(weights)), atol=1e-5)
    # One that is sure has the LoRA of its task, and no other.
    for place in range(2):
        learner.weights = lambda x, place=place: F.one_hot(  # type: ignore[method-assign, misc]
            torch.full((len(x),), place), 2
        ).float()
        own = work.stacked(learner.stored.flat()[place : place + 1])
        expected = work.features(images, every(own))
        torch.testing.assert_close(learner.features_of(both), expected, atol=1e-4, rtol=1e-3)


def test_every_baseline_runs_on_a_clip(clip_work: Workspace) -> None:
    tasks = clip_work.stream.tasks
    for name, baseline in baselines_of("images", fixed_head=True).items():
        first = baseline(clip_work, tasks)[0]
        assert first.metrics["last.xtail"] >= 0, name


# Whole experiments


@pytest.mark.parametrize("kind", ["prototype", "text"])
def test_a_run_of_moram_with_its_baselines(
    chain: Path, tmp_path: Path, clip_settings: dict[str, object], kind: str
) -> None:
    more = clip_settings if kind == "text" else {}
    values = {"method": "moram", "adapter.rank": 2, "adapter.alpha": 2.0,
              "baselines": ("zero-shot", "sequential"), **more}  # fmt: skip
    other = chain.with_name("other.yaml")
    told = yaml.safe_load(chain.read_text())
    other.write_text(yaml.safe_dump({**told, "prompts": {"warm": "one warm {}."}}))
    (record,) = run(config(chain, tmp_path, **values))
    rows = {row.id: row for row in record.metrics.rows}
    assert {"zero-shot", "sequential", "sequential-lda"} < rows.keys()
    assert [task.prompt for task in record.run.tasks] == ["a warm {}.", "a cold {}."]
    memory = record.metrics.rows[0]
    assert memory.kind == "method"
    assert None not in [cell for row in memory.accuracy for cell in row]
    assert memory.accuracy[0] == rows["zero-shot"].accuracy[0]
    for metric in ("transfer.xtail", "average.xtail", "last.xtail"):
        assert 0 <= memory.metrics[metric] <= 1
    assert memory.metrics["transfer.xtail"] > 0
    assert (tmp_path / "runs" / "seed-0" / "report.html").is_file()
    # The probability of a class is that of the cosines.
    seen = open_method(config(chain, tmp_path, **values), seed=0)
    assert isinstance(seen, Moram)
    picture = chain.parent / "images of warm" / "test" / "red" / "0.png"
    said = seen.retrieve(image=picture).prediction
    snapshot, work = seen.snapshot(), seen.workspace
    head = head_under(work, snapshot.bank.recall(snapshot.gate), work.config.head.kind)
    image = torch.from_numpy(load_image(picture, work.config.backbone.image_size)[None].copy())
    with torch.no_grad():
        pixels = work.backbone.preprocess(image)
        features = work.backbone.features(pixels, snapshot.bank.eval().recall(snapshot.gate))
        expected = head(features).softmax(dim=1).max()
    assert said is not None
    assert said.probability == pytest.approx(float(expected), abs=1e-5)
    # What it learned under is part of what it is.
    folder = tmp_path / "runs" / "seed-0" / "adapters"
    first = open_method(config(chain, tmp_path, **values), seed=0, adapters=folder)
    assert first.adapt("2")[0].skipped
    changed = {"head.rivals": "seen"} if kind == "prototype" else {"stream.source": str(other)}
    settings = config(chain, tmp_path, **{**values, **changed})
    again = open_method(settings, seed=0, adapters=folder)
    with pytest.raises(AlreadyExistsError):
        again.adapt("2")
    if kind == "text":  # the image tower's last block, not the text tower's
        assert isinstance(first, Moram)
        shown = explain_atoms(first, task="1")
        assert shown.block == 1
        with pytest.raises(ConfigError, match="--block 3"):
            explain_atoms(first, task="1", block=3)
    # Forgetting the last task gives the memory after the first one back.
    moram = open_method(config(chain, tmp_path, **values), seed=0)
    assert isinstance(moram, Moram)
    forget(moram.workspace.store, ["task-2-seed-0"])
    (left,) = moram.evaluate(setting="xtail").metrics.rows
    columns = [task.name for task in moram.workspace.stream.tasks]
    assert left.matrix(columns).values[1].tolist() == pytest.approx(
        memory.matrix(columns).values[1].tolist()
    )


def test_other_methods_say_that_they_cannot(chain: Path, tmp_path: Path) -> None:
    for changes in ({}, {"head__kind": "lda"}, {"stream__setting": "cil"}):
        with pytest.raises(ConfigError, match=r"method modulation (.|\n)*method mira or moram"):
            open_method(config(chain, tmp_path, method="modulation", **changes), seed=0)
    ordinary = {"method": "mira", "head__kind": "lda", "stream__setting": "cil"}
    ordinary["backbone__name"] = "open_clip:ViT-B-16"
    with pytest.raises(ConfigError, match="method mira on backbone open_clip:ViT-B-16"):
        open_method(config(chain, tmp_path, **ordinary), seed=0)
