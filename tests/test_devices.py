"""All methods on devices that are not there: nothing is float64 on them, no step waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import memtool
from memtool import devices, engine
from memtool.devices import Late, sent
from memtool.engine import Batch, Batches, Joint, Together
from memtool.methods import open_method
from memtool.settings import Config
from tests.contract import kinds
from tests.fake_device import FakeDevice

CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "mira": ("mira on images", {"train.stop_at": 0.9, "adapter.per_task": 2}),
    "mira, learned keys": (
        "mira on images",
        {
            "memory.separation": "softmax",
            "memory.scope": "block",
            "consolidate.keys": "random",
            "consolidate.epochs": 1,
            "consolidate.batch_size": 8,
            "head.kind": "shared",
            "head.scope": "shared",
            "consolidate.protect": "dual-gpm",
            "consolidate.value_lr": 1e-3,
            "train.mixup": 0.4,
            "train.mixup_of": "class",
        },
    ),
    "mira, hard": ("mira on images", {"memory.routing": "lda"}),
    "mira, top-k": (
        "mira on images",
        {"memory.separation": "topk", "memory.frozen": "novelty", "head.kind": "prototype"},
    ),
    "moram": ("moram on images", {}),
    "moram, norm by task": ("moram on images", {"moram.score_norm": "task", "train.clip": 1.0}),
    "modulation": ("modulation on images", {}),
    "nearest-mean": ("nearest-mean on images", {}),
    "mira on texts": ("mira on texts", {}),
    "moram on texts": ("moram on texts", {}),
}
"""By name: a kind of the contract, and what is changed in it."""

ALWAYS = ("mira, learned keys", "mira, top-k", "moram")
"""Those that run in every test run: each goes through code that no other of them does."""

LATE = "devices.Late.read"
PADDED = "backbones.causal_lm._attention_mask"
STOCK = "methods.routed.memory.Routing.recall"
FINITE = "methods.routed.memory._require_weights"

ALLOWED_IN_A_STEP = {
    # The loss of the step before, whose kernels are done when this one is queued.
    LATE: 1,
}
"""For what the CPU waits in a training step, and how often."""

ALLOWED_IN_A_FORWARD_PASS = {
    # Of texts: where nothing is padded transformers takes a faster kernel, and looks itself.
    PADDED,
    # Of many adapters those are computed that an input recalls.
    "adapters.picks.Picks.of",
    # Of many adapters those are read that somebody asks for.
    STOCK,
    "adapters.stock.Stock.take",
    # How unlike all that was learned an input is is told in float64, and so on the CPU.
    "devices.exact",
    "memories.keyed.BlockMemory.answer",
    "methods.attached.finite",
    # A rule of one's own may give numbers that are none, and is told so.
    FINITE,
}

BROKEN = {
    "nearest-mean": "what a rule of one's own computes is its own",
    "mira on texts": "adapters of a stock are read as prompts ask for them",
}
"""What torch.compile does not make one graph of, and why."""

ANSWERS = {
    PADDED: True,
    FINITE: True,
    "learning.adapt.require_learned": True,
    "backbones.causal_lm.CausalLM.generate": False,
}
"""What is found where numbers of the device may be looked at: the last but one once a training, the
last at every token that is generated."""

FEW = {"train.batch_size": 8, "stream.train_per_task": 24, "stream.test_per_task": 12}


def config_of(kind: str, folder: Path) -> Config:
    """The settings of a kind."""
    like, changes = CHANGES[kind]
    config = kinds.config_of(like, folder)
    few = {} if like.endswith("texts") else FEW
    for key, value in {**few, **changes}.items():
        part, _, name = key.partition(".")
        own = getattr(config, part).model_copy(update={name: value})
        config = config.model_copy(update={part: type(own).model_validate(own.model_dump())})
    return config


@dataclass(frozen=True)
class Made:
    """A memory of two tasks that was made on a device, and what that device saw."""

    kind: str
    folder: Path
    device: FakeDevice


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[] if k in ALWAYS else pytest.mark.slow) for k in CHANGES],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("device")
    method = open_method(config_of(request.param, folder), seed=0)
    work = method.workspace
    _ = work.stream, work.backbone
    steps = Batches.micro_batches
    with pytest.MonkeyPatch.context() as patch, FakeDevice("meta", ANSWERS) as device:

        def watched(batches: Batches, step: int, parts: int) -> Iterator[Batch]:
            device.step_begins(first=step == 0)
            yield from steps(batches, step, parts)

        def watched_together(together: Together, step: int, parts: int) -> Iterator[Joint]:
            device.step_begins(first=step == 0)
            each = (steps(batches, step, parts) for batches in together.trainings)
            yield from map(Joint, zip(*each, strict=True))

        patch.setattr(Batches, "micro_batches", watched)
        patch.setattr(Together, "micro_batches", watched_together)
        patch.setattr(devices, "QUEUES", {"cuda", "meta"})
        patch.setattr(engine, "save_checkpoint", lambda *_: None)
        patch.setattr(work.engine, "device", device.device)
        patch.setattr(work.engine._accelerator, "prepare_model", lambda module: module)
        work.backbone = device.take(work.backbone)
        if method.trained_apart is None:
            method.adapt_together(["1", "2"])
        for task in "12":
            method.adapt(task)
            method.write()
            method.consolidate()
        method.evaluate()
    return Made(request.param, folder, device)


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def test_nothing_is_float64_on_a_device(made: Made) -> None:
    assert made.device.doubles == {}


def test_a_training_step_waits_for_nothing_but_what_is_named(made: Made) -> None:
    allowed = ALLOWED_IN_A_STEP
    found, steps = made.device.in_steps, made.device.steps
    assert steps >= 2
    assert found.keys() == allowed.keys()
    for name, each in allowed.items():
        assert 0 < found[name] <= steps * each  # that of a training's last step comes after it


def test_a_memory_answers_on_cuda_without_a_wait(made: Made) -> None:
    model = memtool.load(made.folder / "memory").attach()
    with FakeDevice("cuda", ANSWERS) as device:
        there = device.take(model)
        if made.kind.endswith("texts"):
            tokens = model.backbone.encode(["after a comes", "b"]).tokens.to(device.device)
            device.waits.clear()
            out = there(tokens)
            assert out.device == device.device
            assert out.shape[:2] == tokens.shape
            assert device.waits[PADDED] in (1, 2)  # a look at the prompts is a pass of its own
            assert set(device.waits) <= ALLOWED_IN_A_FORWARD_PASS
        else:
            images = torch.zeros(5, 32, 32, 3, dtype=torch.uint8).to(device.device)
            device.waits.clear()
            out = there(images)
            assert out.logits.device == out.weights.device == device.device
            assert out.logits.shape[0] == out.novelty.shape[0] == 5
            assert set(device.waits) <= ALLOWED_IN_A_FORWARD_PASS
        assert device.doubles == {}


def test_a_forward_pass_is_one_graph(made: Made) -> None:
    if made.kind in BROKEN:
        pytest.skip(BROKEN[made.kind])
    model = memtool.load(made.folder / "memory").attach()
    torch._dynamo.reset()
    if made.kind.endswith("texts"):
        given = model.backbone.encode(["after a comes", "b"]).tokens
    else:
        given = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted, found = model(given), compiled(given)
    if not isinstance(wanted, torch.Tensor):
        wanted, found = wanted.logits, found.logits
    torch.testing.assert_close(found, wanted)


def test_the_device_counts_float64_and_waits() -> None:
    with FakeDevice("cuda") as device:
        there = torch.ones(3).to(device.device)
        assert there.device.type == "cuda"
        assert sum(device.waits.values()) == 1
        torch.ones(3).to(device.device, non_blocking=True)
        assert (sum(device.waits.values()), sum(device.sent.values())) == (1, 1)
        assert device.doubles == {}
        there.double()
        assert sum(device.doubles.values()) == 1
        assert there.cpu().shape == (3,)
        assert sum(device.waits.values()) == 2
        for looked in (
            lambda: bool(there.any()),
            lambda: there.unique(),
            lambda: there[there > 0],
            lambda: there.sum().item(),
            lambda: there + torch.ones(3),
        ):
            with pytest.raises(Exception, match=r"aten|same device"):
                looked()
    assert torch.ones(3).sum().item() == 3


def test_what_comes_late_is_queued_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        record = staticmethod(lambda: told.append("record"))
        synchronize = staticmethod(lambda: told.append("synchronize"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with FakeDevice("cuda") as device:
        late = Late(sent(torch.ones(2), device.device), sent(torch.ones(()), device.device))
        assert told == ["record"]
        assert [tensor.shape for tensor in late.read()] == [(2,), ()]
    assert told == ["record", "synchronize"]
    here = torch.ones(2, requires_grad=True)
    (read,) = Late(here * 2).read()
    assert torch.equal(read, torch.full((2,), 2.0))
    assert not read.requires_grad
