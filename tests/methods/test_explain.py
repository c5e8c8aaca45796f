"""Explaining: what is said of a mixture is what taking parts out of it does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memtool.adapters.recalls import same_for_all
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError, NotFoundError
from memtool.memories.closed_form import QueryStatistics
from memtool.methods.explanation import as_shown
from memtool.methods.mira.explain import distances, explain
from memtool.methods.mira.method import Mira
from memtool.reports.shown import coefficient_grid
from memtool.settings import Config
from tests.methods.conftest import small_config


def affine_config(folder: Path, scope: str) -> Config:
    return small_config(
        folder,
        store=str(folder / f"memory-{scope}"),
        memory__scope=scope,
        memory__separation="affine",
    )


@pytest.fixture(scope="module")
def affine_folder(_learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapters under affine separation: a memory in every block, and one for all."""
    folder = tmp_path_factory.mktemp("affine")
    shutil.copytree(_learned / "runs", folder / "runs")
    for scope in ("block", "model"):
        mira = Mira.open(affine_config(folder, scope), seed=0)
        mira.write()
        mira.consolidate()
    return folder


@pytest.fixture
def signed(affine_folder: Path) -> Mira:
    """A memory in every block, with negative coefficients."""
    return Mira.open(affine_config(affine_folder, "block"), seed=0)


@pytest.fixture
def signed_model(affine_folder: Path) -> Mira:
    """One memory for all blocks, with negative coefficients."""
    return Mira.open(affine_config(affine_folder, "model"), seed=0)


@pytest.fixture
def photo(learned: Mira, tmp_path: Path) -> Path:
    """A test image of task 2."""
    path = tmp_path / "photo.png"
    Image.fromarray(learned.workspace.task("2").test.images[3]).save(path)
    return path


def test_an_image_gets_the_prediction_and_the_coefficients_of_retrieve(signed, photo):
    found, recalled = explain(signed, image=photo), signed.retrieve(image=photo)
    assert recalled.prediction is not None
    assert found.outcome.label == recalled.prediction.label
    assert found.outcome.probability == pytest.approx(recalled.prediction.probability, abs=1e-5)
    assert found.outcome.changed == 0
    np.testing.assert_allclose(found.blocks, recalled.blocks, atol=1e-5)
    assert found.block_numbers == recalled.block_numbers == (0, 1, 2, 3)
    assert [part.name for part in found.adapters] == [one.name for one in recalled.adapters]
    assert type(found).model_validate_json(found.model_dump_json(by_alias=True)) == found


def test_a_contribution_is_what_goes_when_the_adapter_is_not_there(signed_model, photo):
    """Against a mixture of the other adapters only, for one memory that serves all blocks."""
    found = explain(signed_model, image=photo)
    _, model, head = signed_model.snapshot().consolidated()
    work = signed_model.workspace
    images = torch.from_numpy(np.array(Image.open(photo)))[None]
    pixels = work.backbone.preprocess(images)
    whole = torch.tensor(found.blocks[0])
    winner = work.stream.class_names.index(found.outcome.label)
    for place, part in enumerate(found.adapters):
        kept = [other for other in range(3) if other != place]
        others = AdapterValues.from_flat(
            model.values.flat()[kept], work.layout, model.values.scaling[kept]
        )
        features = work.backbone.features(pixels, same_for_all(others, whole[kept], model.mix))
        left = whole * (torch.arange(3) != place)
        probabilities = head.probabilities(head(features, left[None]))[0]
        assert part.without.probability == pytest.approx(float(probabilities[winner]), abs=1e-5)
        assert part.contribution == pytest.approx(
            found.outcome.probability - part.without.probability
        )
        assert part.without.label == work.stream.class_names[int(probabilities.argmax())]


def test_negative_coefficients_are_marked_and_left_out(signed, learned):
    found = explain(signed, task="2")
    assert found.samples == 40
    assert found.without_negative is not None
    assert found.without_negative.accuracy is not None
    assert 0 < found.negative < 1
    # All adapters have as many coefficients, so the shares average.
    assert np.mean([part.negative for part in found.adapters]) == pytest.approx(found.negative)
    assert found.outcome.accuracy == pytest.approx(signed.retrieve(task="2").accuracy)
    grid = coefficient_grid(as_shown(found))
    below = {(i, j) for i, row in enumerate(grid.rows) for j in range(1, 4) if row[j][0] == "-"}
    assert set(grid.bold) == below
    softmax = explain(learned, task="2")
    assert softmax.without_negative is None
    assert softmax.negative == 0
    assert ("negative coefficients", "none") in as_shown(softmax).facts


