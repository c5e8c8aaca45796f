"""A memory in five lines: loaded from its store alone, attached, and asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memtool
from memtool.config import resolve
from memtool.errors import ConfigError, DataError, NotFoundError
from memtool.methods import open_method
from memtool.methods.attached import AttachedImages, Output
from memtool.methods.moram.attached import AttachedAnswers, AttachedAtoms
from memtool.settings import Config
from memtool.streams import load_image
from memtool_stores import SpaceMismatchError
from tests.methods.facts import moram_of, write_facts
from tests.shown import METHOD, write_shown

SMALL = {
    "stream.train_per_task": 40,
    "stream.test_per_task": 30,
    "train.epochs": 1,
    "adapter.rank": 4,
    "adapter.alpha": 4,
    "modulation.hidden": 32,
    "modulation.predictor_epochs": 1,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "mira": ("digits-dil", {}),
    "mira, learned keys": (
        "digits-dil",
        {"memory.separation": "softmax", "memory.scope": "block", "consolidate.keys": "random"}
        | {"consolidate.epochs": 1, "head.kind": "shared", "head.scope": "shared"},
    ),
    "mira, hard": ("digits-dil", {"memory.routing": "lda"}),
    "moram": ("moram-digits", {"stream.splits": 5}),
    "modulation": ("modulation-digits", {"modulation.memory": "hopfield"}),
    "nearest-mean": ("digits-dil", {"method": METHOD}),
}
"""By name: a preset, and what is changed in it."""


def _config(folder: Path, kind: str) -> Config:
    preset, changes = KINDS[kind]
    where = {"store": str(folder / "memory"), "runs": str(folder / "runs")}
    if kind == "nearest-mean":
        write_shown(folder)
        where["method"] = str(folder / METHOD)
    return resolve(
        preset=preset, overrides={**SMALL, **changes, **where}, environ={}, cwd=folder
    ).config


_SLOW = pytest.mark.slow
"""Of what torch takes a minute to trace."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a memory of two tasks, by kind; made once."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folder = folders[kind] = tmp_path_factory.mktemp("memory")
            method = open_method(_config(folder, kind), seed=0)
            for task in "12":
                method.adapt(task)
                method.write()
            method.consolidate()
            image = np.asarray(method.workspace.task("1").test.images[0])
            Image.fromarray(image).save(folder / "image.png")
        return folders[kind]

    return make


