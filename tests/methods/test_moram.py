"""MoRAM on a real store, real digits and the real embedded backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memtool.adapters import atoms as atoms_file
from memtool.adapters.atoms import AtomBank, AtomGate, activations, add_atoms
from memtool.adapters.layout import Layout
from memtool.adapters.peft_files import read_peft
from memtool.config import resolve
from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    ConfigError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.metrics import reuse
from memtool.evaluation.record import Record
from memtool.experiments import run as experiment
from memtool.experiments.bisect import bisect
from memtool.learning.objective import objective_of
from memtool.learning.past_inputs import PastInputs
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.export import export_peft
from memtool.methods.forget import forget
from memtool.methods.mira.method import Mira
from memtool.methods.moram.beneath import history
from memtool.methods.moram.explain import as_picture, explain_atoms, task_grid
from memtool.methods.moram.method import Moram
from memtool.methods.moram.prune import dead_atoms, prune
from memtool.methods.moram.state import AtomsState, bank_of, digest
from memtool.methods.moram.watch import contribution, contributions, frozen_drift, task_shares
from memtool.reports.html import render
from memtool.reports.table import atoms_grid
from memtool.streams.task import spread
from memtool_stores import Backbone, MemoryStore, Space, SpaceMismatchError
from tests.methods.conftest import small_config

SMALL = {
    "stream.train_per_task": 60,
    "stream.test_per_task": 40,
    "stream.splits": 3,
    "train.epochs": 2,
    "adapter.rank": 4,
    "adapter.alpha": 4,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}


def config_in(folder: Path, **overrides: object):
    values = {**SMALL, "store": str(folder / "memory"), "runs": str(folder / "runs")}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(preset="moram-digits", overrides=values, environ={}, cwd=folder).config


def grow(moram: Moram, tasks: int = 3) -> Moram:
    for task in range(1, tasks + 1):
        moram.adapt(str(task))
        moram.write()
    return moram


@pytest.fixture(scope="session")
def _grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    grow(Moram.open(config_in(folder), seed=0))
    return folder


@pytest.fixture
def grown(_grown):
    """Three tasks in memory; for reading only."""
    return Moram.open(config_in(_grown), seed=0)


@pytest.fixture(scope="module")
def _free(tmp_path_factory):
    """Two tasks whose keys are free of those before them."""
    folder = tmp_path_factory.mktemp("free")
    grow(Moram.open(config_in(folder, moram__keys="free"), seed=0), 2)
    return folder


@pytest.fixture
def free_copy(_free, tmp_path):
    """The two tasks of free keys; a copy that a test may change."""
    shutil.copytree(_free, tmp_path / "free")
    return Moram.open(config_in(tmp_path / "free", moram__keys="free"), seed=0)


@pytest.fixture
def grown_copy(_grown, tmp_path):
    """Three tasks in memory; a copy that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(_grown, folder)
    return Moram.open(config_in(folder), seed=0)


def reopened(moram, **overrides):
    folder = moram.config.runs.parent
    return Moram.open(config_in(folder, **overrides), seed=0)


def test_it_learns_task_after_task(grown):
    record = grown.evaluate(history=True, compare=True)
    row = record.row("memory")
    assert row.metrics["faa"] > 0.7
    matrix = record.matrix("memory").values
    assert np.isnan(matrix[0]).all()
    assert not np.isnan(matrix[1:]).any()
    assert matrix[1, 0] > 0.9 > matrix[1, 2]
    assert record.run.configuration["moram"]["topk"] == 4
    assert record.row("memory-all").metrics["faa"] > 0.7
    assert Record.from_json(record.to_json()) == record


