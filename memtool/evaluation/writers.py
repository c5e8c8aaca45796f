"""Records in the file formats that other tools read: DomainBed and Avalanche.

No text in them is a formula to a spreadsheet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memtool import sealed
from memtool.atomic import write_atomic
from memtool.evaluation.csv_text import to_csv
from memtool.evaluation.paired import paired
from memtool.evaluation.record import Record
from memtool.evaluation.summary import summarise_rows
from memtool_stores.printable import as_cell


def write_domainbed(records: Sequence[Record], path: Path) -> Path:
    """DomainBed's `results.jsonl`: a line for every row and step that was measured.

    Keys as there: `args` (dataset, algorithm, trial_seed), `hparams`, `step` (tasks learned),
    `env<j>_out_acc` for task j from 0, `mem_gb` (2³⁰ bytes).
    """
    lines: list[str] = []
    for record in records:
        run, memory = record.run, record.environment.peak_memory_bytes
        for row in record.metrics.rows:
            for step, scores in enumerate(row.accuracy):
                line: dict[str, Any] = {
                    f"env{task}_out_acc": score
                    for task, score in enumerate(scores)
                    if score is not None
                }
                if not line:
                    continue
                line["step"] = step
                line["args"] = {
                    "dataset": run.data.name,
                    "algorithm": row.id,
                    "trial_seed": run.seed,
                    "setting": run.setting,
                }
                line["hparams"] = run.configuration
                if memory is not None:
                    line["mem_gb"] = memory / 2**30
                lines.append(json.dumps(_cells(line), sort_keys=True, allow_nan=False))
    return write_atomic(path, "".join(f"{line}\n" for line in lines))


def write_avalanche(records: Sequence[Record], path: Path) -> Path:
    """Avalanche's evaluation CSV with the columns `method` and `seed` in front.

    `eval_exp` and `training_exp` count from 0 as there; training_exp −1 is before any training.
    `forgetting` is a[j, j] − a[i, j], only for tasks learned before the last one.
    """
    header = ["method", "seed", "eval_exp", "training_exp", "eval_accuracy", "forgetting"]
    lines: list[list[str | int]] = []
    for record in records:
        for row in record.metrics.rows:
            for step, scores in enumerate(row.accuracy):
                for task, score in enumerate(scores):
                    if score is None:
                        continue
                    learned = row.accuracy[task + 1][task] if task + 1 < step else None
                    forgetting = "" if learned is None else repr(learned - score)
                    lines.append([row.id, record.run.seed, task, step - 1, repr(score), forgetting])
    return write_atomic(path, to_csv([header, *lines]))


def write_results(records: Sequence[Record], path: Path) -> Path:
    """What several seeds of one experiment came to, as JSON: rows, pairs of rows, what was chosen.

    rows: the final average of every row by seed and its mean; pairs: the first method less each
    other row on the same test samples (`memtool.evaluation.paired`), where these are known.
    """
    rows = summarise_rows(records)
    own = next((row for row in rows if row.kind == "method"), rows[0])
    pairs = {row.id: paired(records, own.id, row.id) for row in rows if row is not own}
    selection = records[0].run.selection
    document = {
        "schema": "memtool.results",
        "schema_version": 1,
        "data": records[0].run.data.name,
        "seeds": [record.run.seed for record in records],
        "task_orders": [record.run.task_names for record in records],
        "test_samples": [[task.test_samples for task in r.run.tasks] for r in records],
        "rows": [
            {"id": row.id, "kind": row.kind, "faa": faa.values, "mean": faa.mean}
            for row in rows
            if (faa := row.metrics.get("faa")) is not None
        ],
        "pairs": [
            {"first": own.id, "second": id, **dataclasses.asdict(pair)}
            for id, pair in pairs.items()
            if pair is not None
        ],
        "selection": None if selection is None else selection.model_dump(mode="json"),
    }
    return sealed.write_json(path, document)


def _cells(value: Any) -> Any:
    """A value of JSON with every text in it as `as_cell`: lines of JSON end up in spreadsheets."""
    if isinstance(value, dict):
        return {as_cell(key): _cells(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cells(inner) for inner in value]
    return as_cell(value) if isinstance(value, str) else value
