"""The metrics: the worked example, slow oracles, laws, and what is not defined."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memtool.errors import ConfigError, MismatchError
from memtool.evaluation import metrics
from memtool.evaluation.metrics import METRICS, UndefinedMetricError, compute, undefined

Matrix = npt.NDArray[np.float64]


@st.composite
def matrices(draw: st.DrawFn, least: int = 1) -> Matrix:
    tasks = draw(st.integers(least, 6))
    return draw(arrays(np.float64, (tasks + 1, tasks), elements=st.floats(0, 1)))


def worked_example() -> Matrix:
    a = np.full((5, 4), np.nan)
    for i, row in enumerate([[90], [94, 85], [84, 75, 88], [78, 79, 91, 86]], start=1):
        a[i, :i] = row
    return a / 100


def oracle(id: str, a: Matrix) -> float:
    """The formula of the table as loops, i and j from 1 as on the page."""
    last = a.shape[1]

    def at(i: int, j: int) -> float:
        return float(a[i, j - 1])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    tasks = range(1, last + 1)
    earlier = range(1, last)
    match id:
        case "faa" | "last.xtail" | "op.trace":
            return mean([at(last, j) for j in tasks])
        case "average_incremental":
            return mean([mean([at(i, j) for j in range(1, i + 1)]) for i in tasks])
        case "forgetting.max":
            return mean([max(at(i, j) for i in range(j, last + 1)) - at(last, j) for j in earlier])
        case "forgetting.first":
            return mean([at(j, j) - at(last, j) for j in earlier])
        case "forgetting.step":
            return mean(
                [mean([at(i - 1, j) - at(i, j) for j in range(1, i)]) for i in range(2, last + 1)]
            )
        case "bwt.gem":
            return mean([at(last, j) - at(j, j) for j in earlier])
        case "bwt.trace":
            return mean([min(at(last, j) - at(j, j), 0) for j in tasks])
        case "fwt":
            return mean([at(j - 1, j) - at(0, j) for j in range(2, last + 1)])
        case "transfer.xtail":
            return mean([mean([at(i, j) for i in range(1, j)]) for j in range(2, last + 1)])
        case "average.xtail":
            return mean([at(i, j) for i in tasks for j in tasks])
    raise AssertionError(id)


def test_worked_example() -> None:
    values = compute(worked_example())
    shown = {id: round(100 * value, 2) for id, value in values.items()}
    assert shown == {
        "faa": 83.50,
        "average_incremental": 86.33,
        "forgetting.max": 7.33,
        "forgetting.first": 5.00,
        "forgetting.step": 1.89,
        "bwt.gem": -5.00,
        "bwt.trace": -4.50,
        "last.xtail": 83.50,
        "op.trace": 83.50,
    }


def test_worked_example_has_no_upper_triangle_for_the_others() -> None:
    reasons = undefined(worked_example())
    assert set(reasons) == {"fwt", "transfer.xtail", "average.xtail"}
    assert "before any training" in reasons["fwt"]


@given(matrices(least=2))
def test_every_metric_equals_its_formula(a: Matrix) -> None:
    values = compute(a)
    assert set(values) == {id for id, metric in METRICS.items() if metric.of_matrix}
    for id, value in values.items():
        assert value == pytest.approx(oracle(id, a), abs=1e-14)


@given(matrices())
def test_averages_stay_within_the_scores(a: Matrix) -> None:
    values = compute(a)
    for id, scores in (
        ("faa", a[-1]),
        ("average.xtail", a[1:]),
        ("average_incremental", a[1:][np.tril_indices(a.shape[1])]),
    ):
        assert scores.min() - 1e-15 <= values[id] <= scores.max() + 1e-15


@given(st.integers(2, 6), st.data())
def test_constant_columns_are_not_forgotten(tasks: int, data: st.DataObject) -> None:
    column = data.draw(arrays(np.float64, tasks, elements=st.floats(0, 1)))
    values = compute(np.tile(column, (tasks + 1, 1)))
    for id in ("forgetting.max", "forgetting.first", "forgetting.step", "bwt.gem", "bwt.trace"):
        assert values[id] == 0
    assert values["fwt"] == 0


@given(matrices(least=2))
def test_laws_between_metrics(a: Matrix) -> None:
    values = compute(a)
    assert values["forgetting.max"] >= max(values["forgetting.first"], 0) - 1e-15
    assert values["bwt.gem"] == -values["forgetting.first"]
    assert values["bwt.trace"] <= 0
    # Row 0 and the upper triangle have no part in what is forgotten.
    lower = a.copy()
    lower[:-1][np.triu_indices(a.shape[1])] = np.nan
    lower[0] = np.nan
    for id in ("faa", "average_incremental", "forgetting.max", "forgetting.step", "bwt.trace"):
        assert compute(lower)[id] == values[id]


def test_true_zeros_count_in_transfer() -> None:
    a = np.zeros((3, 2))
    a[2] = 1.0
    assert compute(a, ["transfer.xtail", "last.xtail"]) == {"transfer.xtail": 0, "last.xtail": 1}


def test_one_task_defines_no_forgetting() -> None:
    a = np.array([[0.1], [0.9]])
    assert compute(a)["faa"] == 0.9
    for id in ("forgetting.max", "forgetting.step", "bwt.gem", "bwt.trace", "fwt"):
        assert id not in compute(a)
        assert undefined(a)[id] == "needs at least 2 tasks, there is 1"
        with pytest.raises(UndefinedMetricError):
            METRICS[id].function(a)


def test_the_last_row_alone_defines_the_final_average_only() -> None:
    a = np.full((4, 3), np.nan)
    a[3] = [0.2, 0.4, 0.9]
    assert set(compute(a)) == {"faa", "last.xtail", "op.trace"}
    assert set(compute(a)) | set(undefined(a)) == {i for i, m in METRICS.items() if m.of_matrix}


def test_seen_accuracy_is_nan_where_a_seen_task_was_not_measured() -> None:
    a = worked_example()
    a[2, 0] = np.nan
    seen = metrics.seen_accuracy(a)
    assert math.isnan(seen[1])
    assert seen[3] == pytest.approx(0.835)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"forgetting\.maks.*\n.*did you mean 'forgetting\.max'"):
        compute(worked_example(), ["forgetting.maks"])


def test_metric_of_other_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="recall_drop"):
        compute(worked_example(), ["recall_drop"])


@pytest.mark.parametrize("shape", [(3, 3), (2,), (1, 0)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="shape"):
        compute(np.zeros(shape))


def test_recall_metrics() -> None:
    assert metrics.recall_drop(0.9, 0.7) == pytest.approx(0.2)
    assert metrics.task_accuracy([0, 1, 1, 2], [0, 1, 2, 2]) == 0.75
    exact = np.array([[3.0, 4.0], [1.0, 0.0]])
    recalled = np.array([[3.0, 5.0], [1.0, 0.0]])
    error = metrics.recall_error(recalled, exact)
    np.testing.assert_allclose(error, [0.2, 0.0])


def test_recall_metrics_refuse_what_has_no_answer() -> None:
    with pytest.raises(UndefinedMetricError, match="sample"):
        metrics.task_accuracy([], [])
    with pytest.raises(MismatchError):
        metrics.task_accuracy([1, 2], [1])
    with pytest.raises(UndefinedMetricError, match="adapter 1"):
        metrics.recall_error(np.ones((2, 3)), [[1, 1, 1], [0, 0, 0]])
    with pytest.raises(MismatchError):
        metrics.recall_error(np.ones(3), np.ones(3))


def test_dg_selects_by_validation_never_by_target() -> None:
    validation = [[0.7, 0.9, 0.8], [0.6, 0.6, 0.5]]
    target = [[0.99, 0.5, 0.98], [0.4, 0.99, 0.99]]
    assert metrics.dg_heldout(validation, target) == pytest.approx(0.45)
    with pytest.raises(MismatchError):
        metrics.dg_heldout(validation, target[:1])
    with pytest.raises(UndefinedMetricError):
        metrics.dg_heldout([[np.nan, 0.5]], [[0.5, 0.5]])


def test_table_keys_are_the_ids() -> None:
    assert all(id == metric.id and metric.description for id, metric in METRICS.items())
