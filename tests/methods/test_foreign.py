"""Adapters from elsewhere: what they are, and what is lost where they are used as another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memtool.adapters.peft_files import CONFIG_NAME, write_peft
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError
from memtool.learning.answers import Answering
from memtool.learning.learner import Learner
from memtool.methods.exchange import ABOUT, CATALOG, OWN_HEAD
from memtool.methods.export import export_peft
from memtool.methods.mira.method import Mira
from memtool.methods.moram.method import Moram
from memtool_stores import MemoryStore
from tests.methods.conftest import small_config
from tests.methods.facts import moram_of, write_facts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, and tasks of texts."""
    return write_facts(tmp_path_factory.mktemp("texts"))


def plain_lora(place: Path, folder: Path) -> tuple[Path, Learner]:
    """A LoRA that sequential fine-tuning makes of task 1, as a folder of somebody else."""
    work = moram_of(place, folder, **{"train.epochs": 30}).workspace
    learner = Learner(work, 1)
    learner.learn(work.stream.tasks[0], "test")
    value = learner.values.flat()[0].detach().float().cpu()
    alpha = work.config.adapter.alpha
    made = write_peft(folder / "theirs", value, work.layout, alpha=alpha, base_model="m/model")
    return made, learner


def test_a_plain_lora_becomes_atoms_only_where_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    theirs, learner = plain_lora(place, tmp_path)
    moram = moram_of(place, tmp_path)
    with pytest.raises(MismatchError, match="acts whole on every token") as caught:
        moram.write([theirs], task="1")
    assert f"memtool import {theirs} --as atoms" in str(caught.value.remedy)
    assert not MemoryStore.exists(moram.workspace.store_path), "nothing was made"
    (said,) = moram.write([theirs], task="1", as_atoms=True).as_atoms
    task = learner.work.stream.tasks[0]
    answering = Answering(learner.work, learner.recall())
    own = answering.loss(answering.lm.encode(task.test.prompts, task.test.answers))
    assert (said.name, said.task, said.measure) == ("theirs", 1, "loss")
    assert said.plain == pytest.approx(own, rel=1e-4)
    assert said.atoms == pytest.approx(moram.evaluate().row("moram").loss[-1][0], rel=1e-4)
    assert said.atoms > said.plain


def test_a_lora_of_images_says_what_it_loses_as_atoms(learned: Mira, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(learned.config.runs / "adapters" / "task-1-seed-0", theirs)
    settings = {"method": "moram", "adapter__warm_start": "none"}
    moram = Moram.open(small_config(tmp_path / "atoms", **settings), seed=0)
    with pytest.raises(MismatchError, match="acts whole on every token"):
        moram.write([theirs])
    (said,) = moram.write([theirs], as_atoms=True).as_atoms
    assert said.measure == "accuracy"
    assert said.plain > 0.5
    assert said.atoms == pytest.approx(moram.evaluate(setting="til").row("memory").accuracy[-1][0])
    with pytest.raises(ConfigError, match="atoms under method mira"):
        Mira.open(small_config(tmp_path / "whole"), seed=0).write([theirs], as_atoms=True)


def test_atoms_do_not_become_whole_adapters(learned: Mira, tmp_path: Path) -> None:
    (theirs,) = export_peft(learned.workspace, ["task-1-seed-0"], out=tmp_path / "out")
    said = json.loads((theirs / CATALOG).read_text())
    assert said["kind"] == "adapter"
    (theirs / CATALOG).write_text(json.dumps(said | {"kind": "atoms"}))
    mira = Mira.open(small_config(tmp_path / "mine"), seed=0)
    with pytest.raises(MismatchError, match="holds atoms"):
        mira.write([theirs])


@pytest.mark.parametrize(
    ("named", "revision", "said"),
    [
        ("somebody/nano", None, ""),
        ("", None, ""),
        ("google/gemma-2b", None, "made for google/gemma-2b"),
        ("somebody/nano", "v2", "at revision v2"),
        ("somebody/nano", "main", ""),
    ],
)
def test_another_base_model_is_said(
    learned: Mira, tmp_path: Path, named: str, revision: str | None, said: str
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(learned.config.runs / "adapters" / "task-1-seed-0", theirs)
    (theirs / ABOUT).unlink()
    config = json.loads((theirs / CONFIG_NAME).read_text())
    config |= {"base_model_name_or_path": named, "revision": revision}
    (theirs / CONFIG_NAME).write_text(json.dumps(config))
    notes = Mira.open(small_config(tmp_path / "mine"), seed=0).write([theirs], task="1").notes
    assert [said in note and "nano" in note for note in notes] == [True] * bool(said)


def test_another_backbone_by_its_hash_is_refused(learned: Mira, tmp_path: Path) -> None:
    (theirs,) = export_peft(learned.workspace, ["task-1-seed-0"], out=tmp_path / "out")
    said = json.loads((theirs / CATALOG).read_text())
    (theirs / CATALOG).write_text(json.dumps(said | {"backbone_sha256": "0" * 64}))
    with pytest.raises(MismatchError, match=r"was trained on nano \(000000000000…\)"):
        Mira.open(small_config(tmp_path / "mine"), seed=0).write([theirs])


def test_a_head_of_other_classes_is_refused(learned: Mira, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(learned.config.runs / "adapters" / "task-1-seed-0", theirs)
    (theirs / ABOUT).unlink()  # anybody's: nothing vouches for the files beside it
    save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, theirs / OWN_HEAD)
    with pytest.raises(MismatchError, match="a head of 3 classes, 5 wide"):
        Mira.open(small_config(tmp_path / "mine"), seed=0).write([theirs], task="1")


def test_what_lies_beside_is_named_where_it_is_wrong(learned: Mira, tmp_path: Path) -> None:
    (theirs,) = export_peft(learned.workspace, ["task-1-seed-0"], out=tmp_path / "out")
    (theirs / CATALOG).write_text('{"task": "three"}')
    with pytest.raises(CorruptError, match=f"{CATALOG}: task is 'three'"):
        Mira.open(small_config(tmp_path / "mine"), seed=0).write([theirs])


def test_a_query_says_which_backbone_it_is_of(learned: Mira, tmp_path: Path) -> None:
    query, backbone = torch.ones(learned.workspace.backbone.dim), learned.workspace.backbone
    path = tmp_path / "query.safetensors"
    for metadata in (None, {"backbone_sha256": backbone.sha256}):
        save_file({"query": query}, path, metadata)
        assert learned.retrieve(query=path).samples == 1
    save_file({"query": query}, path, {"backbone_sha256": "0" * 64})
    with pytest.raises(MismatchError, match="was made with the backbone '0000"):
        learned.retrieve(query=path)
    save_file({"query": query * torch.nan}, path)
    with pytest.raises(DataError, match="finite floats"):
        learned.retrieve(query=path)
