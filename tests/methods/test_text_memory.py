"""MoRAM on texts step by step: the same memory as a run, and what is read from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import memtool_stores
from memtool import sealed
from memtool.adapters.atoms import ModuleAtoms, activations
from memtool.errors import (
    AlreadyExistsError,
    ConfigError,
    DataError,
    MismatchError,
    NotFoundError,
)
from memtool.experiments.bisect import bisect
from memtool.experiments.run import run
from memtool.learning.answers import Answering
from memtool.learning.learner import Learner
from memtool.learning.passes import each
from memtool.methods.export import export_peft
from memtool.methods.forget import forget
from memtool.methods.moram.explain import as_picture, explain_atoms
from memtool.methods.moram.measure import AtomMeasure
from memtool.methods.moram.method import Moram
from memtool.methods.moram.prune import dead_atoms, prune
from memtool.methods.moram.state import PAST_INPUTS, past_inputs_of
from memtool.methods.moram.watch import watched
from memtool.reports.atom_map import LINE
from memtool_stores import MemoryStore
from tests.methods.facts import config_of, moram_of, write_facts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and three tasks of texts with a description."""
    return write_facts(tmp_path_factory.mktemp("texts"))


def grow(method: Moram, *tasks: int) -> Moram:
    """Train and write tasks, one after another."""
    for task in tasks:
        method.adapt(str(task))
        method.write()
    return method