def test_scores_in_bfloat16_are_of_an_evaluation_alone(grown, monkeypatch):
    asked = []
    again = atoms_file._choose_again
    monkeypatch.setattr(atoms_file, "WORTH", 0)  # this bank is a small one
    monkeypatch.setattr(atoms_file, "_choose_again", lambda *a: asked.append(1) or again(*a))
    exact = grown.evaluate(compare=True)
    assert not asked
    rough = reopened(grown, engine__atom_scores="bf16")
    found = rough.evaluate(compare=True)
    assert asked
    assert found.run.configuration["engine"]["atom_scores"] == "bf16"
    for row in ("memory", "memory-all"):
        faa = exact.row(row).metrics["faa"]
        assert found.row(row).metrics["faa"] == pytest.approx(faa, abs=0.02)
    assert rough.gate.scores == "exact"
    assert rough.read().settings == grown.read().settings


def test_the_bank_is_what_was_written(grown):
    view, work = grown.workspace.store.view(), grown.workspace
    assert [record.kind for record in view.atom_records] == ["atoms"] * 3
    bank = bank_of(view, work.layout)
    tensors = work.layout.unflatten(torch.from_numpy(view.value("task-2-seed-0").copy()))
    for site in work.layout.sites:
        here = bank.bank(site.name)
        assert here.owner.tolist() == [1] * 4 + [2] * 4 + [3] * 4
        assert torch.equal(here.keys[4:8], tensors[f"{site.name}.lora_A"])
        assert torch.equal(here.values[4:8], tensors[f"{site.name}.lora_B"].T)
        assert here.scaling.tolist() == [1.0] * 12
        assert here.values[4:8].any()  # they learned
    assert len(bank_of(view, work.layout, 1)) == 4


def test_scaling_is_that_of_the_atoms_whatever_comes_later(tmp_path):
    moram = grow(Moram.open(config_in(tmp_path, adapter__alpha=12), seed=0), 1)
    bank = moram.snapshot().bank
    assert bank.bank(bank.sites[0].name).scaling.tolist() == [3.0] * 4


@pytest.mark.slow
def test_free_keys_hardly_answer_to_earlier_tasks(free_copy):
    moram = free_copy
    work, view = moram.workspace, moram.workspace.store.view()
    assert "past-inputs" in view.blobs()
    one, two = (bank_of(view, work.layout, rows) for rows in (1, 2))
    past = PastInputs(work.layout, 0.97)
    objective, recall = objective_of(work), one.recall(moram.gate)
    earlier = objective.input_moments(past, work.task("1").train, recall)
    past.add(earlier, 0.0)
    fresh = PastInputs(work.layout, 0.97)
    now = objective.input_moments(fresh, work.task("2").train, recall)
    for site in work.layout.sites:
        keys = two.bank(site.name).keys[4:].double()
        lengths = keys.norm(dim=1)  # a key is zero where nothing is free
        torch.testing.assert_close(lengths, lengths.round(), atol=1e-5, rtol=0)
        assert lengths.any()
        # Of every earlier input's energy 3 % is outside the past; nothing inside is answered to.
        assert past.space[site.module].kept > 0
        inside = keys - past.space[site.module].project(keys)
        assert inside.abs().max() < 1e-3
        assert (keys @ earlier[site.module] @ keys.T).trace() < 0.04 * earlier[site.module].trace()
        # They are those of the task's own inputs that have most energy, in this order.
        own = (keys @ now[site.module] @ keys.T).diagonal()
        assert (own.diff() <= 1e-6 * own[0]).all()
    assert two.bank(site.name).values[4:].any()


def test_a_task_of_one_atom_is_learned(tmp_path):
    moram = grow(Moram.open(config_in(tmp_path, adapter__rank=1, adapter__alpha=1), seed=0), 1)
    assert len(moram.snapshot().bank) == 1
    with pytest.raises(MismatchError, match="topk of 2 with 1 atoms"):
        Moram.open(
            config_in(tmp_path / "b", adapter__rank=1, adapter__alpha=1, moram__topk=2), seed=0
        ).adapt("1")


