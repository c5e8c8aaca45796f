"""The five steps on a real store, real digits and the real embedded backbone."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from memtool.adapters.mixing import Mixture
from memtool.adapters.peft_files import read_peft
from memtool.adapters.recalls import every, on_top, same_for_all
from memtool.adapters.values import AdapterValues
from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    ConfigError,
    DataError,
    MismatchError,
    NotFoundError,
)
from memtool.methods.mira.measure import Measure, drift_degrees
from memtool.methods.mira.method import Mira
from memtool_stores import SpaceMismatchError
from tests.methods.conftest import learn, small_config


def versions(mira):
    return [version.id for version in mira.workspace.store.log()]


def test_the_memory_learns_and_knows_which_task_it_sees(learned):
    record = learned.evaluate(history=True, compare=True)
    memory = record.row("memory")
    assert memory.metrics["faa"] > 0.6
    assert memory.metrics["task_accuracy"] > 0.9
    assert 0.3 < record.row("uniform").metrics["faa"] <= 1
    assert record.row("oracle").metrics["faa"] >= memory.metrics["faa"] - 0.05
    matrix = record.matrix("memory").values
    assert np.isnan(matrix[0]).all()
    assert not np.isnan(matrix[1:]).any()
    assert matrix[1, 0] > 0.5 > matrix[1, 2]


def test_history_agrees_with_the_version_itself(learned):
    matrix = learned.evaluate(history=True).matrix("memory").values
    earlier = [v for v in learned.workspace.store.log() if v.metadata.get("learned") == [1, 2]]
    alone = learned.evaluate(version=earlier[0].id).matrix("memory").values
    assert alone.shape == (3, 2)
    assert np.array_equal(alone[2], matrix[2, :2])


def test_task_given_recalls_the_adapter_exactly(learned):
    record = learned.evaluate(setting="til")
    snapshot, work = learned.snapshot(), learned.workspace
    task = work.stream.tasks[1]
    (stored,) = snapshot.adapters_of(2)
    trained = read_peft(work.adapter_folder / stored.name, work.layout.sites)
    assert torch.equal(torch.from_numpy(snapshot.view.value(stored.id).copy()), trained.value)
    values = AdapterValues.from_flat(trained.value[None], work.layout, trained.scaling)
    pixels = work.backbone.preprocess(torch.from_numpy(np.asarray(task.test.images)))
    with torch.inference_mode():
        scores = snapshot.own_head(stored.name)(work.backbone.features(pixels, every(values)))
    right = (scores.argmax(1).numpy() == task.test.labels).mean()
    assert record.row("memory").accuracy[-1][1] == pytest.approx(right)


def test_repeating_a_step_changes_nothing(learned_copy):
    before = versions(learned_copy)
    assert learned_copy.adapt("2")[0].skipped
    written = learned_copy.write()
    assert written.added == ()
    assert len(written.skipped) == 3
    assert learned_copy.consolidate().unchanged
    assert versions(learned_copy) == before


def test_learning_at_once_gives_the_keys_and_head_of_learning_in_turn(tmp_path):
    plain = {"adapter__warm_start": "none"}
    found = []
    for name, each in (("turn", True), ("once", False)):
        mira = Mira.open(small_config(tmp_path / name, **plain), seed=0)
        learn(mira, 2, each=each)
        snapshot = mira.snapshot()
        found.append((torch.from_numpy(snapshot.view.keys().copy()), snapshot.head.weight))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_chained_adapters_start_where_the_one_before_ended(learned):
    about = learned.workspace.store.view("HEAD").get("task-2-seed-0")
    first = learned.workspace.store.view("HEAD").get("task-1-seed-0")
    assert about.meta["provenance"]["warm_start"] == first.id


def test_an_image_is_recalled_and_named(learned, tmp_path):
    task = learned.workspace.stream.tasks[1]
    picture = tmp_path / "digit.png"
    Image.fromarray(np.asarray(task.test.images[0])).save(picture)
    result = learned.retrieve(image=picture)
    assert result.samples == 1
    assert max(result.adapters, key=lambda a: a.coefficient).task == 2
    assert result.prediction.label in learned.workspace.stream.class_names
    assert 0 < result.prediction.probability <= 1


def test_a_query_is_what_a_memory_would_be_asked(learned, tmp_path):
    snapshot = learned.snapshot()
    _, model, _ = snapshot.consolidated()
    images = torch.from_numpy(np.asarray(learned.workspace.stream.tasks[2].test.images[:1]))
    block = model.memory.blocks[0]
    with torch.inference_mode():
        pixels = model.backbone.preprocess(images)
        query = model.memory[block].query.bare(model.backbone.hidden(pixels, block))[0]
        expected = model.with_coefficients(images)[1][0, 0]
    file = tmp_path / "q.safetensors"
    save_file({"query": query.clone().contiguous()}, file)
    result = learned.retrieve(query=file)
    assert result.blocks[0] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("mix", ["delta", "params"])
def test_the_recalled_adapter_equals_the_mixture(learned_copy, tmp_path, mix):
    folder = learned_copy.config.runs.parent
    config = small_config(folder, memory__mix=mix, memory__separation="tanh")
    mira = Mira.open(config, seed=0)
    mira.consolidate()
    out = tmp_path / "recalled"
    result = mira.retrieve(task="2", out=out)
    work, snapshot = mira.workspace, mira.snapshot()
    found = read_peft(out, work.layout.sites)
    alone = AdapterValues.from_flat(found.value[None], found.layout, found.scaling)
    coefficients = torch.tensor(result.blocks[0])
    assert 0.5 < coefficients.max() < 0.9
    images = torch.from_numpy(np.asarray(work.stream.tasks[1].test.images[:8]))
    pixels = work.backbone.preprocess(images)
    mixture = same_for_all(snapshot.model.values, coefficients, mix)
    with torch.inference_mode():
        expected = work.backbone.features(pixels, mixture)
        actual = work.backbone.features(pixels, every(alone))
    assert torch.allclose(actual, expected, atol=1e-4)


def test_another_separation_is_another_version_from_the_same_moments(learned_copy):
    before = versions(learned_copy)
    folder = learned_copy.config.runs.parent
    for name in ("affine", "identity", "tanh", "relu", "topk"):
        mira = Mira.open(small_config(folder, memory__separation=name), seed=0)
        result = mira.consolidate()
        assert result.separation == name
        assert mira.evaluate().row("memory").metrics["faa"] > 0.5, name
    assert len(versions(learned_copy)) == len(before) + 5
    kept = learned_copy.evaluate(version=before[0]).row("memory").metrics["faa"]
    assert kept > 0.6


@pytest.mark.parametrize("kind", ["ridge", "lda", "ncm", "grown"])
@pytest.mark.parametrize("scope", ["shared", "task"])
def test_every_head(learned_copy, kind, scope):
    folder = learned_copy.config.runs.parent
    mira = Mira.open(small_config(folder, head__kind=kind, head__scope=scope), seed=0)
    mira.consolidate()
    faa = mira.evaluate().row("memory").metrics["faa"]
    assert faa > (0.2 if kind in ("ncm", "grown") else 0.5)


def test_learned_keys_leave_older_keys_where_they_were(adapted):
    learning = {
        "consolidate__keys": "random",
        "consolidate__epochs": 2,
        "memory__separation": "affine",
    }
    mira = Mira.open(small_config(adapted, **learning), seed=0)
    learn(mira, 1)
    first = mira.workspace.store.view("HEAD").keys().copy()
    mira.write([one.path for one in mira.adapt("2")])
    result = mira.consolidate()
    second = mira.workspace.store.view("HEAD").keys()
    assert np.array_equal(second[:, :1], first)
    assert result.key_drift_degrees == pytest.approx(0, abs=1e-3)
    drawn = torch.randn(1, 2, first.shape[2], generator=torch.Generator().manual_seed(0))
    assert not np.allclose(second[:, 1], drawn[:, 1].numpy())


def test_a_memory_in_every_block(adapted):
    mira = Mira.open(small_config(adapted, memory__scope="block"), seed=0)
    learn(mira, 2)
    result = mira.retrieve(task="2")
    assert result.block_numbers == (0, 1, 2, 3)
    assert mira.evaluate().row("memory").metrics["faa"] > 0.5


def test_linear_query_modules_are_kept_in_the_store(adapted):
    settings = {"memory__query": "linear", "memory__separation": "identity"}
    mira = Mira.open(small_config(adapted, consolidate__epochs=1, **settings), seed=0)
    learn(mira, 1)
    weight = mira.snapshot().model.memory[2].query.g.weight
    assert not torch.equal(weight, torch.eye(len(weight)))
    later = Mira.open(small_config(adapted, **settings), seed=0)
    later.write([one.path for one in later.adapt("2")])
    later.consolidate()
    assert torch.equal(later.snapshot().model.memory[2].query.g.weight, weight)


def test_several_adapters_of_a_task_share_its_weight(tmp_path):
    mira = Mira.open(small_config(tmp_path, adapter__per_task=2), seed=0)
    learn(mira, 2)
    result = mira.retrieve(task="2")
    assert [adapter.task for adapter in result.adapters] == [1, 1, 2, 2]
    by_name = [adapter.coefficient for adapter in result.adapters]
    assert by_name[2] == pytest.approx(by_name[3], abs=1e-4)
    assert sum(by_name) == pytest.approx(1, abs=1e-4)
    assert mira.evaluate(setting="til").row("memory").metrics["faa"] > 0.5


def test_an_exported_adapter_comes_back(learned, tmp_path):
    from memtool.methods.export import export_peft

    paths = export_peft(learned.workspace, ["task-2-seed-0"], out=tmp_path / "out")
    other = Mira.open(small_config(tmp_path, store=str(tmp_path / "other")), seed=0)
    result = other.write(paths, task="2")
    assert [adapter.name for adapter in result.added] == ["task-2-seed-0"]
    before = learned.workspace.store.view("HEAD").value("task-2-seed-0")
    after = other.workspace.store.view("HEAD").value("task-2-seed-0")
    assert np.array_equal(before, after)


def test_drift_is_an_angle_and_keys_without_length_have_none():
    before = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    after = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    assert drift_degrees(before, after) == pytest.approx(90)
    assert drift_degrees(before, before) == pytest.approx(0)
    assert drift_degrees(before[:, 1:], after[:, 1:]) == 0


class TestBadInput:
    def test_unknown_tasks(self, learned):
        with pytest.raises(NotFoundError, match="task 9: digits"):
            learned.adapt("9")
        with pytest.raises(NotFoundError, match=r"(?s)no task 'invertd'.*did you mean 'inverted'"):
            learned.adapt("invertd")

    def test_an_empty_memory(self, tmp_path):
        mira = Mira.open(small_config(tmp_path), seed=0)
        with pytest.raises(NotFoundError, match="no memory at"):
            mira.consolidate()
        with pytest.raises(NotFoundError, match="no adapters in"):
            mira.write()

    def test_a_memory_that_was_never_consolidated(self, tmp_path):
        mira = Mira.open(small_config(tmp_path), seed=0)
        mira.adapt("1")
        mira.write()
        with pytest.raises(ConfigError, match=r"(?s)never consolidated.*1 adapters.*consolidate"):
            mira.evaluate()

    def test_an_adapter_of_another_rank(self, learned_copy):
        folder = learned_copy.config.runs.parent
        mira = Mira.open(small_config(folder, adapter__rank=2), seed=0)
        for step in (mira.write, mira.consolidate):
            with pytest.raises(SpaceMismatchError, match="rank"):
                step()

    def test_another_adapter_of_the_same_name(self, learned_copy):
        folder = learned_copy.config.runs.parent
        mira = Mira.open(small_config(folder, train__lr=0.003), seed=0)
        with pytest.raises(AlreadyExistsError, match="other settings"):
            mira.adapt("2")
        mira.adapt("2", fresh=True)
        before = versions(mira)
        with pytest.raises(AlreadyExistsError, match="another adapter named 'task-2-seed-0'"):
            mira.write()
        assert versions(mira) == before

    def test_a_directory_that_is_no_adapter(self, learned, tmp_path):
        with pytest.raises(NotFoundError, match="no adapter directory"):
            learned.write([tmp_path / "nowhere"])

    def test_images_that_cannot_be_read(self, learned, tmp_path):
        with pytest.raises(NotFoundError, match="nowhere"):
            learned.retrieve(image=tmp_path / "nowhere.png")
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"\x89PNG broken")
        with pytest.raises(DataError, match="broken"):
            learned.retrieve(image=broken)

    def test_nothing_to_retrieve(self, learned):
        with pytest.raises(ConfigError, match="what should recall"):
            learned.retrieve()

    def test_queries_counted_another_way(self, learned_copy):
        folder = learned_copy.config.runs.parent
        mira = Mira.open(small_config(folder, memory__token="class"), seed=0)
        with pytest.raises(ConfigError, match=r"(?s)memory.token is class.*counted with mean"):
            mira.consolidate()

    def test_a_query_of_another_width(self, learned, tmp_path):
        file = tmp_path / "q.safetensors"
        save_file({"query": torch.zeros(7)}, file)
        with pytest.raises(MismatchError, match=r"query of shape \(1, 7\)"):
            learned.retrieve(query=file)

    def test_settings_that_one_memory_cannot_answer(self, learned):
        with pytest.raises(ConfigError, match="setting 'dg'"):
            learned.evaluate(setting="dg")

    def test_a_memory_that_changed_meanwhile(self, learned_copy, monkeypatch):
        mira = learned_copy
        other = Mira.open(small_config(mira.config.runs.parent, seed=(1,)), seed=1)
        other.adapt("1")
        changed = small_config(mira.config.runs.parent, memory__separation="affine")
        late = Mira.open(changed, seed=0)
        accuracy = Measure.accuracy

        def write_meanwhile(*arguments):
            other.write([other.workspace.adapter_folder / "task-1-seed-1"])
            return accuracy(*arguments)

        monkeypatch.setattr(Measure, "accuracy", write_meanwhile)
        with pytest.raises(ChangedMeanwhileError, match="moved on to version"):
            late.consolidate()
        assert len(mira.workspace.store.view("HEAD")) == 4

    def test_another_backbone(self, learned_copy, tmp_path):
        import memtool_stores

        work = learned_copy.workspace
        space = work.space
        other = memtool_stores.Space(
            memtool_stores.Backbone("timm:other", "", "0" * 64), space.layout
        )
        memtool_stores.MemoryStore.create(str(tmp_path / "theirs"), other)
        config = small_config(tmp_path, store=str(tmp_path / "theirs"))
        with pytest.raises(SpaceMismatchError, match="backbone"):
            Mira.open(config, seed=0).consolidate()

    def test_another_order_of_tasks(self, learned):
        folder = learned.config.runs.parent
        turned = small_config(folder, stream__order=("rot90", "upright", "inverted"))
        with pytest.raises(MismatchError, match=r"trained on task 1 'upright'.*is 'rot90'"):
            Mira.open(turned, seed=0).evaluate()
        other = turned.model_copy(update={"store": str(folder / "turned")})
        with pytest.raises(MismatchError, match=r"trained on task 1 'upright'"):
            Mira.open(other, seed=0).write()

    def test_a_setting_that_the_tasks_were_not_cut_for(self, learned):
        with pytest.raises(ConfigError, match="setting 'cil' on tasks that were cut for 'dil'"):
            learned.evaluate(setting="cil")

    def test_another_query_module(self, learned_copy):
        folder = learned_copy.config.runs.parent
        mira = Mira.open(small_config(folder, memory__query="linear"), seed=0)
        with pytest.raises(ConfigError, match=r"memory\.query is linear"):
            mira.consolidate()

    @pytest.mark.parametrize("other", [{"separation": "identity"}, {"key_norm": "memories"}])
    def test_learning_keys_of_another_separation(self, learned_copy, other):
        folder = learned_copy.config.runs.parent
        learning = {"consolidate__keys": "random", "consolidate__epochs": 1}
        learning |= {f"memory__{key}": value for key, value in other.items()}
        with pytest.raises(ConfigError, match="another separation"):
            Mira.open(small_config(folder, **learning), seed=0).consolidate()


def test_a_second_adapter_of_a_task_is_counted_in(learned_copy):
    folder = learned_copy.config.runs.parent
    before = learned_copy.snapshot().feature_statistics()[1].sums
    other = Mira.open(small_config(folder, seed=(1,)), seed=1)
    other.adapt("1")
    other.write()
    other.consolidate()
    state = learned_copy.snapshot().state
    assert state.tasks == (1, 2, 3)
    assert state.adapter_tasks == (0, 1, 2, 0)
    assert not torch.allclose(learned_copy.snapshot().feature_statistics()[1].sums, before)
    assert learned_copy.evaluate().row("memory").metrics["faa"] > 0.6


def test_folders_that_a_kill_left_behind_are_not_adapters(learned_copy):
    adapters = learned_copy.workspace.adapter_folder
    shutil.copytree(adapters / "task-1-seed-0", adapters / ".task-1-seed-0-abc-old")
    assert learned_copy.write().added == ()


def test_classes_learned_in_turn_under_a_linear_head_grown_by_task(tmp_path):
    cut = {"stream__setting": "cil", "stream__order": tuple("0123"), "head__kind": "grown"}
    mira = Mira.open(small_config(tmp_path, head__scope="shared", train__epochs=4, **cut), seed=0)
    learn(mira, 2)
    scores = mira.evaluate().row("memory").accuracy[-1]
    assert min(scores) > 0.4


def test_folders_of_others_are_never_replaced(learned_copy):
    place = learned_copy.workspace.adapter_folder / "task-1-seed-7"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    mira = Mira.open(small_config(learned_copy.config.runs.parent, seed=(7,)), seed=7)
    with pytest.raises(AlreadyExistsError, match="is not empty"):
        mira.adapt("1", fresh=True)
    assert (place / "notes.txt").read_text() == "mine"


def test_learning_at_rate_zero_leaves_closed_form_keys(adapted):
    learning = {"consolidate__epochs": 1, "consolidate__lr": 1e-12}
    mira = Mira.open(small_config(adapted, **learning), seed=0)
    learn(mira, 3)
    learned_keys = mira.workspace.store.view("HEAD").keys().copy()
    plain = Mira.open(small_config(adapted), seed=0)
    plain.consolidate()
    assert np.allclose(plain.workspace.store.view("HEAD").keys(), learned_keys, atol=1e-4)


RESIDUAL = {
    "adapter__residual": True,
    "adapter__warm_start": "none",
    "memory__separation": "identity",
    "memory__scope": "block",
    "consolidate__keys": "mean-query",
    "consolidate__protect": "dual-gpm",
    "head__scope": "shared",
    "head__features": "recalled",
}


@pytest.mark.parametrize("per_task", [1, 2])
def test_a_residual_adapter_is_trained_on_top_of_what_is_recalled(tmp_path, per_task):
    mira = Mira.open(small_config(tmp_path, adapter__per_task=per_task, **RESIDUAL), seed=0)
    learn(mira, 2)
    view = mira.workspace.store.view("HEAD")
    sources = [record.meta["provenance"]["warm_start"] for record in view.adapters]
    assert sources[0] == "zero"
    assert "on top of version" in sources[-1]
    assert mira.evaluate().row("memory").metrics["faa"] > 0.4


def test_on_top_is_the_sum_of_both(learned):
    snapshot, work = learned.snapshot(), learned.workspace
    _, model, _ = snapshot.consolidated()
    own = snapshot.own_values(2, work.engine.device)
    images = torch.from_numpy(work.stream.tasks[0].test.images[:6])
    with torch.no_grad():
        pixels = work.backbone.preprocess(images)
        both = work.backbone.features(pixels, on_top(model.recall(pixels), own))
        every_value = AdapterValues.from_flat(
            torch.cat([model.values.flat(), own.flat()]),
            work.layout,
            torch.cat([model.values.scaling, own.scaling]),
        )
        recalled = model.recall(pixels).coefficients[model.memory.blocks[0]]
        gate = torch.cat([recalled, torch.ones(6, 1)], dim=1)
        slow = work.backbone.features(
            pixels, lambda block, _: Mixture.weighted(every_value.block(block), gate)
        )
        alone = work.backbone.features(pixels, model.recall(pixels))
    assert torch.allclose(both, slow, atol=1e-4)
    assert not torch.allclose(both, alone, atol=1e-2)


def test_residual_adapters_need_a_sum(tmp_path):
    config = small_config(tmp_path, adapter__residual=True, memory__mix="params")
    mira = learn(Mira.open(config, seed=0), 1)
    with pytest.raises(ConfigError, match="on top of a memory of mix 'params'"):
        mira.adapt("2")


@pytest.mark.parametrize(("routing", "least"), [("lda", 0.6), ("prototype", 0.3)])
def test_hard_routing_gives_all_to_the_adapters_of_one_task(tmp_path, routing, least):
    config = small_config(tmp_path, memory__routing=routing, adapter__per_task=2)
    mira = learn(Mira.open(config, seed=0), 2)
    found = mira.retrieve(task="1")
    assert sum(adapter.coefficient for adapter in found.adapters) == pytest.approx(1)
    first, second = (a.coefficient for a in found.adapters if a.task == 1)
    assert first == pytest.approx(second)
    assert mira.evaluate().row("memory").metrics["faa"] > least
    learning = small_config(tmp_path, memory__routing=routing, consolidate__epochs=1)
    with pytest.raises(ConfigError, match=f"key learning under memory.routing {routing}"):
        Mira.open(learning, seed=0).consolidate()


def test_a_shared_head_learns_on(adapted):
    config = small_config(
        adapted,
        head__kind="shared",
        head__scope="shared",
        consolidate__epochs=2,
        consolidate__module_lr=1e-2,
    )
    mira = Mira.open(config, seed=0)
    learn(mira, 1)
    before = mira.snapshot().head
    learn(mira, 2)
    after = mira.snapshot().head
    assert before.weight.shape == after.weight.shape
    assert not torch.equal(before.weight, after.weight)
    assert mira.evaluate().row("memory").metrics["faa"] > 0.4


def test_values_that_consolidation_refines(tmp_path):
    settings = {"consolidate__epochs": 1, "head__features": "recalled", "head__scope": "shared"}
    config = small_config(tmp_path, consolidate__value_lr=1e-3, **settings)
    mira = Mira.open(config, seed=0)
    learn(mira, 1)
    store = mira.workspace.store
    trained, refined = store.view("HEAD~1"), store.view("HEAD")
    old, new = trained.adapters[0], refined.adapters[0]
    assert new.name == old.name
    assert new.meta["refined_from"] == old.sha256
    assert not np.array_equal(trained.value(old.id), refined.value(new.id))
    assert mira.write().skipped == (new.name,)  # the trained one on disk is the same adapter
    first = refined.value(new.id).copy()
    learn(mira, 2)
    later = mira.workspace.store.view("HEAD")
    assert np.array_equal(later.value(new.id), first)  # only the new adapters learn
    assert mira.evaluate(history=True).row("memory").metrics["faa"] > 0.4
    wrong = small_config(tmp_path, consolidate__value_lr=1e-3, consolidate__epochs=1)
    with pytest.raises(ConfigError, match=r"head\.features own"):
        Mira.open(wrong, seed=0).consolidate()


def test_consolidating_again_reads_no_image(learned, monkeypatch):
    said = learned.workspace.store.view().metadata
    monkeypatch.setattr("memtool.workspace.create_stream", None)
    again = learned.consolidate()
    assert again.unchanged
    assert again.train_accuracy == said["train_accuracy"]


def test_a_run_consolidates_what_was_written_once(tmp_path):
    mira = Mira.open(small_config(tmp_path), seed=0)
    mira.adapt("1")
    mira.write()
    task = mira.workspace.task("1")
    mira.all_written()  # tasks in an order are consolidated one by one
    assert mira.known_tasks("HEAD") == ()
    mira.task_written(task)
    assert mira.known_tasks("HEAD") == (1,)
    there = mira.workspace.store.head()
    mira.task_written(task)
    assert mira.workspace.store.head() == there


def test_sources_of_generalisation_are_consolidated_at_once(tmp_path):
    dg = {"stream__setting": "dg", "stream__order": ("rot0", "rot30"), "stream__held_out": "rot30"}
    config = small_config(tmp_path, **dg, adapter__warm_start="none", train__epochs=1)
    mira = Mira.open(config, seed=0)
    sources = mira.workspace.stream.tasks
    for task in sources:
        mira.adapt(str(task.number))
    mira.write()
    for task in sources:
        mira.task_written(task)
    assert mira.known_tasks("HEAD") == ()
    mira.all_written()
    assert mira.known_tasks("HEAD") == tuple(task.number for task in sources)


def test_a_report_shows_the_weights_and_keys_in_memory(learned):
    tasks = learned.workspace.stream.tasks
    shown = learned.inside(tasks)
    adapters = tuple(record.name for record in learned.snapshot().records)
    weights = np.array(shown.recalled.weights)
    assert weights.argmax(axis=1).tolist() == [0, 1, 2]
    for place, task in enumerate(tasks):
        assert shown.recalled.tasks[place] == task.name
        assert shown.recalled.samples[place] == len(task.test)
        found = learned.retrieve(task=task.name)
        means = [one.coefficient for one in found.adapters]
        assert np.allclose(weights[place], means, rtol=1e-4, atol=1e-4)
        assert f"{means[0]:.4f}" in found._repr_html_()
    assert shown.keys.adapters == adapters
    names = [task.name for task in tasks]
    assert {one.task for one in shown.examples} == set(names)
    assert all(one.image and one.said and one.label for one in shown.examples)
    assert {one.name for one in shown.curves if one.of == "adapters"} == set(adapters)
    stream = learned.config.stream.model_copy(update={"setting": "til"})
    given = Mira.open(learned.config, seed=0)
    given.config = learned.config.model_copy(update={"stream": stream})
    assert given.inside(tasks).recalled is None
    assert given.inside(tasks).keys is not None


def test_a_run_goes_on_under_the_same_settings_only(learned, tmp_path):
    learned.require_same_settings("none")
    for changes, match in (
        ({"consolidate__keys": "mean-query"}, "other keys or epochs"),
        ({"memory__separation": "identity"}, "other settings"),
    ):
        config = small_config(tmp_path, **changes)
        other = config.model_copy(update={"store": learned.config.store})
        with pytest.raises(ConfigError, match=match):
            Mira.open(other, seed=0).require_same_settings("another store")
