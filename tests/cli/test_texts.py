"""A memory of texts by hand, verb after verb, as a user would call it; one small model, in turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Memtool, inside
from tests.methods.facts import moram_of, settings_of, write_facts

PRESET = ("--preset", "moram-trace")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and three tasks of texts with a description."""
    return write_facts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def texts(place: Path, here: Path, environ: dict[str, str]) -> Memtool:
    """Run `memtool … --preset moram-trace` on the facts in the empty folder, in this process."""
    values = {**settings_of(place, here), "text.epochs": "none", "train.epochs": 1}
    variables = {f"MEMTOOL_{k.upper().replace('.', '__')}": str(v) for k, v in values.items()}

    def run(*arguments: str, status: int = 0):
        done = inside(here, environ | variables, *arguments, *PRESET)
        assert done.returncode == status, done.stderr
        return done

    return run


@pytest.fixture
def grown(place: Path, here: Path) -> None:
    """Two tasks in memory."""
    method = moram_of(place, here, **{"train.epochs": 1})
    for task in ("1", "2"):
        method.adapt(task)
        method.write()


def test_a_memory_is_grown_and_measured_by_hand(texts, here):
    done = texts("train-adapter", "--task", "1")
    assert "task-1-seed-0\t1 letters\t-\t" in done.stdout
    assert "next: memtool write --preset moram-trace" in done.stderr
    assert "next: memtool eval" in texts("write").stderr
    assert "nothing new to write" in texts("write").stderr
    assert "there is nothing to learn" in texts("consolidate").stderr
    record = json.loads(texts("eval", "--history", "--report", "r.html", "--json").stdout)
    row = record["metrics"]["rows"][0]
    assert (row["id"], len(row["loss"]), row["cut_prompts"]) == ("moram", 2, 0)
    assert "Loss of every method at the end" in (here / "r.html").read_text()
    whole = texts("eval", "--unseen").stdout
    assert whole.startswith("method\tletters\tsums\tturned\tmean")
    refused = texts("eval", "--at-least", "0.5", status=2)
    assert "--set text.generate=true" in refused.stderr
    assert "setting 'cil'" in texts("eval", "--setting", "cil", status=2).stderr


def test_generated_answers_are_scored(texts, grown):
    shown = texts("eval", "--set", "text.generate=true", "--json").stdout
    row = json.loads(shown)["metrics"]["rows"][0]
    assert all(score is not None for score in row["accuracy"][-1])
    assert "op.trace" in row["metrics"]
    passed = texts("eval", "--set", "text.generate=true", "--at-least", "0.0", "-q")
    assert float(passed.stdout) >= 0
    partial = texts("eval", "--set", "text.generate=true", "--unseen", "-q")
    assert float(partial.stdout) >= 0


def test_what_is_recalled_and_where_atoms_fire(texts, grown, here):
    found = json.loads(texts("retrieve", "--prompt", "after c comes", "--json").stdout)
    assert (found["schema"], found["samples"]) == ("memtool.retrieve-atoms", 1)
    assert isinstance(found["answer"], str)
    assert "nats per answer token" in texts("retrieve", "--task", "sums").stderr
    where = ("--layer", "v", "--block", "1", "--out", "atoms.html")
    done = texts("explain", "--prompt", "after c comes", *where)
    assert "task-2-seed-0" in done.stdout
    assert "answer\t" in done.stdout
    assert "Which atoms fire where" in (here / "atoms.html").read_text()
    before = ("--store", f"{here / 'memory'}@HEAD~1")
    assert "task-2-seed-0" not in texts("explain", "--task", "2", *before).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("retrieve", "--image", "x.png"), "whose tasks are texts"),
        (("explain", "--image", "x.png"), "--prompt TEXT or --task"),
        (("retrieve",), "one of --task, --prompt and --query"),
        (("retrieve", "--task", "1", "--out", "mixture"), "--out under method moram"),
        (("retrieve", "--prompt", " "), "--prompt is empty"),
        (("train-adapter", "--task", "3", "--topk", "9"), "another gate: topk 2, here 9"),
        (("explain", "--task", "1", "--method", "modulation"), "modulation recalls adapters whole"),
        (("bisect", "--drop", "2", "--metric", "faa"), "--set text.generate=true"),
    ],
)
def test_what_texts_do_not_have(texts, grown, arguments, words):
    assert words in texts(*arguments, status=2).stderr


def test_a_version_that_made_texts_worse_is_found(texts, grown):
    texts("forget", "1")
    found = json.loads(texts("bisect", "--good", "HEAD~1", "--drop", "0.0001", "--json").stdout)
    assert (found["metric"], found["drop"]) == ("loss", 0.0001)
    assert found["culprit"]["version"] == found["bad"]
    done = texts("bisect", "--good", "HEAD~1", "--drop", "9", status=1)
    assert "it never rose by 9 nats" in done.stderr


