"""MIRA in setting xtail: whole adapters recalled by keys, under prototypes known in advance."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import memtool
from memtool.adapters.recalls import every, same_for_all
from memtool.errors import AlreadyExistsError, ConfigError, MismatchError
from memtool.evaluation.record import Record
from memtool.experiments.run import run
from memtool.heads import CosineHead, RecalledHead
from memtool.learning.known import fixed_head, frozen_scores
from memtool.learning.learner import Learner
from memtool.memories.novelty import LIMIT, novelty
from memtool.memories.separation import separation
from memtool.methods import open_method
from memtool.methods.forget import forget
from memtool.methods.in_store import HEAD
from memtool.methods.merge import merge
from memtool.methods.mira.measure import Measure
from memtool.methods.mira.method import Mira
from memtool.settings import Config
from memtool.streams import load_image
from tests.methods.colours import chain_config

pytestmark = pytest.mark.usefixtures("cache")

SETTINGS = {
    "adapter__rank": 2,
    "adapter__warm_start": "previous",
    "head__rivals": "seen",
    "memory__keys_of": "class",
    "memory__look_at": "final",
    "baselines": ("zero-shot",),
}


def config(chain: Path, folder: Path, **overrides: object) -> Config:
    return chain_config(chain, folder, **{**SETTINGS, **overrides})


@pytest.fixture(scope="module")
def learned(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mira, Record]:
    """Both tasks in memory, and the record of the run; for reading only."""
    folder = tmp_path_factory.mktemp("learned")
    (record,) = run(config(chain, folder))
    adapters = folder / "runs" / "seed-0" / "adapters"
    return Mira.open(config(chain, folder), seed=0, adapters=adapters), record


def reopened(mira: Mira, **overrides: object) -> Mira:
    """The same streams, adapters and store under other settings."""
    source = Path(mira.config.stream.source)
    changed = config(source, mira.config.runs.parent, **overrides)
    return Mira.open(changed, seed=0, adapters=mira.workspace.adapter_folder)


def test_an_adapter_learns_as_sequential_lora_does(learned, chain: Path, tmp_path: Path) -> None:
    mira, _ = learned
    learner = Learner(mira.workspace, 2)
    learner.learn(mira.workspace.stream.tasks[0], "test")
    first = mira.workspace.store.view().values()[0]
    np.testing.assert_allclose(first, learner.values.flat()[0].detach().numpy(), atol=1e-6)
    # What it learned under is part of what it is.
    other = config(chain, tmp_path, head__rivals="task")
    with pytest.raises(AlreadyExistsError):
        Mira.open(other, seed=0, adapters=mira.workspace.adapter_folder).adapt("2")


def test_scores_are_those_computed_sample_by_sample(learned) -> None:
    mira, _ = learned
    work, snapshot = mira.workspace, mira.snapshot()
    _, model, head = snapshot.consolidated()
    images = np.concatenate([task.test.images for task in work.stream.tasks])

    def features(image: np.ndarray, recall=None) -> torch.Tensor:
        pixels = work.backbone.preprocess(torch.from_numpy(image[None].copy()))
        with torch.no_grad():
            return work.backbone.features(pixels, recall)[0].double()

    sums = torch.zeros(6, work.backbone.dim, dtype=torch.float64)
    for task in work.stream.tasks:
        for image, label in zip(task.train.images, task.train.labels, strict=True):
            seen = features(image)
            sums[label] += seen / seen.norm()
    prototypes = sums / sums.norm(dim=1, keepdim=True)
    keys = torch.from_numpy(snapshot.view.keys()[0]).double().reshape(2, 3, -1)

    def asked(image: np.ndarray) -> list[list[float]]:
        query = F.layer_norm(features(image), (work.backbone.dim,))
        query = torch.cat([query, query.new_ones(1)])
        return [[float(key @ query) / len(query) ** 0.5 for key in own] for own in keys]

    found = [asked(image) for image in images]
    # Colours are told apart at once: as soft as makes a mixture of it.
    beta = 1 / float(np.median([abs(max(one) - max(other)) for one, other in found]))
    (block,) = model.memory.blocks
    model.memory[block].separation = separation("softmax", beta=beta)
    scores, coefficients = Measure(work).recall(model, head, images)
    for row, image in enumerate(images):
        largest = max(max(own) for own in found[row])
        each = [sum(math.exp(beta * (one - largest)) for one in own) for own in found[row]]
        weights = torch.tensor([one / sum(each) for one in each], dtype=torch.float64)
        assert weights.min() > 0.01
        torch.testing.assert_close(coefficients[row, 0].double(), weights, atol=1e-4, rtol=1e-4)
        mixed = features(image, same_for_all(model.values, weights.float(), "delta"))
        expected = 30.0 * prototypes @ (mixed / mixed.norm())
        torch.testing.assert_close(scores[row].double(), expected, atol=1e-3, rtol=1e-4)


def test_a_run_fills_the_whole_matrix(learned) -> None:
    mira, record = learned
    rows = {row.id: row for row in record.metrics.rows}
    assert {"memory", "routed", "uniform", "oracle", "zero-shot"} <= rows.keys()
    assert rows["uniform"].label == "uniform mixture"
    memory = rows["memory"]
    assert None not in [cell for row in memory.accuracy for cell in row]
    assert memory.accuracy[0] == rows["zero-shot"].accuracy[0]
    for metric in ("transfer.xtail", "average.xtail", "last.xtail", "coefficient_drift"):
        assert metric in memory.metrics
    assert memory.metrics["transfer.xtail"] == memory.accuracy[1][1]
    # The head is one and the same after every task.
    store = mira.workspace.store
    heads = {
        view.blob(HEAD)
        for view in map(store.view, (v.id for v in store.log()))
        if HEAD in view.blobs()
    }
    assert len(heads) == 1


def test_what_is_loaded_says_what_the_memory_says(learned, chain: Path) -> None:
    mira, _ = learned
    picture = chain.parent / "images of warm" / "test" / "red" / "0.png"
    said = mira.retrieve(image=picture).prediction
    assert said is not None
    model = memtool.load(mira.workspace.store_path).attach()
    image = load_image(picture, mira.config.backbone.image_size)[None]
    with torch.no_grad():
        found = model(torch.from_numpy(image.copy()))
    assert float(found.probabilities.max()) == pytest.approx(said.probability, abs=1e-5)
    torch.testing.assert_close(found.probabilities, found.logits.softmax(dim=1))
    explained = mira.explain(image=picture)
    assert explained.outcome.probability == pytest.approx(said.probability, abs=1e-5)
    # A task that is told: its adapter alone, its classes by the same prototypes.
    told = memtool.load(mira.workspace.store_path).attach(task="1")
    with torch.no_grad():
        alone = told(torch.from_numpy(image.copy()))
    values = mira.snapshot().own_values(1, torch.device("cpu"))
    recall = same_for_all(values, torch.ones(1), "delta")
    pixels = mira.workspace.backbone.preprocess(torch.from_numpy(image.copy()))
    with torch.no_grad():
        logits = fixed_head(mira.workspace)(mira.workspace.backbone.features(pixels, recall))
    own = list(mira.workspace.stream.tasks[0].classes)
    expected = logits[:, own].softmax(dim=1)
    torch.testing.assert_close(alone.probabilities[:, own], expected, atol=1e-5, rtol=1e-4)


def test_images_unlike_all_that_was_learned_are_left_to_the_frozen_model(learned) -> None:
    mira, _ = learned
    left = reopened(mira, memory__frozen="novelty", store=str(mira.config.runs.parent / "left"))
    left.write([mira.workspace.adapter_folder / "task-1-seed-0"])
    left.consolidate()
    work, snapshot = left.workspace, left.snapshot()
    _, model, head = snapshot.consolidated()
    images = np.concatenate([task.test.images for task in work.stream.tasks])
    scores, coefficients = Measure(work).recall(model, head, images)
    seen = F.layer_norm(work.features(images), (work.backbone.dim,))
    moments = [one.moments for one in snapshot.query_statistics().values()]
    far = novelty(seen[None], moments) > LIMIT
    assert far[15:].all()  # of the task that was not learned
    assert not far[:15].all()
    assert not coefficients[far].any()
    torch.testing.assert_close(coefficients[~far], torch.ones_like(coefficients[~far]))
    torch.testing.assert_close(scores[far], frozen_scores(work, images)[far], atol=1e-3, rtol=1e-4)
    # The columns of what was not learned are there, and are those of zero-shot.
    (row,) = left.evaluate().metrics.rows
    expected = (
        frozen_scores(work, images)[15:].argmax(1).numpy() == work.stream.tasks[1].test.labels
    )
    assert row.matrix([task.name for task in work.stream.tasks]).values[1, 1] == expected.mean()
    # Such an image chose no task, not the first one.
    assert row.metrics["task_accuracy"] == pytest.approx(1 - far[:15].float().mean().item())


def test_forgetting_the_last_task_leaves_the_memory_of_before(learned, tmp_path: Path) -> None:
    mira, record = learned
    store = str(tmp_path / "memory")
    merge(store, str(mira.workspace.store_path))
    copy = reopened(mira, store=store)
    copy.consolidate()
    forget(copy.workspace.store, ["task-2-seed-0"])
    (left,) = copy.evaluate().metrics.rows
    columns = [task.name for task in mira.workspace.stream.tasks]
    after_one = record.metrics.rows[0].matrix(columns).values[1]
    assert left.matrix(columns).values[1].tolist() == pytest.approx(after_one.tolist())
    # Adapters that learned under another kind of head do not come in.
    solved = reopened(mira, head__kind="lda", store=str(tmp_path / "solved"), runs=str(tmp_path))
    solved.write([mira.workspace.adapter_folder / "task-1-seed-0"])
    solved.consolidate()
    with pytest.raises(MismatchError, match=r"head"):
        merge(store, str(tmp_path / "solved"))


def test_a_head_of_cosines_has_their_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(4, 5, generator=generator), dim=1)
    features = 3 * torch.randn(7, 5, generator=generator)
    head = RecalledHead.of_cosines(CosineHead(prototypes, 30.0))
    expected = torch.stack([30 * prototypes @ (f / f.norm()) for f in features])
    torch.testing.assert_close(head(features, torch.zeros(7, 2)), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head__kind": "text"}, "head.kind text under method mira(.|\n)*prototype"),
        ({"stream__setting": "dg"}, "head.kind prototype(.|\n)*dg"),
        ({"head__features": "own+first"}, r"head.features own\+first(.|\n)*head.features=own"),
        ({"memory__frozen": "novelty", "head__kind": "lda"}, "memory.frozen novelty with head"),
        (
            {"memory__frozen": "novelty", "memory__scope": "block", "memory__look_at": 2},
            "memory.frozen(.|\n)*scope=model",
        ),
        ({"memory__frozen": "novelty", "consolidate__epochs": 1}, "memory.frozen(.|\n)*epochs=0"),
        (
            {"memory__frozen": "novelty", "memory__test_time": "entropy"},
            "memory.frozen(.|\n)*test_time=none",
        ),
    ],
)
def test_what_it_cannot_is_refused(
    chain: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        open_method(config(chain, tmp_path, **changes), seed=0)


def test_adapters_that_learned_under_one_kind_of_head_have_no_other(learned) -> None:
    mira, _ = learned
    other = reopened(mira, head__kind="lda")
    with pytest.raises(ConfigError, match=r"learned under head\.kind prototype") as refused:
        other.consolidate()
    assert "--set head.kind=prototype" in str(refused.value.remedy)


def test_adapters_of_a_task_that_is_told_answer_with_their_cosines(learned) -> None:
    mira, _ = learned
    work, snapshot = mira.workspace, mira.snapshot()
    task = work.stream.tasks[0]
    (record,) = snapshot.adapters_of(task.number)
    recall = every(snapshot.values_of([record]))
    head = snapshot.own_head(record.name)
    assert head is not None
    found = Measure(work)._logits(recall, head, task)
    features = work.backbone.features(
        work.backbone.preprocess(torch.from_numpy(np.array(task.test.images))), recall
    )
    expected = fixed_head(work)(features, task.classes)
    torch.testing.assert_close(found[:, list(task.classes)], expected[:, list(task.classes)])
