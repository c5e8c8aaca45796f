"""Adapter files as strangers send them: whole ones come back byte for byte, others are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool_stores import Backbone, MemoryStore, Space
from memtool_stores.tensorfile import read_header, write_header
from memtool_stores.testing import small_space, some_values
from memtool_stores.transaction import Transaction
from tests.fuzz.door import STRANGE, VALUES, altered, cases, damaged, long, refused_or_taken

pytestmark = long

SPACE = small_space()
LAYOUT = SPACE.layout
HEADER = write_header([(s.name, s.shape) for s in LAYOUT.segments], LAYOUT.dtype)
DATA = some_values(SPACE, 0).tobytes()
ENTRIES = {**json.loads(HEADER[8:]), "__metadata__": {"format": "pt"}}
CONFIG = {"lora_alpha": 4, "r": 2, "target_modules": ["q", "v"], "peft_type": "LORA"}


def _with_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + DATA


NESTED = [bracket * depth for bracket in (b"[", b'{"a":') for depth in (1, 100, 2_000, 30_000)]

FILES = st.one_of(
    damaged(HEADER + DATA),
    altered(ENTRIES).map(lambda entries: _with_header(json.dumps(entries).encode())),
    VALUES.map(lambda value: _with_header(json.dumps(value).encode())),
    damaged(HEADER[8:]).map(_with_header),
    STRANGE,
    st.sampled_from(NESTED).map(_with_header),
    st.sampled_from(list(ENTRIES)).map(  # a name twice
        lambda name: _with_header(
            HEADER[8:].rstrip()[:-1] + b"," + json.dumps({name: ENTRIES[name]}).encode()[1:]
        )
    ),
)


@pytest.fixture(scope="module")
def transaction(tmp_path_factory: pytest.TempPathFactory) -> Transaction:
    """One that is never committed."""
    store = MemoryStore.create(tmp_path_factory.mktemp("safetensors") / "memory", SPACE)
    return store._begin("main")


@cases
@given(data=FILES)
def test_a_file_is_taken_whole_or_refused(transaction: Transaction, data: bytes) -> None:
    with refused_or_taken():
        header = read_header(data, "the file")
        assert data.startswith(header.data)
    before = transaction.nbytes
    id = None
    with refused_or_taken():
        id = transaction.add_file("name", data)
    if id is None:
        assert transaction.nbytes == before
    else:
        assert data.endswith(transaction.value(id).tobytes())
        transaction.remove(id)


@cases
@given(
    data=FILES | st.just(HEADER + DATA),
    config=st.one_of(
        st.just(json.dumps(CONFIG).encode()),
        altered(CONFIG).map(lambda config: json.dumps(config).encode()),
        damaged(json.dumps(CONFIG).encode()),
    ),
)
def test_the_space_of_a_file_can_be_stored_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, config: bytes
) -> None:
    folder = Path(tmp_path_factory.getbasetemp(), "space")
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_bytes(config)
    with refused_or_taken():
        space = Space.from_safetensors(
            folder / "adapter_model.safetensors", backbone=Backbone("b", "", "00")
        )
        assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space


@cases
@given(document=altered(SPACE.to_json()) | VALUES)
def test_a_description_of_a_space_is_one_or_is_refused(document: object) -> None:
    with refused_or_taken():
        space = Space.from_json(document)
        assert Space.from_json(space.to_json()) == space
        assert space.layout.nbytes > 0
        assert math.isfinite(space.layout.alpha / space.layout.rank)
