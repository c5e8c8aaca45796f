"""Whole experiments: every row of the table, resumption, several seeds."""

from __future__ import annotations

import pytest

from memtool.errors import ConfigError
from memtool.evaluation.record import read_record
from memtool.experiments import run as experiment
from memtool.experiments.ablations import ablate
from memtool.experiments.baselines import chosen_baselines
from memtool.experiments.plan import plan
from memtool.methods import open_method
from memtool.methods.mira.method import Mira
from tests.conftest import no_pages
from tests.methods.conftest import learn, small_config

pytestmark = pytest.mark.usefixtures("no_page")  # but in the run of `first`

READINGS = ("", "-ridge", "-lda", "-routed")

DG = {
    "stream__setting": "dg",
    "stream__order": ("rot0", "rot30", "rot60"),
    "stream__validation": 0.2,
    "adapter__warm_start": "none",
    "memory__separation": "identity",
    "memory__scope": "block",
    "consolidate__keys": "random",
    "consolidate__epochs": 1,
    "head__scope": "shared",
    "head__features": "recalled",
}


def two(folder, **more):
    """The small experiment on two tasks."""
    return small_config(folder, stream__order=("upright", "inverted"), **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def first(folder):
    (record,) = experiment.run(two(folder), command="test")
    return record


def test_the_table_holds_memory_baselines_and_oracle(first):
    kinds = {row.id: row.kind for row in first.metrics.rows}
    trained = ("sequential", "ewc", "lwf", "o-lora", "inf-lora", "moe-lora")
    heads = ("ridge", "lda", "ncm", "routed", "linear")
    assert kinds == {
        "memory": "method",
        "routed": "baseline",
        "uniform": "baseline",
        **{f"frozen-{head}": "baseline" for head in heads},
        **{f"{name}{head}": "baseline" for name in trained for head in READINGS},
        "joint": "upper bound",
        "joint-lda": "upper bound",
        "oracle": "upper bound",
    }
    for row in first.metrics.rows:
        assert 0.05 < row.metrics["faa"] <= 1, row.id


def test_files_lie_where_they_should(folder, first):
    place = folder / "runs" / "seed-0"
    assert read_record(place / "record.json") == first
    page = (place / "report.html").read_text(encoding="utf-8")
    assert 'id="figure-recall"' in page
    assert "<svg" in page
    assert "default-src 'none'" in page
    assert (folder / "runs" / "results.jsonl").exists()


def test_a_second_run_trains_nothing_and_finds_the_same(folder, first):
    events = []
    (again,) = experiment.run(two(folder), command="test", progress=events.append)
    assert not [event for event in events if "adapt" in event.stage]
    for row in first.metrics.rows:
        assert again.row(row.id).accuracy == row.accuracy


def test_a_run_that_was_stopped_goes_on(tmp_path, first):
    config = two(tmp_path)

    def stop(event):
        if event.stage.startswith("task 2") and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, progress=stop, baselines=False)
    (record,) = experiment.run(config, baselines=False)
    for row in record.metrics.rows:
        assert first.row(row.id).accuracy == row.accuracy


def test_seeds_have_memories_of_their_own(tmp_path):
    config = two(tmp_path, seed=(0, 1), stream__train_per_task=20, train__epochs=1)
    records = experiment.run(config, baselines=False)
    assert [record.run.seed for record in records] == [0, 1]
    assert (tmp_path / "memory-seed-0").is_dir()
    assert (tmp_path / "memory-seed-1").is_dir()


def test_a_memory_of_another_seed_or_other_settings_is_not_gone_on_with(folder, first):
    with pytest.raises(ConfigError, match="holds adapters of seed 0"):
        experiment.run(two(folder, seed=(1,)))
    with pytest.raises(ConfigError, match="consolidated with other settings"):
        experiment.run(two(folder, memory__separation="affine"))


@pytest.fixture(scope="module")
def generalised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generalised")
    with no_pages():
        (record,) = experiment.run(small_config(folder, **DG), command="test")
    return folder, record


def test_every_domain_is_held_out_in_turn(generalised):
    folder, record = generalised
    assert [task.name for task in record.run.tasks] == ["rot0", "rot30", "rot60"]
    ids = {row.id for row in record.metrics.rows}
    assert {"memory", "memory-nonnegative", "uniform", "routed", "erm-linear", "erm-lda"} <= ids
    assert {"moe-lora-linear", "moe-lora-lda", "frozen-lda", "frozen-prototype"} <= ids
    assert "oracle" not in ids
    for row in record.metrics.rows:
        scores = row.accuracy[-1]
        assert None not in scores
        assert row.metrics["dg.heldout"] == pytest.approx(sum(scores) / 3)
    memory = record.row("memory")
    assert memory.metrics["dg.validation"] > 0.3
    for place, name in enumerate(("rot0", "rot30", "rot60")):
        fold = read_record(folder / "runs" / "seed-0" / f"without-{name}" / "record.json")
        assert fold.row("memory").accuracy[-1] == (memory.accuracy[-1][place],)
        assert (folder / f"memory-without-{name}").is_dir()
    assert len(list((folder / "runs" / "seed-0" / "adapters").glob("[!.]*"))) == 3


