"""The door of PEFT folders: whatever lies in one, it is read or refused by name, and at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from memtool.adapters.peft_files import CONFIG_NAME, WEIGHTS_NAME, read_peft, restored_file
from memtool.methods.exchange import ABOUT, CATALOG, OWN_HEAD, read_adapter
from memtool.methods.mira.method import Mira
from memtool_stores.names import check_name
from tests.fuzz.door import NAMES, cases, damaged, long, nothing_else_changes, refused_or_taken
from tests.methods.conftest import small_config

FILES = (WEIGHTS_NAME, CONFIG_NAME, ABOUT, OWN_HEAD)

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from([0, True, 10**30, 10**400, -1, 1e308, 5e-324, "4", None]),
    st.builds(lambda: [4]),
    st.builds(lambda: {"r": 4}),  # anew each time: a test changes it
)
PATTERNS = st.one_of(
    NAMES,
    st.sampled_from(
        ["(a+)+b", ".*", "(", "^blocks", r".*\.(q|v)", "a" * 500, r"(.*\.)*x", "(?=a)"]
    ),
    st.text(alphabet="qkv.*+()[]|\\{}2", max_size=20),
)
JSON = st.recursive(
    NUMBERS | NAMES, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3)
)
NESTED = st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500])
PEFT_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "peft_type": st.sampled_from(["LORA", "IA3", "lora", None, 3, ["LORA"]]) | NAMES,
        "r": NUMBERS,
        "lora_alpha": NUMBERS,
        "rank_pattern": st.dictionaries(PATTERNS, NUMBERS, max_size=3) | JSON,
        "alpha_pattern": st.dictionaries(PATTERNS, NUMBERS, max_size=3) | JSON,
        "target_modules": PATTERNS | st.lists(PATTERNS, max_size=3) | JSON,
        "exclude_modules": PATTERNS | JSON,
        "layers_pattern": PATTERNS | JSON,
        "modules_to_save": st.lists(NAMES, max_size=2) | JSON,
        "use_rslora": st.booleans() | JSON,
        "use_dora": st.booleans() | JSON,
        "bias": st.sampled_from(["none", "all", "lora_only"]) | JSON,
        "fan_in_fan_out": st.booleans() | JSON,
        "init_lora_weights": st.sampled_from([True, "gaussian", "pissa", "eva"]) | JSON,
        "base_model_name_or_path": NAMES | JSON,
        "revision": NAMES | JSON,
        "trainable_token_indices": JSON,
        "lora_bias": st.booleans(),
    },
)


class Door:
    """A folder that was trained here, and copies of it that are spoilt and read."""

    def __init__(self, folder: Path, mira: Mira) -> None:
        self.sandbox, self.mira = folder, mira
        self.good = mira.config.runs / "adapters" / "task-1-seed-0"
        self.files = {name: (self.good / name).read_bytes() for name in FILES}
        self.place = folder / "somebody" / "theirs"

    def fresh(self, but: str = "") -> Path:
        """The folder as it was made, without one of its files."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for name, data in self.files.items():
            if name != but:
                (self.place / name).write_bytes(data)
        return self.place

    def read(self) -> None:
        """What reads a folder: as files of peft, and as an adapter for a memory."""
        work = self.mira.workspace
        with nothing_else_changes(self.sandbox):
            with refused_or_taken():
                found = read_peft(self.place, work.layout.sites)
                restored_file(found)
                assert bool(found.value.isfinite().all())
            with refused_or_taken():
                adapter = read_adapter(self.place, work, work.stream.tasks[0])
                check_name(adapter.name, "an adapter")
                json.dumps(adapter.meta, allow_nan=False)
                assert bool(adapter.value.isfinite().all())


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    folder = tmp_path_factory.mktemp("door")
    mira = Mira.open(small_config(folder / "mine", stream__train_per_task=20), seed=0)
    mira.adapt("1")
    return Door(folder, mira)


def test_the_folder_as_it_was_made_is_read(door: Door) -> None:
    door.fresh()
    work = door.mira.workspace
    assert read_adapter(door.place, work).name == "task-1-seed-0"


