"""Where the keys of a memory over images look, against the backbone run by hand."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from memtool.adapters.values import AdapterValues
from memtool.config import parse_assignment
from memtool.errors import ConfigError, MismatchError
from memtool.experiments.plan import plan
from memtool.experiments.run import run
from memtool.learning.looks import MOST_WIDE, directions
from memtool.memories.closed_form import QueryStatistics
from memtool.methods import merge as merging
from memtool.methods.about import said_by
from memtool.methods.forget import chosen, forget, looked_under
from memtool.methods.in_store import HEAD
from memtool.methods.mira.look import ImageLook, passes_of, width_of
from memtool.methods.mira.method import Mira
from memtool.methods.mira.recall import Given
from memtool.methods.mira.state import MEMORY, MemoryState
from memtool.sections import MemorySettings
from memtool.settings import HeadSettings
from memtool_cli.plan import _image_cost
from tests.cli.conftest import inside
from tests.methods.conftest import learn, small_config

FIRST = {
    "memory__look_at": ("final",),
    "memory__look_under": "first-adapter",
    "memory__keys_of": "class",
    "memory__beta": 0.3,
    "head__features": "own+first",
}
"""Keys by class on the final features under the first adapter, which the head reads, too."""


def opened(learned: Path, tmp_path: Path, **changes: object) -> Mira:
    """The adapters that were trained for all, with a memory of its own."""
    return Mira.open(small_config(learned, store=str(tmp_path / "memory"), **changes), seed=0)


def written(mira: Mira, tasks: tuple[int, ...] = (1, 2, 3), *, each: bool = False) -> Mira:
    """Write tasks, and consolidate after each of them, or once."""
    for task in tasks:
        mira.write([mira.workspace.adapter_folder / f"task-{task}-seed-0"])
        if each:
            mira.consolidate()
    if not each:
        mira.consolidate()
    return mira


@pytest.fixture
def folder(_learned: Path) -> Path:
    """Where the adapters that were trained for all lie."""
    return _learned


@pytest.fixture(scope="module")
def _first(_learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    written(opened(_learned, folder, **FIRST), each=True)
    return folder


@pytest.fixture
def first(_learned: Path, _first: Path, tmp_path: Path) -> Mira:
    """Three tasks that are looked at under the first adapter; a copy."""
    shutil.copytree(_first / "memory", tmp_path / "memory")
    return opened(_learned, tmp_path, **FIRST)


# Queries ------------------------------------------------------------------------------------------


def by_hand(vit: torch.nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """The inputs of all blocks and the features of one image, block after block."""
    hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    found = {}
    for number, block in enumerate(vit.blocks):
        found[f"block:{number}"] = hidden[0]
        hidden = block(hidden, None)
    found["final"] = vit.forward_head(vit.norm(hidden), pre_logits=True)[0]
    return found


def merged(work, values: Tensor, scaling: float) -> torch.nn.Module:
    """The backbone with an adapter added to its own weights, in float64."""
    backbone = copy.deepcopy(work.backbone).double()
    layers = {getattr(m, "name", None): m for m in backbone.modules() if hasattr(m, "weight")}
    tensors = work.layout.unflatten(values.double()[None])
    for site in work.layout.sites:
        a, b = tensors[f"{site.name}.lora_A"][0], tensors[f"{site.name}.lora_B"][0]
        rows = slice(site.first_row, site.first_row + site.out_features)
        layers[site.module].weight.data[rows] += scaling * b @ a
    return backbone.vit


def plain_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("look_at", "under", "beside", "token"),
    [
        (2, "frozen", "", "class"),
        (2, "frozen", "", "mean"),
        (("block:3",), "first-adapter", "", "class"),
        (("final",), "first-adapter", "", "mean"),
        (("final", "block:1", "final"), "both", "first", "mean"),
        (("blocks",), "both", "frozen", "class"),
        (("block:1", "block:2"), "frozen", "first", "mean"),
    ],
)
def test_a_query_is_what_a_slow_loop_sees(learned, look_at, under, beside, token) -> None:
    work, (record, *_) = learned.workspace, learned.workspace.store.view("HEAD").adapters
    value = torch.from_numpy(work.store.view("HEAD").value(record.id).copy())
    settings = MemorySettings(look_at=look_at, look_under=under, token=token)
    head = HeadSettings(features=f"own+{beside}" if beside else "own")
    backbone = copy.deepcopy(work.backbone).double()
    first = AdapterValues.from_flat(value.double()[None], work.layout, record.scaling)
    look = ImageLook(backbone, settings, head, first)
    images = torch.from_numpy(work.stream.tasks[1].test.images[:3].copy())
    pixels = backbone.preprocess(images).double()
    seen = look(backbone, pixels)
    passes = {"frozen": backbone.vit, "first": merged(work, value, record.scaling)}
    for row in range(len(pixels)):
        hand = {name: by_hand(vit, pixels[row : row + 1]) for name, vit in passes.items()}
        parts = []
        for name in {"frozen": ["frozen"], "first-adapter": ["first"]}.get(under, passes):
            for place in dict.fromkeys(settings.places):
                for each in [f"block:{n}" for n in range(4)] if place == "blocks" else [place]:
                    state = hand[name][each]
                    if each != "final":
                        state = state[0] if token == "class" else state[1:].mean(dim=0)
                    parts.append(plain_norm(state))
        torch.testing.assert_close(seen.query[row], torch.cat(parts), rtol=0, atol=1e-10)
        if beside:
            torch.testing.assert_close(seen.beside[row], hand[beside]["final"], rtol=0, atol=1e-10)


def _counting(forward, blocks):
    def run(*given):
        blocks.append(forward)
        return forward(*given)

    return run


def test_passes_are_shared_and_no_longer_than_asked(learned, monkeypatch) -> None:
    work = learned.workspace
    backbone, runs = work.backbone, []
    pixels = backbone.preprocess(torch.from_numpy(work.stream.tasks[0].test.images[:2].copy()))
    own = learned.snapshot().own_values(1, work.engine.device)
    for name in ("features", "hidden"):
        inner = getattr(type(backbone), name)

        def run(self, *given, _name=name, _inner=inner):
            runs.append(_name)
            return _inner(self, *given)

        monkeypatch.setattr(type(backbone), name, run)
    blocks: list[object] = []
    for block in backbone.blocks:
        monkeypatch.setattr(block, "forward", _counting(block.forward, blocks))
    for look_at, under, features, expected, shares in (
        (2, "frozen", "own", ["hidden"], {"frozen": 0.5}),
        (("final",), "first-adapter", "own+first", ["features"], {"first": 1}),
        (
            *(("final",), "both", "recalled+first"),
            *(["features", "features"], {"frozen": 1, "first": 1}),
        ),
        (
            *(("block:1", "block:2"), "first-adapter", "own+frozen"),
            *(["hidden", "features"], {"first": 0.5, "frozen": 1}),
        ),
    ):
        settings = MemorySettings(look_at=look_at, look_under=under)
        look = ImageLook(backbone, settings, HeadSettings(features=features), own)
        look(backbone, pixels)
        assert runs == expected
        head = HeadSettings(features=features)
        assert passes_of(settings, head, backbone.depth) == shares
        assert len(blocks) == round(backbone.depth * sum(shares.values()))
        runs.clear()
        blocks.clear()
        look(backbone, pixels, beside=False)
        assert len(runs) == 1 + (under == "both")
        runs.clear()
        assert look(backbone, pixels, query=False).query is None
        assert runs == ["features"] * ("+" in features)
        runs.clear()
        blocks.clear()


def test_images_are_embedded_once_for_all_passes(learned) -> None:
    _, model, _ = learned.snapshot().consolidated()
    assert model.look.under == ("frozen",)
    images = torch.from_numpy(learned.workspace.stream.tasks[0].test.images[:2].copy())
    embedded: list[int] = []
    vit = model.backbone.vit
    hook = vit.patch_embed.register_forward_hook(lambda *given: embedded.append(len(given[1][0])))
    given = Given(torch.zeros(2, len(model.memory.blocks), len(model.values)))
    features, coefficients = model.with_coefficients(images)
    for call in (model, partial(model.given, given=given)):
        call(images)
    seen, again, _ = model.seen(model.backbone.preprocess(images))
    hook.remove()
    assert embedded == [2] * 4
    assert torch.equal(seen, features)
    assert torch.equal(again, coefficients)
    pixels = model.backbone.preprocess(images)
    slow = model.mixed(pixels, model.seen_of(pixels))  # two passes from the pixels on
    assert torch.equal(slow[0], features)
    assert torch.equal(slow[1], coefficients)


def test_what_is_too_wide_is_projected_as_texts_are(learned) -> None:
    work = learned.workspace
    backbone = copy.copy(work.backbone)
    settings = MemorySettings(look_at=("blocks", "final"), look_under="both")
    own = learned.snapshot().own_values(1, work.engine.device)
    look = ImageLook(backbone, settings, None, own)
    assert (width_of(settings, backbone, ()), look.narrow) == (10 * backbone.dim, None)
    backbone.dim = 300  # as wide as a larger model
    wide = ImageLook(backbone, settings, None, own)
    assert width_of(settings, backbone, ()) == MOST_WIDE
    torch.testing.assert_close(wide.narrow, directions(3000, MOST_WIDE, torch.device("cpu")))
    part = torch.randn(3, 3000)
    torch.testing.assert_close(wide._joined([part]), part @ wide.narrow)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (4, 4),
        ("4", 4),
        (["4"], 4),
        (["block:4"], 4),
        ("block:04", None),
        (["2", "final"], ("block:2", "final")),
        ("blocks", ("blocks",)),
        (["first"], None),
    ],
)
def test_every_spelling_of_a_place(written, kept) -> None:
    if kept is None:
        with pytest.raises(ValueError, match="block:N"):
            MemorySettings(look_at=written)
    else:
        assert MemorySettings(look_at=written).look_at == kept


# A memory -----------------------------------------------------------------------------------------


def test_moments_are_exact_in_any_order_and_keys_are_those_of_the_classes(
    first, folder, tmp_path
) -> None:
    other = written(opened(folder, tmp_path / "turned", **FIRST), (1, 3, 2)).snapshot()
    turn = first.snapshot()
    assert len(turn.state.first) == 1
    for number in (1, 2, 3):
        for kind in ("query_statistics", "feature_statistics"):
            mine = getattr(turn, kind)()[number].moments
            theirs = getattr(other, kind)()[number].moments
            assert torch.equal(mine.sums, theirs.sums)
            assert torch.equal(mine.second, theirs.second)
    order = [other.state.tasks.index(number) for number in (1, 2, 3)]
    keys, theirs = (torch.from_numpy(one.view.keys().copy()) for one in (turn, other))
    torch.testing.assert_close(theirs[:, order], keys, rtol=1e-4, atol=1e-4)
    # The moments are those of the final features under the first adapter, class by class.
    work = first.workspace
    task = work.stream.tasks[2]
    pixels = work.backbone.preprocess(torch.from_numpy(np.asarray(task.train.images)))
    with torch.inference_mode():
        seen = turn.model.look(work.backbone, pixels)
    counted = turn.query_statistics()[3]
    expected = QueryStatistics(1, work.backbone.dim)
    for place, label in enumerate(np.unique(task.train.labels)):
        expected.add(place, seen.query[None, torch.from_numpy(task.train.labels == label)])
    torch.testing.assert_close(counted.sums, expected.sums, rtol=1e-5, atol=1e-4)
    features = turn.feature_statistics()[3]
    assert features.dim == 2 * work.backbone.dim
    torch.testing.assert_close(
        features.sums.sum(0)[work.backbone.dim :], seen.beside.double().sum(0), rtol=1e-4, atol=1e-3
    )


def test_every_verb_reads_it(first, tmp_path) -> None:
    record = first.evaluate(history=True, compare=True)
    assert record.row("memory").metrics["faa"] > 0.6
    assert record.row("memory").metrics["task_accuracy"] > 0.8
    assert {"routed", "uniform", "oracle"} <= {row.id for row in record.metrics.rows}
    assert record.row("oracle").metrics["faa"] > 0.6
    task = first.workspace.stream.tasks[1]
    picture = tmp_path / "digit.png"
    Image.fromarray(np.asarray(task.test.images[0])).save(picture)
    result = first.retrieve(image=picture)
    assert result.block_numbers == (first.workspace.backbone.depth,)
    assert result.prediction.novelty > 0
    told = first.explain(image=picture)
    assert told.outcome.label == result.prediction.label
    assert len(told.familiar) == 3
    module = first.attach()
    pixels = module.pixels(torch.from_numpy(np.asarray(task.test.images[:3])))
    with torch.no_grad():
        out = module(pixels)
    whole = torch.export.export(module, (pixels,)).module()(pixels)
    torch.testing.assert_close(whole.logits, out.logits, rtol=1e-4, atol=1e-4)
    weights = [adapter.coefficient for adapter in result.adapters]
    assert out.weights[0].tolist() == pytest.approx(weights, abs=1e-5)
    assert float(out.novelty[0]) == pytest.approx(result.prediction.novelty, rel=1e-4)
    # As the command line reads it.
    read = (
        *("retrieve", "--image", str(picture), "--store", first.workspace.store_path),
        *("--json", "--device", "cpu", "--precision", "fp32"),
    )
    done = inside(tmp_path, {"XDG_CONFIG_HOME": str(tmp_path)}, *read)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["blocks"][0] == pytest.approx(list(result.blocks[0]), abs=1e-6)
    assert said["prediction"]["label"] == result.prediction.label


def test_a_plan_counts_what_it_costs(first) -> None:
    told = plan(first.config, seed=0, verb="run")["cost"]
    assert (told["frozen"], told["first_adapter"]) == (0, 1)
    view, moments = first.snapshot().view, first.snapshot().query_statistics().values()
    assert told["keys_bytes"] == view.keys().nbytes
    assert told["queries_bytes"] == sum(8 * (m.sums.numel() + m.second.numel()) for m in moments)
    assert dict(_image_cost(told))["passes of an image"] == "first adapter 1, recalled 1"


@pytest.mark.parametrize(("features", "kind"), [("own+frozen", "ridge"), ("recalled+first", "ncm")])
def test_heads_read_what_stands_beside(folder, tmp_path, features, kind) -> None:
    changes = {**FIRST, "head__features": features, "head__kind": kind, "head__scope": "shared"}
    mira = written(opened(folder, tmp_path, **changes), (1,))
    snapshot = mira.snapshot()
    assert snapshot.head.weight.shape[-1] == 2 * mira.workspace.backbone.dim
    task = mira.workspace.stream.tasks[0]
    images = torch.from_numpy(np.asarray(task.train.images))
    with torch.inference_mode():
        pixels = snapshot.model.backbone.preprocess(images)
        recalled = mira.workspace.backbone.features(pixels, snapshot.model.recall(pixels))
        read = snapshot.model(images)
    torch.testing.assert_close(read[:, : recalled.shape[1]], recalled)
    if features.startswith("recalled"):
        sums = snapshot.feature_statistics()[1].sums.sum(0)
        torch.testing.assert_close(sums, read.double().sum(0), rtol=1e-4, atol=1e-3)


def test_keys_learn_beside_a_wider_head(folder, tmp_path) -> None:
    changes = {
        "memory__look_at": ("final",),
        "memory__look_under": "both",
        "head__features": "recalled+first",
        "consolidate__epochs": 1,
    }
    mira = written(opened(folder, tmp_path, **changes), (1,))
    assert mira.measure("HEAD", [1])["faa"] > 0.5


# Out of it, and together --------------------------------------------------------------------------


def test_without_the_first_task_everything_is_counted_again(first) -> None:
    view = first.workspace.store.view("HEAD")
    assert [looked_under(view, chosen(view, [name])) for name in "123"] == [True, False, False]
    forget(first.workspace.store, ["1"])
    view = first.workspace.store.view("HEAD")
    assert view.keys() is None
    assert not {*view.blobs()} & {MEMORY, HEAD, "queries.2", "queries.3", "features.3"}
    with pytest.raises(ConfigError, match=r"(?s)never consolidated.*memtool consolidate"):
        first.snapshot().consolidated()
    first.consolidate()
    state = first.snapshot().state
    assert state.tasks == (2, 3)
    assert state.first == (first.workspace.store.view("HEAD").adapters[0].id,)
    assert first.measure("HEAD", [2, 3])["faa"] > 0.6


def test_forgetting_a_later_task_leaves_the_look(first, folder, tmp_path) -> None:
    forget(first.workspace.store, ["2"])
    alone = written(opened(folder, tmp_path / "alone", **FIRST), (1, 3))
    mine, theirs = (mira.snapshot().view.keys() for mira in (first, alone))
    assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_two_memories_that_began_alike_are_joined(first, folder, tmp_path) -> None:
    whole = first.snapshot().view.keys().copy()
    mine = written(opened(folder, tmp_path / "two", **FIRST), (1, 2))
    theirs = first.workspace.store_path
    merging.merge(mine.workspace.store_path, theirs, ["3"])
    mine.consolidate()
    assert np.allclose(mine.snapshot().view.keys(), whole, rtol=1e-4, atol=1e-4)
    # A new memory of some of its adapters has the first one under another id.
    new = str(tmp_path / "new")
    with pytest.raises(MismatchError, match=r"(?s)looked at under 'task-1-seed-0'.*task-1-seed-0"):
        merging.merge(new, theirs, ["3"])
    merging.merge(new, theirs, ["3", "task-1-seed-0"])
    joined = Mira.open(small_config(folder, store=new, **FIRST), seed=0)
    joined.consolidate()
    assert joined.snapshot().state.first == (joined.workspace.store.view().get("task-1-seed-0").id,)
    other = written(opened(folder, tmp_path / "other", **FIRST), (3,))
    with pytest.raises(MismatchError, match="different first adapters"):
        merging.merge(mine.workspace.store_path, other.workspace.store_path)


def test_what_was_stored_before_there_were_looks_is_read(learned) -> None:
    state = learned.snapshot().state
    then = json.loads(state.model_dump_json())
    del then["first"], then["memory"]["look_under"]
    assert MemoryState.model_validate(then) == state
    assert learned.consolidate().unchanged


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"memory__look_at": ("tokens",)}, "look_at tokens on a stream of images"),
        ({"memory__scope": "block", "memory__look_at": ("final",)}, "look_at final under"),
        ({"memory__scope": "block", "memory__look_under": "both"}, "look_under both under"),
        (
            {"memory__look_under": "both", "consolidate__value_lr": 0.1, "consolidate__epochs": 1},
            "look_under both with consolidate.value_lr 0.1",
        ),
        ({"head__features": "own+first", "head__kind": "grown"}, "own.first with head.kind grown"),
    ],
)
def test_looks_that_cannot_be(tmp_path, changes, match) -> None:
    require = said_by("mira").require
    with pytest.raises(ConfigError, match=match) as error:
        require(small_config(tmp_path, **changes))
    key, value = parse_assignment(error.value.remedy.removeprefix("--set "))
    require(small_config(tmp_path, **{**changes, key.replace(".", "__"): value}))


def test_a_block_that_is_not_there_is_refused_before_anything_is_learned(folder, tmp_path) -> None:
    mira = opened(folder, tmp_path, memory__look_at=("block:4", "final"))
    mira.write([mira.workspace.adapter_folder / "task-1-seed-0"])
    told = r"(?s)block 4 of a model of 4.*look_at=final"
    config = mira.config.model_copy(update={"runs": tmp_path / "runs"})
    for step in (
        mira.consolidate,
        lambda: plan(config, seed=0, verb="run"),
        lambda: Mira.open(config, seed=0).adapt("1"),
        lambda: run(config),
    ):
        with pytest.raises(ConfigError, match=told):
            step()
    assert not (tmp_path / "runs" / "adapters").exists()
    opened(folder, tmp_path, memory__look_at=("final",)).consolidate()


def test_keys_that_cannot_learn_are_refused_before_anything_is_learned(folder, tmp_path) -> None:
    changes = {"memory__routing": "lda", "consolidate__epochs": 1}
    mira = opened(folder, tmp_path, **changes)
    for step in (lambda: plan(mira.config, seed=0, verb="run"), lambda: mira.adapt("1")):
        with pytest.raises(ConfigError, match=r"key learning under memory\.routing lda"):
            step()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"memory__look_under": "both"}, "look_under=first-adapter"),
        ({"memory__look_at": ("block:1", "final")}, "look_at=final"),
        ({"head__features": "own+frozen"}, r"features=own\+first"),
    ],
)
def test_what_was_counted_one_way_is_not_asked_another_way(
    first, folder, tmp_path, changes, match
) -> None:
    mira = opened(folder, tmp_path, **{**FIRST, **changes})
    with pytest.raises(ConfigError, match=match):
        mira.consolidate()


def test_memories_in_blocks_of_several_widths_are_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    convnet = {
        "backbone__name": "timm:test_convnext",
        "backbone__weights": "random",
        "backbone__targets": ("fc1",),
        "memory__scope": "block",
    }
    with pytest.raises(ConfigError, match="adapted blocks are 24, 32, 48, 64 wide") as refused:
        Mira.open(small_config(tmp_path, **convnet), seed=0).adapt("1")
    assert refused.value.remedy is not None
    (key, named) = refused.value.remedy.rpartition("--set ")[2].split("=")
    assert key == "memory.blocks"
    blocks = tuple(map(int, named.split(",")))
    config = small_config(tmp_path, **convnet, memory__blocks=blocks)
    memory = learn(Mira.open(config, seed=0), tasks=1).snapshot().model.memory
    assert memory.blocks == blocks
    assert len({memory[block].query.width for block in blocks}) == 1
