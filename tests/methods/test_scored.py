"""A history is measured where something changed, and nowhere else: images through the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from memtool.engine import Engine
from memtool.methods.mira.method import Mira
from tests.methods.conftest import learn, small_config

TEST = 40
"""Test images of a task."""


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many images went through the model since it was asked last."""
    counts = [0]
    predict = Engine.predict

    def counted(self, function, images, *more, **others):  # type: ignore[no-untyped-def]
        counts[0] += len(images)
        return predict(self, function, images, *more, **others)

    monkeypatch.setattr(Engine, "predict", counted)

    def since() -> int:
        found, counts[0] = counts[0], 0
        return found

    return since


def _same(one, other) -> bool:  # type: ignore[no-untyped-def]
    """Whether two records say the same of the memory, but for how long it took."""
    rows = [record.row("memory").model_dump(exclude={"ms_per_input"}) for record in (one, other)]
    return np.testing.assert_equal(*rows) is None


def test_earlier_versions_are_measured_once(learned_copy: Mira, passed: Callable[[], int]) -> None:
    tasks = 3
    first = learned_copy.evaluate(history=True)
    assert passed() == tasks * tasks * TEST
    again = learned_copy.evaluate(history=True)
    assert passed() == tasks * TEST  # the newest version
    assert _same(first, again)
    elsewhere = learned_copy.config.model_copy(update={"baselines": ("none",), "lock_timeout": 7})
    Mira.open(elsewhere, seed=0).evaluate(history=True)
    assert passed() == tasks * TEST
    other = learned_copy.config.model_copy(
        update={"engine": learned_copy.config.engine.model_copy(update={"eval_batch_size": 7})}
    )
    Mira.open(other, seed=0).evaluate(history=True)
    assert passed() == tasks * tasks * TEST  # other settings decide what is computed


def test_a_version_that_was_the_newest_is_an_earlier_one_later(
    adapted, passed: Callable[[], int]
) -> None:
    """With every task one version and one column are new; the oracle measures each version."""
    mira = learn(Mira.open(small_config(adapted), seed=0), 2)
    mira.evaluate(history=True)
    learn(mira, 3)
    passed()
    matrix = mira.evaluate(history=True).matrix("memory").values
    assert passed() == (3 + 2) * TEST  # of the newest all tasks, of two others the third
    for version, count in zip(mira.after_each(mira.workspace.stream.tasks), (1, 2, 3), strict=True):
        alone = [mira.measure(version, [number])["faa"] for number in (1, 2, 3)]
        assert np.array_equal(matrix[count], alone)


def test_an_adapter_that_stays_is_measured_once_where_tasks_are_given(
    learned: Mira, passed: Callable[[], int]
) -> None:
    matrix = learned.evaluate(setting="til", history=True).matrix("memory").values
    assert passed() == 3 * TEST
    for count in (1, 2, 3):
        assert np.array_equal(matrix[count, :count], matrix[3, :count])
        assert np.isnan(matrix[count, count:]).all()
