"""PEFT directories through the memory and out again: the same bytes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from memtool.backbones.nano import build_nano
from memtool.errors import CorruptError, MemtoolError
from memtool.methods import export
from memtool.methods.export import export_peft
from memtool.methods.mira.method import Mira
from memtool.methods.modulation.method import Modulation
from memtool_stores import IntegrityError, SchemaError
from tests.methods.conftest import small_config

FILES = ("adapter_model.safetensors", "adapter_config.json")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def foreign(folder, source, dtype):
    """The adapter of a PEFT directory as somebody else would have written it."""
    folder.mkdir()
    tensors = {name: t.to(dtype) for name, t in load_file(source / FILES[0]).items()}
    # Not our order, and metadata of their own.
    save_file(dict(reversed(tensors.items())), folder / FILES[0], {"format": "pt", "by": "them"})
    config = json.loads((source / FILES[1]).read_text())
    config["base_model_name_or_path"] = "somebody/model"
    (folder / FILES[1]).write_text(json.dumps(config, indent=4) + "\n\n")
    return folder


def test_trained_adapters_come_out_as_they_went_in(learned, tmp_path):
    written = export_peft(learned.workspace, None, out=tmp_path / "out")
    assert len(written) == 3
    for directory in written:
        source = learned.config.runs / "adapters" / directory.name
        for name in FILES:
            assert sha256(directory / name) == sha256(source / name)
        assert json.loads((directory / "memtool_catalog.json").read_text())["byte_identical"]
    blobs = [b for b in learned.workspace.store.view().blobs() if b.startswith("peft.")]
    assert len(blobs) == 1, "what they share is stored once"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_export_that_fails_half_way_is_taken_back(learned, tmp_path, monkeypatch, failure):
    out = tmp_path / "not" / "there"
    write, count = export.write_stored, itertools.count()

    def third_fails(*arguments):
        if next(count) == 2:
            raise failure
        write(*arguments)

    monkeypatch.setattr(export, "write_stored", third_fails)
    with pytest.raises((MemtoolError, KeyboardInterrupt)):
        export_peft(learned.workspace, None, out=out)
    assert next(count) == 3
    assert not (tmp_path / "not").exists()
    assert len(export_peft(learned.workspace, None, out=out)) == 3


def test_an_export_goes_nowhere_but_below_its_folder(learned, tmp_path):
    """Also where a link waits in the place of an adapter."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    name = learned.workspace.store.view().live[1].name
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SchemaError, match="leads out of"):
        export_peft(learned.workspace, None, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_foreign_adapters_come_out_as_they_went_in(learned, tmp_path, dtype):
    source = foreign(tmp_path / "theirs", learned.config.runs / "adapters/task-2-seed-0", dtype)
    config = small_config(tmp_path / "mine")
    mira = Mira.open(config, seed=0)
    mira.write([source], task="2")
    (directory,) = export_peft(mira.workspace, ["theirs"], out=tmp_path / "out")
    for name in FILES:
        assert (directory / name).read_bytes() == (source / name).read_bytes()
    # And once more, from the copy.
    again = small_config(tmp_path / "again")
    other = Mira.open(again, seed=0)
    other.write([directory])
    (second,) = export_peft(other.workspace, None, out=tmp_path / "out2")
    assert sha256(second / FILES[0]) == sha256(source / FILES[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directories_of_the_peft_library_come_out_as_they_went_in(tmp_path, dtype):
    settings = {"backbone__targets": ("proj", "fc1"), "adapter__rank": 4, "adapter__alpha": 8.0}
    sources = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            build_nano().to(dtype),
            peft.LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=r".*blocks\.\d+\.(attn\.proj|mlp\.fc1)",
                init_lora_weights=False,
            ),
            autocast_adapter_dtype=False,
        )
        sources.append(tmp_path / f"theirs-{seed}")
        model.save_pretrained(str(sources[-1]))
    stored = load_file(sources[0] / FILES[0])
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    config = small_config(tmp_path / "mine", **settings)
    mira = Mira.open(config, seed=0)
    mira.write(sources, task="2")
    blobs = mira.workspace.store.view().blobs()
    assert len(blobs) == 1, "what they share is stored once"
    for directory in export_peft(mira.workspace, None, out=tmp_path / "out"):
        for name in FILES:
            assert sha256(directory / name) == sha256(tmp_path / directory.name / name)
        again = peft.PeftModel.from_pretrained(build_nano().to(dtype), str(directory))
        assert again.peft_config["default"].r == 4


def test_an_adapter_that_no_longer_makes_its_file_is_corrupt(learned_copy, tmp_path):
    with learned_copy.workspace.store.transaction("a lie") as txn:
        txn.update("task-2-seed-0", file_sha256="0" * 64)
    with pytest.raises(CorruptError, match="task-2-seed-0"):
        export_peft(learned_copy.workspace, ["task-2-seed-0"], out=tmp_path / "out")


def with_wide_numbers(folder, learned):
    """The directory of an adapter whose numbers take 64 bits."""
    source = foreign(folder, learned.config.runs / "adapters/task-2-seed-0", torch.float64)
    tensors = {name: t + 1e-12 for name, t in load_file(source / FILES[0]).items() if "A" in name}
    save_file({**load_file(source / FILES[0]), **tensors}, source / FILES[0])
    return source


def test_what_was_rounded_on_the_way_in_is_said(learned, tmp_path):
    source = with_wide_numbers(tmp_path / "wide", learned)
    config = small_config(
        tmp_path / "mine", method="modulation", stream__setting="til", stream__order=None
    )
    modulation = Modulation.open(config, seed=0)
    modulation.write([source], task="2")
    (directory,) = export_peft(modulation.workspace, None, out=tmp_path / "out")
    assert not json.loads((directory / "memtool_catalog.json").read_text())["byte_identical"]
    ours, theirs = load_file(directory / FILES[0]), load_file(source / FILES[0])
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)


def test_what_rows_cannot_hold_is_kept_as_its_file(learned, tmp_path):
    source = with_wide_numbers(tmp_path / "wide", learned)
    mira = Mira.open(small_config(tmp_path / "mine"), seed=0)
    mira.write([source], task="2")
    assert mira.workspace.store.view().get("wide").ragged
    assert mira.write([source], task="2").unchanged
    (directory,) = export_peft(mira.workspace, None, out=tmp_path / "out")
    for name in FILES:
        assert sha256(directory / name) == sha256(source / name)


def test_a_damaged_header_is_named(learned_copy, tmp_path):
    store = learned_copy.workspace.store
    (blob,) = [name for name in store.view().blobs() if name.startswith("peft.")]
    data = store.view().blob(blob)
    for path in (
        store_path for store_path in (learned_copy.config.runs.parent / "memory").rglob("*")
    ):
        if path.is_file() and (place := path.read_bytes().find(data[:64])) >= 0:
            broken = bytearray(path.read_bytes())
            broken[place + 70] ^= 1
            path.write_bytes(bytes(broken))
    with pytest.raises(IntegrityError, match="peft"):
        export_peft(Mira.open(learned_copy.config, seed=0).workspace, None, out=tmp_path / "out")
