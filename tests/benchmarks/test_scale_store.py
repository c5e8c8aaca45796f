"""The benchmark of a growing store runs from end to end and says what was held to what limit."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import scale_store


@pytest.fixture(scope="module")
def cases() -> list[dict[str, object]]:
    """Two tiny sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_store, "APPENDS", 1)
        return scale_store.store_cases(1, sizes=(70, 3))


def test_every_size_has_its_figures_and_limits(cases: list[dict[str, object]]) -> None:
    each = {f"{what}, T = {n}" for what in ("bytes of a commit", "open") for n in (3, 70)}
    linear = {f"{what} by thousand adapters, T = 70" for what in scale_store.DOING}
    memory = {f"memory of {what}, T = 70" for what in scale_store.DOING}
    found = {case["name"]: case for case in cases}
    over_few = {f"{what} at T = 70, over few" for what in ("append", "page")}
    assert set(found) == each | linear | memory | over_few
    for case in found.values():
        value, limit = case["value"], str(case["limit"])
        assert isinstance(value, float)
        assert math.isfinite(value)
        assert case["passed"] == (value <= float(limit.removeprefix("<= ")))
    json.dumps(cases)


def test_a_commit_writes_more_than_its_adapter_and_less_than_a_block(
    cases: list[dict[str, object]],
) -> None:
    sizes = [case["value"] for case in cases if str(case["name"]).startswith("bytes")]
    assert all(isinstance(size, float) and 0.5 < size < 100 for size in sizes)