def test_the_held_out_domain_is_never_learned_from(generalised):
    folder, _ = generalised
    mira = Mira.open(
        small_config(
            folder, **DG, stream__held_out="rot30", store=str(folder / "memory-without-rot30")
        ),
        seed=0,
    )
    names = [record.meta["task_name"] for record in mira.workspace.store.view().adapters]
    assert names == ["rot0", "rot60"]
    assert len(mira.workspace.stream.held_out.train) == 0
    with pytest.raises(ConfigError, match="'rot30' is held out"):
        mira.adapt("rot30")
    assert mira.retrieve(task="rot30").samples > 0


def test_domains_keep_their_numbers_where_one_is_held_out(tmp_path):
    mira = Mira.open(small_config(tmp_path, **DG, stream__held_out="rot0"), seed=0)
    tasks = mira.workspace.stream.tasks
    assert [mira.stage(task) for task in tasks] == [
        "task 2/3 rot30: adapt",
        "task 3/3 rot60: adapt",
    ]
    assert mira.workspace.stream.count == 3


def test_a_plan_of_held_out_domains_writes_nothing(tmp_path):
    config = small_config(tmp_path, **DG)
    facts = plan(config, seed=0, verb="run")
    assert (facts["setting"], facts["held_out"], facts["memories"]) == ("dg", None, 3)
    assert facts["tasks"] == ["rot0", "rot30", "rot60"]
    assert (facts["train_samples"], facts["test_samples"]) == ([50] * 3, [40] * 3)
    assert (facts["epochs"], facts["steps"]) == ([2] * 3, [2] * 3)
    assert facts["bytes_in_all"] == 3 * 2 * facts["bytes_per_adapter"]
    assert facts["baselines"] == ["frozen", "erm", "moe-lora"]
    assert (facts["head"], facts["head_scope"]) == ("lda", "shared")
    assert facts["runs"] == str(tmp_path / "runs")
    one = plan(small_config(tmp_path, **DG, stream__held_out="rot30"), seed=0, verb="write")
    assert (one["held_out"], one["memories"], one["baselines"]) == ("rot30", 1, None)
    assert one["train_samples"] == [50, 0, 50]
    assert one["test_samples"] == [0, 40, 0]
    assert one["epochs"] == [2, 0, 2]
    assert not list(tmp_path.iterdir())


def test_baselines_are_those_of_the_setting_and_the_method(tmp_path):
    def chosen(config):
        return chosen_baselines(open_method(config, seed=0))

    of_setting = {
        setting: chosen(small_config(tmp_path, stream__setting=setting))
        for setting in ("dil", "til", "dg")
    }
    assert of_setting["til"] == ()
    assert of_setting["dg"] == ("frozen", "erm", "moe-lora")
    assert {"ewc", "joint"} < set(of_setting["dil"])
    wanted = small_config(tmp_path, baselines=("joint", "frozen", "erm"))
    assert chosen(wanted) == ("frozen", "joint")
    nothing = small_config(tmp_path, baselines=("none",))
    assert chosen(nothing) == ()
    other = small_config(tmp_path, method="modulation", stream__setting="mts")
    assert chosen(other) == ()


def test_domains_that_cannot_be_held_out(tmp_path):
    for held_out, match in (("rot45", "no domain of digits"), ("rot0", "under stream.setting dil")):
        cut = {"stream__setting": "dil", "stream__order": None} if held_out == "rot0" else DG
        config = small_config(tmp_path, **cut, stream__held_out=held_out)
        with pytest.raises(ConfigError, match=match):
            Mira.open(config, seed=0).adapt("1")
    mira = learn(Mira.open(small_config(tmp_path, **DG), seed=0), 2, each=False)
    with pytest.raises(ConfigError, match="none is held out"):
        mira.evaluate(setting="dg")


def test_an_ablation_changes_one_choice_and_trains_adapters_once(tmp_path):
    config = two(tmp_path, consolidate__keys="random", consolidate__epochs=2)
    (record,) = ablate(config, "protect")
    assert [row.label for row in record.metrics.rows] == [
        "protect dual-gpm",
        "protect freeze",
        "protect none",
    ]
    assert len(list((tmp_path / "runs" / "seed-0" / "adapters").glob("[!.]*"))) == 2
    drift = {row.id: row.metrics["coefficient_drift"] for row in record.metrics.rows}
    assert drift["protect-dual-gpm"] < drift["protect-none"]


def test_ablations_that_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="no ablation 'sep'"):
        ablate(small_config(tmp_path), "sep")
    with pytest.raises(ConfigError, match="protection under setting dg"):
        ablate(small_config(tmp_path, **DG), "protect")
