"""A collection of LoRA, measured on texts that its owner has, beside what PEFT makes of it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memtool.errors import ConfigError, DataError, MemtoolError, NotFoundError
from memtool.evaluation.record import Record
from memtool.learning.answers import Answering
from memtool.methods.export import export_peft
from memtool.methods.mira.peft_rows import PeftAdapters, validation_of, ways_of
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.routed.measure import answering
from memtool.methods.routed.memory import only
from memtool.settings import StreamSettings
from memtool.streams.text import open_text_stream
from memtool_cli.scores import grids
from tests.methods.facts import FACTS
from tests.methods.test_collection import (
    PROMPTS,
    opened,
    write_adapter,
    write_collection,
    write_prompts,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)


def write_texts(file: Path, names: tuple[str, ...]) -> Path:
    lines = [
        json.dumps({"adapter": name, "prompt": p, "answer": a})
        for name in names
        for p, a in FACTS[name]
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three adapters of unlike shapes, and a memory of them with keys."""
    folder = write_collection(tmp_path_factory.mktemp("measured"))
    method = opened(folder, folder)
    method.collect([str(folder / "adapters")], folder / "prompts.jsonl")
    method.consolidate()
    return folder


def measured(place: Path, file: Path, **changes: object) -> PromptMemory:
    return opened(place, place, **{"stream.source": str(file), **changes})


def last(record: Record, row: str) -> list[float]:
    found = [loss for loss in record.row(row).loss[-1] if loss is not None]
    assert len(found) == len(record.run.tasks)
    return found