@long
@cases
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(door: Door, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    (door.fresh() / name).write_bytes(data.draw(damaged(door.files[name])))
    door.read()


@long
@cases
@given(
    options=PEFT_OPTIONS, rest=st.dictionaries(NAMES, JSON, max_size=2), nested=NESTED | st.none()
)
def test_a_configuration_of_any_kind_is_refused_or_read(
    door: Door, options: dict[str, Any], rest: dict[str, Any], nested: str | None
) -> None:
    config = json.loads(door.files[CONFIG_NAME]) | options | rest
    text = json.dumps(config)
    if nested is not None and len(options) % 2:
        text = text[:-1] + ', "eva_config": ' + nested
    (door.fresh() / CONFIG_NAME).write_text(text, encoding="utf-8", errors="surrogatepass")
    door.read()


@long
@cases
@given(data=st.data())
def test_what_lies_beside_is_refused_or_read(door: Door, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([ABOUT, CATALOG]))
    whole = json.loads(door.files[ABOUT]) if name == ABOUT else {"task": 1, "kind": "adapter"}
    for _ in range(data.draw(st.integers(1, 3))):
        here = whole
        key = data.draw(st.sampled_from(sorted(here)))
        while isinstance(here[key], dict) and here[key] and data.draw(st.booleans()):
            here = here[key]
            key = data.draw(st.sampled_from(sorted(here)))
        here[key] = data.draw(JSON)
    folder = door.fresh(but=ABOUT if name == CATALOG else "")
    text = json.dumps(whole)
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    door.read()


SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 16, 64, 192]), max_size=3).map(tuple)
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)


@long
@cases
@given(data=st.data())
def test_tensors_of_any_kind_are_refused_or_read(door: Door, data: st.DataObject) -> None:
    site = door.mira.workspace.layout.sites[0]
    modules = st.sampled_from([site.module, "blocks.0.mlp.fc1", "base", ""]) | NAMES
    tensors = {}
    for module in data.draw(st.lists(modules, max_size=3, unique=True)):
        for part in data.draw(st.sampled_from(["AB", "AB", "A", ["embedding_A"]])):
            shape = data.draw(SHAPES | st.just((4, site.in_features)))
            if part == "B" and data.draw(st.booleans()):
                shape = (site.module_rows, 4)
            tensor = torch.zeros(shape, dtype=data.draw(DTYPES))
            if tensor.is_floating_point():
                tensor += data.draw(st.floats(width=16) | st.just(0.5))
            name = f"base_model.model.{module}.lora_{part}.weight"
            tensors[name.encode(errors="replace").decode()] = tensor
    note = data.draw(NAMES | JSON.map(json.dumps) | st.just("")).encode(errors="replace").decode()
    (door.fresh() / WEIGHTS_NAME).write_bytes(save(tensors, {"memtool": note} if note else None))
    door.read()


@pytest.mark.parametrize("name", [*FILES, CATALOG])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself", "device"])
def test_what_is_no_file_is_refused_at_once(door: Door, name: str, kind: str) -> None:
    path = door.fresh(but=name) / name
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link to nothing":
            path.symlink_to(door.sandbox / "nowhere")
        case "link to itself":
            path.symlink_to(path)
        case _:
            path.symlink_to("/dev/zero")
    door.read()


def test_a_pickle_is_never_read(door: Door) -> None:
    folder = door.fresh(but=WEIGHTS_NAME)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    door.read()
    assert not (folder / "ran").exists()


def test_one_large_rank_does_not_swell_all_modules(door: Door) -> None:
    tensors, ranks = {}, {}
    for site in {site.module: site for site in door.mira.workspace.layout.sites}.values():
        rank = 1 if ranks else 20_000
        ranks[site.module] = rank
        name = f"base_model.model.{site.module}.lora_"
        tensors[f"{name}A.weight"] = torch.zeros(rank, site.in_features)
        tensors[f"{name}B.weight"] = torch.zeros(site.module_rows, rank)
    folder = door.fresh(but=ABOUT)
    (folder / WEIGHTS_NAME).write_bytes(save(tensors))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    door.read()
