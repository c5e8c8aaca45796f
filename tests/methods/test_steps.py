"""Budgets in steps: a small source learns for as many steps as a large one."""

from __future__ import annotations

import math

import pytest

from memtool.experiments.baselines import _with_the_whole_budget
from memtool.experiments.plan import plan
from memtool.methods.mira.method import Mira
from memtool.settings import TrainSettings
from memtool.streams.task import Task
from tests.methods.conftest import small_config


@pytest.mark.parametrize("steps", [0, 1, 7, 100])
@pytest.mark.parametrize("tasks", [1, 3])
def test_epochs_are_the_fewest_that_reach_the_steps(steps, tasks):
    train = TrainSettings(epochs=2, batch_size=50, steps=steps)
    for samples in (1, 20, 50, 51, 1000):
        for told in (None, 4):
            wanted = told or 2
            while wanted * math.ceil(samples / 50) < tasks * steps:
                wanted += 1
            assert train.epochs_for(samples, tasks, told) == wanted
        exact = TrainSettings(iterations=5, batch_size=50, steps=steps)
        assert exact.epochs_for(samples) == TrainSettings(iterations=5).epochs_for(samples)


def test_steps_are_taken_planned_and_given_to_baselines(tmp_path):
    dg = {"stream__setting": "dg", "stream__order": ("rot0", "rot30", "rot60")}
    dg |= {"stream__held_out": "rot60", "train__batch_size": 16}
    few = {"stream__train_per_task": 20, "stream__test_per_task": 10, "train__epochs": 2}
    keys = {"consolidate__epochs": 3, "consolidate__keys": "random"}
    config = small_config(tmp_path, **dg, **few, **keys, train__steps=9)
    mira = Mira.open(config, seed=0)
    (result,) = mira.adapt("1")
    assert len(result.losses) == 5  # epochs of two steps
    assert plan(config, seed=0, verb="run")["steps"] == [10, 10, 0]
    pooled = Task.pooled(mira.workspace.stream.tasks)
    work = _with_the_whole_budget(mira)
    of_memory = 2 * 9 + 3 * math.ceil(len(pooled.train) / 16)
    taken = work.epochs(pooled) * math.ceil(len(pooled.train) / 16)
    assert of_memory <= taken < of_memory + 2 * math.ceil(len(pooled.train) / 16)
    unset = Mira.open(small_config(tmp_path, **dg, **few, **keys), seed=0)
    assert _with_the_whole_budget(unset).epochs(pooled) == 2 + 3