@pytest.fixture(scope="module")
def _grown(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    grow(moram_of(place, folder), 1, 2, 3)
    return folder


@pytest.fixture
def grown(place: Path, _grown: Path) -> Moram:
    """Three tasks in memory, for reading only."""
    return moram_of(place, _grown)


@pytest.fixture
def grown_copy(place: Path, _grown: Path, tmp_path: Path) -> Moram:
    """Three tasks in memory, in a copy that a test may change."""
    shutil.copytree(_grown, tmp_path / "copy")
    return moram_of(place, tmp_path / "copy")


# Adapt and write --------------------------------------------------------------------------------


def test_a_task_is_trained_into_a_folder_and_written_as_one_version(
    place: Path, tmp_path: Path
) -> None:
    method = moram_of(place, tmp_path)
    (result,) = method.adapt("letters")
    assert (result.name, result.task, result.train_accuracy) == ("task-1-seed-0", 1, None)
    assert not method.workspace.has_store
    written = method.write()
    assert [adapter.name for adapter in written.added] == ["task-1-seed-0"]
    (record,) = method.workspace.store.view().atom_records
    assert (record.kind, record.task, record.scaling) == ("atoms", 1, 2.0)
    (again,) = method.adapt("1")
    assert again.skipped
    assert method.write().skipped == ("task-1-seed-0",)
    assert len(method.workspace.store.log()) == 2
    assert not list((tmp_path / "runs" / "adapters").glob(".*.checkpoint"))


@pytest.mark.usefixtures("no_page")
def test_growing_by_hand_makes_the_rows_of_a_run(place: Path, grown: Moram, tmp_path: Path) -> None:
    (record,) = run(config_of(place, tmp_path), baselines=False)
    there = moram_of(place, tmp_path).workspace.store.view()
    here = grown.workspace.store.view()
    assert [r.sha256 for r in there.atom_records] == [r.sha256 for r in here.atom_records]
    for one, other in zip(there.atom_records, here.atom_records, strict=True):
        assert one.meta["provenance"]["beneath"] == other.meta["provenance"]["beneath"]
        assert one.meta["provenance"]["fingerprint"] == other.meta["provenance"]["fingerprint"]
    by_hand = grown.evaluate(history=True).row("moram")
    assert by_hand.loss == record.row("moram").loss
    assert by_hand.metrics == record.row("moram").metrics
    for task in range(3):
        assert by_hand.loss[task + 1][task] < by_hand.loss[task][task] - 0.1  # type: ignore[operator]


@pytest.mark.usefixtures("no_page")
def test_a_run_goes_on_after_what_was_grown_by_hand_and_the_other_way_round(
    place: Path, grown: Moram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = grow(moram_of(place, tmp_path), 1)
    trained: list[str] = []
    learn = Learner.learn

    def counted(self: Learner, task, stage, **more):
        trained.append(task.name)
        return learn(self, task, stage, **more)

    monkeypatch.setattr(Learner, "learn", counted)
    run(config_of(place, tmp_path), baselines=False)
    assert trained == ["sums", "turned"]
    expected = [r.sha256 for r in grown.workspace.store.view().atom_records]
    assert [r.sha256 for r in first.workspace.store.view().atom_records] == expected
    run(config_of(place, tmp_path), baselines=False)
    assert trained == ["sums", "turned"]
    two = {"stream.order": ("letters", "sums")}
    run(config_of(place, tmp_path / "b", **two), baselines=False)
    after = grow(moram_of(place, tmp_path / "b"), 3)
    assert [r.sha256 for r in after.workspace.store.view().atom_records] == expected


def test_a_run_refuses_a_memory_of_other_settings(place: Path, tmp_path: Path) -> None:
    grow(moram_of(place, tmp_path), 1)
    for change in ({"train.lr": 0.01}, {"moram.temperature": 0.5}, {"stream.train_per_task": 3}):
        with pytest.raises(ConfigError, match="trained with other settings"):
            run(config_of(place, tmp_path, **change), baselines=False)


def test_atoms_that_were_trained_on_top_of_others_are_refused(place: Path, tmp_path: Path) -> None:
    method = moram_of(place, tmp_path)
    method.adapt("2")  # on top of nothing
    grow(moram_of(place, tmp_path, runs=tmp_path / "other"), 1)
    with pytest.raises(MismatchError, match="trained from zero, not on top of the 1 tasks"):
        method.write()
    method.adapt("2", fresh=True)
    assert len(method.write().added) == 1
    renamed = tmp_path / "other" / "adapters" / "again"
    shutil.copytree(tmp_path / "other" / "adapters" / "task-1-seed-0", renamed)
    about = sealed.read_json(renamed / "memtool.json").content
    about["result"]["name"] = "again"
    sealed.write_json(renamed / "memtool.json", about)
    with pytest.raises(AlreadyExistsError, match="atoms of task 1 already"):
        method.write([renamed])


def test_all_atoms_of_a_memory_have_one_gate(place: Path, tmp_path: Path) -> None:
    grow(moram_of(place, tmp_path), 1)
    other = moram_of(place, tmp_path, **{"moram.threshold": 0.5})
    with pytest.raises(ConfigError, match=r"another gate: threshold 0\.2, here 0\.5"):
        other.adapt("2")
    assert other.snapshot().gate.threshold == 0.2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"moram.topk": 3}, MismatchError, "topk of 3 with 2 atoms"),
        ({"adapter.per_task": 2}, ConfigError, "adapter.per_task 2"),
        ({"adapter.residual": True}, ConfigError, "adapter.residual"),
        ({"text.prompt_tokens": 5, "text.long_prompts": "refuse"}, DataError, "prompt 1 has"),
    ],
)
def test_what_atoms_cannot_be_trained_with(
    place: Path,
    tmp_path: Path,
    change: dict[str, object],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        moram_of(place, tmp_path, **change).adapt("1")


def test_an_empty_answer_is_refused_by_its_file(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "texts")
    file = tmp_path / "texts" / "data" / "sums" / "train.json"
    file.write_text(json.dumps([{"prompt": "1 and 1 is", "answer": " "}]))
    with pytest.raises(DataError, match="have an empty answer: 1"):
        moram_of(tmp_path / "texts", tmp_path).adapt("1")


def test_a_memory_of_another_model_is_refused(
    place: Path, grown_copy: Moram, tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "other")
    file = tmp_path / "other" / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, {"format": "pt"})
    folder = Path(grown_copy.workspace.store_path).parent
    model = {"backbone.name": f"hf:{tmp_path / 'other' / 'model'}"}
    with pytest.raises(memtool_stores.SpaceMismatchError, match="backbone sha256"):
        moram_of(place, folder, **model).evaluate()
    with pytest.raises(MismatchError, match="was trained on hf:"):
        moram_of(place, folder, store=str(tmp_path / "new"), **model).write()
    with pytest.raises(memtool_stores.SpaceMismatchError, match="targets"):
        moram_of(place, folder, **{"backbone.targets": ("q", "v")}).evaluate()


