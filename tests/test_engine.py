"""The engine: exact resumption, accumulation, interruption, divergence, distribution."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from memtool.checkpoints import save_checkpoint
from memtool.engine import Batches, Engine, _Losses, one_cycle
from memtool.errors import (
    ConfigError,
    CorruptError,
    DivergedError,
    MemtoolError,
    TrainingInterrupted,
)
from memtool.settings import EngineSettings, TrainSettings

CPU = EngineSettings(device="cpu", precision="fp32")
TRAIN = TrainSettings(epochs=3, batch_size=8, lr=0.05)


def data(n=40, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def batches(**changes):
    x, y = data()
    return Batches(x, y, **{"batch_size": 8, "epochs": 3, "seed": 1, **changes})


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def loss(module, batch):
    return F.cross_entropy(module(batch.inputs), batch.labels)


def test_a_fit_says_the_loss_of_its_first_step():
    fresh = model()
    plan = batches()
    first = next(iter(plan.micro_batches(0, 1)))
    expected = float(loss(fresh, first).detach())
    assert Engine(CPU).fit(fresh, plan, loss, TRAIN, stage="here").begin == (expected,)


def test_every_sample_is_seen_once_an_epoch():
    plan = batches(batch_size=7)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.indices(step)[0] for step in steps])
        assert sorted(seen) == list(range(40))


def test_a_step_depends_on_seed_and_step_only():
    assert np.array_equal(batches().indices(9), batches().indices(9))
    assert not np.array_equal(batches().indices(9), batches(seed=2).indices(9))


def test_groups_draw_bootstrap_samples_of_their_own():
    plan = batches(groups=3, epochs=2)
    samples = []
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.indices(step) for step in steps], axis=1)
        copies = np.concatenate([plan.copies(step) for step in steps], axis=1)
        samples.append([np.bincount(s, c, 40) for s, c in zip(seen, copies, strict=True)])
        for group in seen:
            assert len(set(group)) == len(group) < 40
        assert copies.min() == 1
    assert np.sum(samples[0], axis=1).tolist() == [40, 40, 40]
    assert np.array_equal(*samples)  # every epoch goes through the same samples
    assert not np.array_equal(samples[0][0], samples[0][1])


def test_a_group_does_not_depend_on_the_number_of_groups():
    few, many = batches(groups=2), batches(groups=5)
    assert len(few) == len(many)
    for step in range(len(few)):
        assert np.array_equal(few.indices(step), many.indices(step)[:2])
        assert np.array_equal(few.copies(step), many.copies(step)[:2])


def test_a_group_is_a_bootstrap_sample():
    """A sample is drawn as often as in n draws with replacement: Poisson with mean one, nearly."""
    x, y = data()
    counts = np.zeros((200, 40))
    for seed in range(100):
        plan = Batches(x, y, 40, 1, seed, groups=2)
        for group in range(2):
            counts[2 * seed + group][plan.indices(0)[group]] = plan.copies(0)[group]
    assert np.all(counts.sum(axis=1) == 40)
    for times, share in enumerate((0.363, 0.373, 0.186, 0.061)):
        assert (counts == times).mean() == pytest.approx(share, abs=0.015)
    assert np.abs(counts.mean(axis=0) - 1).max() < 0.3


@pytest.mark.parametrize("batch_size", [1, 7, 40, 100])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_no_batch_is_empty(batch_size, count):
    x, y = data(n=count)
    plan = Batches(x, y, batch_size, 1, 0, groups=3)
    drawn = [plan.copies(step).sum(axis=1) for step in range(len(plan))]
    assert np.min(drawn) >= 1
    assert np.sum(drawn, axis=0).tolist() == [count] * 3


def test_weights_are_copies_with_mean_one():
    plan = batches(groups=2)
    parts = list(plan.micro_batches(1, 3))
    weights = torch.cat([part.weights.view(2, -1) for part in parts], dim=1)
    assert torch.allclose(weights.mean(dim=1), torch.ones(2))
    ratio = weights / torch.from_numpy(plan.copies(1))
    assert torch.allclose(ratio, ratio[:, :1])
    assert torch.equal(next(batches().micro_batches(0, 1)).weights, torch.ones(8))


def test_micro_batches_together_are_the_batch():
    plan = batches(groups=2)
    whole = next(plan.micro_batches(4, 1))
    parts = list(plan.micro_batches(4, 3))
    joined = torch.cat([part.inputs.view(2, -1, 6) for part in parts], dim=1)
    assert torch.equal(joined.reshape(-1, 6), whole.inputs)


def test_accumulation_changes_nothing_but_memory():
    states = []
    for accumulate in (1, 4):
        module = model().double()
        settings = CPU.model_copy(update={"accumulate": accumulate})
        x, y = data()
        plan = Batches(x.astype(np.float64), y, 8, 3, 1)
        Engine(settings).fit(module, plan, loss, TRAIN, stage="t")
        states.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.allclose(*states, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("wanted", "mode"), [(True, None), ("graphs", "reduce-overhead")])
def test_a_model_is_compiled_as_it_was_asked_for(monkeypatch, wanted, mode):
    """With torch's own compiler a test would take minutes: its eager backend stands for it."""
    compiled = torch.compile
    modes, steps = [], []

    def eager(function, **how):
        modes.append(how["mode"])
        return compiled(function, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    mark = torch.compiler.cudagraph_mark_step_begin
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: (steps.append(1), mark())
    )
    states = []
    for setting in (False, wanted):
        module = model()
        engine = Engine(CPU.model_copy(update={"compile": setting}))
        engine.fit(module, batches(epochs=1), loss, TRAIN, stage="t")
        states.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.allclose(*states, rtol=0, atol=1e-6)
    assert modes == [mode]
    assert len(steps) == (len(batches(epochs=1)) if mode else 0)


