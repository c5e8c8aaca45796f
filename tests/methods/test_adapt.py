"""Stage 1: the adapters of a task, trained together, are those that would be trained alone."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.adapters.values import AdapterValues
from memtool.backbones import create_backbone
from memtool.engine import Batches, Engine
from memtool.heads import LinearClassifier
from memtool.learning.adapt import AdapterTraining, Lesson, adapt, losses
from memtool.methods.mira.method import Mira
from memtool.settings import AdapterSettings, BackboneSettings, EngineSettings, TrainSettings
from memtool.streams.task import Images
from tests.methods.conftest import small_config

CLASSES = (0, 1, 3)
ADAPTER = AdapterSettings(rank=2, per_task=3)
TRAIN = TrainSettings(epochs=3, batch_size=8, lr=0.02, clip=0.5)


@pytest.fixture(scope="module")
def nano():
    return create_backbone(BackboneSettings())


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    labels = rng.choice(CLASSES, size=30)
    noise = rng.integers(0, 120, size=(30, 32, 32, 3))
    return Images((noise + 40 * labels[:, None, None, None]).astype(np.uint8), labels)


@dataclass(frozen=True, eq=False)
class Alone(Batches):
    """One group of `plan` with its copies drawn out: what a training of that adapter alone sees."""

    plan: Batches | None = None
    member: int = 0

    @property
    def steps_per_epoch(self):
        return self.plan.steps_per_epoch

    def indices(self, step):
        group = self.member
        return np.repeat(self.plan.indices(step)[group], self.plan.copies(step)[group])[None]

    def copies(self, step):
        return np.ones_like(self.indices(step))


def alone(engine, backbone, layout, samples, train, seed):
    """Each of the three adapters trained by itself, on materialised bootstrap samples."""
    values = init_lora(layout, 3, generator=engine.generator(seed))
    shape = (samples.images, samples.labels, train.batch_size, train.epochs, seed)
    plan = Batches(*shape, groups=3)
    head = LinearClassifier(torch.zeros(4, backbone.dim), torch.zeros(4))
    for member, value in enumerate(values):
        stack = AdapterValues.from_flat(value[None], layout, 4.0, trainable=True)
        module = AdapterTraining(backbone, stack, head, [CLASSES])
        batches = Alone(*shape, plan=plan, member=member)
        fit = engine.fit(
            module,
            batches,
            lambda model, batch: losses(model(batch.inputs), batch.labels, batch.weights),
            train,
            stage="alone",
        )
        yield stack.flat()[0], module.weight[0].detach(), fit.losses


@pytest.mark.parametrize(("accumulate", "begin"), [(1, 0), (2, 0), (1, 2), (2, 3)])
def test_adapters_trained_together_are_those_trained_alone(nano, samples, accumulate, begin):
    """Also where they begin in a later block, and what is before it is computed once."""
    layout = Layout([site for site in nano.sites(("q", "v")) if site.block >= begin], 2)
    engine = Engine(EngineSettings(device="cpu", precision="fp32", accumulate=accumulate))
    task = {"class_count": 4, "adapter": ADAPTER, "train": TRAIN}
    (found,) = adapt(engine, nano, layout, [Lesson(samples, CLASSES, 5)], **task)
    start = init_lora(layout, 3, generator=engine.generator(5))
    expected = list(alone(engine, nano, layout, samples, TRAIN, 5))
    for j, (value, weight, curve) in enumerate(expected):
        learned = (value - start[j]).norm()
        assert learned > 0.1
        assert (found.values[j] - value).norm() < 2e-3 * learned
        assert torch.allclose(found.heads[j].weight, weight, atol=1e-4)
        assert found.fit.by_group[j] == pytest.approx(curve, rel=1e-3)
    assert found.fit.losses == pytest.approx(np.sum(found.fit.by_group, axis=0))
    assert found.fit.losses[-1] < 0.7 * found.fit.losses[0]


def test_training_accuracy_is_that_of_every_adapter_with_its_head(nano, samples):
    layout = Layout(nano.sites(("q", "v")), 2)
    engine = Engine(EngineSettings(device="cpu", precision="fp32", eval_batch_size=7))
    task = {"class_count": 4, "adapter": ADAPTER, "train": TRAIN}
    (found,) = adapt(engine, nano, layout, [Lesson(samples, CLASSES, 5)], **task)
    for value, head, accuracy in zip(found.values, found.heads, found.train_accuracy, strict=True):
        stack = AdapterValues.from_flat(value[None], layout, 4.0)
        module = AdapterTraining(nano, stack, head, [CLASSES])
        with torch.no_grad():
            predicted = module(torch.from_numpy(samples.images))[0].argmax(dim=1)
        assert accuracy == pytest.approx(np.mean(predicted.numpy() == samples.labels))


def test_the_time_of_a_pass_is_shared_by_its_adapters(tmp_path):
    mira = Mira.open(small_config(tmp_path, adapter__per_task=3, train__epochs=1), seed=0)
    begin = time.perf_counter()
    results = mira.adapt("1")
    assert len({result.seconds for result in results}) == 1
    assert 0 < sum(result.seconds for result in results) < time.perf_counter() - begin
