"""Records: exact JSON, clear errors, and the files written beside them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from memtool.errors import CorruptError, DataError, MemtoolError, MismatchError, NotFoundError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import (
    Environment,
    Record,
    Row,
    find_records,
    peak_resident_bytes,
    read_record,
    write_record,
)
from memtool.evaluation.writers import write_avalanche, write_domainbed
from tests.reports.sample import TASKS, record


def test_round_trip_is_exact(tmp_path: Path) -> None:
    before = record()
    path = write_record(before, tmp_path / "runs" / "record.json")
    after = read_record(path)
    assert after == before
    stored = json.loads(path.read_text())
    assert stored.pop("seal").startswith("sha256:")
    assert stored == json.loads(after.to_json())
    document = json.loads(path.read_text())
    assert list(document) == ["schema", "schema_version", "run", "metrics", "environment", "seal"]
    assert (document["schema"], document["schema_version"]) == ("memtool.evaluation", 2)


def test_the_records_of_a_folder(tmp_path: Path) -> None:
    for seed in (10, 9):
        write_record(record(seed), tmp_path / f"seed-{seed}" / "record.json")
    (tmp_path / "seed-x").mkdir()
    paths = tuple(tmp_path / f"seed-{seed}" / "record.json" for seed in (9, 10))
    assert find_records(tmp_path) == paths
    assert find_records(tmp_path / "seed-9") == paths[:1]
    assert find_records(paths[1]) == paths[1:]
    with pytest.raises(NotFoundError, match=r"no record.json in the folder .*seed-x"):
        find_records(tmp_path / "seed-x")
    own = write_record(record(), tmp_path / "record.json")
    assert find_records(tmp_path) == (own,)


def test_awkward_floats_survive() -> None:
    matrix = AccuracyMatrix.empty(["a"]).with_row(0, [5e-324]).with_row(1, [0.1 + 0.2])
    row = Row.measured("m", "m", "method", matrix, seconds=1 / 3)
    assert Row.model_validate_json(row.model_dump_json()) == row
    assert row.matrix(["a"]) == matrix


def test_a_row_holds_what_is_defined_and_why_the_rest_is_not() -> None:
    row = record().row("oracle")
    assert set(row.metrics) == {"faa", "last.xtail", "op.trace"}
    assert "not measured" in row.undefined["forgetting.max"]
    assert record().matrix("memory").tasks == TASKS
    with pytest.raises(NotFoundError, match="oracle"):
        record().row("nothing")


def test_newer_version_names_the_remedy() -> None:
    document = json.loads(record().to_json()) | {"schema_version": 5, "something": "new"}
    with pytest.raises(MismatchError, match=r"version 5.*\n.*\n.*upgrade memtool"):
        Record.from_json(json.dumps(document), "runs/r.json")


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", CorruptError), ("[]", CorruptError), ('{"schema": "other"}', MismatchError)],
)
def test_other_files(text: str, error: type[MemtoolError]) -> None:
    with pytest.raises(error, match=r"r\.json"):
        Record.from_json(text, "r.json")


def test_wrong_fields_are_named() -> None:
    document = json.loads(record().to_json())
    document["metrics"]["rows"][0]["accuracy"][1][0] = 84
    with pytest.raises(DataError, match=r"metrics\.rows\.0\.accuracy\.1\.0"):
        Record.from_json(json.dumps(document))
    document = json.loads(record().to_json())
    document["run"]["colour"] = "red"
    with pytest.raises(DataError, match=r"run\.colour"):
        Record.from_json(json.dumps(document))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_record(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptError):
        read_record(tmp_path / "binary")


def test_what_cannot_stand_in_a_record() -> None:
    whole = record()
    rows = whole.metrics.rows
    with pytest.raises(ValidationError, match="not unique"):
        Record(
            run=whole.run,
            metrics=whole.metrics.model_copy(update={"rows": (rows[0], rows[0])}),
            environment=whole.environment,
        )
    with pytest.raises(ValidationError, match="accuracy matrix"):
        Record(
            run=whole.run.model_copy(update={"tasks": whole.run.tasks[:2]}),
            metrics=whole.metrics,
            environment=whole.environment,
        )
    with pytest.raises(ValidationError):
        type(whole.run)(**(whole.run.model_dump() | {"configuration": {"lr": float("nan")}}))
    matrix = AccuracyMatrix.empty(["a"])
    with pytest.raises(ValidationError):
        Row.measured("m", "m", "method", matrix, more={"faa": float("nan")})


def test_kernels_are_of_the_newest_schema_and_others_say_nothing_of_them() -> None:
    assert "kernels" not in json.loads(record().to_json())["environment"]
    environment = Environment.here("cpu", 1.0, packages=(), kernels={"gathered", "dense"})
    new = record().model_copy(update={"environment": environment})
    document = json.loads(new.to_json())
    assert document["schema_version"] == 4
    assert document["environment"]["kernels"] == ["dense", "gathered"]
    assert Record.from_json(new.to_json()) == new


def test_environment_of_this_process() -> None:
    here = Environment.here("cpu", 1.5, packages=["numpy", "no-such-distribution"])
    assert list(here.packages) == ["numpy"]
    assert here.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    peak = peak_resident_bytes()
    assert peak is None or peak > 2**20
    assert Environment.here("cuda", 1.0, peak_memory_bytes=7).peak_memory_bytes == 7


def test_domainbed_lines(tmp_path: Path) -> None:
    path = write_domainbed([record(0), record(1)], tmp_path / "results.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 * (5 * 6 + 1)  # five rows of six steps, and the oracle's last
    line = next(x for x in lines if x["args"]["algorithm"] == "memory" and x["step"] == 2)
    assert line["env1_out_acc"] == record(0).row("memory").accuracy[2][1]
    assert line["args"]["dataset"] == "digits"
    assert line["hparams"]["memory"]["separation"] == "affine"
    assert line["mem_gb"] == pytest.approx(0.68, abs=0.01)


def test_avalanche_rows(tmp_path: Path) -> None:
    path = write_avalanche([record()], tmp_path / "eval_results.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "memory"]
    assert len(rows) == 30
    accuracy = record().row("memory").accuracy
    by_place = {(int(r["training_exp"]), int(r["eval_exp"])): r for r in rows}
    assert float(by_place[-1, 3]["eval_accuracy"]) == accuracy[0][3]
    assert by_place[1, 1]["forgetting"] == ""
    learned, later = accuracy[2][1], accuracy[5][1]
    assert learned is not None
    assert later is not None
    assert float(by_place[4, 1]["forgetting"]) == learned - later
