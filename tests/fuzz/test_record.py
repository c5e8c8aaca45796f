"""The door of evaluation records and accuracy matrices: damaged files, and hostile names."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Record, read_record, write_record
from memtool.evaluation.writers import write_avalanche, write_domainbed
from memtool.reports.html import render, write_report
from memtool.reports.table import methods_grid, plain_text
from tests.fuzz.door import (
    NAMES,
    cases,
    damaged,
    long,
    nothing_else_changes,
    refused_or_taken,
)
from tests.reports.sample import record

WHOLE = record(tasks=("upright", "inverted")).to_json()
ROUGH = [
    "$\\frac{1}{",
    "$x$",
    "_hidden",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "{% raw %}",
    "]]>",
    "-->",
    "=cmd|'/c calc'!A1",
    "@SUM(1+1)",
    "'=1",
    "-",
    "#0b0c0e",
    "javascript:alert(1)",
    "[bold]x[/bold]",
]
TEXTS = st.one_of(NAMES, st.sampled_from(ROUGH)).filter(
    lambda text: not any("\ud800" <= c <= "\udfff" for c in text)
)


@st.composite
def hostile(draw: st.DrawFn) -> Record:
    """A record that fits the schema, with names as a stranger would choose them."""
    tree: dict[str, Any] = json.loads(WHOLE)
    names = draw(st.lists(TEXTS, min_size=2, max_size=2, unique=True))
    for task, name in zip(tree["run"]["tasks"], names, strict=True):
        task["name"] = name
    rows = tree["metrics"]["rows"][: draw(st.integers(1, 3))]
    ids = draw(st.lists(TEXTS, min_size=len(rows), max_size=len(rows), unique=True))
    for row, id in zip(rows, ids, strict=True):
        row["id"], row["label"] = id, draw(TEXTS)
    tree["metrics"]["rows"] = rows
    run = tree["run"]
    for key in ("method", "setting", "preset", "command", "mix", "store"):
        run[key] = draw(TEXTS)
    run["data"]["name"] = draw(TEXTS)
    run["configuration"] = {draw(TEXTS): {draw(TEXTS): draw(TEXTS)}}
    tree["environment"]["packages"] = {draw(TEXTS): draw(TEXTS)}
    return Record.model_validate_json(json.dumps(tree))


NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%)?", re.IGNORECASE | re.ASCII)
"""What a spreadsheet may take for the number that it is."""


class Page(HTMLParser):
    """What a browser would do: elements, and every address that it would ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self._runs = False
        self.feed(text)

    def handle_data(self, data: str) -> None:
        if self._runs:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._runs = self._runs and tag != "script"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        if tag == "script" and dict(attrs).get("type") != "application/json":
            self._runs = True
            self.scripts.append("")
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action", "data"}:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


def require_harmless(text: str) -> None:
    """Nothing is run but our own, nothing asked for, nothing hides or turns what stands beside."""
    page = Page(text)
    assert not page.elements & {"iframe", "object", "embed", "base", "form", "link"}
    assert page.scripts == our_scripts()
    assert not page.handlers
    inside = ("#", "data:image/png;", "data:application/json;base64,", "data:text/csv;base64,")
    assert all(address.startswith(inside) for address in page.addresses)
    for script in page.scripts:
        text = text.replace(script, "")
    assert all(c.isprintable() or c in "\n\u00a0\u2009" for c in text)


@cache
def our_scripts() -> list[str]:
    """What a page of a plain record runs."""
    return Page(render([record()])).scripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@long
@cases
@given(content=damaged(WHOLE.encode()))
def test_damaged_records(content, folder):
    file = folder / "record.json"
    file.write_bytes(content)
    with refused_or_taken(), nothing_else_changes(folder):
        plain_text(methods_grid([read_record(file)]))


@long
@cases
@given(content=damaged(record().matrix("memory").to_json().encode()))
def test_damaged_matrices(content, folder):
    file = folder / "matrix.json"
    file.write_bytes(content)
    with refused_or_taken():
        AccuracyMatrix.load(file)


@long
@cases
@given(names=st.lists(TEXTS, min_size=1, max_size=3, unique=True))
def test_a_matrix_comes_back_from_a_file_without_formulas(names, folder):
    file = folder / "matrix.csv"
    matrix = AccuracyMatrix.empty(names)
    matrix.save(file)
    assert AccuracyMatrix.load(file) == matrix


def _texts(value: Any) -> Iterator[str]:
    """Every name and text in a document of JSON."""
    match value:
        case str():
            yield value
        case dict():
            yield from _texts([*value, *value.values()])
        case list():
            for one in value:
                yield from _texts(one)


@long
@cases
@given(given=hostile())
def test_files_of_hostile_records(given, folder):
    assert read_record(write_record(given, folder / "record.json")) == given
    lines = write_domainbed([given], folder / "results.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line) for line in lines.splitlines()]
    assert all(isinstance(document, dict) for document in documents)
    with write_avalanche([given], folder / "results.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    for text in (*_texts(documents), *cells):
        assert not text.startswith(("=", "+", "@", "\t")) or NUMBER.fullmatch(text), text
    assert plain_text(methods_grid([given])).replace("\n", "").isprintable()


@long
@with_settings(cases, max_examples=min(cases.max_examples, 2))
@given(given=hostile())
def test_pages_of_hostile_records(given):
    require_harmless(render([given]))


@pytest.mark.slow
@with_settings(cases, max_examples=min(cases.max_examples, 200))
@given(given=hostile())
def test_more_pages_of_hostile_records(given):
    require_harmless(render([given]))


def test_what_is_drawn_in_files_has_no_control_characters(tmp_path: Path):
    page = write_report(record(tasks=("a\x1b[2J", "b")), tmp_path / "page.html")
    assert "\x1b" not in page.read_text(encoding="utf-8")
