"""The benchmark of consolidations and answers runs at tiny sizes."""

from __future__ import annotations

from benchmarks import scale_consolidate


def test_it_measures_a_commit_and_answers_at_every_size() -> None:
    found = scale_consolidate.run(1, sizes=(10, 100))
    assert found["passed"] or all(
        "images" in one["name"] for one in found["cases"] if not one["passed"]
    )
    kinds = [one["name"].partition(",")[0] for one in found["cases"]]
    assert kinds.count("bytes beside keys") == 2
    assert sum("images among 100" in one["name"] for one in found["cases"]) == 2
