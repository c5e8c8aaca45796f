"""The engine: exact resumption, accumulation, interruption, divergence, distribution."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtool.config import EngineSettings, TrainSettings
from memtool.engine import Batches, Engine, one_cycle
from memtool.errors import ConfigError, DivergedError

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
    plan = batches(groups=3, epochs=1)
    seen = np.concatenate([plan.indices(step) for step in range(plan.steps_per_epoch)], axis=1)
    assert seen.shape == (3, 40)
    for group in seen:
        assert len(set(group)) < 40
    assert not np.array_equal(np.sort(seen[0]), np.sort(seen[1]))


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

    with pytest.raises(KeyboardInterrupt):
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


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path):
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"not a checkpoint")
    fit = Engine(CPU).fit(
        model(), batches(), loss, TRAIN, stage="t", checkpoint=file, fingerprint="f"
    )
    assert fit.resumed_at == 0


def test_divergence_names_stage_step_and_remedy():
    def diverges(module, batch):
        return loss(module, batch) * torch.inf

    with pytest.raises(DivergedError, match=r"task 1: the loss became inf at step 1 of 15") as info:
        Engine(CPU).fit(model(), batches(), diverges, TRAIN, stage="task 1")
    assert "smaller learning rate" in str(info.value)


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