def test_graphs_and_accumulation_are_refused_together():
    with pytest.raises(ConfigError, match=r"engine\.compile graphs") as refused:
        Engine(CPU.model_copy(update={"compile": "graphs", "accumulate": 2}))
    assert "engine.accumulate=1" in str(refused.value)


class Stack(nn.Module):
    """Linear classifiers, one for each group, that start differently."""

    def __init__(self, first, last):
        super().__init__()
        start = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(0)) * 20
        self.weight = nn.Parameter(start[first:last].double())
        self.bias = nn.Parameter(torch.zeros(last - first, 2, dtype=torch.float64))

    def forward(self, x):
        grouped = x.view(len(self.weight), -1, 6)
        return torch.baddbmm(self.bias[:, None], grouped, self.weight.transpose(1, 2))


def loss_of_each(module, batch):
    logits = module(batch.inputs)
    each = F.cross_entropy(logits.flatten(0, 1), batch.labels, reduction="none") * batch.weights
    return each.view(len(logits), -1).mean(dim=1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_groups_learn_as_if_each_were_alone(accumulate):
    """Also clipped alone: the first gradients are long, and of different lengths."""
    x, y = data()
    train = TRAIN.model_copy(update={"clip": 0.3})
    engine = Engine(CPU.model_copy(update={"accumulate": accumulate}))
    plan = Batches(x.astype(np.float64), y, 8, 4, 1, groups=3)
    together = Stack(0, 3)
    fit = engine.fit(together, plan, loss_of_each, train, stage="t")
    for group in range(3):

        class Alone(Batches):
            def indices(self, step, group=group):
                return plan.indices(step)[group][None]

            def copies(self, step, group=group):
                return plan.copies(step)[group][None]

            steps_per_epoch = plan.steps_per_epoch

        module = Stack(group, group + 1)
        batches = Alone(x.astype(np.float64), y, 8, 4, 1)
        alone = engine.fit(module, batches, loss_of_each, train, stage="t")
        assert torch.allclose(together.weight[group], module.weight[0], rtol=0, atol=1e-10)
        assert fit.by_group[group] == pytest.approx(alone.losses, rel=1e-6)


def test_training_learns_and_reports():
    events = []
    module = model()
    fit = Engine(CPU).fit(module, batches(epochs=8), loss, TRAIN, stage="t", progress=events.append)
    assert fit.losses[-1] < 0.5 * fit.losses[0]
    assert events[-1].step == events[-1].total == fit.steps == 40


class Stop(Exception):
    pass


def test_a_killed_run_goes_on_exactly_where_it_was(tmp_path):
    straight = model()
    Engine(CPU).fit(straight, batches(), loss, TRAIN, stage="t")
    file = tmp_path / "c.safetensors"
    interrupted = model()

    def interrupt(event):
        if event.step == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as told:
        Engine(CPU).fit(
            interrupted,
            batches(),
            loss,
            TRAIN,
            stage="t",
            checkpoint=file,
            fingerprint="f",
            progress=interrupt,
        )
    assert told.value.checkpoint == file
    assert file.exists()
    resumed = model(seed=5)
    fit = Engine(CPU).fit(
        resumed, batches(), loss, TRAIN, stage="t", checkpoint=file, fingerprint="f"
    )
    assert fit.resumed_at == 6
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    again = Engine(CPU).fit(
        model(), batches(), loss, TRAIN, stage="t", checkpoint=file, fingerprint="f"
    )
    assert again.resumed_at == again.steps


def test_without_a_checkpoint_nothing_is_said_to_be_saved():
    def interrupt(event):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as told:
        Engine(CPU).fit(model(), batches(), loss, TRAIN, stage="t", progress=interrupt)
    assert not isinstance(told.value, TrainingInterrupted)


def stopped(file, at=6):
    """A training that was saved in `file` after step `at`."""

    def interrupt(event):
        if event.step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        resume(file, progress=interrupt)


def resume(file, fingerprint="f", **more):
    module = model()
    fit = Engine(CPU).fit(
        module,
        batches(),
        loss,
        TRAIN,
        stage="t",
        checkpoint=file,
        fingerprint=fingerprint,
        **more,
    )
    return fit, torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path):
    file = tmp_path / "c.safetensors"
    stopped(file)
    assert resume(file, "another")[0].resumed_at == 0