def test_free_keys_are_of_the_whole_memory(grown, free_copy):
    with pytest.raises(ConfigError, match="another gate: keys random, here free"):
        reopened(grown, moram__keys="free").adapt("3", fresh=True)
    moram = free_copy
    assert moram.adapt("2")[0].skipped
    # Trained anew, a task sees the inputs of those before it only: the same atoms again.
    moram.adapt("1", fresh=True)
    moram.adapt("2", fresh=True)
    assert set(moram.write().skipped) == {"task-1-seed-0", "task-2-seed-0"}
    with pytest.raises(ConfigError, match=r"past\.energy 0\.5 in a memory"):
        reopened(moram, moram__keys="free", past__energy=0.5).adapt("3")
    assert moram.evaluate(history=True).row("memory").metrics["faa"] > 0.7
    forget(moram.workspace.store, ["task-2-seed-0"])
    assert "past-inputs" in moram.workspace.store.view().blobs()
    forget(moram.workspace.store, ["task-1-seed-0"])
    assert "past-inputs" not in moram.workspace.store.view().blobs()


def test_repeating_a_step_changes_nothing(grown_copy):
    before = grown_copy.workspace.store.head()
    assert grown_copy.adapt("1")[0].skipped
    assert grown_copy.adapt("2")[0].skipped
    written = grown_copy.write()
    assert written.added == ()
    assert len(written.skipped) == 3
    assert grown_copy.consolidate().unchanged
    assert grown_copy.workspace.store.head() == before


def test_atoms_are_trained_on_top_of_those_in_memory(grown, tmp_path):
    view = grown.workspace.store.view()
    beneath = [record.meta["provenance"]["beneath"] for record in view.atom_records]
    assert beneath == [digest(view.atom_records[:rows]) for rows in range(3)]
    # Trained without task 1 they are other atoms, and are refused on top of it.
    alone = Moram.open(config_in(tmp_path), seed=0)
    alone.adapt("1")
    alone.adapt("2")
    folder = alone.workspace.adapter_folder
    alone.write([folder / "task-1-seed-0"])
    with pytest.raises(MismatchError, match=r"(?s)trained from zero, not on top of the 1 tasks"):
        alone.write([folder / "task-2-seed-0"])
    with pytest.raises(AlreadyExistsError, match="trained with other settings"):
        alone.adapt("2")
    alone.adapt("2", fresh=True)
    assert len(alone.write([folder / "task-2-seed-0"]).added) == 1


def test_training_is_resumed_where_it_was(tmp_path, monkeypatch):
    whole = grow(Moram.open(config_in(tmp_path / "whole"), seed=0), 1)
    moram = Moram.open(config_in(tmp_path / "cut"), seed=0)
    engine = moram.workspace.engine
    fit, saved = engine.fit, []

    def cut_short(module, batches, loss, settings, **more):
        def once(model, batch):
            saved.append(0)
            if len(saved) == 3:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)
            return loss(model, batch)

        return fit(module, batches, once, settings, **more)

    monkeypatch.setattr(engine, "fit", cut_short)
    with pytest.raises(KeyboardInterrupt):
        moram.adapt("1")
    again = Moram.open(moram.config, seed=0)
    assert again.adapt("1")[0].resumed
    again.write()
    values = [m.workspace.store.view().value("task-1-seed-0") for m in (whole, again)]
    assert np.array_equal(*values)


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("ridge", "shared"), ("ncm", "task"), ("grown", "task"), ("shared", "shared")],
)
def test_the_head_can_be_solved_again_in_other_ways(grown_copy, kind, scope):
    other = reopened(grown_copy, head__kind=kind, head__scope=scope)
    result = other.consolidate()
    assert (result.head, result.scope, result.unchanged) == (kind, scope, False)
    assert other.evaluate().row("memory").metrics["faa"] > 0.3