def test_nothing_is_consolidated(grown: Moram) -> None:
    result = grown.consolidate()
    assert (result.unchanged, result.head, result.tasks) == (True, None, (1, 2, 3))
    assert result.version == grown.workspace.store.head()


# Evaluate ---------------------------------------------------------------------------------------


def test_the_tasks_in_memory_are_measured_and_others_where_they_are_asked_for(
    place: Path, tmp_path: Path
) -> None:
    method = grow(moram_of(place, tmp_path), 2)
    record = method.evaluate()
    assert record.run.task_names == ("sums",)
    assert record.row("moram").loss[0] == (None,)
    whole = method.evaluate(unseen=True, history=True)
    assert whole.run.task_names == ("sums", "letters", "turned")
    row = whole.row("moram")
    assert row.loss[1][0] == record.row("moram").loss[1][0]
    assert all(loss is not None for line in row.loss[:2] for loss in line)
    assert row.loss[2:] == ((None,) * 3,) * 2
    assert row.metrics["loss.final"] == row.loss[1][0]


def test_scores_of_a_version_are_measured_once(
    grown: Moram, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = grown.evaluate(history=True)

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Answering, "scores", refuse)
    assert grown.evaluate(history=True).metrics == before.metrics
    with pytest.raises(AssertionError, match="measured again"):
        grown.evaluate(compare=True)


def test_cut_prompts_are_counted_in_the_record(place: Path, grown: Moram) -> None:
    short = moram_of(place, Path(grown.workspace.store_path).parent, **{"text.prompt_tokens": 10})
    # "after a comes" and "0 and 1 is" are longer, "turn ab:" is not; each with one token ahead.
    assert short.evaluate().row("moram").cut_prompts == 16
    assert grown.evaluate().row("moram").cut_prompts == 0


def test_the_use_of_atoms_follows_from_their_contributions(grown: Moram) -> None:
    row = grown.evaluate(history=True).row("moram")
    use = row.atom_use
    assert use is not None
    assert [use.norm[i][i] for i in range(3)] == [1, 1, 1]
    assert [use.difference[i][i] for i in range(3)] == [0, 0, 0]
    assert use.norm[0][1] is None
    assert row.metrics["atom_drift"] == pytest.approx(
        (use.difference[2][0] + use.difference[2][1]) / 2
    )
    # The atoms of the first task, by hand: the inputs of then, through the bank of then and of now.
    work, store = grown.workspace, grown.workspace.store
    versions = [version.id for version in store.log() if "task-1" in version.message]
    then, now = grown.snapshot(versions[0]), grown.snapshot()
    assert then.tasks == (1,)
    seen: list[tuple[str, torch.Tensor]] = []

    def watch(atoms: ModuleAtoms, x: torch.Tensor) -> None:
        seen.extend((site.name, x) for site in atoms.sites)

    each(work, work.task("1").test, watched(then.bank, then.gate, watch))
    before, apart = 0.0, 0.0
    for name, x in seen:
        adds = []
        for snapshot in (then, now):
            bank = snapshot.bank.bank(name)
            weights = activations(x, bank, snapshot.gate)
            added = torch.zeros(*x.shape[:-1], bank.values.shape[1], dtype=torch.float64)
            for atom in range(2):
                response = x.double() @ bank.keys[atom].double()
                scale = weights[..., atom].double() * response * bank.scaling[atom].double()
                added += scale.unsqueeze(-1) * bank.values[atom].double()
            adds.append(added)
        before += float(adds[0].square().sum())
        apart += float((adds[1] - adds[0]).square().sum())
    assert use.difference[2][0] == pytest.approx((apart / before) ** 0.5, rel=1e-4)
    assert use.difference[2][0] > 0.01
    shares = grown.retrieve(task="2").tasks
    assert use.reuse[1] == pytest.approx([one.share for one in shares], abs=1e-6)