def test_a_checkpoint_is_for_its_owner_only(tmp_path):
    stopped(tmp_path / "c")
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_200_random_bytes_in_a_checkpoint_are_refused_by_name(tmp_path):
    file = tmp_path / "c.safetensors"
    stopped(file)
    whole = file.read_bytes()
    for seed in range(20):
        draw = np.random.default_rng(seed)
        data = bytearray(whole)
        low = int(draw.integers(len(data) - 200))
        data[low : low + 200] = draw.bytes(200)
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=r"c\.safetensors") as refused:
            resume(file)
        assert "--fresh" in str(refused.value)
    file.write_bytes(whole)
    assert resume(file)[0].resumed_at == 6
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptError):
        resume(file)


def test_a_checkpoint_without_checksum_is_left_aside_with_a_word(tmp_path, caplog):
    file = tmp_path / "c.safetensors"
    save_file({"parameter/0.bias": torch.ones(5)}, file, {"format": "2", "fingerprint": "f"})
    assert resume(file)[0].resumed_at == 0
    assert "has no checksum" in caplog.text
    assert "begins anew" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path):
    stopped(tmp_path / "c")
    (tmp_path / "c").chmod(0)
    with pytest.raises(MemtoolError, match=r"cannot read .* Permission denied") as refused:
        resume(tmp_path / "c")
    assert not isinstance(refused.value, CorruptError)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of processes")
def test_without_file_handles_a_checkpoint_is_not_called_damaged(tmp_path):
    stopped(tmp_path / "c")
    with no_more_files(), pytest.raises(MemtoolError, match="Too many open files") as refused:
        resume(tmp_path / "c")
    assert not isinstance(refused.value, CorruptError)
    assert "ulimit -n" in str(refused.value)
    assert resume(tmp_path / "c")[0].resumed_at == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk_is_said(tmp_path):
    (tmp_path / "c").symlink_to("/dev/full")
    trained = {"a": nn.Parameter(torch.zeros(3))}
    with pytest.raises(MemtoolError, match=r"cannot write .*: No space left") as refused:
        save_checkpoint(
            tmp_path / "c", "f", trained, torch.optim.AdamW(trained.values()), (0, [], [])
        )
    assert not isinstance(refused.value, CorruptError)


@contextmanager
def no_more_files():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_divergence_names_stage_step_and_remedy():
    def diverges(module, batch):
        return loss(module, batch) * torch.inf

    with pytest.raises(DivergedError, match=r"task 1: the loss became inf at step 1 of 15") as info:
        Engine(CPU).fit(model(), batches(), diverges, TRAIN, stage="task 1")
    assert "smaller learning rate" in str(info.value)


def test_a_loss_that_is_read_a_step_late_names_its_step():
    def diverged(loss, step):
        return DivergedError(f"{loss} at step {step}")

    losses = _Losses(1, [], 3, 1, diverged)
    losses.queue([torch.tensor(0.5), torch.tensor([0.25])])
    assert (losses.running, losses.news()) == ([], [])
    losses.queue([torch.tensor(torch.nan)])
    assert (losses.running, losses.begin, losses.news()) == ([[0.75]], (0.75,), [(4, 0.75)])
    with pytest.raises(DivergedError, match="nan at step 5"):
        losses.settle()


def test_after_step_runs_after_every_step():
    module = model()
    frozen = module[0].weight.detach().clone()

    def put_back():
        with torch.no_grad():
            module[0].weight.copy_(frozen)

    Engine(CPU).fit(module, batches(), loss, TRAIN, stage="t", after_step=put_back)
    assert torch.equal(module[0].weight, frozen)