def loss_by_transformers(model: Any, place: Path, name: str) -> float:
    """−log p per answer token, text by text."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    total, count = 0.0, 0
    for prompt, answer in FACTS[name]:
        asked = tokenizer(prompt).input_ids
        said = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
        logs = scores.log_softmax(-1)
        total -= sum(float(logs[i, token]) for i, token in enumerate(said))
        count += len(said)
    return total / count


def test_some_adapters_are_measured_and_the_others_distract(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_texts(tmp_path / "texts.jsonl", ("sums", "letters"))
    with file.open("a", encoding="utf-8") as more:
        more.write('{"adapter": "poems", "prompt": "x", "answer": "y"}\n')
    with caplog.at_level(logging.WARNING, "memtool"):
        record = measured(place, file).evaluate(compare=True)
    assert record.run.task_names == ("letters", "sums")  # as in the memory
    assert [task.test_samples for task in record.run.tasks] == [8, 8]
    rows = {row.id: row.label for row in record.metrics.rows}
    assert list(rows) == ["memory", "hard", "uniform", "frozen", "oracle"]
    assert rows["memory"] == "memory, mira (1 of 3 adapters distract)"
    assert [r.getMessage() for r in caplog.records if "not measured" in r.getMessage()] == [
        "not measured, as no adapter with a key is called so: poems"
    ]
    whole = opened(place, place).evaluate(compare=True)
    assert whole.row("memory").label == "memory, mira"
    for row in rows:  # of the same texts and adapters: distractors are in both
        assert last(record, row) == pytest.approx(last(whole, row)[:2], abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    expected = [loss_by_transformers(model, place, name) for name in ("letters", "sums")]
    assert last(record, "frozen") == pytest.approx(expected, abs=1e-5)
    assert record.row("memory").metrics["loss.final"] == pytest.approx(
        sum(last(record, "memory")) / 2
    )


def test_the_history_of_some_adapters(place: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.jsonl", ("sums",))
    record = measured(place, file).evaluate(history=True)
    assert [any(x is not None for x in line) for line in record.row("memory").loss] == [False, True]


def test_answers_are_scored_by_the_metric_that_is_named(place: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.jsonl", ("sums", "turned"))
    for metric in ("exact-match", "edit-similarity"):
        method = measured(place, file, **{"text.generate": True, "stream.metric": metric})
        assert {task.metric for task in method.workspace.stream.tasks} == {metric}
        assert None not in method.evaluate().row("memory").accuracy[-1]


def test_a_stream_of_lines_has_test_texts_only(place: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.jsonl", ("sums", "turned"))
    settings = StreamSettings(
        source=str(file), setting="trace", order=("turned", "sums"), test_per_task=3
    )
    first, second = open_text_stream(settings).tasks
    assert (first.name, first.number, second.name, second.number) == ("turned", 1, "sums", 2)
    assert [len(part) for part in (first.train, first.validation, first.test)] == [0, 0, 3]
    assert set(zip(first.test.prompts, first.test.answers, strict=True)) < set(FACTS["turned"])
    with pytest.raises(DataError, match="no training texts"):
        measured(place, file, store=str(tmp_path / "m"), runs=tmp_path).adapt("1")


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ('{"adapter": "sums", "prompt": "x"}', DataError, "line 1"),
        ('{"adapter": "sums", "prompt": "x", "answer": " "}', DataError, "line 1"),
        ('{"adapter": "sums", "prompt": "x", "answer": 3}', DataError, "line 1"),
        ('{"adapter": "sums", "prompt": "\\ud800", "answer": "y"}', DataError, "half of a char"),
        ("", DataError, "holds no texts"),
        ('{"adapter": "poems", "prompt": "x", "answer": "y"}', ConfigError, "no task of texts"),
    ],
)
def test_texts_that_cannot_be_used(
    place: Path, tmp_path: Path, line: str, error: type[MemtoolError], said: str
) -> None:
    (tmp_path / "texts.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(error, match=said):
        measured(place, tmp_path / "texts.jsonl").evaluate()


def test_a_file_of_texts_that_is_not_there(place: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        measured(place, tmp_path / "texts.jsonl").evaluate()


# Beside PEFT --------------------------------------------------------------------------------------

ALIKE: dict[str, dict[str, Any]] = {
    "letters": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "sums": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
}
ROWS = ("peft-cat", "peft-linear", "peft-ties", "peft-dare_ties", "peft-arrow", "peft-oracle")


def memory_of(
    place: Path, where: Path, shapes: dict[str, dict[str, Any]], **changes: object
) -> PromptMemory:
    """A memory of adapters of these shapes, in `where`."""
    for seed, (name, shape) in enumerate(shapes.items()):
        write_adapter(place / "model", where / "adapters" / name, seed, **shape)
    write_prompts(where / "prompts.jsonl", {name: PROMPTS[name] for name in shapes})
    file = write_texts(where / "texts.jsonl", tuple(shapes))
    method = opened(place, where, **{"stream.source": str(file), **changes})
    method.collect([str(where / "adapters")], where / "prompts.jsonl")
    method.consolidate()
    return method


def test_peft_and_the_memory_agree_on_what_both_can(place: Path) -> None:
    record = opened(place, place).evaluate(compare=True, rivals=("peft",))
    rows = {row.id: row for row in record.metrics.rows}
    assert tuple(rows)[-len(ROWS) :] == ROWS
    assert last(record, "peft-oracle") == pytest.approx(last(record, "oracle"), abs=1e-5)
    assert last(record, "peft-cat") == pytest.approx(last(record, "uniform"), abs=1e-5)
    assert rows["peft-oracle"].kind == "upper bound"
    assert rows["peft-cat"].label == "PEFT cat (weight 0.333: defaults)"
    for id in ("peft-linear", "peft-ties", "peft-dare_ties", "peft-arrow"):
        assert rows[id].label.endswith("not possible: ranks 1, 2, 3 and 4")
        assert rows[id].undefined["loss.final"] == "not possible: ranks 1, 2, 3 and 4"
        assert "loss.final" not in rows[id].metrics
    (grid,) = grids([record])
    cells = {line[0]: line[1:] for line in grid.rows}
    assert set(cells[rows["peft-ties"].label]) == {"-"}
    assert cells[rows["peft-cat"].label] == cells["uniform mixture"]
    assert Record.from_json(record.to_json()) == record


def test_peft_is_given_the_names_that_it_looks_for(place: Path, tmp_path: Path) -> None:
    for seed, (name, shape) in enumerate(ALIKE.items()):
        folder = tmp_path / "adapters" / name
        write_adapter(place / "model", folder, seed, **shape)
        file = folder / "adapter_model.safetensors"
        save_file({f"_orig_mod.{key}": one for key, one in load_file(file).items()}, file)
    write_prompts(tmp_path / "prompts.jsonl", {name: PROMPTS[name] for name in ALIKE})
    file = write_texts(tmp_path / "texts.jsonl", tuple(ALIKE))
    method = opened(place, tmp_path, **{"stream.source": str(file)})
    method.collect([str(tmp_path / "adapters")], tmp_path / "prompts.jsonl")
    method.consolidate()
    record = method.evaluate(compare=True, rivals=("peft",))
    assert last(record, "peft-oracle") == pytest.approx(last(record, "oracle"), abs=1e-5)
    assert last(record, "peft-cat") == pytest.approx(last(record, "uniform"), abs=1e-5)


def linear_loss(place: Path, adapters: Path, name: str) -> float:
    """The loss under Σ √(w s) B_i · Σ √(w s) A_i, which is what `linear` says, in float64."""
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    sums: dict[str, torch.Tensor] = {}
    for task, shape in ALIKE.items():
        root = (shape["lora_alpha"] / shape["r"] / len(ALIKE)) ** 0.5
        for key, one in load_file(adapters / task / "adapter_model.safetensors").items():
            sums[key] = sums.get(key, 0) + root * one.double()
    weights = dict(model.named_parameters())
    for key, a in sums.items():
        if "lora_A" in key:
            site = key.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[site].data += sums[key.replace("lora_A", "lora_B")] @ a
    return loss_by_transformers(model, place, name)


def test_adapters_of_one_rank_can_be_merged_otherwise(place: Path, tmp_path: Path) -> None:
    record = memory_of(place, tmp_path, ALIKE).evaluate(compare=True, rivals=("peft",))
    found = {id: last(record, id) for id in ROWS}
    assert len({tuple(losses) for losses in found.values()}) == len(ROWS)
    assert found["peft-oracle"] == pytest.approx(last(record, "oracle"), abs=1e-5)
    assert found["peft-cat"] == pytest.approx(last(record, "uniform"), abs=1e-5)
    expected = [linear_loss(place, tmp_path / "adapters", name) for name in ALIKE]
    assert found["peft-linear"] == pytest.approx(expected, abs=1e-5)
    assert record.row("peft-ties").label == "PEFT ties (weight 1, density 0.5: defaults)"
    assert record.row("peft-arrow").label == "PEFT Arrow (top_k 2, router_temperature 1: defaults)"


def test_one_adapter_is_itself_in_every_way_of_arrow(place: Path, tmp_path: Path) -> None:
    method = memory_of(place, tmp_path, {"sums": ALIKE["sums"]})
    record = method.evaluate(compare=True, rivals=("peft",))
    for id in ("peft-cat", "peft-arrow", "peft-oracle"):
        assert last(record, id) == pytest.approx(last(record, "oracle"), abs=1e-5)


def test_scalings_of_rslora_are_counted_once(place: Path, tmp_path: Path) -> None:
    shapes = {name: {**shape, "use_rslora": True} for name, shape in ALIKE.items()}
    record = memory_of(place, tmp_path, shapes).evaluate(compare=True, rivals=("peft",))
    assert last(record, "peft-cat") == pytest.approx(last(record, "uniform"), abs=1e-5)
    assert last(record, "peft-oracle") == pytest.approx(last(record, "oracle"), abs=1e-5)


def test_a_merge_that_would_lose_layers_is_not_made(place: Path, tmp_path: Path) -> None:
    shapes = {
        name: {**ALIKE[name], "layers_to_transform": [layer]} for layer, name in enumerate(ALIKE)
    }
    record = memory_of(place, tmp_path, shapes).evaluate(compare=True, rivals=("peft",))
    assert "not possible: PEFT leaves out layers" in record.row("peft-cat").label
    assert last(record, "peft-oracle") == pytest.approx(last(record, "oracle"), abs=1e-5)


def test_what_peft_leaves_open_is_chosen_on_validation_texts(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    for name in FACTS:
        shutil.copy(tmp_path / "data" / name / "test.json", tmp_path / "data" / name / "eval.json")
    shutil.copy(place / "facts.yaml", tmp_path / "facts.yaml")
    changes = {"stream.source": str(tmp_path / "facts.yaml"), "stream.order": tuple(ALIKE)}
    method = memory_of(place, tmp_path, ALIKE, **changes)
    work, memory = method.workspace, method.read()
    folders = export_peft(work, None, out=tmp_path / "out")
    for folder in folders:
        original = tmp_path / "adapters" / folder.name / "adapter_model.safetensors"
        assert (folder / original.name).read_bytes() == original.read_bytes()
    tasks = method.shown(memory.view, memory.tasks)
    record = method.evaluate(rivals=("peft",))
    chosen = {}
    for way in ways_of(PeftAdapters(work, folders)):
        losses = []
        for choice in way.choices:  # validation and test texts are the same here
            with way.asked(**choice) as lm:
                losses.append(sum(Answering(work, None, lm).scores(tasks, "").losses))
        best = losses.index(min(losses))
        chosen[way.id] = best
        assert way.best(work, validation_of(work, tasks)) == way.choices[best]
        said = ", ".join(f"{name} {value:.3g}" for name, value in way.choices[best].items())
        label = f"{way.label} ({said}: chosen on validation texts)"
        assert record.row(way.id).label == label
        assert sum(last(record, way.id)) == pytest.approx(min(losses))
    assert any(chosen.values())  # not the defaults


def test_the_answers_of_peft_are_those_of_the_memory(place: Path, tmp_path: Path) -> None:
    method = memory_of(place, tmp_path, ALIKE, **{"engine.eval_batch_size": 3})
    work, memory = method.workspace, method.read()
    adapters = PeftAdapters(work, export_peft(work, None, out=tmp_path / "out"))
    prompts = [*PROMPTS["letters"], *PROMPTS["turned"]]  # of unlike lengths: padded
    for index, name in enumerate(ALIKE):
        ours = answering(work, memory, only(index, memory.routing.owners)).answers(prompts)
        with adapters.alone(name) as lm:
            assert Answering(work, None, lm).answers(prompts) == ours
    assert len(set(ours)) > 1


def test_answers_and_half_precision_have_their_rows(place: Path, tmp_path: Path) -> None:
    changes = {"text.generate": True, "engine.precision": "bf16"}
    record = memory_of(place, tmp_path, ALIKE, **changes).evaluate(compare=True, rivals=("peft",))
    for id in ROWS:
        assert None not in record.row(id).accuracy[-1]
    assert last(record, "peft-oracle") == pytest.approx(last(record, "oracle"), abs=0.1)


def test_without_peft_nothing_is_begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="needs the package peft") as caught:
        opened(place, place).evaluate(rivals=("peft",))
    assert caught.value.remedy == "pip install peft"
