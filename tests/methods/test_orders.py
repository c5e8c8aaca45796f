"""What a seed changes beside initialisation, and runs at the order bounds."""

from __future__ import annotations

import numpy as np
import pytest

from memtool.errors import ConfigError
from memtool.evaluation.record import read_record
from memtool.experiments import run as experiment
from memtool.experiments.orders import at_bounds, of_seed
from memtool.experiments.plan import plan
from memtool.reports.chosen import bounds_grid
from memtool.reports.table import methods_grid
from memtool.streams import create_stream
from tests.methods.conftest import small_config


def images(part):
    return {image.tobytes() for image in part.images}


def test_a_seed_changes_what_it_is_told_to(tmp_path):
    start = small_config(tmp_path, stream__setting="cil", stream__order=None)
    assert of_seed(start, 3) == start.model_copy(update={"seed": (3,)})
    order, again, other = (
        of_seed(start.model_copy(update={"vary": "order"}), seed) for seed in (3, 3, 4)
    )
    assert order == again
    assert sorted(order.stream.order) == sorted(other.stream.order) == list("0123456789")
    assert order.stream.order != other.stream.order
    assert (order.vary, order.stream.seed) == ("start", 0)
    both = of_seed(start.model_copy(update={"vary": "all"}), 3)
    assert both.stream.order == order.stream.order
    assert (both.stream.seed, both.stream.test_seed) == (3, 0)
    # What a run was is written out: it does not change once more.
    assert of_seed(both, 3) == both


def test_the_test_images_stay_whatever_is_learned_from(tmp_path):
    whole = small_config(tmp_path, vary="all", stream__validation=0.2)
    one, other = (create_stream(of_seed(whole, seed).stream, 32) for seed in (1, 2))
    assert one.fingerprint != other.fingerprint
    tests = [{t.name: images(t.test) for t in stream.tasks} for stream in (one, other)]
    assert tests[0] == tests[1]
    trains = [{t.name: images(t.train) for t in stream.tasks} for stream in (one, other)]
    assert trains[0].keys() == trains[1].keys()
    assert all(trains[0][name] != trains[1][name] for name in trains[0])
    for stream in (one, other):
        for task in stream.tasks:
            assert not images(task.test) & (images(task.train) | images(task.validation))
            assert not images(task.train) & images(task.validation)


def test_what_has_no_order(tmp_path):
    dg = small_config(tmp_path, stream__setting="dg", stream__order=None, vary="order")
    with pytest.raises(ConfigError, match="--vary order under") as error:
        of_seed(dg, 1)
    assert "--vary all" in str(error.value.remedy)
    assert of_seed(dg.model_copy(update={"vary": "all"}), 1).stream.seed == 1
    with pytest.raises(ConfigError, match="--orders bounds under"):
        at_bounds(dg)
    with pytest.raises(ConfigError, match="--orders bounds under"):
        plan(dg.model_copy(update={"orders": "bounds"}), seed=0, verb="run")
    with pytest.raises(ConfigError, match="stream of texts"):
        at_bounds(small_config(tmp_path, stream__setting="trace", stream__source="x.yaml"))


def test_groups_of_classes_have_bounds(tmp_path):
    config = small_config(
        tmp_path, stream__setting="cil", stream__order=("0", "1", "2", "3", "4", "5")
    )
    (hardest, first), (median, _), (easiest, last) = at_bounds(config)
    assert hardest.similarity < median.similarity < easiest.similarity
    assert first.stream.order != last.stream.order
    assert sorted(first.stream.order) == sorted(last.stream.order) == list("012345")
    assert at_bounds(config)[0] == (hardest, first)


def test_a_run_at_the_bounds_has_three_records_that_run_again(tmp_path, no_page):
    config = small_config(
        tmp_path, orders="bounds", stream__train_per_task=40, stream__test_per_task=30
    )
    records = experiment.run(config, baselines=False)
    assert [record.run.bound.name for record in records] == ["hardest", "median", "easiest"]
    similar = [record.run.bound.similarity for record in records]
    assert similar == sorted(similar, reverse=True)  # of neighbours: unlike ones are easier
    for record in records:
        file = tmp_path / "runs" / record.run.bound.name / "seed-0" / "record.json"
        assert read_record(file) == record
        assert record.run.configuration["stream"]["order"] == list(record.run.task_names)
    grid = bounds_grid(records)
    assert [name.split()[0] for name in grid.header[1:4]] == ["hardest", "median", "easiest"]
    own = [record.row("memory").metrics["faa"] for record in records]
    assert float(grid.rows[0][-1]) == pytest.approx(100 * (max(own) - min(own)), abs=0.051)
    assert "3 seeds" not in methods_grid(records).title
    assert np.isfinite(similar).all()