@pytest.mark.slow
def test_a_head_that_goes_on_keeps_the_classes_of_earlier_tasks(tmp_path):
    moram = grow(Moram.open(config_in(tmp_path, head__kind="shared"), seed=0), 2)
    one, two = moram.workspace.stream.tasks[:2]
    head = moram.snapshot().head
    before = moram.snapshot(moram.workspace.store.log()[1].id).head
    assert torch.equal(head.weight[0][list(one.classes)], before.weight[0][list(one.classes)])
    assert torch.isfinite(head.bias[0][list(two.classes)]).all()
    assert moram.adapt("2")[0].skipped


def test_til_compares_the_classes_of_the_task_only(grown):
    told = grown.evaluate(setting="til", history=True)
    inferred = grown.evaluate()
    assert told.row("memory").metrics["faa"] >= inferred.row("memory").metrics["faa"]
    assert np.isnan(told.matrix("memory").values[1, 1:]).all()


@pytest.mark.slow
def test_a_column_for_every_task_of_the_stream_is_one_argument(tmp_path):
    moram = grow(Moram.open(config_in(tmp_path), seed=0), 2)
    matrix = moram.evaluate(history=True, unseen=True).matrix("memory").values
    assert matrix.shape == (4, 3)
    assert not np.isnan(matrix[1:3]).any()
    assert matrix[2, 2] == 0  # none of its classes is known
    assert moram.evaluate().matrix("memory").values.shape == (3, 2)


@pytest.mark.slow
def test_domains_share_their_classes(tmp_path):
    config = config_in(
        tmp_path,
        stream__setting="dil",
        stream__splits=None,
        stream__order=("upright", "inverted"),
        head__scope="task",
    )
    moram = grow(Moram.open(config, seed=0), 2)
    assert moram.evaluate().row("memory").metrics["faa"] > 0.3
    assert set(moram.measure("HEAD", [1, 2])) == {"faa", "task_accuracy"}


def test_retrieve_says_whose_atoms_are_chosen(grown, tmp_path):
    task = grown.workspace.stream.tasks[1]
    picture = tmp_path / "digit.png"
    Image.fromarray(np.asarray(task.test.images[0])).save(picture)
    for result in (grown.retrieve(task="2"), grown.retrieve(image=picture)):
        assert [one.task for one in result.tasks] == [1, 2, 3]
        assert 0 < sum(one.share for one in result.tasks) <= 1 + 1e-6
        assert result.block_numbers == (0, 1, 2, 3)
        mean = np.mean(result.blocks, axis=0)
        assert mean == pytest.approx([one.share for one in result.tasks])
        assert result.atoms[0].share >= result.atoms[-1].share > 0
        assert {atom.task for atom in result.atoms} <= {1, 2, 3}
    assert result.prediction.label in grown.workspace.stream.class_names
    assert grown.retrieve(task="2").accuracy > 0.7