def test_the_version_that_made_texts_worse_is_found(grown_copy: Moram) -> None:
    first = grown_copy.workspace.store.log()[::-1]
    start = next(v.id for v in first if grown_copy.known_tasks(v.id) == (1, 2, 3))
    forget(grown_copy.workspace.store, ["1"])
    result = bisect(grown_copy, good=start, drop=0.05)
    assert result.metric == "loss"
    assert result.culprit is not None
    assert result.culprit.version == grown_copy.workspace.store.head()
    assert result.bad_value - result.good_value > 0.05
    assert bisect(grown_copy, good=start, drop=9.0).culprit is None
    shares = bisect(grown_copy, good=start, drop=0.01, metric="task_accuracy")
    assert 0 <= shares.bad_value <= shares.good_value <= 1
    with pytest.raises(ConfigError, match=r"faa of answers that are not generated"):
        bisect(grown_copy, good=start, drop=0.01, metric="faa")
    with pytest.raises(ConfigError, match="more than 0 nats"):
        bisect(grown_copy, good=start, drop=0.0)


def test_atoms_of_texts_go_out_as_peft_and_come_back(
    place: Path, grown: Moram, tmp_path: Path
) -> None:
    paths = export_peft(grown.workspace, ["task-1-seed-0"], out=tmp_path / "out")
    source = grown.config.runs / "adapters" / "task-1-seed-0"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (paths[0] / name).read_bytes() == (source / name).read_bytes()
    other = moram_of(place, tmp_path / "other")
    assert other.write(paths).added[0].name == "task-1-seed-0"
    (record,) = other.workspace.store.view().atom_records
    assert record.sha256 == grown.workspace.store.view().atom_records[0].sha256
    expected = grown.evaluate(history=True).row("moram").loss[1][0]
    assert other.evaluate().row("moram").loss[1][0] == pytest.approx(expected)


def test_another_setting_is_refused(grown: Moram) -> None:
    with pytest.raises(ConfigError, match="setting 'cil'"):
        grown.evaluate(setting="cil")


def test_an_empty_memory_has_nothing_to_measure(place: Path, tmp_path: Path) -> None:
    method = moram_of(place, tmp_path)
    with pytest.raises(NotFoundError, match="no memory at"):
        method.evaluate()
    MemoryStore.create(method.workspace.store_path, method.workspace.space)
    with pytest.raises(NotFoundError, match="holds no atoms"):
        method.evaluate()


def test_a_forgotten_task_leaves_the_others_as_they_are(grown_copy: Moram) -> None:
    before = grown_copy.snapshot()
    result = forget(grown_copy.workspace.store, ["2"])
    assert result.tasks == (2,)
    after = grown_copy.snapshot()
    assert after.tasks == (1, 3)
    name = grown_copy.workspace.layout.sites[0].name
    kept = before.bank.bank(name).owner != 2
    assert torch.equal(after.bank.bank(name).keys, before.bank.bank(name).keys[kept])
    record = grown_copy.evaluate(history=True)
    assert record.run.task_names == ("letters", "turned")
    assert all(loss is not None for loss in record.row("moram").loss[2])
    with pytest.raises(ConfigError, match="task 3 in the place of task 2"):
        grown_copy.learn(grown_copy.workspace.stream.tasks[1])


