"""Settings chosen on validation samples: what is tried, what is read, and what a record re-runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from memtool.config import resolve
from memtool.errors import ConfigError, DataError, DivergedError
from memtool.evaluation.record import Record, read_record
from memtool.evaluation.selection import Cell, Choice, Selection, first_best
from memtool.experiments import run as experiment
from memtool.experiments.plan import plan_of_selection
from memtool.experiments.select import cell_config, cells_of, select, tuning_seed
from memtool.learning.learner import Learner
from memtool.methods.mira.method import Mira
from memtool.remembered import require_held_back
from memtool.reports.chosen import selection_grid
from memtool.reports.table import methods_grid
from memtool.settings import Config
from memtool.streams import create_stream, digits
from memtool_stores import MemoryStore
from tests.conftest import no_pages
from tests.methods.conftest import small_config
from tests.reports import sample

GRID = ("train.lr=1e-4,2e-2",)


def tiny(folder: Path, **more: object) -> Config:
    return small_config(
        folder,
        **{
            "stream__train_per_task": 40,
            "stream__test_per_task": 30,
            "stream__order": ("upright", "inverted"),
            "stream__validation": 0.2,
            "consolidate__keys": "random",
            "consolidate__epochs": 2,
            "train__epochs": 1,
            "baselines": ("sequential",),
            **more,
        },
    )


def selected(config: Config) -> tuple[object, Record]:
    cells = cells_of(config, GRID)
    with no_pages():
        selection = select(config, cells, seed=tuning_seed(config))
    (record,) = experiment.run(config, selection=selection)
    return selection, record


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selected")
    trained: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        watch_training(patch, trained)
        selection, record = selected(tiny(folder))
    return folder, selection, record, trained


def watch_training(patch: pytest.MonkeyPatch, trained: list[str]) -> None:
    """Add the hash of what every baseline has learned after each task to `trained`."""
    learn = Learner.learn

    def watched(self: Learner, *given: object, **more: object) -> object:
        found = learn(self, *given, **more)
        if self.values is not None:
            values = self.values.flat().detach().cpu().numpy().tobytes()
            trained.append(hashlib.sha256(values).hexdigest())
        return found

    patch.setattr(Learner, "learn", watched)


def learned(store: str) -> dict[str, str]:
    """Hashes of all that a memory holds: adapters, keys, heads and other blobs."""
    view = MemoryStore.open(store).view()
    keys = view.keys()
    found = {record.name: record.sha256 for record in view.live}
    for name in view.blobs():
        data = view.blob(name)
        for record in view.live:  # ids are drawn anew for every store
            data = data.replace(record.id.encode(), record.name.encode())
        found[f"blob {name}"] = hashlib.sha256(data).hexdigest()
    return found | {"keys": "none" if keys is None else hashlib.sha256(keys.tobytes()).hexdigest()}


def test_each_row_has_the_first_best_of_its_figures(whole):
    _, selection, record, _ = whole
    assert [cell.text for cell in selection.cells] == ["train.lr=0.0001", "train.lr=0.02"]
    assert (selection.seed, selection.samples, selection.measure) == (1000, 20, "accuracy")
    assert {row.id for row in record.metrics.rows} == set(selection.rows)
    for id, choice in selection.rows.items():
        if choice.of is not None:
            assert choice.of == "sequential"
            best = max(figure for figure in choice.figures if figure is not None)
            assert choice.figures.index(best) == choice.chosen, id
    own = selection.rows["memory"].chosen
    assert all(choice.chosen == own for choice in selection.rows.values() if choice.of is None)
    assert record.run.configuration["train"]["lr"] == selection.cells[own].values["train.lr"]
    assert record.run.selection == selection
    assert record.run.configuration["stream"]["split"] == "test"


def test_the_table_says_what_was_tried(whole):
    folder, selection, record, _ = whole
    note = methods_grid([record]).notes[-1]
    assert note.startswith("Each row has the best of 2 settings on 20 validation samples of seed")
    grid = selection_grid([record])
    assert grid.header == ("", "train.lr=0.0001", "train.lr=0.02", "chosen")
    assert len(grid.rows) == len(selection.rows)
    written = json.loads((folder / "runs" / "results.json").read_text())
    assert written["selection"] == selection.model_dump(mode="json")
    assert {pair["second"] for pair in written["pairs"]} == set(selection.rows) - {"memory"}
    page = (folder / "runs" / "seed-0" / "report.html").read_text(encoding="utf-8")
    assert "How settings were chosen" in page
    assert read_record(folder / "runs" / "seed-0" / "record.json") == record


@pytest.mark.usefixtures("no_page")
def test_scrambled_test_samples_change_nothing_that_is_learned_or_chosen(
    whole, tmp_path, monkeypatch
):
    """The test labels dealt anew and the test images dealt anew: only accuracies change."""
    folder, selection, record, trained = whole
    table_of = digits.digits_table

    def scrambled(*given: object, **more: object) -> object:
        table = table_of(*given, **more)
        rows, draw = np.flatnonzero(table.is_test), np.random.default_rng(9)
        labels, images = table.labels.copy(), np.array(table.images)
        labels[rows] = labels[draw.permutation(rows)]
        images[rows] = images[draw.permutation(rows)]
        return dataclasses.replace(table, labels=labels, images=images)

    monkeypatch.setattr(digits, "digits_table", scrambled)
    again: list[str] = []
    watch_training(monkeypatch, again)
    other, scored = selected(tiny(tmp_path))
    assert other == selection
    assert again == trained
    assert len(trained) == 2 * 2 + 2 * len({c.chosen for c in selection.rows.values() if c.of})
    stores = ["memory", *(path.name for path in folder.glob("memory-select-*"))]
    assert len(stores) == 3
    for name in stores:
        assert learned(str(tmp_path / name)) == learned(str(folder / name))
    # Ten classes at random: it was the test samples that were scrambled.
    assert scored.row("memory").metrics["faa"] < 0.3 < record.row("memory").metrics["faa"]


@pytest.mark.usefixtures("no_page")
def test_a_killed_choice_goes_on_in_the_cell_where_it_was(whole, tmp_path):
    _, selection, _, _ = whole
    config = tiny(tmp_path)
    cells = cells_of(config, GRID)
    adapted = 0

    def stop(event: object) -> None:
        nonlocal adapted
        adapted += event.stage == "baseline: sequential" and event.step == 0
        if adapted == 2:  # the second cell has its memory by now
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(config, cells, seed=1000, progress=stop)
    events: list[str] = []
    found = select(config, cells, seed=1000, progress=lambda event: events.append(event.stage))
    assert found == selection
    assert not [stage for stage in events if stage.endswith("adapt")]
    assert events.count("baseline: sequential") == 2  # its begin and its end, of one cell
    events.clear()
    assert select(config, cells, seed=1000, progress=events.append) == selection
    assert events == []


@pytest.mark.usefixtures("no_page")
def test_a_record_runs_again_from_its_file_alone(whole, tmp_path):
    folder, selection, record, _ = whole
    file = folder / "runs" / "seed-0" / "record.json"
    places = {"store": str(tmp_path / "memory"), "runs": str(tmp_path / "runs")}
    config = resolve(file=file, overrides=places, environ={}, cwd=tmp_path, ambient=False).config
    (again,) = experiment.run(config, selection=read_record(file).run.selection)
    assert again.run.data == record.run.data
    assert (again.run.seed, again.run.task_names) == (record.run.seed, record.run.task_names)
    assert again.run.selection == selection
    for row in record.metrics.rows:
        assert again.row(row.id).right == row.right, row.id
    assert learned(str(tmp_path / "memory")) == learned(str(folder / "memory"))


def test_what_is_no_record_is_no_configuration(tmp_path):
    file = tmp_path / "other.json"
    file.write_text('{"schema": "memtool.results"}')
    with pytest.raises(ConfigError, match="is no record of a run"):
        resolve(file=file, environ={}, cwd=tmp_path)


def test_a_memory_may_be_measured_on_what_it_held_back_alone(whole):
    folder, _, _, _ = whole
    store = MemoryStore.open(str(folder / "memory"))
    require_held_back(store, tiny(folder))
    with pytest.raises(
        ConfigError, match=r"stream\.validation 0\.3: the memory was made with 0\.2"
    ):
        require_held_back(store, tiny(folder, stream__validation=0.3))


def test_a_cell_holds_back_a_share_and_never_a_test_sample(tmp_path):
    config = tiny(tmp_path, stream__validation=0.0, seed=(1000, 3))
    seed = tuning_seed(config)
    assert seed == 1001
    cell = cell_config(config, cells_of(config, GRID)[0], seed)
    assert (cell.stream.split, cell.stream.validation, cell.seed) == ("validation", 0.2, (1001,))
    reported, tuned = (create_stream(one.stream, 32) for one in (config, cell))
    for task, other in zip(reported.tasks, tuned.tasks, strict=True):
        assert (len(task.train), len(other.train), len(other.test)) == (40, 30, 10)
        test = {image.tobytes() for image in task.test.images}
        learned_from = [*other.train.images, *other.test.images, *other.validation.images]
        assert not test & {image.tobytes() for image in learned_from}


@pytest.mark.usefixtures("no_page")
def test_cells_that_learn_alike_share_what_is_learned(tmp_path):
    """A record a cell is not kept, what it measured is; each memory is one of its own."""
    config, events = tiny(tmp_path, baselines=("sequential",)), []
    cells = cells_of(config, ["memory.beta=0.3,1", "head.kind=lda,ridge"])
    selection = select(config, cells, seed=1000, progress=lambda one: events.append(one.stage))
    trained = [stage for stage in dict.fromkeys(events) if stage.endswith("adapt")]
    assert len(trained) == len(create_stream(config.stream, 32).tasks)
    assert len([*(tmp_path / "runs" / "select").iterdir()]) == 1
    alone = select(tiny(tmp_path / "alone", baselines=("sequential",)), cells[3:], seed=1000)
    assert alone.rows["memory"].figures == selection.rows["memory"].figures[3:]
    assert len({cell_config(config, cell, 1000).store for cell in cells}) == 4


def test_all_combinations_and_equal_ones_once(tmp_path):
    config = tiny(tmp_path)
    cells = cells_of(config, ["train.lr=1e-3,2e-3", "adapter.rank=2,4,8"])
    assert len({cell.text for cell in cells}) == 6
    assert cells[0].values == {"train.lr": 0.001, "adapter.rank": 2}
    cells = cells_of(config, ["memory.separation=softmax,topk", "memory.topk=1,2"])
    assert [cell.text for cell in cells] == [
        "memory.separation=softmax",
        "memory.separation=topk, memory.topk=1",
        "memory.separation=topk, memory.topk=2",
    ]
    (first, second) = cells_of(config, ["train.betas=0.9,0.99;0.9,0.999"])
    assert (first.text, second.values) == ("train.betas=0.9,0.99", {"train.betas": [0.9, 0.999]})


@pytest.mark.parametrize(
    ("selections", "match"),
    [
        (["train.lr"], "--select train.lr"),
        (["train.rate=1,2"], "no setting 'train.rate'"),
        (["moram.topk=1,2"], "has no effect under method mira: it is of method moram"),
        (["memory.topk=1,2"], r"memory\.topk has no effect under memory\.separation softmax"),
        (["text.dropout=0,0.1"], r"text\.dropout has no effect under stream\.setting dil"),
        (["replay.buffer=10,20"], r"replay\.buffer has no effect under baselines sequential"),
        (["head.width=100,200"], r"head\.width has no effect under baselines sequential"),
        (["first_session.epochs=1,2"], "has no effect under baselines sequential"),
        (["stream.shots=1,2"], "says what is measured"),
        (["engine.threads=1,2"], "says what is measured"),
        (["train.lr=1e-3"], "has 1 value to choose from"),
        (["train.lr="], "has 0 values to choose from"),
        (["train.lr=1e-3,0.001"], "stands for a value that is there already"),
        (["train.lr=1e-3,fast"], "train.lr cannot be 'fast'"),
        (["train.lr=1,2", "train.lr=3,4"], "is selected twice"),
    ],
)
def test_what_cannot_be_chosen(tmp_path, selections, match):
    with pytest.raises(ConfigError, match=match):
        cells_of(tiny(tmp_path), selections)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("replay.buffer=10,20", {"baselines": ("er",)}),
        ("head.width=100,200", {"baselines": ("all", "ranpac")}),
        ("head.width=100,200", {"head__kind": "rp-ridge"}),
        ("first_session.epochs=1,2", {"baselines": ("fsa",)}),
        ("replay.buffer=10,20", {"baselines": ("mine.py:Learner",)}),  # who knows what it reads
    ],
)
def test_what_rows_that_are_named_read_can_be_chosen(tmp_path, text, more):
    assert len(cells_of(tiny(tmp_path, **more), [text])) == 2


def test_a_reported_seed_is_not_tuned_on(tmp_path):
    assert tuning_seed(tiny(tmp_path), 7) == 7
    with pytest.raises(ConfigError, match="--select-seed 0 is reported, too"):
        tuning_seed(tiny(tmp_path), 0)


def test_the_first_of_the_best():
    assert first_best((0.1, 0.3, 0.3), lower=False) == 1
    assert first_best((0.4, None, 0.3), lower=True) == 2
    assert first_best((None, None), lower=False) == 0


# What fails


def gone(patch: pytest.MonkeyPatch, *, memory: tuple[float, ...], rival: tuple[float, ...]) -> None:
    """Learning rates with which a memory, or the baselines, diverge."""
    adapt, learn = Mira.adapt, Learner.learn

    def adapted(self: Mira, *given: object, **more: object) -> object:
        if self.config.train.lr in memory:
            raise DivergedError("the loss became nan")
        return adapt(self, *given, **more)

    def learned(self: Learner, *given: object, **more: object) -> object:
        if self.work.config.train.lr in rival:
            raise DivergedError("the loss of a rival became nan")
        return learn(self, *given, **more)

    patch.setattr(Mira, "adapt", adapted)
    patch.setattr(Learner, "learn", learned)


@pytest.mark.usefixtures("no_page")
def test_what_fails_in_a_cell_is_left_out_for_its_rows_alone(tmp_path, monkeypatch):
    gone(monkeypatch, memory=(1e-4,), rival=(2e-2,))
    config, said = tiny(tmp_path), []
    grid = ["train.lr=1e-4,2e-2", "memory.look_at=block:1;block:99"]
    cells = cells_of(config, grid)
    found = select(config, cells, seed=1000, say=said.append)
    assert [line.partition(":")[0] for line in said] == ["note"] * 5
    assert (
        "train.lr=0.0001, memory.look_at=1 failed, and is left out: the loss became nan" in said[0]
    )
    assert "train.lr=0.02, memory.look_at=1 failed for sequential" in said[2]
    memory, rival = found.rows["memory"], found.rows["sequential"]
    assert [figure is None for figure in memory.figures] == [True, True, False, True]
    assert [figure is None for figure in rival.figures] == [False, False, True, True]
    assert (memory.chosen, rival.chosen) == (2, 0)
    assert memory.failed[0] == "the loss became nan"
    assert rival.failed[2] == "the loss of a rival became nan"
    assert memory.failed[3] == "a look at block 99 of a model of 4 blocks"
    assert rival.failed.keys() == {2, 3}
    assert Selection.model_validate_json(found.model_dump_json()) == found
    # Of a killed choice the cells that ended go on as they ended, those that diverged, too.
    events: list[str] = []
    again = select(config, cells, seed=1000, progress=lambda one: events.append(one.stage))
    assert again == found
    assert {*events} == {"baseline: sequential"}  # beside a block that is not there: from its file


def test_a_table_says_what_failed_and_why():
    whole = sample.record()
    cells = (Cell(values={"train.lr": 1e-4}), Cell(values={"train.lr": 5.0}))
    failed = {1: "the loss became nan"}
    rows = {row.id: Choice(figures=(0.5, 0.4), chosen=0) for row in whole.metrics.rows}
    first, second, *_ = rows
    rows[second] = Choice(figures=(0.5, None), chosen=0, of="ewc", failed=failed)
    selection = Selection(
        seed=1000, validation=0.2, samples=20, measure="accuracy", cells=cells, rows=rows
    )
    assert selection.has_failed
    run = whole.run.model_copy(update={"selection": selection})
    one = whole.model_copy(update={"run": run, "inside": None})
    grid = selection_grid([one])
    cells_of_rows = {row[0]: row[1:3] for row in grid.rows}
    assert cells_of_rows[one.row(first).label] == ("50.0", "40.0")
    assert cells_of_rows[one.row(second).label] == ("50.0", "failed")
    assert grid.notes == (
        f"Failed with train.lr=5.0 ({one.row(second).label}): the loss became nan.",
    )
    written = json.loads(one.model_dump_json(by_alias=True))
    assert written["schema_version"] == 4  # an older release would not know the reason
    assert "failed" not in written["run"]["selection"]["rows"][first]
    assert Record.model_validate(written).run.selection == selection
    with pytest.raises(ValueError, match="no such cell, or not failed: 0"):
        Selection(
            seed=1, validation=0.2, samples=1, measure="loss", cells=cells,
            rows={"memory": Choice(figures=(0.5, None), chosen=0, failed={0: "why"})},
        )  # fmt: skip


def test_too_few_samples_to_choose_by_are_told_of_the_choice(tmp_path):
    config = tiny(tmp_path, stream__validation=0, stream__train_per_task=10)
    chosen = "--select holds back 20% of the training samples to choose by, which leaves"
    with pytest.raises(DataError, match=chosen) as told:
        select(config, cells_of(config, GRID), seed=1000)
    assert "stream.validation" not in told.value.message
    with pytest.raises(DataError, match=chosen):
        plan_of_selection(config, cells_of(config, GRID), seed=1000, baselines=1)
    asked = tiny(tmp_path, stream__validation=0.2, stream__train_per_task=10)
    with pytest.raises(DataError, match=r"^stream\.validation 0\.2 leaves"):
        select(asked, cells_of(asked, GRID), seed=1000)
