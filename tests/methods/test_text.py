"""Learning on streams of texts: resuming, what is written, the baselines, and the whole run."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from memtool.adapters.recalls import dropping
from memtool.config import resolve
from memtool.errors import ConfigError
from memtool.evaluation.record import read_record
from memtool.experiments.run import run
from memtool.learning.answers import AnswerScores, answer_row
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.baselines import baselines_of
from memtool.methods.baselines.inf_lora import InfLora
from memtool.methods.baselines.joint import joint
from memtool.methods.baselines.moe_lora import MoeLora
from memtool.methods.baselines.o_lora import STRENGTH, OLora, overlap
from memtool.methods.baselines.zero_shot import InContext
from memtool.methods.moram.learn import AtomLearner
from memtool.methods.moram.state import gate_of
from memtool.workspace import Workspace
from tests.methods.facts import FACTS, config_of, work_of, write_facts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and three tasks of texts with a description."""
    return write_facts(tmp_path_factory.mktemp("texts"))


def atoms_of(work: Workspace) -> AtomLearner:
    """An empty bank that learns, through the configured gate."""
    gate = gate_of(work.config.moram, work.config.adapter.rank)
    return AtomLearner(work, Rank1Memory(work.layout.sites), gate)


def test_older_atoms_stay_as_they_were(place: Path, tmp_path: Path) -> None:
    work = work_of(place, tmp_path)
    learner = atoms_of(work)
    tasks = work.stream.tasks
    learner.learn(tasks[0], "test")
    name = work.layout.sites[0].name
    before = learner.bank.bank(name).keys.clone()
    learner.learn(tasks[1], "test")
    assert torch.equal(learner.bank.bank(name).keys[:2], before)


def test_a_row_of_some_tasks_has_the_metrics_of_a_stream_that_ended_there(
    place: Path, tmp_path: Path
) -> None:
    tasks = work_of(place, tmp_path).stream.tasks
    found = {
        0: AnswerScores(losses=(3.0, 3.0, 3.0)),
        1: AnswerScores(losses=(1.0, 3.0, 3.0)),
        2: AnswerScores(losses=(1.5, 0.5, 2.0), cut_prompts=4, cut_answers=2),
    }
    row = answer_row("moram", "MoRAM", "method", tasks, found)
    assert row.loss[2:] == ((1.5, 0.5, 2.0), (None, None, None))
    assert row.metrics == {"loss.final": 1.0, "loss.forgetting": 0.5}
    assert (row.cut_prompts, row.cut_answers) == (4, 2)


def test_joint_learns_every_task_without_order(place: Path, tmp_path: Path) -> None:
    work = work_of(place, tmp_path)
    tasks = work.stream.tasks
    (row,) = joint(work, tasks)
    (zero,) = baselines_of("texts")["zero-shot"](work, tasks)
    assert row.kind == "upper bound"
    assert all(cell is None for line in row.loss[:3] for cell in line)
    for after, before in zip(row.loss[3], zero.loss[0], strict=True):
        assert after < before - 0.1  # type: ignore[operator]
    assert len(set(zero.loss)) == 1
    assert zero.metrics["loss.forgetting"] == 0