def test_dead_atoms_are_found_shown_by_their_losses_and_pruned(grown_copy: Moram) -> None:
    found = dead_atoms(grown_copy, 0.3)
    assert (found.measure, found.done, found.atoms) == ("loss", False, 3 * 2 * 8)
    assert 0 < found.pruned < found.atoms
    assert len(grown_copy.workspace.store.log()) == 4
    losses = grown_copy.evaluate().row("moram").loss[3]
    assert [one.before for one in found.tasks] == pytest.approx(losses)
    done = prune(grown_copy, found)
    assert done.done
    left = sum(
        len(grown_copy.snapshot().bank.bank(s.name)) for s in grown_copy.workspace.layout.sites
    )
    assert left == found.atoms - found.pruned
    after = grown_copy.evaluate().row("moram").loss[3]
    assert after == pytest.approx([one.after for one in found.tasks])
    with pytest.raises(ConfigError, match="--atoms-below 1"):
        dead_atoms(grown_copy, 1.0)


# Retrieve and explain ---------------------------------------------------------------------------


def weights_by_hand(method: Moram, prompt: str, site_name: str) -> torch.Tensor:
    """The gate's weights (tokens, atoms) at a map of the first block, from its input alone."""
    snapshot, lm = method.snapshot(), method.workspace.backbone
    layer = lm.blocks[0].layer
    ids = lm.encode([prompt]).tokens
    x = layer.input_layernorm(lm.embed(ids))
    return activations(x, snapshot.bank.bank(site_name), snapshot.gate)[0]


def test_shares_of_a_prompt_follow_from_the_inputs_of_the_maps(grown: Moram) -> None:
    prompt = "after c comes"
    result = grown.retrieve(prompt=prompt)
    assert (result.subject, result.samples, result.loss) == (prompt, 1, None)
    assert (
        result.answer
        == AtomMeasure(grown.workspace).answering(grown.snapshot()).answers([prompt])[0]
    )
    assert [one.task for one in result.tasks] == [1, 2, 3]
    assert result.block_numbers == (0, 1)
    assert 1 <= len(result.atoms) <= 10
    # q, k and v of the first block read one input; o does not.
    work = grown.workspace
    owner = torch.tensor([1, 1, 2, 2, 3, 3])
    name = work.backbone.sites(("k",))[0].name
    expected = weights_by_hand(grown, prompt, name).double()
    shown = explain_atoms(grown, prompt=prompt, layer="k", block=0)
    torch.testing.assert_close(torch.tensor(shown.weights), expected.T, check_dtype=False)
    for one in shown.tasks:
        share = float(expected[:, owner == one.task].sum(dim=1).mean())
        assert one.share == pytest.approx(share, abs=1e-6)


def test_a_task_is_looked_at_text_by_text(grown: Moram) -> None:
    result = grown.retrieve(task="turned")
    assert result.samples == 6
    assert result.answer is None
    whole = grown.evaluate().row("moram").loss[3][2]
    assert result.loss == pytest.approx(whole)
    parts = [
        grown.retrieve(prompt=prompt).blocks for prompt in grown.workspace.task("3").test.prompts
    ]
    mean = torch.tensor(parts, dtype=torch.float64).mean(dim=0)
    torch.testing.assert_close(torch.tensor(result.blocks, dtype=torch.float64), mean)
    shown = explain_atoms(grown, task="turned")
    assert shown.columns == tuple(f"text {n}" for n in range(1, 7))