@pytest.fixture(params=KINDS)
def folder(made: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    return made(request.param)


@pytest.fixture
def _no_streams(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may open training data, once the memory is made."""
    del folder
    monkeypatch.setattr("memtool.workspace.create_stream", None)


def _images(folder: Path, count: int = 5) -> torch.Tensor:
    image = load_image(folder / "image.png", 32)
    noise = np.random.default_rng(0).integers(0, 40, (count, 1, 1, 1), dtype=np.uint8)
    return torch.from_numpy(np.maximum(image[None], noise))


def _equal(one: Output, other: Output, tolerance: float = 1e-5) -> None:
    for name in ("logits", "probabilities", "weights", "novelty"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), atol=tolerance, rtol=1e-4, equal_nan=True
        )


@pytest.mark.usefixtures("_no_streams")
def test_five_lines(folder: Path) -> None:
    memory = memtool.load(folder / "memory")
    model = memory.attach()
    batch = _images(folder)
    out = model(batch)
    assert isinstance(model, AttachedImages)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert out.logits.shape == out.probabilities.shape == (5, len(memory.classes))
    assert out.weights.shape == (5, len(memory.adapters)) == (5, 2)
    assert out.novelty.shape == out.unlike.shape == (5,)
    torch.testing.assert_close(out.logits.softmax(1), out.probabilities)
    assert memory.log()[0].id == memory.version
    pixels = memory.transform(Image.open(folder / "image.png"))[None]
    assert pixels.dtype == torch.float32
    _equal(model(pixels), model(torch.tensor(load_image(folder / "image.png", 32))[None]))


@pytest.mark.parametrize("kind", ["mira", "mira, learned keys", "moram", "nearest-mean"])
def test_it_says_what_retrieve_says(made: Callable[[str], Path], kind: str) -> None:
    folder = made(kind)
    method = open_method(_config(folder, kind), seed=0)
    said = method.retrieve(image=folder / "image.png")
    memory = memtool.load(folder / "memory")
    out = memory.attach()(torch.tensor(load_image(folder / "image.png", 32))[None])
    assert said.prediction is not None
    place = int(out.logits[0].argmax())
    assert memory.classes[place] == said.prediction.label
    assert float(out.probabilities[0, place]) == pytest.approx(said.prediction.probability, 1e-5)
    if said.prediction.novelty is not None:
        assert float(out.novelty[0]) == pytest.approx(said.prediction.novelty, 1e-5)
    parts = said.adapters if said.schema_ == "memtool.retrieve" else said.tasks
    weights = [getattr(part, "coefficient", getattr(part, "share", None)) for part in parts]
    assert out.weights[0].tolist() == pytest.approx(weights, abs=1e-6)


def test_what_it_gets_right_is_what_eval_says(folder: Path) -> None:
    memory = memtool.load(folder / "memory")
    method = open_method(memory.config.model_copy(update={"store": str(folder / "memory")}), seed=0)
    record = method.evaluate()
    id = "hopfield" if memory.config.method == "modulation" else "memory"
    right = record.row(id).accuracy[-1]
    model = memory.attach()
    for number, expected in zip((1, 2), right, strict=True):
        samples = method.workspace.task(str(number)).test
        found = model(torch.from_numpy(np.asarray(samples.images))).logits.argmax(1).numpy()
        assert expected == pytest.approx(float((found == samples.labels).mean()))


@pytest.mark.parametrize("task", ["1", "2"])
def test_a_task_that_is_told_has_its_adapter_exactly(
    made: Callable[[str], Path], task: str
) -> None:
    for kind in ("mira", "modulation", "nearest-mean"):
        folder = made(kind)
        memory = memtool.load(folder / "memory")
        method = open_method(_config(folder, kind), seed=0)
        samples = method.workspace.task(task).test
        out = memory.attach(task=task)(torch.from_numpy(np.asarray(samples.images)))
        right = float((out.logits.argmax(1).numpy() == samples.labels).mean())
        if kind == "nearest-mean":
            row = method.evaluate(compare=True).row("oracle")
        else:
            row = method.evaluate(setting="til").row("memory" if kind == "mira" else "hopfield")
        assert row.accuracy[-1][int(task) - 1] == pytest.approx(right)


def test_it_is_a_module_like_any_other(folder: Path) -> None:
    model = memtool.load(folder / "memory").attach()
    batch, device = _images(folder), torch.device("meta")
    expected = model(batch)
    _equal(nn.Sequential(nn.Identity(), model)(batch), expected)
    loader = DataLoader(TensorDataset(batch), batch_size=2, num_workers=1)
    logits = torch.cat([model(images).logits for (images,) in loader])
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-4)
    moved = model.to(device)
    tensors = [*moved.parameters(), *moved.buffers()]
    assert tensors
    # What is counted in float64 stays on the CPU, as a device may not know it.
    assert {tensor.device for tensor in tensors if tensor.dtype != torch.float64} == {device}
    exact = {tensor.device for tensor in tensors if tensor.dtype == torch.float64}
    assert exact <= {torch.device("cpu")}


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")  # of views, on a GPU
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in ("mira", "modulation") else _SLOW) for kind in KINDS],
)
def test_it_is_exported(made: Callable[[str], Path], kind: str) -> None:
    folder = made(kind)
    model = memtool.load(folder / "memory").attach()
    pixels = model.pixels(_images(folder, 4))
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (pixels,), dynamic_shapes=dynamic)
    other = model.pixels(_images(folder, 7))
    _equal(program.module()(other), model(other))
    if isinstance(model, AttachedAtoms):
        return  # what torch saves of its changes of number format, torch does not load
    torch.export.save(program, folder / "program.pt2")
    _equal(torch.export.load(folder / "program.pt2").module()(other), model(other))


def test_a_loss_and_a_gradient_of_it_are_finite(folder: Path) -> None:
    model = memtool.load(folder / "memory").attach()
    pixels = model.pixels(_images(folder)).requires_grad_()
    out = model(pixels)
    seen = out.probabilities.detach().argmax(1)
    torch.nn.functional.cross_entropy(out.logits, seen).backward()
    assert bool(out.logits.gather(1, seen[:, None]).isfinite().all())
    assert pixels.grad is not None
    assert bool(pixels.grad.isfinite().all())


def test_other_number_formats_and_strange_numbers(folder: Path) -> None:
    model = memtool.load(folder / "memory").attach()
    batch = _images(folder, 3)
    expected = model(batch)
    pixels = model.pixels(batch)
    _equal(model(pixels.double()), expected)
    pixels[1, 0, 0, 0] = torch.nan
    out = model(pixels)
    if not bool(expected.novelty.isnan().any()):
        assert bool(out.unlike[1])
        torch.testing.assert_close(out.novelty[[0, 2]], expected.novelty[[0, 2]])
    doubled = model.double()(batch)
    assert doubled.logits.argmax(1).tolist() == expected.logits.argmax(1).tolist()
    for wrong in (np.zeros((1, 32, 32, 3), np.uint8), None, [1]):
        with pytest.raises(DataError, match="a batch of type"):
            model(wrong)
    with pytest.raises(DataError, match="a picture of type"):
        memtool.load(folder / "memory").transform(batch[0])


def test_a_language_memory_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = moram_of(write_facts(tmp_path), tmp_path)
    for task in "12":
        method.adapt(task)
        method.write()
    prompts = list(method.workspace.task("1").test.prompts[:3])
    said = method.retrieve(prompt=prompts[0])
    monkeypatch.setattr("memtool.workspace.create_stream", None)
    memory = memtool.load(tmp_path / "memory")
    assert memory.classes == ()
    model = memory.attach()
    assert isinstance(model, AttachedAnswers)
    assert model.answer(prompts[0]) == said.answer
    assert model.generate(prompts)[0] == said.answer
    assert model.generate([]) == []
    assert len(model.generate(prompts, most=1)[0]) <= len(said.answer or "")
    for wrong in ("one text", [3], None):
        with pytest.raises(DataError, match="prompts of type"):
            model.generate(wrong)
    shares = [task.share for task in said.tasks]
    assert model.weights(prompts)[0].tolist() == pytest.approx(shares, abs=1e-6)
    with pytest.raises(ConfigError, match="no transform"):
        _ = memory.transform


def test_in_a_fresh_process_without_data(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("mira")
    code = (
        "import json, sys, memtool\n"
        f"memory = memtool.load({str(folder / 'memory')!r})\n"
        "model = memory.attach()\n"
        "from PIL import Image\n"
        f"out = model(memory.transform(Image.open({str(folder / 'image.png')!r}))[None])\n"
        "print(json.dumps(out.probabilities[0].tolist()), flush=True)\n"
        "import os; os._exit(0)\n"  # threads of icechunk may abort one that is torn down
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMTOOL_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"MEMTOOL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    image = torch.tensor(load_image(folder / "image.png", 32))
    expected = memtool.load(folder / "memory").attach()(image[None])
    assert json.loads(done.stdout) == pytest.approx(expected.probabilities[0].tolist(), abs=1e-5)
    # Adapters are kept unpacked; of images nothing was decoded.
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["stores"]


def test_what_cannot_be_attached_says_why(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("mira")
    with pytest.raises(Exception, match="nowhere"):
        memtool.load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"no weights at .*absent"):
        memtool.load(folder / "memory", weights=tmp_path / "absent").attach()
    memory = memtool.load(folder / "memory")
    other = memtool.create_backbone(memory.config.backbone)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.sha256 = "0" * 64
    with pytest.raises(SpaceMismatchError, match="backbone"):
        memory.attach(other)
    with pytest.raises(ConfigError, match="a backbone of type Linear"):
        memory.attach(nn.Linear(2, 2))
    assert repr(memory).endswith("mira on nano, 2 adapters>")
    with pytest.raises(NotFoundError, match="holds no adapters"):
        memtool.load(f"{folder / 'memory'}@{memory.log()[-1].id}")
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        memory.attach(precision="fp16")
    with pytest.raises(NotFoundError, match="no adapter of task '9'"):
        memory.attach(task=9)
    with pytest.raises(ConfigError, match="find themselves"):
        memtool.load(made("moram") / "memory").attach(task=1)
    with pytest.raises(ConfigError, match="never consolidated"):
        memtool.load(f"{folder / 'memory'}@HEAD~1").attach()