def test_the_penalty_of_o_lora_is_not_zero_and_lowers_the_overlap(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(place, tmp_path)
    tasks = work.stream.tasks
    left: dict[float, float] = {}
    for strength in (0.0, 1.0):
        monkeypatch.setattr("memtool.methods.baselines.o_lora.STRENGTH", strength)
        learner = OLora(work, 3)
        learner.learn(tasks[0], "test")
        nothing = torch.zeros(())
        assert float(learner.penalty(nothing, nothing, nothing)) == 0
        learner.learn(tasks[1], "test")
        assert learner.past is not None
        left[strength] = float(overlap(learner.past, learner.values).detach())
        if strength:
            penalty = learner.penalty(nothing, nothing, nothing)
            penalty.backward()
            assert float(penalty.detach()) == pytest.approx(left[strength])
            assert any(a.grad is not None and a.grad.abs().max() > 0 for a in learner.values.a)
    assert STRENGTH > 0
    assert left[1.0] < 0.7 * left[0.0]


def test_the_branch_of_inf_lora_does_not_see_old_inputs(place: Path, tmp_path: Path) -> None:
    work = work_of(place, tmp_path)
    learner = InfLora(work, 3)
    learner.learn(work.stream.tasks[0], "test")
    learner.before_task(work.stream.tasks[1])
    for module, second in learner.moments(work.stream.tasks[0]).items():
        block = next(site.block for site in work.layout.sites if site.module == module)
        a = learner.values.block(block).modules[module].a[0, 0].double()  # type: ignore[union-attr]
        seen = float(((a @ second) * a).sum() / second.trace())
        assert seen < 0.05, module
    assert not any(parameter.requires_grad for parameter in learner.values.a)


def test_moments_leave_padding_out(place: Path, tmp_path: Path) -> None:
    together = InfLora(work_of(place, tmp_path), 3)
    alone = InfLora(work_of(place, tmp_path, **{"engine.eval_batch_size": 1}), 3)
    task = together.work.stream.tasks[1]
    for module, second in together.moments(task).items():
        torch.testing.assert_close(second, alone.moments(task)[module], rtol=1e-5, atol=1e-5)


def test_a_router_of_moe_lora_learns_and_looks_at_one_token_at_a_time(
    place: Path, tmp_path: Path
) -> None:
    work = work_of(place, tmp_path)
    learner = MoeLora(work, 3)
    learner.learn(work.stream.tasks[0], "test")
    assert any(parameter.abs().max() > 0 for parameter in learner.routers.parameters())
    tokens = learner.work.backbone.encode(["turn ab:"]).tokens
    longer = learner.work.backbone.encode(["turn ab:"], ["x"]).tokens
    with torch.no_grad():
        short = learner.work.backbone.logits(tokens, learner.recall())
        whole = learner.work.backbone.logits(longer, learner.recall())
    torch.testing.assert_close(whole[:, : short.shape[1]], short, rtol=1e-4, atol=1e-4)


def test_examples_come_from_the_training_set_and_fit(place: Path, tmp_path: Path) -> None:
    work = work_of(place, tmp_path, **{"text.shots": 5})
    learner = InContext(work, 3)
    task = work.stream.tasks[0]
    for asked, prompt in zip(learner.asked(task), task.test.prompts, strict=True):
        assert asked.endswith(prompt)
        assert len(learner.work.backbone.tokenizer(asked).input_ids) <= 60
        *shots, _ = asked.split("\n\n")
        assert len(shots) == 2  # a third one does not fit into 60 tokens
        known = [f"{p} {a}" for p, a in FACTS["letters"]]
        assert set(shots) <= set(known)


def test_dropout_drops_a_share_of_the_inputs_by_its_seed(place: Path, tmp_path: Path) -> None:
    learner = atoms_of(work_of(place, tmp_path))
    learner.learn(learner.work.stream.tasks[0], "test")
    tokens = learner.work.backbone.encode(["after a comes"]).tokens

    def logits(share: float, seed: int) -> torch.Tensor:
        with torch.no_grad():
            return learner.work.backbone.logits(
                tokens, dropping(learner.recall(), share, seed, tokens.device)
            )

    assert torch.equal(logits(0.0, 1), logits(0.0, 2))
    assert torch.equal(logits(0.3, 1), logits(0.3, 1))
    assert not torch.equal(logits(0.3, 1), logits(0.3, 2))
    assert dropping(None, 0.3, 1, tokens.device) is None


def test_epochs_of_each_task_are_named_one_by_one(place: Path, tmp_path: Path) -> None:
    work = work_of(place, tmp_path, **{"text.epochs": (1, 2, 3)})
    assert [work.epochs(task) for task in work.stream.tasks] == [1, 2, 3]
    with pytest.raises(ConfigError, match="2 numbers for 3 tasks"):
        _ = work_of(place, tmp_path, **{"text.epochs": (1, 2)}).stream


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory.mix", "params"),
        ("memory.separation", "affine"),
        ("memory.similarity", "cosine"),
        ("consolidate.keys", "random"),
        ("consolidate.value_lr", 0.1),
        ("memory.routing", "prototype"),
    ],
)
def test_mira_says_what_it_does_not_do_on_texts(
    place: Path, tmp_path: Path, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=f"{key} {value} on a stream of texts") as caught:
        run(config_of(place, tmp_path, method="mira", **{key: value}))
    assert f"--set {key}=" in (caught.value.remedy or "")


def test_a_whole_run_generates_scores_and_writes_the_record(
    place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = config_of(
        place,
        tmp_path,
        **{"text.generate": True, "train.epochs": 2, "baselines": ("sequential", "zero-shot")},
    )
    (record,) = run(config, preset="moram-trace")
    assert [row.id for row in record.metrics.rows] == ["moram", "zero-shot", "sequential"]
    moram = record.row("moram")
    assert {"op.trace", "bwt.gem", "bwt.trace", "loss.final", "loss.forgetting"} <= set(
        moram.metrics
    )
    assert all(score is not None for line in moram.accuracy for score in line)
    assert [right.share for right in moram.right if right] == list(moram.accuracy[-1])
    assert record.run.setting == "trace"
    folder = tmp_path / "runs" / "seed-0"
    assert read_record(folder / "record.json") == record
    assert "Loss after the last task" in (folder / "report.html").read_text(encoding="utf-8")
    request.getfixturevalue("no_page")
    (again,) = run(config, preset="moram-trace")
    assert again.metrics == record.metrics
    (fresh,) = run(config, preset="moram-trace", resume=False)
    assert fresh.row("moram").loss == moram.loss


def test_every_baseline_gives_a_row(place: Path, tmp_path: Path) -> None:
    work = work_of(place, tmp_path, **{"train.epochs": 1})
    known = baselines_of("texts")
    assert {"ewc", "lwf", "joint", "in-context"} <= set(known)
    for name, measure in known.items():
        (row,) = measure(work, work.stream.tasks)
        assert row.id == name
        assert all(cell is not None and math.isfinite(cell) for cell in row.loss[3])


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("MEMTOOL_DATA"), reason="MEMTOOL_DATA is not set: no TRACE texts"
)
def test_the_preset_learns_on_real_texts(tmp_path: Path) -> None:
    config = resolve(
        preset="moram-trace",
        overrides={
            "store": str(tmp_path / "memory"),
            "runs": tmp_path / "runs",
            "stream.order": ("FOMC", "NumGLUE-ds"),
            "stream.train_per_task": 16,
            "stream.test_per_task": 4,
            "text.epochs": None,
            "train.epochs": 2,
            "train.batch_size": 8,
        },
        ambient=False,
    ).config
    row = run(config, baselines=False)[0].row("moram")
    assert row.loss[2][0] < row.loss[0][0]  # type: ignore[operator]
    assert row.loss[2][1] < row.loss[1][1]  # type: ignore[operator]
