"""Modulation on texts: a predictor that sees prompts alone, and what answers lose to recall."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import memtool
from memtool.adapters.peft_files import read_peft
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.backbones.answering import without_answers
from memtool.backbones.causal_lm import PAD
from memtool.config import resolve
from memtool.errors import ConfigError, MemtoolError, MismatchError, NotFoundError
from memtool.experiments.baselines import chosen_baselines
from memtool.experiments.bisect import bisect
from memtool.experiments.run import run
from memtool.methods.baselines import RIVALS, baselines_of
from memtool.methods.forget import forget
from memtool.methods.modulation.measure import Seen, relative_errors
from memtool.methods.modulation.method import Modulation
from memtool.methods.modulation.predictor import PREDICTOR, Predictor
from tests.methods.facts import settings_of, write_facts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and three tasks of texts with a description."""
    return write_facts(tmp_path_factory.mktemp("texts"))


def config(place: Path, where: Path, **changes: object):
    small = {"modulation.hidden": 16, "modulation.predictor_epochs": 8}
    small |= {"modulation.predictor_lr": 0.02}
    values = {**settings_of(place, where), **small, **changes}
    return resolve(preset="modulation-trace", overrides=values, ambient=False).config


@pytest.fixture(scope="module")
def _learned(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    method = Modulation.open(config(place, folder), seed=0)
    for task in method.workspace.stream.tasks:
        method.learn(task)
        method.task_written(task)
    method.all_written()
    return folder


@pytest.fixture
def learned(place: Path, _learned: Path) -> Modulation:
    """Three tasks in memory, for reading only."""
    return Modulation.open(config(place, _learned), seed=0)


@pytest.fixture
def learned_copy(place: Path, _learned: Path, tmp_path: Path) -> Modulation:
    """Three tasks in memory, in a copy that a test may change."""
    shutil.copytree(_learned, tmp_path / "copy")
    return Modulation.open(config(place, tmp_path / "copy"), seed=0)


def logits_alone(method: Modulation, prompt: str) -> torch.Tensor:
    """What the predictor makes of one prompt, by hand: (tasks,)."""
    work = method.workspace
    tells = Predictor.fitting(method.stored())
    recall = every(AdapterValues.from_flat(tells.value[None], work.layout, tells.scaling))
    with torch.no_grad():
        mean = work.backbone.hidden(work.backbone.encode([prompt]).tokens, recall)[0].mean(dim=0)
    return tells.head.weight @ mean + tells.head.bias


def losses_alone(method: Modulation, number: int, place_of) -> float:
    """The loss on the test texts of a task, one by one, by the stored adapter that is told."""
    work, stored = method.workspace, method.stored()
    total = tokens = 0.0
    samples = work.task(str(number)).test
    for prompt, answer in zip(samples.prompts, samples.answers, strict=True):
        value = stored.values[place_of(prompt)][None]
        recall = every(AdapterValues.from_flat(value, work.layout, work.scaling))
        encoded = work.backbone.encode([prompt], [answer])
        with torch.no_grad():
            each = work.backbone.answer_loss(encoded.tokens, encoded.answers, recall)
        total, tokens = total + float(each.sum()), tokens + float(encoded.answers.sum())
    return total / tokens


def test_the_rows_are_what_every_prompt_gets_alone(learned: Modulation) -> None:
    record = learned.evaluate(history=True, compare=True)
    ids = [row.id for row in record.metrics.rows]
    assert ids == ["hopfield", "bayes-pcn", "exact-predicted", "exact", "frozen"]

    def seen(prompt: str) -> int:
        return int(logits_alone(learned, prompt).argmax())

    right = total = 0
    for place, task in enumerate(learned.workspace.stream.tasks):
        predicted = losses_alone(learned, task.number, seen)
        assert record.row("exact-predicted").loss[3][place] == pytest.approx(predicted, rel=1e-5)
        given = losses_alone(learned, task.number, lambda _, at=place: at)
        assert record.row("exact").loss[3][place] == pytest.approx(given, rel=1e-5)
        right += sum(seen(prompt) == place for prompt in task.test.prompts)
        total += len(task.test)
    assert right / total > 0.5
    for name, most in (("hopfield", 1e-5), ("bayes-pcn", 5e-3)):
        row = record.row(name)
        assert row.metrics["task_accuracy"] == right / total
        assert row.metrics["recall_error"] < most
        assert row.loss[3] == pytest.approx(record.row("exact-predicted").loss[3], rel=1e-2)
        # The version after each task has the tasks so far, and a predictor of them.
        assert [[x is not None for x in line] for line in row.loss] == [
            [False] * 3,
            [True, False, False],
            [True, True, False],
            [True] * 3,
        ]
        assert "loss.forgetting" in row.metrics
    assert record.row("exact").metrics["loss.forgetting"] == 0
    assert "recall_drop" not in record.row("hopfield").metrics
    assert record.row("frozen").loss[3] > record.row("exact").loss[3]


def test_the_predictor_sees_neither_answers_nor_padding(learned: Modulation) -> None:
    work, tasks = learned.workspace, learned.workspace.stream.tasks
    prompts = [prompt for task in tasks for prompt in task.test.prompts]
    alone = torch.stack([logits_alone(learned, prompt) for prompt in prompts])
    logits = Predictor.fitting(learned.stored()).logits(work)
    for answers in (["b"] * len(prompts), [prompt[::-1] for prompt in prompts]):
        encoded = work.backbone.encode(prompts, answers)
        asked = without_answers(encoded.tokens, encoded.answers)
        wider = torch.cat([torch.full((len(asked), 3), PAD), asked], dim=1)
        with torch.no_grad():
            torch.testing.assert_close(logits(wider), alone, rtol=1e-4, atol=1e-4)
    seen = Seen.of(work, learned.stored(), tasks)
    assert torch.cat(list(seen.places)).tolist() == alone.argmax(dim=1).tolist()


def test_generated_answers_are_scored_beside_the_exact_ones(
    place: Path, learned: Modulation
) -> None:
    folder = learned.config.runs.parent
    method = Modulation.open(config(place, folder, **{"text.generate": True}), seed=0)
    record = method.evaluate()
    row, exact = record.row("hopfield"), record.row("exact")
    drop = exact.metrics["faa"] - row.metrics["faa"]
    assert row.metrics["recall_drop"] == pytest.approx(drop)
    assert [right.samples for right in row.right] == [8, 8, 6]
    model = memtool.load(folder / "memory").attach()
    samples = method.workspace.task("2").test
    said = model.generate(samples.prompts)
    hits = [one == wanted for one, wanted in zip(said, samples.answers, strict=True)]
    assert row.accuracy[3][1] == pytest.approx(sum(hits) / len(hits))


def test_a_task_a_prompt_and_a_key_recall_an_adapter(learned: Modulation, tmp_path: Path) -> None:
    by_task = learned.retrieve(task="2", out=tmp_path / "adapter")
    assert (by_task.task, by_task.stored, by_task.accuracy) == (2, 3, None)
    whole = learned.evaluate().row("exact").loss[3][1]
    assert by_task.loss == pytest.approx(whole, rel=1e-3)
    value = read_peft(tmp_path / "adapter", learned.workspace.layout.sites).value
    assert relative_errors(value[None], learned.stored().values[1:2])[0] < 1e-5
    assert not (tmp_path / "adapter" / "head.safetensors").exists()
    prompt = "3 and 1 is"
    asked = learned.retrieve(prompt=prompt)
    assert asked.task == int(logits_alone(learned, prompt).argmax()) + 1
    model = memtool.load(learned.config.store).attach()
    assert model.answer(prompt) == asked.answer
    chosen = model.weights([prompt, "after c comes"])
    assert chosen.sum(dim=1).tolist() == [1, 1]
    assert model.names[int(chosen[0].argmax())] == asked.adapter
    key = learned.stored().values[2, : asked.key_numbers].clone()
    save_file({"query": key}, tmp_path / "key.safetensors")
    found = learned.retrieve(query=tmp_path / "key.safetensors")
    assert (found.task, found.answer, found.loss) == (3, None, None)


def test_one_adapter_that_is_told_answers_all_prompts(learned: Modulation) -> None:
    model = memtool.load(learned.config.store).attach(task="letters")
    assert model.weights(["3 and 1 is", "turn ab:"])[:, 0].tolist() == [1, 1]
    assert model.weights([]).shape == (0, 3)


def test_other_texts_or_epochs_train_the_predictor_anew(place: Path, learned_copy) -> None:
    folder = learned_copy.config.runs.parent
    assert learned_copy.consolidate().unchanged
    shorter = config(place, folder, **{"text.prompt_tokens": 20})
    result = Modulation.open(shorter, seed=0).consolidate()
    assert (result.unchanged, result.epochs, result.tasks) == (False, 8, (1, 2, 3))
    assert result.train_task_accuracy > 0.5


def test_what_was_forgotten_is_found_by_its_loss(place: Path, learned_copy: Modulation) -> None:
    store = learned_copy.workspace.store
    good = store.head()
    forget(store, ["1"])
    left = Modulation.open(learned_copy.config, seed=0)
    with pytest.raises(NotFoundError, match="no task predictor"):
        left.evaluate()
    left.consolidate()
    result = bisect(left, good=good, drop=0.05)
    assert result.metric == "loss"
    assert result.culprit is not None
    assert result.culprit.version == store.head()
    assert left.measure("HEAD", [1])["task_accuracy"] == 0
    store.rollback(good)
    assert left.evaluate().run.task_names == ("letters", "sums", "turned")


def test_what_texts_do_not_have_is_said(learned: Modulation, learned_copy: Modulation) -> None:
    for setting in ("til", "mts"):
        with pytest.raises(ConfigError, match=f"setting '{setting}'"):
            learned.evaluate(setting=setting)
    with pytest.raises(ConfigError, match="what should recall") as refused:
        learned.retrieve(task="1", prompt="2")
    assert refused.value.expected == "exactly one of --task, --prompt and --query"
    with pytest.raises(ConfigError, match="an image for a memory of texts"):
        learned.retrieve(image=Path("x.png"))
    with pytest.raises(MemtoolError, match="recalls adapters whole"):
        learned.explain(task="1")
    store = learned_copy.workspace.store
    with store.transaction("no predictor") as txn:
        txn.delete_blob(PREDICTOR)
    with pytest.raises(NotFoundError, match="no task predictor") as missing:
        learned_copy.retrieve(prompt="2 and 1 is")
    assert missing.value.remedy.startswith("memtool consolidate")
    with store.transaction("one task less") as txn:
        txn.remove(txn.adapters[1].name)
        learned_copy._also_commit(txn, [])
    assert learned_copy.consolidate().tasks == (1, 3)
    with store.transaction("another task less") as txn:
        txn.remove(txn.adapters[1].name)
        learned_copy._also_commit(txn, [])
    with pytest.raises(MismatchError, match="task predictor knows tasks"):
        learned_copy.evaluate()


def test_a_run_ends_with_its_rows_and_the_baselines_of_texts(place: Path, tmp_path: Path) -> None:
    quick = {"modulation.predictor_epochs": 1, "train.epochs": 1, "baselines": ("zero-shot",)}
    quick |= {"modulation.memory": ("hopfield",)}
    chosen = config(place, tmp_path, **quick)
    (record,) = run(chosen)
    ids = [row.id for row in record.metrics.rows]
    assert ids == ["hopfield", "exact-predicted", "exact", "zero-shot"]
    assert record.row("hopfield").seconds > 0
    every_one = Modulation.open(chosen.model_copy(update={"baselines": ("all",)}), seed=0)
    plain = tuple(name for name in baselines_of("texts") if name not in RIVALS)
    assert chosen_baselines(every_one) == plain
    assert "recall error" in (tmp_path / "runs" / "seed-0" / "report.html").read_text()