def test_the_adapter_of_the_task_carries_it_and_its_queries_are_the_nearest(signed):
    found = explain(signed, task="inverted")
    best = max(found.adapters, key=lambda part: part.contribution)
    assert best.task == 2
    assert best.task_name == "inverted"
    assert best.without.accuracy < found.outcome.accuracy
    assert found.familiar[0].task == 2
    assert 0.8 < found.familiar[0].ratio < 2
    assert found.familiar[1].ratio > 2


def test_what_was_never_seen_is_far_from_all_tasks(learned, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    found = explain(learned, image=tmp_path / "noise.png")
    assert found.familiar[0].ratio > 3


def test_adapters_that_take_no_part_contribute_nothing(learned_copy, tmp_path, photo):
    mira = Mira.open(small_config(tmp_path / "copy", memory__separation="max"), seed=0)
    mira.consolidate()
    found = explain(mira, image=photo)
    assert sorted(found.blocks[0]) == [0, 0, 1]
    silent = [part for part in found.adapters if part.coefficient == 0]
    assert all(part.contribution == 0 and part.without == found.outcome for part in silent)
    (sole,) = [part for part in found.adapters if part.coefficient == 1]
    # The heads of tasks go with their adapters: nothing is left that knows a class.
    assert sole.without.label is None
    assert sole.contribution == found.outcome.probability
    assert as_shown(found).parts.rows[0][-1] == "no class"


def test_distances_against_every_query_one_by_one():
    generator = np.random.default_rng(1)
    training = [generator.normal(size=(2, n, 3)) + 2 * t for t, n in enumerate((9, 14))]
    statistics = {}
    for task, queries in enumerate(training):
        statistics[task] = QueryStatistics(2, 3)
        statistics[task].add(0, torch.from_numpy(queries))
    asked = generator.normal(size=(5, 2, 3))
    found = distances(torch.from_numpy(asked), statistics)
    assert found is not None
    squared, typical = np.zeros((5, 2, 2)), np.zeros((2, 2))
    for memory in range(2):
        centred = [queries[memory] - queries[memory].mean(axis=0) for queries in training]
        within = sum(part.T @ part for part in centred) / 23
        within = 0.99 * within + 0.01 * np.trace(within) / 3 * np.eye(3)
        for task, queries in enumerate(training):
            for i in range(5):
                away = asked[i, memory] - queries[memory].mean(axis=0)
                squared[i, memory, task] = away @ np.linalg.solve(within, away)
            typical[memory, task] = np.mean(
                [one @ np.linalg.solve(within, one) for one in centred[task]]
            )
    np.testing.assert_allclose(found[0].numpy(), squared.mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), typical.mean(axis=0), rtol=1e-12)


def test_no_distances_from_no_queries_or_equal_ones():
    assert distances(torch.zeros(1, 2, 3), {}) is None
    same = QueryStatistics(2, 3)
    same.add(0, torch.zeros(2, 4, 3))
    assert distances(torch.zeros(1, 2, 3), {1: same}) is None


def test_what_cannot_be_explained(learned, photo, tmp_path):
    with pytest.raises(ConfigError, match="--task and --image"):
        explain(learned)
    with pytest.raises(ConfigError, match="--task and --image"):
        explain(learned, task="1", image=photo)
    with pytest.raises(ConfigError, match=r"\.svg, \.png, \.html"):
        explain(learned, image=photo, out=tmp_path / "x.pdf")
    with pytest.raises(NotFoundError):
        explain(learned, image=tmp_path / "nowhere.png")
    written = learned.workspace.store.log()[-2].id
    with pytest.raises(ConfigError, match="memtool consolidate"):
        explain(learned, task="1", version=written)


def test_a_plot_has_the_same_bytes_every_time(signed, photo, tmp_path):
    for suffix in ("svg", "png", "html"):
        files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
        for file in files:
            assert explain(signed, image=photo, out=file).out == file
        first, second = (file.read_bytes() for file in files)
        assert first == second
        assert first
