"""The report: self-contained, deterministic, complete, and honest about what was not given."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from memtool.errors import MismatchError
from memtool.evaluation.summary import summarise_rows
from memtool.reports.drawing import INK, RULE
from memtool.reports.figures import (
    accuracy_map,
    coefficient_map,
    key_map,
    sample_map,
    task_curves,
)
from memtool.reports.html import Cost, count, duration, flatten, render, size, write_report
from memtool.reports.shown import CoefficientMap, KeyMap, SampleCoefficientMap
from tests.reports.sample import TASKS, held_out_record, record, without_negative

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting, collects ids, references to other places, and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def full_report() -> str:
    noise = np.random.default_rng(0)
    blocks = np.eye(5) + noise.normal(0, 0.1, (4, 5, 5))
    return render(
        [without_negative(record(seed)) for seed in range(3)],
        coefficients=CoefficientMap(blocks, TASKS, TASKS, (0, 1, 2, 3)),
        samples=SampleCoefficientMap(
            np.repeat(np.eye(5), 40, axis=0), tuple(np.repeat(TASKS, 40)), TASKS
        ),
        keys=KeyMap.of_keys(noise.normal(size=(4, 5, 16)), TASKS),
        costs=[Cost("adapt", 41.25, 294_912, 1_200_000), Cost("retrieve, one image", 0.0241)],
    )


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = full_report()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    rest = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", text)
    assert "http" not in rest
    assert "@import" not in text
    assert "<script" not in text
    assert page.headings == [
        "Methods",
        "Accuracy after each task",
        "Metrics",
        "Which adapters are recalled",
        "Negative coefficients",
        "Drift",
        "Keys",
        "Cost",
        "How it was made",
        "Configuration",
    ]


def test_same_input_same_bytes() -> None:
    first = full_report()
    # A user's own plotting defaults do not reach the report.
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert full_report() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_what_the_page_says() -> None:
    text = full_report()
    assert "a final average accuracy of 91.2 % (3 seeds, 95 % t-interval 88.4 to 94.0 %)" in text
    assert "the best baseline, negative at zero, 89.2 %" in text
    assert "for 200 samples (columns)" in text
    assert "a line that falls is a task that is forgotten" in text
    assert "memtool run --preset mira-dil --seed 0 1 2" in text
    assert "5f" * 32 in text
    assert "V1CSJ2R4M7K8Y3Q5B0DG" in text
    assert "memory.separation" in text
    assert "294\u2009912" in text
    assert INK not in text
    assert RULE not in text


def test_parts_not_given_are_left_out(tmp_path: Path) -> None:
    path = write_report(record(), tmp_path / "reports" / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.headings == [
        "Methods",
        "Accuracy after each task",
        "Metrics",
        "How it was made",
        "Configuration",
    ]
    assert "interval" not in path.read_text(encoding="utf-8")


def test_one_task_without_optional_fields() -> None:
    whole = record(tasks=("only",))
    run = whole.run.model_copy(
        update={"command": None, "mix": None, "separation": None, "configuration": {}}
    )
    text = render([whole.model_copy(update={"run": run})])
    assert "After 1 task of digits" in text
    assert Page(text).headings[-1] == "How it was made"


def test_names_cannot_break_the_page() -> None:
    text = render([record(tasks=("<b>&\"'", "$x$_1^2", "汉字", "-"))])
    Page(text)
    assert "<b>&" not in text
    assert "&lt;b&gt;" in text
    assert "$x$_1^2" in text


def test_large_maps_are_one_image() -> None:
    names = tuple(f"adapter {i}" for i in range(100))
    svg = key_map(KeyMap(np.eye(100), names))
    assert "data:image/png;base64" in svg
    assert len(svg) < 200_000


def test_maps_of_constant_and_missing_scores() -> None:
    assert "<svg" in accuracy_map(np.full((3, 2), np.nan), ("a", "b"))
    assert "before any" in accuracy_map(np.ones((3, 2)), ("a", "b"))
    assert "<svg" in coefficient_map(CoefficientMap(np.zeros((2, 3)), ("a", "b"), ("x", "y", "z")))


def test_maps_check_their_shapes() -> None:
    with pytest.raises(MismatchError, match="shape"):
        CoefficientMap(np.zeros((2, 2)), ("a",), ("x", "y"))
    with pytest.raises(MismatchError, match="shape"):
        CoefficientMap(np.zeros((2, 2)), ("a", "b"), ("x", "y"), blocks=(0, 1))
    with pytest.raises(MismatchError, match="NaN"):
        KeyMap(np.array([[np.nan]]), ("x",))
    with pytest.raises(MismatchError, match="zeros"):
        KeyMap.of_keys(np.zeros((2, 3)), ("x", "y"))
    with pytest.raises(MismatchError, match="keys of shape"):
        KeyMap.of_keys(np.zeros(3), ("x",))


def test_samples_are_shown_by_domain() -> None:
    values = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    samples = SampleCoefficientMap(values, ("b", "a", "b"), ("x", "y"))
    (first, of_b), (second, of_a) = samples.groups
    assert (first, second) == ("b", "a")
    np.testing.assert_array_equal(of_b, [[1, 0], [3, 0]])
    np.testing.assert_array_equal(of_a, [[0, 2]])
    assert "<svg" in sample_map(samples)
    with pytest.raises(MismatchError, match="samples' coefficients"):
        SampleCoefficientMap(values, ("a", "b"), ("x", "y"))


def test_many_samples_are_one_image() -> None:
    values = np.random.default_rng(0).normal(size=(3000, 20))
    domains = tuple(np.repeat(["a", "b", "c"], 1000))
    svg = sample_map(SampleCoefficientMap(values, domains, tuple(map(str, range(20)))))
    assert "data:image/png;base64" in svg
    assert len(svg) < 500_000


@pytest.mark.parametrize("count", [2, 5, 20])
def test_a_curve_for_every_task(count: int) -> None:
    tasks = tuple(f"t{i}" for i in range(count))
    row = summarise_rows([record(tasks=tasks)])[0]
    assert task_curves(row, tasks).count("<path") > count


def test_held_out_domains() -> None:
    text = render([held_out_record(seed) for seed in range(2)])
    headings = Page(text).headings
    assert headings[:3] == ["Methods", "Accuracy on held-out domains", "Metrics"]
    assert "On 5 held-out domains of digits (dg), MIRA memory has an average accuracy" in text
    assert "after task" not in text
    assert "task order" not in text
    assert "forgetting" not in text


def test_many_methods_leave_the_leading_curves() -> None:
    whole = record()
    rows = list(whole.metrics.rows)
    rows += [
        rows[1].model_copy(update={"id": f"b{i}", "label": f"baseline {i}"}) for i in range(20)
    ]
    metrics = whole.metrics.model_copy(update={"rows": tuple(rows)})
    text = render([whole.model_copy(update={"metrics": metrics})])
    assert "The leading 12 of 26 methods." in text


def test_keys_over_blocks_are_averaged() -> None:
    keys = np.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]]])
    np.testing.assert_allclose(KeyMap.of_keys(keys, ("x", "y")).similarity, [[1, 0.5], [0.5, 1]])


def test_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**20, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "2.0 TiB",
    ]
    assert [duration(s) for s in (1.24, 185, 7620)] == ["1.2 s", "3 min 05 s", "2 h 07 min"]
    assert count(999) == "999"
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": None, "e": True}) == [
        ("a.b", "1, 2"),
        ("a.c", "{}"),
        ("d", "–"),
        ("e", "yes"),
    ]
