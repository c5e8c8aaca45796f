"""Right or wrong by sample: kept beside the share, written exactly, and compared in pairs."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memtool.errors import DataError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.metrics import compute
from memtool.evaluation.paired import RESAMPLES, bootstrap, mcnemar, paired
from memtool.evaluation.record import Metrics, Record, Row
from memtool.evaluation.right import Right, Share, right_of
from memtool.reports.table import paired_grid
from tests.reports.sample import of_flags, record

FLAGS = st.lists(st.booleans(), min_size=1, max_size=70)


@given(FLAGS)
def test_flags_come_back_from_text(flags: list[bool]) -> None:
    right = Right.of(flags)
    assert Right.model_validate_json(right.model_dump_json()).flags.tolist() == flags
    digits = "".join(f"{int(digit, 16):04b}" for digit in right.bits)
    assert digits == "".join("01"[flag] for flag in flags).ljust(len(digits), "0")
    assert 0 <= len(digits) - len(flags) < 8


@given(FLAGS)
def test_a_share_is_the_mean_bit_for_bit(flags: list[bool]) -> None:
    share = Share(flags)
    assert share == float(torch.tensor(flags).double().mean())
    assert json.dumps(share) == json.dumps(float(share))
    assert pickle.loads(pickle.dumps(share)).flags.tolist() == flags  # noqa: S301
    assert right_of(share) == Right.of(flags)
    assert right_of(float(share)) is None
    assert type(share + 0.0) is float


def test_a_share_of_none_is_no_number_and_no_bits() -> None:
    assert np.isnan(Share([]))
    assert right_of(Share([])) is None
    assert AccuracyMatrix.empty(["a"]).with_row(1, [Share([])]).last == ()


@pytest.mark.parametrize(
    ("samples", "bits"), [(8, "ff00"), (9, "ff"), (4, "f1"), (8, "xy"), (1, ""), (0, "")]
)
def test_bits_that_do_not_fit(samples: int, bits: str) -> None:
    with pytest.raises(ValidationError):
        Right(samples=samples, bits=bits)


def test_a_matrix_keeps_the_shares_of_its_rows() -> None:
    first, second, again = Share([True]), Share([True, False]), Share([False, True])
    matrix = AccuracyMatrix.empty(["a", "b"]).with_row(1, [first, second])
    assert matrix.last[1] is second
    matrix = matrix.with_row(2, [again, 0.5])
    assert (matrix.last[0], right_of(matrix.last[1])) == (again, None)
    assert matrix.with_row(2, [0.5, None]).shares.keys() == {(1, 0), (1, 1)}
    assert matrix.up_to(1).last == (first,)
    assert AccuracyMatrix(matrix.tasks, matrix.values) == matrix


def test_a_row_keeps_its_last_measured_line_alone() -> None:
    matrix = AccuracyMatrix.empty(["a", "b"]).with_row(1, [Share([True, True, False]), None])
    row = Row.measured("m", "m", "method", matrix)
    assert row.right == (Right.of([True, True, False]), None)
    assert Row.model_validate_json(row.model_dump_json()) == row
    assert [right_of(score) for score in row.last] == list(row.right)
    plain = Row.measured("m", "m", "method", AccuracyMatrix.empty(["a"]).with_row(1, [0.5]))
    assert (plain.right, plain.last) == ((), (0.5,))


@pytest.mark.parametrize(
    "right", [[{"samples": 3, "bits": "80"}, None], [{"samples": 3, "bits": "c0"}]]
)
def test_a_record_whose_bits_do_not_make_its_accuracy_is_refused(right: list[object]) -> None:
    document = json.loads(of_flags({"memory": [[1, 1, 0], [1, 0, 0]]}).to_json())
    document["metrics"]["rows"][0]["right"] = right
    with pytest.raises(DataError, match="does not make up its accuracy"):
        Record.from_json(json.dumps(document))
    document["metrics"]["rows"][0]["accuracy"] = []
    with pytest.raises(DataError):
        Record.from_json(json.dumps(document))


def _random(seed: int, share: float, like: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """Flags of 300 and 100 samples; of those `like` others nine of ten are the same."""
    draw = np.random.default_rng(seed)
    fresh = [draw.random(size) < share for size in (300, 100)]
    return [
        np.where(draw.random(len(old)) < 0.9, old, new)
        for old, new in zip(like or fresh, fresh, strict=True)
    ]


def test_the_difference_is_that_of_the_final_averages() -> None:
    one = _random(1, 0.8)
    other = _random(2, 0.6, like=one)
    whole = of_flags({"memory": one, "other": other})
    found = paired([whole], "memory", "other")
    assert found is not None
    faa = [compute(whole.matrix(id).values, ["faa"])["faa"] for id in ("memory", "other")]
    assert found.difference == pytest.approx(faa[0] - faa[1])
    assert found.low < found.difference < found.high
    assert found.samples == 400
    assert found.only_first == sum(int((a & ~b).sum()) for a, b in zip(one, other, strict=True))
    back = paired([whole], "other", "memory")
    assert back is not None
    assert (back.only_first, back.only_second) == (found.only_second, found.only_first)
    assert back.low == pytest.approx(-found.high, abs=0.002)


def test_the_interval_is_that_of_samples_drawn_one_by_one() -> None:
    """Oracle: indices drawn with replacement within each task; and the normal law for many."""
    one = _random(1, 0.8)
    other = _random(2, 0.6, like=one)
    differences = [a.astype(float) - b for a, b in zip(one, other, strict=True)]
    draw = np.random.default_rng(5)
    means = np.zeros(RESAMPLES)
    for d in differences:
        means += d[draw.integers(0, len(d), (RESAMPLES, len(d)))].mean(axis=1) / len(differences)
    low, high = bootstrap(differences)
    # Two quantiles of 10,000 draws differ by some hundredths of the width.
    width = high - low
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.06 * width)
    error = sum(d.var() / len(d) for d in differences) ** 0.5 / len(differences)
    assert width == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (low, high) == bootstrap(differences)


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        both = draw.random(400) < 0.6
        first = both | (draw.random(400) < 0.3)  # right on 0.4 · 0.3 of all alone
        second = both | (draw.random(400) < 0.2)
        low, high = bootstrap([first.astype(float) - second])
        held += low <= 0.4 * (0.3 - 0.2) <= high
    assert 180 <= held <= 199


def test_what_both_have_in_common_makes_the_interval_narrower() -> None:
    one = _random(1, 0.7)
    like, apart = _random(2, 0.7, like=one), _random(2, 0.7)
    widths = []
    for other in (like, apart):
        found = paired([of_flags({"memory": one, "other": other})], "memory", "other")
        assert found is not None
        widths.append(found.high - found.low)
    assert widths[0] < 0.6 * widths[1]
    same = paired([of_flags({"memory": one, "other": one})], "memory", "other")
    assert same is not None
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_seeds_with_the_same_tests_are_averaged_sample_by_sample() -> None:
    one, other = _random(1, 0.8), _random(2, 0.6)
    seeds = [of_flags({"memory": one, "other": other}, seed) for seed in range(3)]
    alone, three = paired(seeds[:1], "memory", "other"), paired(seeds, "memory", "other")
    assert alone is not None
    assert three is not None
    # The same answers three times are no more samples: the interval does not shrink.
    assert (three.low, three.high) == (alone.low, alone.high)
    assert (three.samples, three.only_first) == (400, 3 * alone.only_first)
    grid = paired_grid(seeds)
    assert grid is not None
    assert [row[0] for row in grid.rows] == ["other"]
    assert float(grid.rows[0][2]) <= float(grid.rows[0][1]) <= float(grid.rows[0][3])


def test_nothing_is_said_of_rows_or_records_that_cannot_be_paired() -> None:
    whole = of_flags({"memory": [[1, 0], [1]], "other": [[1, 1], [0]]})
    row = whole.row("other").model_copy(update={"right": (None, Right.of([0]))})
    partly = whole.model_copy(update={"metrics": Metrics(rows=(whole.row("memory"), row))})
    assert paired([partly], "memory", "other") is None
    assert paired([partly], "memory", "other", task=0) is None
    assert paired([partly], "memory", "other", task=1) is not None
    fewer = of_flags({"memory": [[1, 0], [1]], "other": [[1], [0]]})
    assert paired([fewer], "memory", "other") is None
    assert paired_grid([record()]) is None


def _slow_p(differences: Sequence[int]) -> float:
    """Every sign of every difference in turn, counted."""
    reached = [
        abs(sum(sign * abs(d) for sign, d in zip(signs, differences, strict=True)))
        >= abs(sum(differences))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(reached) / len(reached)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_p_is_that_of_all_signs_counted(differences: list[int]) -> None:
    assert mcnemar(np.array(differences)) == pytest.approx(_slow_p(differences), abs=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (9, 2), (40, 61), (3000, 2800)])
def test_one_seed_is_mcnemars_exact_test(b: int, c: int) -> None:
    """Oracle: twice the tail of a binomial, in whole numbers."""
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    expected = min(1.0, float(Fraction(2 * tail, 2**n)))
    found = mcnemar(np.array([1] * b + [-1] * c + [0] * 7))
    assert found == pytest.approx(expected, rel=1e-9)


def test_p_of_many_samples_and_seeds_is_that_of_the_normal_law() -> None:
    draw = np.random.default_rng(3)
    differences = draw.integers(-3, 4, size=20_000) + (draw.random(20_000) < 0.02)
    z = abs(differences.sum()) / np.sqrt((differences.astype(float) ** 2).sum())
    assert mcnemar(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=4e-3)


def test_p_is_rarely_small_where_nothing_differs() -> None:
    draw = np.random.default_rng(1)
    small = 0
    for _ in range(400):
        sides = draw.random((2, 200)) < 0.7
        small += mcnemar(sides[0].astype(int) - sides[1]) < 0.05
    assert small <= 32  # 20 expected at most; three deviations above


def test_seeds_with_other_tests_gain_nothing_by_their_number() -> None:
    one = _random(1, 0.8)
    other = _random(2, 0.6, like=one)
    whole = of_flags({"memory": one, "other": other})
    others = [whole]
    for seed in (1, 2):
        data = whole.run.data.model_copy(update={"fingerprint": str(seed)})
        run = whole.run.model_copy(update={"data": data, "seed": seed})
        others.append(whole.model_copy(update={"run": run}))
    alone, three = paired([whole], "memory", "other"), paired(others, "memory", "other")
    assert alone is not None
    assert three is not None
    assert (three.low, three.high) == pytest.approx((alone.low, alone.high))
    assert three.difference == pytest.approx(alone.difference)
    assert three.p == pytest.approx(min(1, 2 * alone.p))
    assert three.samples == alone.samples
