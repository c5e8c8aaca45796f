"""What a row of predictions is, as CSV and as a line of JSON.

    file, label, probability, label_2, probability_2, …, adapters, task, novelty, unlike, abstained,
    error                                                       one row a picture
    prompt, answer, adapters, novelty, unlike                   one row a prompt

A file that could not be read has a row with its `error` and nothing else. Where the memory abstains
`label` is empty, and the rest says what it would have said. JSON has the classes as a list, and the
adapters with their tasks.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from memtool.inference.answers import LEAST, Answered
from memtool.inference.pictures import Told
from memtool_stores.printable import as_cell, printable_json


def picture_header(topk: int) -> list[str]:
    """The columns of pictures with so many classes."""
    more = [f"{name}_{place}" for place in range(2, topk + 1) for name in ("label", "probability")]
    rest = ["adapters", "task", "novelty", "unlike", "abstained", "error"]
    return ["file", "label", "probability", *more, *rest]


PROMPT_HEADER = ["prompt", "answer", "adapters", "novelty", "unlike"]
"""The columns of prompts."""


def picture_cells(told: Told, topk: int) -> list[str]:
    """The cells of one picture, under `picture_header`."""
    said = told.predicted
    if said is None:
        return [as_file(told.file), *[""] * (2 * topk + 5), as_cell(told.problem or "")]
    classes: list[str] = []
    for name, probability in said.classes[:topk]:
        classes += [as_cell(name), _number(probability)]
    if told.abstained:
        classes[0] = ""
    weights = [(one.adapter, one.weight) for one in said.weights if one.weight >= LEAST]
    rest = [_adapters(weights), str(said.task), _number(said.novelty), _yes(said.unlike)]
    return [as_file(told.file), *classes, *rest, _yes(told.abstained), ""]


def picture_document(told: Told) -> dict[str, Any]:
    """One picture as an object of JSON."""
    said = told.predicted
    start = {"schema": "memtool.prediction", "schema_version": 1, "file": str(told.file)}
    if said is None:
        return {**start, "label": None, "error": told.problem}
    return {
        **start,
        "label": None if told.abstained else said.label,
        "probability": said.probability,
        "classes": [{"label": name, "probability": share} for name, share in said.classes],
        "adapters": [
            {"name": one.adapter, "task": one.task, "weight": one.weight}
            for one in said.weights
            if one.weight >= LEAST
        ],
        "task": said.task,
        "novelty": said.novelty,
        "unlike": said.unlike,
        "abstained": told.abstained,
    }


def prompt_cells(one: Answered) -> list[str]:
    """The cells of one prompt, under `PROMPT_HEADER`."""
    rest = [_adapters(one.weights), _number(one.novelty), _yes(one.unlike)]
    return [as_cell(one.prompt), as_cell(one.answer), *rest]


def prompt_document(one: Answered) -> dict[str, Any]:
    """One prompt as an object of JSON."""
    return {
        "schema": "memtool.answer",
        "schema_version": 1,
        "prompt": one.prompt,
        "answer": one.answer,
        "adapters": [{"name": name, "weight": weight} for name, weight in one.weights],
        "novelty": one.novelty,
        "unlike": one.unlike,
    }


def write_cells(file: TextIO, cells: Sequence[str]) -> None:
    """One line of CSV."""
    csv.writer(file, lineterminator="\n").writerow(cells)


def write_document(file: TextIO, document: dict[str, Any]) -> None:
    """One line of JSON, without a character that steers a terminal; infinity is null."""
    finite = {key: _finite(value) for key, value in document.items()}
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    file.write(printable_json(text) + "\n")


def as_file(file: Path) -> str:
    """A path that opens what it is and that no spreadsheet takes for a formula."""
    text = str(file)
    return text if as_cell(text) == text else f"./{text}"


def _adapters(weights: Sequence[tuple[str, float]]) -> str:
    """`"task-1=0.93; task-2=0.07"`."""
    return as_cell("; ".join(f"{name}={_number(weight)}" for name, weight in weights))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _yes(value: bool | None) -> str:
    return "" if value is None else str(value).lower()


def _finite(value: Any) -> Any:
    return None if value in (float("inf"), float("-inf")) else value