def test_a_prompt_is_mapped_at_any_layer_block_and_version(grown: Moram) -> None:
    prompt = "3 and 1 is"
    shown = explain_atoms(grown, prompt=prompt, layer="o", block=1)
    assert "".join(shown.columns[1:]) == prompt
    assert len(shown.weights) == len(shown.atoms) == 6
    assert {len(row) for row in shown.weights} == {len(shown.columns)}
    assert shown.answer is not None
    log = grown.workspace.store.log()
    before = explain_atoms(grown, prompt=prompt, version=log[1].id)
    assert [one.task for one in before.tasks] == [1, 2]
    for change, words in (
        ({"layer": "gate"}, "'gate' is not adapted"),
        ({"block": 2}, "--block 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            explain_atoms(grown, prompt=prompt, **change)  # type: ignore[arg-type]


def test_a_map_of_a_prompt_is_drawn_with_its_tokens(grown: Moram, tmp_path: Path) -> None:
    page = tmp_path / "atoms.html"
    shown = explain_atoms(grown, prompt="turn ab: 1 and 2", out=page)
    text = page.read_text(encoding="utf-8")
    assert ">t</text>" in text
    assert ">␣</text>" in text
    assert "1 letters" in text
    assert "class token" not in text
    long = explain_atoms(grown, prompt="turn ab: " * 6, out=tmp_path / "atoms.svg")
    assert len(as_picture(long).columns) > LINE
    for kind in ("svg", "png"):
        explain_atoms(grown, task="1", out=tmp_path / f"task.{kind}")
    assert as_picture(shown).columns == shown.columns


@pytest.mark.parametrize("subject", [{}, {"task": "1", "prompt": "a"}, {"prompt": " \n"}])
def test_one_subject_with_visible_characters(grown: Moram, subject: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        grown.retrieve(**subject)  # type: ignore[arg-type]


def test_a_long_prompt_is_refused_where_it_would_be_cut(place: Path, grown: Moram) -> None:
    where = Path(grown.workspace.store_path).parent
    strict = moram_of(place, where, **{"text.long_prompts": "refuse"})
    with pytest.raises(DataError, match="prompt 1 has 81 tokens"):
        strict.retrieve(prompt="a" * 80)
    assert grown.retrieve(prompt="a" * 80).samples == 1


def test_a_long_prompt_of_a_later_task_is_refused_before_anything_is_learned(
    place: Path, tmp_path: Path
) -> None:
    changes = {
        "text.long_prompts": "refuse",
        "text.prompt_tokens": 12,
        "stream.order": ("sums", "letters"),
    }
    with pytest.raises(DataError, match=r"task 2 letters, train: prompt 1 has 1\d tokens"):
        run(config_of(place, tmp_path, **changes))
    assert not (tmp_path / "memory").exists()


# Keys free of earlier texts ---------------------------------------------------------------------


@pytest.mark.usefixtures("no_page")
def test_free_keys_do_not_answer_to_earlier_texts(place: Path, tmp_path: Path) -> None:
    free = {"moram.keys": "free", "moram.temperature": 0.2, "moram.threshold": -1.0}
    method = grow(moram_of(place, tmp_path, **free), 1, 2)
    work, snapshot = method.workspace, method.snapshot()
    past = past_inputs_of(work.store.view("HEAD~1"), work.layout, work.config.past)
    name = work.backbone.sites(("q",))[0].name
    module = work.backbone.sites(("q",))[0].module
    learned = past.space[module]
    bank = snapshot.bank.bank(name)
    new = bank.keys[bank.owner == 2].double()
    inside = new - learned.project(new)
    assert float(inside.abs().max()) < 1e-5
    present = new.norm(dim=1) > 0
    assert present.any()
    torch.testing.assert_close(
        new[present].norm(dim=1), torch.ones(int(present.sum()), dtype=torch.float64)
    )
    # A run makes the same ones.
    (record,) = run(config_of(place, tmp_path / "run", **free), baselines=False)
    there = moram_of(place, tmp_path / "run", **free).workspace.store.view().atom_records
    here = work.store.view().atom_records
    assert [r.sha256 for r in there[:2]] == [r.sha256 for r in here]
    assert record.row("moram").atom_use is not None


def test_a_memory_of_free_keys_forgets_its_past_with_its_last_task(
    place: Path, tmp_path: Path
) -> None:
    method = grow(moram_of(place, tmp_path, **{"moram.keys": "free"}), 1)
    store = method.workspace.store
    assert PAST_INPUTS in store.view().blobs()
    forget(store, ["1"])
    assert PAST_INPUTS not in store.view().blobs()
