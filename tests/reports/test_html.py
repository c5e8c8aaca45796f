"""The report: self-contained, deterministic, complete, and honest about what was not given."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from memtool.errors import MismatchError
from memtool.evaluation.inside import Keys, Recalled
from memtool.evaluation.record import Metrics, Record
from memtool.evaluation.summary import summarise_rows
from memtool.reports import charts
from memtool.reports.html import count, duration, flatten, render, size, write_report
from memtool.reports.looks import look_of
from memtool.reports.notebook import figures_of
from tests.reports.sample import (
    TASKS,
    held_out_record,
    record,
    shown_record,
    text_record,
    without_negative,
)

VOID = {"meta", "br", "hr", "img", "link", "input"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

PROBE = """
const told = (page, all) => [...page.document.querySelectorAll(all)];
const look = (page) => ({
  live: told(page, "figure.live").map((figure) => figure.dataset.live),
  drawn: told(page, ".chart svg.marks").length,
  choices: told(page, ".chart select").length,
  wide: page.document.documentElement.scrollWidth,
  loaded: page.performance.getEntriesByType("resource").map((one) => one.name)
    .filter((name) => !name.startsWith("data:")),
});
onload = () => setTimeout(() => {
  const pages = [...document.querySelectorAll("iframe")].map((frame) => frame.contentWindow);
  document.body.dataset.found = JSON.stringify(pages.map(look));
}, 8000);
"""


class Page(HTMLParser):
    """Checks nesting, collects ids, references to other places, headings and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"] or ""
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
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def full() -> str:
    return render([shown_record(seed) for seed in range(2)])


def said(text: str) -> str:
    """The page without its scripts and pictures: what a reader is told."""
    text = re.sub(r"<(script|svg|style).*?</\1>", "", text, flags=re.S)
    return re.sub(r"[ \n]+", " ", text)


def test_the_page_is_whole_and_needs_nothing_else(full: str) -> None:
    page = Page(full)
    assert len(set(page.ids)) == len(page.ids)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    drawn = re.sub(r"<script.*?</script>", "", full, flags=re.S)
    assert set(re.findall(r"url\(#([^)]*)\)", drawn)) <= set(page.ids)
    # A browser loads nothing from elsewhere, whatever a script asks for.
    assert page.policy.startswith("default-src 'none';")
    assert "http" not in page.policy
    assert "@import" not in said(full)
    assert sum("vegaEmbed" in one for one in page.scripts) == 2  # the library, and its use, once
    assert page.headings == [
        "What each task recalls",
        "Methods",
        "After each task",
        "What was forgotten",
        "Differences on the same test samples",
        "What is taken for what",
        "Examples",
        "How it learned",
        "Metrics",
        "Cost",
        "How it was made",
    ]
    assert len(full) < 3_000_000