class TestWhatAtomsDo:
    def test_contributions_of_all_tasks_are_what_the_bank_adds(self):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        bank = AtomBank(draw(6, 5), draw(6, 7), torch.rand(6).double(), torch.arange(6) // 2)
        gate, x = AtomGate(topk=3, temperature=0.1), draw(2, 4, 5)
        each = [contribution(x, bank, gate, task) for task in range(3)]
        from memtool.adapters.atoms import ModuleAtoms
        from memtool.adapters.layout import Site

        atoms = ModuleAtoms((Site(0, "m", "", 5, 7, 0, 7),), (bank,))
        with torch.no_grad():
            whole = add_atoms(torch.zeros(2, 4, 7, dtype=torch.float64), x, atoms, gate)
        assert torch.allclose(torch.stack(each).sum(dim=0), whole, atol=1e-12)

    def test_drift_against_the_definition(self, grown):
        work, snapshot = grown.workspace, grown.snapshot()
        versions = history(grown.workspace, snapshot.version, snapshot.tasks)
        then = grown.snapshot(versions[1])
        samples = spread(work.stream.tasks[0].test, 8)
        same, later = frozen_drift(
            work, then.bank, [then.bank, snapshot.bank], then.gate, 1, samples
        )
        assert (same.norm, same.difference) == (1, 0)
        # The first block sees the same inputs at every version: count it by hand.
        only = Layout([s for s in work.layout.sites if s.block == 0 and s.slice], 4).sites
        before, after, moved = 0.0, 0.0, 0.0
        pixels = work.backbone.preprocess(torch.from_numpy(np.asarray(samples.images)))
        block = work.backbone.vit.blocks[0]
        with torch.inference_mode():
            x = block.norm1(work.backbone.hidden(pixels, 0))
            for site in only:
                old = contribution(x, then.bank.bank(site.name), then.gate, 1)
                new = contribution(x, snapshot.bank.bank(site.name), then.gate, 1)
                before += float(old.square().sum())
                after += float(new.square().sum())
                moved += float((new - old).square().sum())
        banks = []
        for full in (then.bank, snapshot.bank):
            part = Rank1Memory(work.layout.sites)
            for site in only:
                part.append(site.name, full.bank(site.name))
            banks.append(part)
        (alone,) = frozen_drift(work, banks[0], banks[1:], then.gate, 1, samples)
        assert alone.norm == pytest.approx((after / before) ** 0.5, rel=1e-4)
        assert alone.difference == pytest.approx((moved / before) ** 0.5, rel=1e-4)
        assert later.difference > 0

    @pytest.mark.slow
    def test_under_the_norm_of_tasks_only_places_are_shared(self, tmp_path):
        settings = {"moram__score_norm": "task", "moram__topk": 4}
        moram = grow(Moram.open(config_in(tmp_path, **settings), seed=0), 2)
        snapshot = moram.snapshot()
        site = snapshot.bank.sites[0].name
        old, new = bank_of(snapshot.view, moram.workspace.layout, 1).bank(site), None
        new = snapshot.bank.bank(site)
        wide = AtomGate(topk=8, temperature=1.0, threshold=-1, score_norm="task")
        x = torch.randn(1, 9, old.keys.shape[1], generator=torch.Generator().manual_seed(0))
        few, many = activations(x, old, wide), activations(x, new, wide)[..., :4]
        ratio = many / few
        assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), atol=1e-5)

    def test_what_a_record_and_a_report_say_of_it(self, grown):
        record = grown.evaluate(history=True)
        row = record.row("memory")
        use = row.atom_use
        assert [use.norm[i][i] for i in range(3)] == [1, 1, 1]
        assert use.norm[0][1] is None
        assert use.difference[2][0] > 0
        assert row.metrics["atom_reuse"] == pytest.approx(reuse(use.reuse))
        assert row.metrics["atom_norm"] == pytest.approx((use.norm[2][0] + use.norm[2][1]) / 2)
        grid = atoms_grid([record])
        assert len(grid.rows) == 2
        assert grid.rows[1][1] == f"{use.norm[2][0]:.2f}"
        page = render([record])
        assert "Atoms as the bank grows" in page
        assert 'id="figure-recall"' in page  # whose atoms fire, of a record without more

    def test_shares_without_threshold_sum_to_one(self, grown):
        work, snapshot = grown.workspace, grown.snapshot()
        images = spread(work.stream.tasks[0].test, 4)
        open_gate = AtomGate(topk=4, threshold=-1)
        shares, blocks = task_shares(work, snapshot.bank, open_gate, snapshot.tasks, images)
        assert shares.shape == (4, 4, 3)
        assert torch.allclose(shares.sum(dim=-1), torch.ones(4, len(blocks)), atol=1e-5)

    def test_each_set_of_images_counts_alike(self, grown):
        work, snapshot = grown.workspace, grown.snapshot()
        one = spread(work.stream.tasks[0].test, 6)
        two = spread(work.stream.tasks[1].test, 3)

        def added(*images):
            return contributions(work, snapshot.bank, snapshot.gate, images)

        both, first_one, second = added(one, two), added(one), added(two)
        for site, values in both.items():
            assert torch.allclose(values, (first_one[site] + second[site]) / 2)


