"""PEFT directories through the memory and out again: the same bytes."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from memtool.methods.exchange import export_peft, import_peft
from memtool.methods.mira import Mira
from memtool_stores import IntegrityError
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
    written = export_peft(learned.config, None, out=tmp_path / "out")
    assert len(written) == 3
    for directory in written:
        source = learned.config.runs / "adapters" / directory.name
        for name in FILES:
            assert sha256(directory / name) == sha256(source / name)
        assert json.loads((directory / "memtool_catalog.json").read_text())["byte_identical"]
    blobs = [b for b in learned.workspace.store.view().blobs() if b.startswith("peft.")]
    assert len(blobs) == 1, "what they share is stored once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_foreign_adapters_come_out_as_they_went_in(learned, tmp_path, dtype):
    source = foreign(tmp_path / "theirs", learned.config.runs / "adapters/task-2-seed-0", dtype)
    config = small_config(tmp_path / "mine")
    import_peft(config, [source], task="2")
    (directory,) = export_peft(config, ["theirs"], out=tmp_path / "out")
    for name in FILES:
        assert (directory / name).read_bytes() == (source / name).read_bytes()
    # And once more, from the copy.
    again = small_config(tmp_path / "again")
    import_peft(again, [directory])
    (second,) = export_peft(again, None, out=tmp_path / "out2")
    assert sha256(second / FILES[0]) == sha256(source / FILES[0])


def test_what_was_rounded_on_the_way_in_is_said(learned, tmp_path):
    source = tmp_path / "wide"
    foreign(source, learned.config.runs / "adapters/task-2-seed-0", torch.float64)
    tensors = {name: t + 1e-12 for name, t in load_file(source / FILES[0]).items() if "A" in name}
    save_file({**load_file(source / FILES[0]), **tensors}, source / FILES[0])
    config = small_config(tmp_path / "mine")
    import_peft(config, [source], task="2")
    (directory,) = export_peft(config, None, out=tmp_path / "out")
    assert not json.loads((directory / "memtool_catalog.json").read_text())["byte_identical"]
    ours, theirs = load_file(directory / FILES[0]), load_file(source / FILES[0])
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float64
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_damaged_header_is_named(learned_copy, tmp_path):
    store = learned_copy.workspace.store
    (blob,) = [name for name in store.view().blobs() if name.startswith("peft.")]
    data = store.view().blob(blob)
    for path in (
        store_path for store_path in (learned_copy.config.runs.parent / "memory").rglob("*")
    ):
        if path.is_file() and path.read_bytes().startswith(data[:64]):
            broken = bytearray(path.read_bytes())
            broken[70] ^= 1
            path.write_bytes(bytes(broken))
    with pytest.raises(IntegrityError, match="peft"):
        export_peft(Mira.open(learned_copy.config, seed=0).config, None, out=tmp_path / "out")