def test_predict_keeps_the_order():
    x, _ = data(n=23)
    result = Engine(CPU).predict(lambda batch: batch * 2, x, batch_size=5)
    assert torch.equal(result, torch.from_numpy(x) * 2)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="no parameters"):
        Engine(CPU).fit(model().requires_grad_(False), batches(), loss, TRAIN, stage="t")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="no CUDA device"):
        Engine(EngineSettings(device="cuda"))


def test_the_rate_rises_then_falls_to_zero():
    rates = [one_cycle(step / 100, 0.15) for step in range(101)]
    peak = int(np.argmax(rates))
    assert peak == 15
    assert rates[peak] == pytest.approx(1)
    assert rates[-1] == pytest.approx(0)
    assert all(a <= b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))


SCRIPT = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_engine as t
module = t.model().double()
x, y = t.data()
plan = t.Batches(x.astype("float64"), y, 8, 2, 1)
engine = t.Engine(t.CPU)
engine.fit(module, plan, t.loss, t.TRAIN, stage="t")
if engine.is_main:
    print(json.dumps(torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Under torchrun every process takes half of each batch; the result is the same."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in (".", "cli", "stores")),
        "OMP_NUM_THREADS": "1",
    }
    found = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, str(script), str(Path(__file__).parent)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=200
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
        found.append(torch.tensor(json.loads(lines[0]), dtype=torch.float64))
    assert torch.allclose(*found, rtol=0, atol=1e-9)


def means_of(steps, kind):
    """The slow twin: what `train.average` makes of the parameters after every step, in float64."""
    if kind == "half":
        return [sum(parts) / len(parts) for parts in zip(*steps[len(steps) // 2 :], strict=True)]
    decay, mean = np.exp(-10 / len(steps)), steps[0]
    for step in steps:
        mean = [decay * m + (1 - decay) * new for m, new in zip(mean, step, strict=True)]
    return mean


@pytest.mark.parametrize("kind", ["half", "ema"])
def test_training_ends_with_the_mean_of_its_steps(kind):
    plain, module, steps, scored = model(), model(), [], []
    Engine(CPU).fit(plain, batches(), loss, TRAIN, stage="t")

    def parameters():
        return [p.detach().double().clone() for p in module.parameters()]

    settings = TRAIN.model_copy(update={"average": kind})
    keep = {"after_step": lambda: steps.append(parameters())}
    Engine(CPU).fit(module, batches(), loss, settings, stage="t", **keep)
    for last, without in zip(steps[-1], plain.parameters(), strict=True):
        assert torch.equal(last.float(), without)  # the steps themselves are the same
    for mean, twin in zip(parameters(), means_of(steps, kind), strict=True):
        assert torch.allclose(mean, twin, rtol=0, atol=1e-6)

    assert not torch.allclose(parameters()[0], steps[-1][0], rtol=0, atol=1e-4)

    def score():
        scored.append(parameters())
        return float(len(scored))

    module, steps[:] = model(), []
    Engine(CPU).fit(module, batches(), loss, settings, stage="t", select=score, **keep)
    for scored_last, end in zip(scored[-1], parameters(), strict=True):
        assert torch.equal(scored_last, end)  # what is scored is the mean, and the last is kept
    for scored_last, twin in zip(scored[-1], means_of(steps, kind), strict=True):
        assert torch.allclose(scored_last, twin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["half", "ema"])
def test_a_running_mean_goes_on_where_it_was_and_what_is_put_back_is_its_own(kind, tmp_path):
    settings = TRAIN.model_copy(update={"average": kind})
    straight, frozen = model(), []

    def put_back(module):
        kept = module[0].weight.detach()[:2].clone()
        frozen.append(kept)

        @torch.no_grad()
        def call():
            module[0].weight[:2] = kept

        return {"after_step": call}

    Engine(CPU).fit(straight, batches(), loss, settings, stage="t", **put_back(straight))
    assert torch.equal(straight[0].weight[:2], frozen[0])

    def interrupt(event):
        if event.step == 11:
            signal.raise_signal(signal.SIGINT)

    file = {"checkpoint": tmp_path / "c", "fingerprint": "f", "stage": "t"}
    first, second = model(), model()
    with pytest.raises(TrainingInterrupted):
        Engine(CPU).fit(
            first, batches(), loss, settings, progress=interrupt, **file, **put_back(first)
        )
    again = Engine(CPU).fit(second, batches(), loss, settings, **file, **put_back(second))
    assert again.resumed_at == 11
    for one, other in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
