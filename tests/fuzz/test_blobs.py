"""The blobs of a memory that a stranger made: hashes that hold, and anything in what they hash."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from memtool.adapters.layout import Layout, Site
from memtool.heads import FeatureStatistics, LinearClassifier, ProjectedMoments, RecalledHead
from memtool.learning.past_inputs import PastInputs
from memtool.memories.bayes_pcn import BayesPCN, BayesPCNSettings
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.dual_gpm import DualGPM, spaces_from_bytes, spaces_to_bytes
from memtool.methods.in_store import classifier_bytes, classifier_of
from memtool.methods.mira.method import Mira
from memtool.methods.mira.state import MemoryState
from memtool.methods.modulation.predictor import Predictor
from memtool.methods.moram.state import AtomsState
from memtool_stores import MemoryView
from tests.fuzz.door import NAMES, cases, damaged, long, refused_or_taken
from tests.methods.conftest import learn, small_config

pytestmark = long

generator = torch.Generator().manual_seed(0)


def _rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _features(projected: ProjectedMoments | None = None) -> bytes:
    statistics = FeatureStatistics(3, 2, projected)
    statistics.add(_rows(20, 3), torch.arange(20) % 2)
    return statistics.to_bytes()


def _queries() -> bytes:
    statistics = QueryStatistics(2, 3)
    for task in range(2):
        statistics.add(task, _rows(2, 20, 3))
    return statistics.to_bytes()


def _bayes_pcn() -> tuple[bytes, torch.Tensor]:
    memory, patterns = BayesPCN(12, 4, BayesPCNSettings(hidden=4, steps=2)), _rows(2, 12)
    for name, pattern in zip("ab", patterns, strict=True):
        memory.write(name, pattern)
    return memory.to_bytes(), patterns


HEAD = RecalledHead.of_tasks([LinearClassifier(_rows(3, 4), _rows(3))] * 2, [0, 1])
PREDICTOR = Predictor(_rows(8), 2.0, LinearClassifier(_rows(2, 4), _rows(2)), (1, 2))
SPACES = spaces_to_bytes({"a b": DualGPM(4, 0.9), "c": DualGPM(3, 0.9)})
LAYOUT = Layout((Site(0, "a b", "", 4, 4, 0, 4), Site(0, "c", "", 3, 3, 0, 3)), 2)
BAYES, PATTERNS = _bayes_pcn()
READERS = {
    "head": (HEAD.to_bytes(), lambda data: RecalledHead.from_bytes(data, "blob 'head'")),
    "classifier": (
        classifier_bytes(LinearClassifier(_rows(3, 4), _rows(3))),
        lambda data: classifier_of(data, "blob 'head.a'")(torch.zeros(1, 4)),
    ),
    "predictor": (PREDICTOR.to_bytes(), lambda data: Predictor.from_bytes(data, "a blob")),
    "queries": (
        _queries(),
        lambda data: QueryStatistics.from_bytes(data, "blob 'queries.1'").lda_keys(),
    ),
    "features": (
        _features(),
        lambda data: FeatureStatistics.from_bytes(data, "blob 'features.1'").lda(),
    ),
    "projected": (
        _features(ProjectedMoments(3, 4, 0, 2)),
        lambda data: FeatureStatistics.from_bytes(data, "blob 'features.1'").rp_ridge(),
    ),
    "spaces": (SPACES, lambda data: spaces_from_bytes(data, "blob 'past-queries'")),
    "inputs": (
        SPACES,
        lambda data: PastInputs.from_bytes(data, LAYOUT, 0.9, "blob 'past-inputs'"),
    ),
    "bayes-pcn": (BAYES, lambda data: BayesPCN.from_bytes(data, PATTERNS, "a blob")),
}
"""By kind of blob: the bytes of a good one, and what reads them and computes a little."""


@pytest.mark.parametrize("kind", READERS)
def test_a_good_blob_is_read(kind):
    data, read = READERS[kind]
    read(data)


@pytest.mark.parametrize("kind", READERS)
@cases
@given(data=st.data())
def test_a_damaged_blob_is_refused_or_read(kind, data):
    whole, read = READERS[kind]
    changed = data.draw(damaged(whole))
    with refused_or_taken():
        read(changed)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
READ_NAMES = ["weight", "bias", "owners", "counts", "sums", "second", "value", "scaling", "tasks"]
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool])


@st.composite
def strange_tensors(draw: st.DrawFn) -> bytes:
    """A whole safetensors file of tensors whose names, shapes, types and numbers are anything."""
    known = st.sampled_from(
        ["weight", "bias", "owners", "counts", "sums", "second", "value", "scaling", "tasks"]
    )
    known |= st.sampled_from(["remove 0.9 a", "retain x y", "remove 2 b"])
    tensors = {}
    for name in draw(st.sets(known | NAMES, max_size=6)):
        if name.isprintable() and name != "__metadata__":
            tensor = torch.zeros(draw(SHAPES), dtype=draw(DTYPES))
            if tensor.is_floating_point():
                tensor += draw(st.floats(width=16))
            tensors[name] = tensor + draw(st.integers(0, 1))
    return save(tensors)


@pytest.mark.parametrize("kind", READERS)
@cases
@given(data=strange_tensors())
def test_tensors_of_any_kind_are_refused_or_read(kind, data):
    with refused_or_taken():
        READERS[kind][1](data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def mira(tmp_path_factory):
    """A memory of one task, and an image beside it."""
    folder = tmp_path_factory.mktemp("blobs")
    Image.new("RGB", (32, 32), "gray").save(folder / "image.png")
    return learn(Mira.open(small_config(folder, train__epochs=1), seed=0), 1), folder / "image.png"


@cases
@given(data=st.data())
def test_a_memory_with_one_blob_of_a_stranger_is_refused_or_read(mira, data):
    memory, image = mira
    view = memory.workspace.store.view()
    name = data.draw(st.sampled_from(view.blobs()))
    changed = data.draw(damaged(view.blob(name)) | strange_tensors() | _state(view))
    honest = MemoryView.blob

    def blob(view: MemoryView, wanted: str) -> bytes:
        return changed if wanted == name else honest(view, wanted)

    with mock.patch.object(MemoryView, "blob", blob), refused_or_taken():
        recalled = memory.retrieve(image=image)
        assert all(np.isfinite(adapter.coefficient) for adapter in recalled.adapters)


@st.composite
def _state(draw: st.DrawFn, view: MemoryView) -> bytes:
    """The state of the memory with one part in another form."""
    state = json.loads(view.blob(MemoryState.blob))
    state[draw(st.sampled_from(sorted(state)))] = draw(JSON)
    return json.dumps(state).encode()


@cases
@given(st.dictionaries(st.sampled_from([*AtomsState.model_fields]) | NAMES, JSON, max_size=6))
def test_a_strange_state_of_atoms_is_refused(content):
    class View:
        version = "X"

        def has_blob(self, name: str) -> bool:
            return name == AtomsState.blob

        def blob(self, _: str) -> bytes:
            return json.dumps(content).encode()

    with refused_or_taken():
        AtomsState.load(View())  # type: ignore[arg-type]