class TestExplain:
    def test_a_map_of_atoms_by_tokens(self, grown, tmp_path):
        work, snapshot = grown.workspace, grown.snapshot()
        task = work.stream.tasks[0]
        picture = tmp_path / "digit.png"
        Image.fromarray(np.asarray(task.test.images[0])).save(picture)
        result = explain_atoms(grown, image=picture, layer="v", block=0)
        assert result.site == "blocks.0.attn.qkv[v]"
        weights = np.array(result.weights)
        assert weights.shape == (12, 17)
        assert (result.prefix_tokens, result.side) == (1, 4)
        pixels = work.backbone.preprocess(torch.from_numpy(np.asarray(task.test.images[:1])))
        with torch.inference_mode():
            x = work.backbone.vit.blocks[0].norm1(work.backbone.hidden(pixels, 0))
            expected = activations(x, snapshot.bank.bank(result.site), snapshot.gate)[0].T
        assert np.allclose(weights, expected.numpy(), atol=1e-5)
        assert [atom.task for atom in result.atoms] == [1] * 4 + [2] * 4 + [3] * 4
        assert result.prediction.label in work.stream.class_names
        assert len(task_grid(result).rows) == 3

    @pytest.mark.parametrize("name", ["map.svg", "map.png", "map.html"])
    def test_drawn_the_same_for_the_same_numbers(self, grown, tmp_path, name):
        paths = [tmp_path / "a" / name, tmp_path / "b" / name]
        for path in paths:
            path.parent.mkdir()
            explain_atoms(grown, task="2", out=path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert len(paths[0].read_bytes()) > 1000

    def test_an_older_version(self, grown):
        snapshot = grown.snapshot()
        result = explain_atoms(
            grown, task="1", version=history(grown.workspace, snapshot.version, snapshot.tasks)[1]
        )
        assert {atom.task for atom in result.atoms} == {1}
        assert as_picture(result).weights.shape == (4, 17)

    def test_what_is_not_adapted(self, grown):
        with pytest.raises(ConfigError, match=r"(?s)--layer 'out'.*one of .*fc1"):
            explain_atoms(grown, task="1", layer="out")
        with pytest.raises(ConfigError, match=r"(?s)--block 9.*0, 1, 2, 3"):
            explain_atoms(grown, task="1", block=9)
        with pytest.raises(ConfigError, match="--task and --image"):
            explain_atoms(grown)


class TestForget:
    def test_a_task_leaves_as_if_it_had_not_been_written(self, grown_copy):
        result = forget(grown_copy.workspace.store, ["2"])
        assert set(result.blobs) == {"head.task-2-seed-0", "features.2"}
        assert result.left == 2
        moram = reopened(grown_copy)
        record = moram.evaluate(history=True)
        assert record.matrix("memory").values.shape == (3, 2)
        assert moram.snapshot().tasks == (1, 3)
        classes = list(moram.workspace.stream.tasks[1].classes)
        assert torch.isneginf(moram.snapshot().head.bias[0][classes]).all()

    def test_all_of_them_leave_an_empty_memory(self, grown_copy):
        assert forget(grown_copy.workspace.store, ["1", "2", "3"]).left == 0
        moram = reopened(grown_copy)
        assert AtomsState.load(moram.workspace.store.view()) is None
        with pytest.raises(NotFoundError, match="holds no atoms"):
            moram.retrieve(task="1")
        assert moram.evaluate(version=grown_copy.workspace.store.log()[1].id)

    def test_dead_atoms_go_and_the_effect_is_known_before(self, grown_copy, tmp_path):
        before = grown_copy.workspace.store.head()
        found = dead_atoms(grown_copy, 0.1)
        assert grown_copy.workspace.store.head() == before
        assert 0 < found.pruned < found.atoms == 12 * 24
        done = prune(grown_copy, found)
        assert done.done
        moram = reopened(grown_copy)
        row = moram.evaluate(history=True).row("memory")
        assert row.accuracy[-1] == pytest.approx([task.after for task in found.tasks])
        left = sum(len(moram.snapshot().bank.bank(s.name)) for s in moram.workspace.layout.sites)
        assert left == found.atoms - found.pruned
        assert moram.adapt("2")[0].skipped
        # What was taken out is zero in an export, which says so.
        (path,) = export_peft(moram.workspace, ["task-1-seed-0"], out=tmp_path / "out")
        said = json.loads((path / "memtool_catalog.json").read_text())
        assert not said["byte_identical"]
        (record, *_) = moram.workspace.store.view().atom_records
        assert said["pruned"] == {site: list(ranks) for site, ranks in record.pruned.items()}
        value = read_peft(path, moram.workspace.layout.sites).value
        tensors = moram.workspace.layout.unflatten(value)
        for site in moram.workspace.layout.sites:
            gone = ~tensors[f"{site.name}.lora_A"].any(dim=1)
            assert set(gone.nonzero()[:, 0].tolist()) == set(record.pruned.get(site.name, ()))
            assert not tensors[f"{site.name}.lora_B"][:, gone].any()
        with pytest.raises(ChangedMeanwhileError, match="nothing was pruned"):
            prune(moram, found)

    def test_what_is_no_share(self, grown):
        for below in (0, 1, -1, 3):
            with pytest.raises(ConfigError, match="between 0 and 1"):
                dead_atoms(grown, below)


def test_what_atoms_add_is_float32_under_autocast(grown):
    bank, gate = grown.snapshot().bank, grown.gate
    site = bank.sites[0]
    here = bank.bank(site.name)
    x = torch.randn(2, 5, site.in_features, generator=torch.Generator().manual_seed(0))
    exact = contribution(x, here, gate, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = contribution(x, here, gate, 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


@pytest.mark.slow
def test_a_task_learned_on_a_pruned_bank(tmp_path):
    moram = grow(Moram.open(config_in(tmp_path), seed=0), 2)
    prune(moram, dead_atoms(moram, 0.2))
    moram.adapt("3")
    moram.write()
    assert moram.snapshot().tasks == (1, 2, 3)


def test_an_exported_row_comes_back_in_another_memory(grown, tmp_path):
    paths = export_peft(grown.workspace, ["task-1-seed-0"], out=tmp_path / "out")
    other = Moram.open(config_in(tmp_path, store=str(tmp_path / "other")), seed=0)
    assert other.write(paths).added[0].name == "task-1-seed-0"
    values = [m.workspace.store.view().value("task-1-seed-0") for m in (grown, other)]
    assert np.array_equal(*values)


@pytest.mark.slow
def test_a_run_goes_on_and_has_baselines_beside_it(tmp_path):
    config = config_in(tmp_path, train__epochs=1, stream__splits=2, baselines=("frozen",))
    (record,) = experiment.run(config)
    ids = [row.id for row in record.metrics.rows]
    assert ids[0] == "memory"
    assert any(id.startswith("frozen") for id in ids)
    assert record.row("memory").atom_use is not None
    head = MemoryStore.open(config.store).head()
    (again,) = experiment.run(config)
    assert MemoryStore.open(config.store).head() == head
    assert again.row("memory").accuracy == record.row("memory").accuracy
    page = (config.runs / "seed-0" / "report.html").read_text()
    assert "adapt: atoms of all tasks" in page
    other = config_in(
        tmp_path, train__epochs=1, stream__splits=2, baselines=("frozen",), moram__threshold=0.1
    )
    with pytest.raises(ConfigError, match="another gate"):
        experiment.run(other)


@pytest.mark.slow
def test_bisect_finds_the_version_that_lost_a_task(grown_copy):
    good = grown_copy.workspace.store.head()
    forget(grown_copy.workspace.store, ["1"])
    moram = reopened(grown_copy)
    assert moram.known_tasks(good) == (1, 2, 3)
    found = bisect(moram, metric="faa", drop=0.2, good=good)
    assert found.culprit.version == moram.workspace.store.head()


class TestBadInput:
    def test_more_atoms_to_keep_than_there_are(self, tmp_path):
        moram = Moram.open(config_in(tmp_path, moram__topk=9), seed=0)
        with pytest.raises(MismatchError, match=r"topk of 9 with 4 atoms"):
            moram.adapt("1")

    def test_an_empty_memory(self, tmp_path):
        moram = Moram.open(config_in(tmp_path), seed=0)
        with pytest.raises(NotFoundError, match="no memory at"):
            moram.evaluate()
        with pytest.raises(NotFoundError, match="no adapters in"):
            moram.write()
        MemoryStore.create(moram.workspace.store_path, moram.workspace.space)
        with pytest.raises(NotFoundError, match="holds no atoms"):
            moram.retrieve(task="1")

    def test_another_gate(self, grown_copy):
        with pytest.raises(ConfigError, match=r"threshold 0\.2, here 0\.1"):
            reopened(grown_copy, moram__threshold=0.1).adapt("3", fresh=True)

    @pytest.mark.slow
    def test_a_memory_of_whole_adapters(self, tmp_path):
        mira = Mira.open(small_config(tmp_path), seed=0)
        mira.adapt("1")
        mira.write()
        same = {"stream__order": ("upright", "inverted", "rot90"), "adapter__alpha": 8.0}
        config = small_config(tmp_path, method="moram", adapter__warm_start="none", **same)
        moram = Moram.open(config, seed=0)
        for step in (moram.evaluate, moram.consolidate, lambda: moram.adapt("2")):
            with pytest.raises(MismatchError, match="holds 1 adapters that are recalled whole"):
                step()

    def test_whole_adapters_in_a_memory_of_atoms(self, grown_copy):
        config = grown_copy.config.model_copy(update={"method": "mira"})
        with pytest.raises(MismatchError, match="holds 3 rows of atoms"):
            Mira.open(config, seed=0).write()

    def test_a_bank_of_another_backbone(self, grown, tmp_path):
        space = grown.workspace.space
        other = Space(Backbone("timm:other", "", "0" * 64), space.layout)
        MemoryStore.create(str(tmp_path / "theirs"), other)
        config = config_in(tmp_path, store=str(tmp_path / "theirs"))
        with pytest.raises(SpaceMismatchError, match="backbone"):
            Moram.open(config, seed=0).evaluate()

    def test_settings_that_atoms_cannot_follow(self, tmp_path):
        for setting in (
            {"adapter__per_task": 2},
            {"adapter__warm_start": "previous"},
            {"adapter__residual": True},
            {"stream__setting": "mts"},
        ):
            with pytest.raises(ConfigError, match="under method moram"):
                Moram.open(config_in(tmp_path, **setting), seed=0).adapt("1")

    def test_nothing_to_ask_with(self, grown, tmp_path):
        with pytest.raises(ConfigError, match="--query under method moram"):
            grown.retrieve(query=tmp_path / "q.safetensors")
        with pytest.raises(ConfigError, match="--out under method moram"):
            grown.retrieve(task="1", out=tmp_path / "out")
        with pytest.raises(ConfigError, match="--task and --image"):
            grown.retrieve()

    def test_settings_that_one_memory_cannot_answer(self, grown):
        with pytest.raises(ConfigError, match="setting 'dil' on tasks that were cut for 'cil'"):
            grown.evaluate(setting="dil")

    def test_the_same_task_twice(self, grown_copy, tmp_path):
        paths = export_peft(grown_copy.workspace, ["task-1-seed-0"], out=tmp_path / "out")
        paths[0].rename(tmp_path / "copy-of-1")
        with pytest.raises(AlreadyExistsError, match="atoms of task 1 already"):
            grown_copy.write([tmp_path / "copy-of-1"])
