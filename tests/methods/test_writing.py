"""Adapters written by what the store alone says: the same as with the model, or left to it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from memtool.experiments.plan import plan
from memtool.methods.export import export_peft
from memtool.methods.home import stored_home
from memtool.methods.in_store import features_blob
from memtool.methods.mira.method import Mira
from memtool.methods.mira.state import queries_blob
from memtool.methods.moram.method import Moram
from memtool.methods.records import own_head_blob
from memtool.methods.writing import write_stored
from memtool_stores import MemoryView
from tests.methods.conftest import small_config


def copy_of(learned: Mira, folder: Path) -> Mira:
    shutil.copytree(Path(learned.workspace.store_path).parent, folder)
    return Mira.open(small_config(folder), seed=0)


def said(view: MemoryView) -> dict[str, object]:
    """All that a version holds, but for ids and times."""
    records = [(r.name, r.kind, r.scaling, r.sha256, dict(r.meta)) for r in view.live]
    blobs = {name: hashlib.sha256(view.blob(name)).hexdigest() for name in view.blobs()}
    return {"records": records, "blobs": blobs, "by": view.message, "with": dict(view.metadata)}


def test_a_store_tells_what_the_model_and_the_stream_tell(learned: Mira) -> None:
    home, work = stored_home(learned.config, seed=0), learned.workspace
    assert home is not None
    assert home.layout == work.layout
    model, known = work.backbone, home.backbone
    assert (known.name, known.sha256, known.dim) == (model.name, model.sha256, model.dim)
    assert home.stream.class_names == work.stream.class_names
    assert (home.stream.name, home.stream.setting) == (work.stream.name, work.stream.setting)
    for task in work.stream.tasks:
        for word in (task.name, str(task.number)):
            one = home.task(word)
            assert (one.number, one.name, one.domain, one.classes) == (
                task.number,
                task.name,
                task.domain,
                task.classes,
            )


def test_what_is_written_by_the_store_is_what_is_written_by_the_model(
    learned: Mira, tmp_path: Path
) -> None:
    """Of folders of ours with a head, and of others without."""
    held = []
    for place in ("stored", "opened"):
        mira = copy_of(learned, tmp_path / place)
        work = mira.workspace
        with work.store.transaction("two are taken out") as txn:
            for name in ("task-2-seed-0", "task-3-seed-0"):
                txn.remove(work.store.view().get(name).id)
                txn.delete_blob(f"head.{name}")
        theirs = tmp_path / place / "theirs"
        shutil.copytree(work.adapter_folder / "task-2-seed-0", theirs)
        for own in ("memtool.json", "head.safetensors"):
            (theirs / own).unlink()
        for folders, task in ((None, None), ([theirs], "inverted"), (None, None)):
            if place == "opened":
                result = mira.write(folders, task=task)
            else:
                stored = write_stored(mira.config, seed=0, directories=folders, task=task)
                assert stored is not None
                result = stored
            held.append((said(work.store.view()), [a.name for a in result.added], result.skipped))
    runs = [str(tmp_path / place) for place in ("stored", "opened")]
    assert repr(held[:3]).replace(*runs) == repr(held[3:])
    assert held[0][1] == ["task-2-seed-0", "task-3-seed-0"]
    assert held[2][1] == []


@pytest.mark.parametrize("names", [None, ["task-2-seed-0"]])
def test_what_is_exported_by_the_store_is_what_is_exported_by_the_model(
    learned: Mira, tmp_path: Path, names: list[str] | None
) -> None:
    home = stored_home(learned.config, seed=0)
    assert home is not None
    stored = export_peft(home, names, out=tmp_path / "stored")
    opened = export_peft(learned.workspace, names, out=tmp_path / "opened")
    assert len(stored) == len(opened) == (1 if names else 3)
    for one, other in zip(stored, opened, strict=True):
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        for name in files:
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    "setting",
    [
        {"adapter__rank": 8},
        {"adapter__alpha": 4.0},
        {"backbone__targets": ("q",)},
        {"backbone__image_size": 64},
        {"stream__seed": 1},
        {"stream__source": "folder"},
        {"method": "modulation"},
        {"head__kind": "ridge"},
        {"engine__device": "cuda"},
        {"store": "elsewhere"},
    ],
    ids=str,
)
def test_other_settings_than_the_memory_was_made_with_are_left_to_the_model(
    learned: Mira, setting: dict[str, object]
) -> None:
    folder = Path(learned.workspace.store_path).parent
    assert stored_home(small_config(folder), seed=0) is not None
    assert stored_home(small_config(folder, **setting), seed=0) is None


def test_one_of_several_processes_leaves_it_to_those_that_know_each_other(
    learned: Mira, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stored_home(learned.config, seed=0) is None


def test_a_head_that_the_store_knows_no_width_of_is_left_to_the_model(
    learned: Mira, tmp_path: Path
) -> None:
    mira = copy_of(learned, tmp_path / "copy")
    with mira.workspace.store.transaction("no heads") as txn:
        for record in txn.adapters[1:]:
            txn.remove(record.id)
        for name in [name for name in txn.base.blobs() if name.startswith("head.")]:
            txn.delete_blob(name)
    assert write_stored(mira.config, seed=0, directories=None, task=None) is None
    assert len(mira.write().added) == 2


def test_atoms_that_are_there_are_known_without_the_model_and_new_ones_are_not(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path, method="moram", adapter__warm_start="none")
    moram = Moram.open(config, seed=0)
    moram.adapt("1")
    assert write_stored(config, seed=0, directories=None, task=None) is None
    first = moram.write()
    again = write_stored(config, seed=0, directories=None, task=None)
    assert again is not None
    assert (again.version, again.known, again.added) == (first.version, first.added, ())
    moram.adapt("2")
    assert write_stored(config, seed=0, directories=None, task=None) is None
    assert [one.name for one in moram.write().added] == ["task-2-seed-0"]
    other = small_config(
        tmp_path, method="moram", adapter__warm_start="none", moram__temperature=9.0
    )
    assert write_stored(other, seed=0, directories=None, task=None) is None


def test_a_plan_says_how_much_of_a_commit_is_new(learned: Mira) -> None:
    """Of the last task: what the store holds of it."""
    view = learned.workspace.store.view()
    *_, record = view.adapters
    keys = view.keys()
    assert keys is not None
    written = view.value(record.id).nbytes + len(view.blob(own_head_blob(record.name)))
    blobs = "heads.0", queries_blob(3), features_blob(3), "asked", "asked.0"
    consolidated = keys.nbytes + sum(len(view.blob(name)) for name in blobs)
    for verb, found in (("write", written), ("consolidate", consolidated)):
        said = plan(learned.config, seed=0, verb=verb)["commit"]
        assert [*said] == [verb]
        assert said[verb]["new_bytes"] == pytest.approx(found, rel=0.15)
    assert [*plan(learned.config, seed=0, verb="run")["commit"]] == ["write", "consolidate"]
    assert plan(learned.config, seed=0, verb="train-adapter")["commit"] == {}