def test_every_figure_has_a_picture_without_the_script(full: str) -> None:
    found = re.findall(r'<figure class="live" id="figure-([\w-]+)".*?</figure>', full, re.S)
    assert found == [
        "recall",
        "methods",
        "curves",
        "matrix",
        "forgetting",
        "paired",
        "confusion",
        "classes",
        "learning",
        "keys",
    ]
    for body in re.findall(r'<figure class="live".*?</figure>', full, re.S):
        assert re.search(r'<div class="static"><(svg|img)', body)
        json.loads(re.findall(r"<script[^>]*>(.*?)</script>", body, re.S)[0])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_figures_live_in_a_browser_and_fit_a_phone(full: str, tmp_path: Path) -> None:
    several = [shown_record(), text_record()]
    (tmp_path / "runs.html").write_text(render(several), encoding="utf-8")
    (tmp_path / "report.html").write_text(full, encoding="utf-8")
    # A frame is a phone of 390 px; the browser's own window cannot be as narrow.
    (tmp_path / "phone.html").write_text(
        '<iframe src="report.html" width="390" height="9000" style="border:0"></iframe>'
        '<iframe src="runs.html" width="390" height="9000" style="border:0"></iframe>'
        f"<script>{PROBE}</script>",
        encoding="utf-8",
    )
    out = subprocess.run(
        [
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=12000",
            "--dump-dom",
            (tmp_path / "phone.html").as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    ).stdout.decode()
    match = re.search(r'data-found="([^"]*)"', out)
    assert match is not None
    one, both = json.loads(match[1].replace("&quot;", '"'))
    assert one["live"] == ["yes"] * 10
    assert one["drawn"] == 10
    assert one["choices"] == 6  # blocks, tasks, methods of three figures, and what learned
    assert set(both["live"]) == {"yes", None}  # the second run is folded
    assert both["drawn"] > 10
    for frame in (one, both):
        assert frame["wide"] <= 390
        assert frame["loaded"] == []


def test_same_input_same_bytes() -> None:
    assert render([record()]) == render([record()])


def test_what_the_page_says(full: str) -> None:
    text = said(full)
    assert "the best baseline, sequential LoRA," in text  # not replay, and no reading of memory
    assert "the upper bound" not in text  # joint LoRA is below the method
    assert "joint LoRA (reference)" in text
    assert "‡ keeps samples of earlier tasks, which no other row may: not ranked." in text
    assert "2 seeds, 95 % t-interval" in text
    assert "n = 300 test samples" in text or "n = 1,800" in text
    assert "5f" * 32 in text
    assert "memory.separation" in text
    assert "294\u2009912" in text
    assert "Who &lt;b&gt;wrote&lt;/b&gt; it?" in text


def test_the_record_is_on_the_page(full: str) -> None:
    files = dict(re.findall(r'download="([^"]+)" href="data:[^,]*;base64,([^"]+)"', full))
    whole = json.loads(base64.b64decode(files["record.json"]))
    assert [Record.model_validate(one) for one in whole] == [shown_record(0), shown_record(1)]
    lines = list(csv.DictReader(io.StringIO(base64.b64decode(files["record.csv"]).decode())))
    last = [line for line in lines if line["row"] == "er" and line["after_tasks"] == "5"]
    expected = [score for seed in (0, 1) for score in shown_record(seed).row("er").last]
    assert [float(line["accuracy"]) for line in last] == expected


def test_kernels_of_all_runs_are_told_where_any_are_known() -> None:
    def ran(seed: int, *kernels: str) -> Record:
        one = record(seed)
        environment = one.environment.model_copy(update={"kernels": kernels})
        return one.model_copy(update={"environment": environment})

    title = "kernels of picked adapters"
    assert title not in render([record()])
    page = render([ran(1, "gathered", "grouped_mm"), ran(2, "dense")])
    assert re.search(rf"{title}\W.*?dense, gathered, grouped_mm", page, re.S)


def test_parts_not_given_are_left_out(tmp_path: Path) -> None:
    path = write_report(record(), tmp_path / "reports" / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.headings == [
        "Methods",
        "After each task",
        "What was forgotten",
        "Metrics",
        "Cost",
        "How it was made",
    ]
    assert "interval" not in said(path.read_text(encoding="utf-8"))


def test_a_memory_alone_without_optional_fields() -> None:
    whole = record(tasks=("only",))
    run = whole.run.model_copy(
        update={"command": None, "mix": None, "separation": None, "configuration": {}}
    )
    metrics = Metrics(rows=whole.metrics.rows[:1])
    text = render([whole.model_copy(update={"run": run, "metrics": metrics})])
    assert "After 1 task of digits" in text
    assert Page(text).headings == ["Methods", "Metrics", "Cost", "How it was made"]


def test_texts_have_losses() -> None:
    text = render([text_record()])
    assert Page(text).headings[:3] == ["Methods", "After each task", "What was forgotten"]
    assert "has a mean loss of 0.450 nats per answer token" in said(text)


def test_several_runs_are_side_by_side() -> None:
    other = shown_record()
    changed = {**other.run.configuration, "memory": {"separation": "softmax"}}
    other = other.model_copy(
        update={"run": other.run.model_copy(update={"configuration": changed})}
    )
    text = said(render([shown_record(), other]))
    assert "2 runs side by side" in text
    assert "2. MIRA on digits, memory.separation=softmax" in text
    with pytest.raises(MismatchError, match="each seed once"):
        render([shown_record(), shown_record()])


def test_names_cannot_break_the_page() -> None:
    names = ("<b>&\"'", "</script><script>", "$x$_1^2", "汉字", "-")
    text = render([record(tasks=names)])
    Page(text)
    assert "<b>&" not in text
    assert "</script><script>" not in said(text)
    assert "&lt;b&gt;" in text
    assert "$x$_1^2" in text


def test_a_method_looks_the_same_in_every_report() -> None:
    first = {row.id: look_of(row) for row in summarise_rows([record()])}
    second = {row.id: look_of(row) for row in summarise_rows([shown_record()])}
    assert first["sequential"] == second["sequential"]
    assert first["memory"] == second["memory"]
    assert sum(look.colour == first["memory"].colour for look in first.values()) == 1


def test_scales_are_those_of_every_report() -> None:
    figures = figures_of([shown_record()])
    x = figures["methods"].spec["layer"][1]["encoding"]["x"]
    assert x["scale"] == {"domain": [0, 100]}
    ends = [
        figures[name].spec["layer"][0]["encoding"]["color"]["scale"]["domain"][-1]
        for name in ("matrix", "confusion")
    ]
    assert ends == [100, 100]


def test_a_confusion_adds_up() -> None:
    whole = shown_record()
    (row, *_) = summarise_rows([whole])
    table = charts.confusion([whole], row)
    assert table is not None
    assert table.sum() == 300
    share = table.trace() / table.sum()
    assert share == pytest.approx(whole.row("memory").metrics["faa"])
    assert charts.confusion([record()], row) is None


def test_intervals_hold_what_is_known() -> None:
    low, high = charts.wilson(10, 10)
    assert (round(low, 3), high) == (0.722, 1.0)
    whole = shown_record()
    mean, low, high = charts.point([whole], summarise_rows([whole])[0], "accuracy", None)
    assert low < mean < high
    assert np.isnan(charts.point([record()], summarise_rows([record()])[0], "accuracy", None)[1])


def test_a_figure_is_saved_and_shown(tmp_path: Path) -> None:
    figure = shown_record().plot()
    assert figure.name == "recall"
    for name in ("a.svg", "a.png", "a.json", "a.html"):
        assert figure.save(tmp_path / name).stat().st_size > 1000
    assert "currentColor" not in (tmp_path / "a.svg").read_text()
    bundle = figure._repr_mimebundle_()
    assert bundle["image/svg+xml"].startswith("<svg")
    assert "var(" not in json.dumps(bundle["application/vnd.vegalite.v5+json"])
    assert "<svg" in shown_record()._repr_html_()


def test_maps_check_their_shapes() -> None:
    with pytest.raises(MismatchError, match="shape"):
        Recalled.of([np.zeros((3, 2))], ["a", "b"], ["x", "y"])
    with pytest.raises(MismatchError, match="NaN"):
        Recalled.of([np.full((3, 2), np.nan)], ["a"], ["x", "y"])
    with pytest.raises(ValueError, match="cosines of keys of shape"):
        Keys(adapters=("x",), cosine=((1.0, 0.0),))
    with pytest.raises(MismatchError, match="zeros"):
        Keys.of(np.zeros((2, 3)), ("x", "y"))
    with pytest.raises(MismatchError, match="keys of shape"):
        Keys.of(np.zeros(3), ("x",))


def test_blocks_of_a_large_memory_are_left_out() -> None:
    weights = [np.ones((2, 50, 20))] * 20
    names = [str(place) for place in range(20)]
    found = Recalled.of(weights, names, names, blocks=range(50))
    assert found.by_block == ()
    assert len(found.weights) == 20


def test_large_maps_are_one_image() -> None:
    names = tuple(f"adapter {i}" for i in range(50))
    inside = shown_record().inside
    assert inside is not None
    keys = inside.model_copy(update={"keys": Keys.of(np.eye(50), names)})
    figure = charts.keys_figure(shown_record().model_copy(update={"inside": keys}))
    assert figure is not None
    drawn = figure.inline()
    assert drawn.startswith("<img")
    assert len(drawn) < 120_000


def test_held_out_domains() -> None:
    text = render([held_out_record(seed) for seed in range(2)])
    assert Page(text).headings[:2] == ["Methods", "Metrics"]
    assert "On 5 held-out domains of digits (dg), MIRA memory has an average accuracy" in text
    told = said(text)
    assert "after task" not in told
    assert "task order" not in told
    assert "forgetting" not in told


def test_what_negative_weights_carry() -> None:
    assert "Negative weights" in Page(render([without_negative(record())])).headings


def test_keys_over_blocks_are_averaged() -> None:
    keys = np.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]]])
    assert Keys.of(keys, ("x", "y")).cosine == ((1.0, 0.5), (0.5, 1.0))


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
    assert TASKS[0] == "upright"
