"""Modulation on texts by hand, verb after verb, as a user would call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import inside
from tests.methods.facts import settings_of, write_facts


@pytest.fixture
def texts(here: Path, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory):
    """Run `memtool … --preset modulation-trace` on facts in the empty folder, in this process."""
    values = {**settings_of(write_facts(tmp_path_factory.mktemp("texts")), here)}
    values |= {"text.epochs": "none", "train.epochs": 2, "modulation.hidden": 16}
    variables = {f"MEMTOOL_{k.upper().replace('.', '__')}": str(v) for k, v in values.items()}

    def call(*arguments: str, status: int = 0):
        done = inside(here, environ | variables, *arguments, "--preset", "modulation-trace")
        assert done.returncode == status, done.stderr
        return done

    return call


def test_a_memory_is_made_measured_and_used(texts, here):
    plan = json.loads(texts("run", "--dry-run", "--json").stdout)["plan"]
    assert (plan["method"], plan["tasks"]) == ("modulation", ["letters", "sums", "turned"])
    assert plan["baselines"][:2] == ["zero-shot", "in-context"]
    for task in ("letters", "sums"):
        texts("train-adapter", "--task", task)
        texts("write")
        assert "task predictor" in texts("consolidate").stdout
    shown = texts("eval", "--history", "--compare", "--report", "r.html", "--json").stdout
    rows = {row["id"]: row for row in json.loads(shown)["metrics"]["rows"]}
    assert set(rows) == {"hopfield", "bayes-pcn", "exact-predicted", "exact", "frozen"}
    assert [line[1] is None for line in rows["hopfield"]["loss"]] == [True, True, False]
    assert "Loss on every task" in (here / "r.html").read_text()
    assert "--set text.generate=true" in texts("eval", "--at-least", "0.5", status=2).stderr
    texts("eval", "--set", "text.generate=true", "--at-least", "0.0", "-q")
    found = json.loads(texts("retrieve", "--prompt", "2 and 1 is", "--json").stdout)
    assert found["schema"] == "memtool.recall"
    assert isinstance(found["answer"], str)
    assert found["answer"] in texts("retrieve", "--prompt", "2 and 1 is").stdout
    done = texts("retrieve", "--task", "sums", "--out", "recalled")
    assert "nats per answer token" in done.stderr
    assert (here / "recalled" / "adapter_config.json").is_file()
    generated = texts("generate", "--prompt", "2 and 1 is", "--json")
    assert json.loads(generated.stdout)["answers"][0]["text"] == found["answer"]
    texts("export", "--out", "out")
    assert (here / "out" / "task-2-seed-0" / "adapter_model.safetensors").is_file()
    texts("import", "out/task-1-seed-0", "--store", "other")
    assert "adapters left\t1" in texts("forget", "1").stdout
    assert "memtool consolidate" in texts("eval", status=3).stderr
    texts("rollback", "HEAD~1", "--yes")
    assert "recalls adapters whole" in texts("explain", "--task", "1", status=2).stderr
    found = json.loads(
        texts("bisect", "--good", "HEAD~2", "--drop", "9", "--json", status=1).stdout
    )
    assert found["metric"] == "loss"
