"""Files that one step leaves for a later one: damaged anywhere, they are refused or the same.

For every kind of file, what its reader gives is what it gave before the damage, or what it gives
where there is no such file, or an error of ours that names the file; never another result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from memtool import sealed
from memtool.backbones.weight_files import read_weights
from memtool.checkpoints import load_checkpoint, save_checkpoint
from memtool.engine import Engine
from memtool.errors import MemtoolError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row, read_record, write_record
from memtool.methods.exchange import read_adapter
from memtool.methods.kept import kept
from memtool.methods.mira.method import Mira
from memtool.settings import EngineSettings
from memtool.streams import cache, open_table
from tests.fuzz.door import cases, damaged, long, no_hang
from tests.methods.conftest import small_config
from tests.reports.sample import record

ROWS = TypeAdapter(list[Row])


@dataclass(frozen=True)
class Kind:
    """A file, what reads it, and what that gives where there is no file (None: an error)."""

    file: Path
    read: Callable[[], Any]
    without: Any = None


def _checkpoint(folder: Path) -> Kind:
    file = folder / "checkpoint"

    def fresh() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        trained = {"a.weight": nn.Parameter(torch.zeros(3, 4)), "b": nn.Parameter(torch.zeros(()))}
        return trained, torch.optim.AdamW(trained.values(), 0.1)

    trained, optimizer = fresh()
    for _ in range(3):
        sum((p - 1).square().sum() for p in trained.values()).backward()
        optimizer.step()
    save_checkpoint(file, "f" * 64, trained, optimizer, (3, [[0.5]], [[0.25], [0.125]]))

    def read() -> list[Any]:
        trained, optimizer = fresh()
        state = load_checkpoint(file, "f" * 64, trained, optimizer)
        moments = {
            f"{name}/{key}": value.tolist()
            for name, parameter in trained.items()
            for key, value in optimizer.state[parameter].items()
        }
        return [state, {name: p.tolist() for name, p in trained.items()}, moments]

    without = [(0, [], []), {"a.weight": [[0.0] * 4] * 3, "b": 0.0}, {}]
    return Kind(file, read, without)


def _weights(folder: Path) -> Kind:
    file, own = folder / "weights.safetensors", {"a": torch.arange(12.0).view(3, 4)}
    sealed.write_tensors(file, own, {"steps": "3"})
    return Kind(
        file,
        lambda: {
            name: tensor.tolist()
            for name, tensor in read_weights(file, own, "own", resample=lambda _: None).items()
        },
    )


def _kept(folder: Path) -> Kind:
    file, engine = folder / "frozen.json", Engine(EngineSettings(device="cpu"))
    rows = list(record().metrics.rows)
    kept(file, ROWS, engine, lambda: rows)

    def measured_again() -> list[Row]:
        raise AssertionError("the file is there: nothing is to be measured")

    return Kind(file, lambda: kept(file, ROWS, engine, measured_again))


def _record(folder: Path) -> Kind:
    file = write_record(record(), folder / "record.json")
    return Kind(file, lambda: read_record(file))


def _matrix(folder: Path) -> Kind:
    file = AccuracyMatrix(("a", "b"), np.array([[0.1, 0.2], [0.9, 0.3], [0.8, 0.7]])).save(
        folder / "matrix.json"
    )
    return Kind(file, lambda: AccuracyMatrix.load(file))


def _images(folder: Path) -> dict[str, Kind]:
    from PIL import Image

    draw = np.random.default_rng(0)
    for place in ("dog/0", "dog/1", "cat/0", "cat/1"):
        path = folder / "pictures" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTOOL_CACHE", str(folder / "cache"))
        table = open_table(str(folder / "pictures"), 8)
        (entry,) = [path for path in (folder / "cache" / "images").iterdir() if path.is_dir()]

    def read() -> Any:
        found = cache._read(entry, table.name, 8)  # None: it is built again
        return found and [
            np.asarray(found.images).tolist(),
            found.labels.tolist(),
            found.is_test.tolist(),
            found.domains,
            (found.class_names, found.domain_names, found.fingerprint),
        ]

    return {file.name: Kind(file, read, without="built again") for file in entry.iterdir()}


def _adapters(folder: Path) -> dict[str, Kind]:
    """The files of a folder of train-adapter, as `write` reads them."""
    config = small_config(folder, stream__train_per_task=20, train__epochs=1)
    mira = Mira.open(config, seed=0)
    path = mira.adapt("1")[0].path

    def read() -> Any:
        found = read_adapter(path, mira.workspace)
        assert found.head is not None
        head = [found.head.weight.tolist(), found.head.bias.tolist()]
        return [found.name, found.sha256, found.value.tolist(), head, found.meta, found.files]

    return {file.name: Kind(file, read) for file in path.iterdir()}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("kept")
    found = {
        "checkpoint": _checkpoint(folder),
        "weights": _weights(folder),
        "kept result": _kept(folder),
        "record": _record(folder),
        "matrix": _matrix(folder),
        **_images(folder),
        **_adapters(folder),
    }
    assert set(found) == set(KINDS)
    return found


KINDS = (
    "checkpoint",
    "weights",
    "kept result",
    "record",
    "matrix",
    "header.json",
    "rows.npz",
    "images.npy",
    "memtool.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "head.safetensors",
)


@pytest.fixture(scope="module")
def right(kinds: dict[str, Kind]) -> dict[str, Any]:
    """What the whole files say."""
    return {name: kind.read() for name, kind in kinds.items()}


@long
@cases
@given(name=st.sampled_from(KINDS), data=st.data())
def test_a_damaged_file_is_refused_by_name_or_gives_the_same(
    kinds: dict[str, Kind], right: dict[str, Any], name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    whole = kind.file.read_bytes()
    found, refused = None, None
    try:
        kind.file.write_bytes(data.draw(damaged(whole)))
        with no_hang():
            found = kind.read()
    except MemtoolError as error:
        refused = error
    finally:
        kind.file.write_bytes(whole)
    if refused is not None:
        assert kind.file.name in refused.message, refused.message
        assert refused.message.isprintable()
    elif found != right[name]:
        assert (found or "built again") == kind.without, "another result, without a word"
