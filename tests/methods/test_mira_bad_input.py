"""What a user may give MIRA by mistake: it is refused in words, or computed as it should be."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memtool.adapters.values import AdapterValues
from memtool.errors import CapacityError, ConfigError, DataError, DivergedError
from memtool.experiments import run as experiment
from memtool.heads import FeatureStatistics, LinearClassifier, solve_head
from memtool.learning import adapt as stage_one
from memtool.methods.mira.count import count_task
from memtool.methods.mira.method import Mira
from memtool.settings import AdapterSettings, StreamSettings, TrainSettings
from memtool.streams import create_stream
from memtool.streams.task import spread
from tests.methods.conftest import learn, small_config

FEW = {"stream__train_per_task": 60, "stream__test_per_task": 30}


def pictures(root: Path, leaves: dict[str, int]) -> str:
    """A folder of noise images, so many in every leaf; every leaf has a grey of its own."""
    generator = np.random.default_rng(0)
    for grey, (leaf, count) in enumerate(leaves.items()):
        (root / leaf).mkdir(parents=True)
        for number in range(count):
            noise = generator.integers(0, 60, (16, 16, 3)) + 20 * grey
            Image.fromarray(noise.astype(np.uint8)).save(root / leaf / f"{number:02}.png")
    return str(root)


# One class, and classes that were never seen


def test_a_domain_with_one_class_is_named_and_can_be_left_out(tmp_path):
    source = pictures(tmp_path / "d", {"photo/ant": 5, "photo/bee": 5, "sketch/ant": 5, "z/ant": 5})
    config = small_config(tmp_path, stream__source=source, stream__order=None)
    with pytest.raises(DataError, match=r"task 2 \(sketch\) .* only one class .*: ant") as error:
        Mira.open(config, seed=0).adapt("1")
    assert "stream.order" in str(error.value)
    with pytest.raises(DataError, match="only one class"):
        experiment.run(config)
    assert not (tmp_path / "memory").exists()
    alone = config.stream.model_copy(update={"order": ("photo",)})
    assert len(create_stream(alone, 32).tasks) == 1


@pytest.mark.parametrize("setting", ["dil", "cil"])
def test_a_class_that_only_the_test_part_has(setting, tmp_path):
    counts = {f"train/photo/{one}": 4 for one in ("ant", "bee", "cat")}
    counts |= {f"test/photo/{one}": 2 for one in ("ant", "bee", "cat", "dog")}
    settings = StreamSettings(
        source=pictures(tmp_path / "d", counts), setting=setting, classes_per_task=4
    )
    with pytest.raises(DataError, match=r"2 test images of task 1 .* images of: dog\n"):
        create_stream(settings, 32)


def test_a_class_of_the_held_out_domain_that_no_source_has(tmp_path):
    counts = {f"{domain}/{one}": 5 for domain in "ab" for one in ("ant", "bee")}
    counts |= {"c/ant": 5, "c/cat": 3}
    source = pictures(tmp_path / "d", counts)
    held_out = StreamSettings(source=source, setting="dg", held_out="c")
    with pytest.raises(DataError, match=r"3 test images of task 3 \(c\) .*: cat"):
        create_stream(held_out, 32)
    # One of the learned domains may well lack a class that another one has.
    assert len(create_stream(held_out.model_copy(update={"held_out": "a"}), 32).tasks) == 2


def test_a_class_that_too_small_a_subset_left_out():
    settings = StreamSettings(order=("upright",), train_per_task=5)
    with pytest.raises(DataError, match="classes that no task has training images of") as error:
        create_stream(settings, 32)
    assert "a larger stream.train_per_task" in str(error.value)


# Tasks of unequal size, and one task


def test_tasks_of_unequal_size_count_by_their_images(tmp_path):
    config = small_config(tmp_path, head__kind="ridge", head__scope="shared", train__epochs=1)
    mira = Mira.open(config, seed=0)
    stream = mira.workspace.stream
    tasks = [
        dataclasses.replace(task, train=spread(task.train, count))
        for task, count in zip(stream.tasks[:2], (25, 55), strict=True)
    ]
    mira.workspace.stream = dataclasses.replace(stream, tasks=tuple(tasks))
    learn(mira, 2)
    snapshot, work = mira.snapshot(), mira.workspace
    counted = snapshot.feature_statistics()
    assert [int(counted[number].counts.sum()) for number in (1, 2)] == [25, 55]
    # The head is the one of all 80 images at once, not the mean of the two tasks'.
    _, model, head = snapshot.consolidated()
    everything = FeatureStatistics(work.backbone.dim, 10)
    for task in tasks:
        own = snapshot.own_values(task.number, work.engine.device)
        features, _ = count_task(
            work.engine, work.backbone, model.memory, model.look, config.memory, own, task.train
        )
        everything.add(features, torch.from_numpy(np.array(task.train.labels)))
    expected = solve_head("ridge", everything, config.head)
    assert torch.allclose(head.weight[0], expected.weight, atol=1e-5)
    assert torch.allclose(head.bias[0], expected.bias, atol=1e-5)
    # Tasks count alike in the average, whatever their number of test images.
    row = mira.evaluate().row("memory")
    assert row.metrics["faa"] == pytest.approx(sum(row.accuracy[-1]) / 2)


@pytest.mark.parametrize("keys", ["closed-form", "random"])
def test_one_domain_alone(keys, tmp_path):
    learning = {"consolidate__keys": keys, "consolidate__epochs": int(keys == "random")}
    config = small_config(tmp_path, stream__order=("upright",), **FEW, **learning)
    (record,) = experiment.run(config, baselines=False)
    row = record.row("memory")
    assert row.metrics["faa"] > 0.3
    assert row.metrics["faa"] == row.accuracy[-1][0]
    assert "forgetting.max" not in row.metrics
    assert "forgetting.max" in row.undefined
    assert (tmp_path / "runs" / "seed-0" / "report.html").is_file()


def test_one_domain_leaves_none_to_generalise_from(tmp_path):
    config = small_config(tmp_path, stream__setting="dg", stream__order=("rot0",))
    with pytest.raises(ConfigError, match="'rot0' leaves no domain of digits to learn from"):
        experiment.run(config)
    assert not list(tmp_path.glob("memory*"))
    assert not list(tmp_path.rglob("*.safetensors"))


# More adapters than memory


def test_more_adapters_than_memory_are_refused_before_training(tmp_path):
    mira = Mira.open(small_config(tmp_path, adapter__per_task=20_000, **FEW), seed=0)
    events = []
    mira.workspace.progress = events.append
    with pytest.raises(
        CapacityError, match=r"20000 adapters in one pass takes about .* bytes"
    ) as e:
        mira.adapt("1")
    assert re.search(r"--adapters-per-task \d+, a smaller train.batch_size", e.value.remedy)
    assert "bytes that cpu has left" in e.value.expected
    assert not events
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Mira.open(small_config(tmp_path_factory.mktemp("room"), **FEW), seed=0).workspace


@pytest.fixture(scope="module")
def trial(work):
    """One adapter with its head, as a training would begin."""
    flat = torch.zeros(1, work.layout.numel)
    stack = AdapterValues.from_flat(flat, work.layout, 1.0, trainable=True)
    head = LinearClassifier(torch.zeros(10, work.backbone.dim), torch.zeros(10))
    return stage_one.AdapterTraining(work.backbone, stack, head, [range(10)])


def test_the_number_that_is_suggested_fits(work, trial, monkeypatch):
    task = work.task("1")
    monkeypatch.setattr(stage_one, "available_bytes", lambda device: 10**9)

    def room(count):
        parameters = work.layout.numel + 10 * work.backbone.dim
        settings = AdapterSettings(per_task=count), TrainSettings()
        stage_one.require_room(work.engine, trial, [task.train], parameters, *settings, "adapt")

    with pytest.raises(CapacityError) as error:
        room(1000)
    most = int(re.search(r"--adapters-per-task (\d+)", error.value.remedy)[1])
    assert 1 <= most < 1000
    room(most)
    with pytest.raises(CapacityError):
        room(most + 1)


def test_what_an_image_keeps_is_the_same_for_every_image(work, trial):
    train = work.task("1").train
    kept = [stage_one._bytes_kept(work.engine, trial, train, count) for count in (1, 2, 3, 5)]
    assert kept[1] - kept[0] == kept[2] - kept[1] == (kept[3] - kept[2]) / 2
    tokens, width = 65, work.backbone.dim
    assert kept[1] - kept[0] > 4 * tokens * width * 4  # at least the input of each of four blocks


# Divergence

LEARNING = {
    **FEW,
    "adapter__warm_start": "none",
    "memory__separation": "affine",
    "consolidate__keys": "random",
    "consolidate__epochs": 1,
}


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """A memory of two tasks whose keys were learned, and an adapter of the third beside it."""
    folder = tmp_path_factory.mktemp("two")
    mira = learn(Mira.open(small_config(folder, **LEARNING), seed=0), 2)
    mira.adapt("3")
    return folder


@pytest.fixture
def opened(two_tasks, tmp_path):
    """Opens a copy of that memory under other settings."""
    folder = tmp_path / "copy"
    shutil.copytree(two_tasks, folder)
    return lambda **changes: Mira.open(small_config(folder, **{**LEARNING, **changes}), seed=0)


@pytest.mark.parametrize(
    ("epochs", "match"),
    [
        (1, r"task 3/3 rot90: adapt: the loss was 2.3 at step 1 and .* ended at step 2"),
        (2, r"task 3/3 rot90: adapt: the loss became nan at step \d of 4"),
    ],
)
def test_adapters_that_diverge_leave_the_memory_as_it_was(epochs, match, opened):
    mira = opened(train__lr=1e6, train__epochs=epochs)
    before, adapters = mira.workspace.store.head(), mira.workspace.adapter_folder
    shutil.rmtree(adapters / "task-3-seed-0")
    with pytest.raises(DivergedError, match=match) as error:
        mira.adapt("3")
    assert "a smaller learning rate than" in error.value.remedy
    assert mira.workspace.store.head() == before
    assert sorted(path.name for path in adapters.glob("task-*")) == [
        "task-1-seed-0",
        "task-2-seed-0",
    ]
    assert opened_again(mira).evaluate().row("memory").metrics["faa"] > 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {"consolidate__lr": 1e6},
        # So large that no product of the values is finite, however the numbers are rounded.
        {"consolidate__value_lr": 1e30, "head__features": "recalled"},
    ],
    ids=["keys", "values"],
)
def test_a_consolidation_that_diverges_leaves_the_memory_as_it_was(changes, opened):
    mira = opened(**changes)
    mira.write()
    before = mira.workspace.store.head()
    with pytest.raises(DivergedError, match=r"task 3: consolidate: .* at step \d") as error:
        mira.consolidate()
    assert "a smaller learning rate than" in error.value.remedy
    assert mira.workspace.store.head() == before
    again = opened_again(mira)
    assert again.evaluate().row("memory").accuracy[-1].count(None) == 0
    assert again.snapshot().state.tasks == (1, 2)
    assert again.consolidate().tasks == (1, 2, 3)  # with the settings as they were before
    assert again.workspace.store.head() != before


def opened_again(mira: Mira) -> Mira:
    """The same memory in a new process's eyes, under the settings that it was learned with."""
    config = mira.config
    folder = config.runs.parent
    return Mira.open(small_config(folder, **LEARNING), seed=0)