def test_atoms_go_to_another_memory_as_peft(texts, grown, here):
    texts("export", "--out", "out")
    assert (here / "out" / "task-2-seed-0" / "adapter_model.safetensors").is_file()
    done = texts("import", "out/task-1-seed-0", "--store", "other")
    assert "next: memtool eval" in done.stderr
    assert "task-1-seed-0" in texts("log", "--store", "other").stdout
    texts("diff", "HEAD~1", "-q")
    assert "adapters\t2" in texts("export", "--bundle", "all.bundle").stdout
    assert "adapters\t2" in texts("import", "all.bundle", "--store", "copy").stdout
    for option in (("--task", "1"), ("--as", "atoms")):
        refused = texts("import", "all.bundle", "--store", "copy", *option, status=2)
        assert f"{option[0]} with all.bundle, a whole memory" in refused.stderr


def test_a_lora_from_elsewhere_becomes_atoms_where_it_is_asked_for(texts, grown, here):
    texts("export", "task-1-seed-0", "--out", "out")
    theirs = here / "out" / "task-1-seed-0"
    (theirs / "memtool_catalog.json").unlink()
    config = json.loads((theirs / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/else"
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    arguments = ("import", str(theirs), "--task", "1", "--store", "other")
    refused = texts(*arguments, status=2)
    assert "a LoRA that acts whole" in refused.stderr
    assert f"memtool import {theirs} --as atoms" in refused.stderr
    assert not (here / "other").exists()
    done = texts(*arguments, "--as", "atoms")
    assert "task-1-seed-0 as atoms: loss " in done.stderr
    assert " as plain adapter (test samples of task 1)" in done.stderr
    assert "made for somebody/else; the backbone here is " in done.stderr
    assert "did you mean 'atoms'?" in texts(*arguments, "--as", "atom", status=2).stderr


def test_images_have_no_prompt(memtool):
    for verb in ("retrieve", "explain"):
        done = memtool(verb, "--prompt", "a word")
        assert done.returncode == 2
        assert "whose tasks are images" in done.stderr
        assert "--store PATH, as there is no memory at 'memory'" in done.stderr


def test_a_task_and_dead_atoms_are_forgotten(texts, grown):
    below = ("--atoms-below", "0.3")
    plan = json.loads(texts("forget", *below, "--dry-run", "--json").stdout)
    assert (plan["schema"], plan["measure"], plan["done"]) == ("memtool.prune", "loss", False)
    refused = texts("forget", *below, status=2)
    assert "loss by task, before and without them" in refused.stderr
    assert json.loads(texts("forget", *below, "--yes", "--json").stdout)["done"]
    pruned = json.loads(texts("diff", "HEAD~1", "--json").stdout)
    assert [one["name"] for one in pruned["changed"]] == ["task-1-seed-0", "task-2-seed-0"]
    assert sum(pruned["pruned_atoms"].values()) == plan["pruned"]
    assert "lost " in texts("diff", "HEAD~1").stdout
    assert "adapters left\t1" in texts("forget", "1").stdout
    assert "removed\tatoms\ttask-1-seed-0" in texts("diff", "HEAD~1").stdout
    assert texts("eval").stdout.startswith("method\tsums\tmean")


@pytest.mark.usefixtures("no_page")
def test_a_run_goes_on_and_says_before_where_its_memory_goes(texts, grown, here):
    too_many = ("--set", "text.prompt_tokens=128")
    assert "whose context is 128" in texts("run", "--dry-run", *too_many, status=2).stderr
    plan = json.loads(texts("run", "--dry-run", "--json").stdout)["plan"]
    assert plan["tasks"] == ["letters", "sums", "turned"]
    assert plan["epochs"] == [1, 1, 1]
    assert plan["memory"]["atoms_bytes"] == 3 * plan["bytes_per_adapter"]
    assert plan["memory"]["step_tokens"] == 66
    stored = json.loads(texts("show", "--store", str(here / "memory"), "--json").stdout)
    assert plan["parameters_per_adapter"] == stored["numbers_per_adapter"]
    done = texts("run", "--baselines", "zero-shot,frozen", "--json")
    missing = "no baseline frozen under stream.setting trace, so that there will be no row"
    assert f"{missing}; there are zero-shot, in-context" in done.stderr
    record = json.loads(done.stdout)
    assert [row["id"] for row in record["metrics"]["rows"]] == ["moram", "moram-all", "zero-shot"]
    assert len(record["metrics"]["rows"][0]["loss"]) == 4
