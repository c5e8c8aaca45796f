"""A rule of one's own that gives what it should not, and what a memory of it is read without."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memtool
from memtool import registry
from memtool.config import resolve
from memtool.errors import ConfigError, CorruptError, MismatchError, NotFoundError
from memtool.methods import open_method
from memtool_stores import SpaceMismatchError
from tests.contract.kinds import config_of

RULES = """
import torch
import memtool

class Fine(memtool.Routed):
    name = "fine"
    kept = staticmethod(lambda looks: {"count": torch.tensor(len(looks))})
    given = staticmethod(lambda looks, kept: torch.ones(len(looks), len(kept)))

    def keep(self, looks):
        return type(self).kept(looks)

    def weights(self, looks, kept):
        return type(self).given(looks, kept)

class Half(memtool.Routed):
    name = "half"

class Pictures(Fine):
    reads = ("images",)

class Nameless(memtool.Routed):
    keep = Fine.keep
    weights = Fine.weights
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rules, and a memory of one that is fine."""
    place = tmp_path_factory.mktemp("rules")
    (place / "rules.py").write_text(RULES)
    method = _opened(place, "Fine")
    for task in "12":
        method.adapt(task)
        method.write()
    method.consolidate()
    return place


def _opened(place: Path, word: str, **changes: object) -> Any:
    config = config_of("mira on images", place)
    values = config.model_dump(exclude={"memory", "consolidate", "past"})
    values["method"] = f"{place / 'rules.py'}:{word}"
    return open_method(config.model_validate({**values, **changes}), seed=0)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda looks: looks, "keep gave a Tensor"),
        (lambda looks: None, "keep gave a NoneType"),
        (lambda looks: {}, "keep gave an empty one"),
        (lambda looks: {"a.b": looks}, "keep gave the name 'a.b'"),
        (lambda looks: {"": looks}, "keep gave the name ''"),
        (lambda looks: {1: looks}, "keep gave the name 1"),
        (lambda looks: {"mean": looks.tolist()}, "keep gave a list as mean"),
    ],
)
def test_what_no_rule_can_keep_is_told(place, tmp_path, monkeypatch, kept, said):
    method = _opened(place, "Fine", store=str(tmp_path / "memory"))
    method.write()
    monkeypatch.setattr(type(method), "kept", staticmethod(kept))
    head = method.workspace.store.head()
    with pytest.raises(MismatchError, match=re.escape(said)) as caught:
        method.consolidate()
    assert "rules.py:Fine" in caught.value.message
    assert method.workspace.store.head() == head


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda looks, kept: torch.ones(len(looks)), "weights gave shape (2,)"),
        (lambda looks, kept: torch.ones(len(kept), len(looks) + 1), "weights gave shape (2, 3)"),
        (lambda looks, kept: [1.0], "weights gave a list"),
        (lambda looks, kept: torch.full((len(looks), 2), torch.nan), "numbers that are not finite"),
    ],
)
def test_weights_that_are_none_are_told(place, monkeypatch, given, said):
    method = _opened(place, "Fine")
    monkeypatch.setattr(type(method), "given", staticmethod(given))
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    model = method.attach()
    for ask in (lambda: method.retrieve(task="1"), method.evaluate, lambda: model(images)):
        with pytest.raises(MismatchError) as caught:
            ask()
        assert "rules.py:Fine" in caught.value.message
    assert said in caught.value.message


def test_an_input_that_is_no_number_spoils_no_other(place):
    model = _opened(place, "Fine").attach()
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[1] = torch.nan
    assert bool(model(pixels).probabilities[0].isfinite().all())


@pytest.mark.parametrize(
    ("word", "said"),
    [("Half", "the class Half has no keep, weights"), ("Nameless", "Nameless has no name")],
)
def test_a_class_that_is_no_rule_is_told(place, word, said):
    with pytest.raises(ConfigError, match=said):
        _opened(place, word)


def test_a_rule_for_pictures_is_given_no_texts_and_no_fixed_head(place):
    overrides = {"method": f"{place / 'rules.py'}:Pictures"}
    texts = resolve(preset="moram-trace", overrides=overrides, ambient=False).config
    with pytest.raises(ConfigError, match=r"rules.py:Pictures on a stream of texts"):
        open_method(texts, seed=0)
    with pytest.raises(ConfigError, match=r"rules.py:Fine with .*head.kind prototype"):
        _opened(place, "Fine", head={"kind": "prototype"})


def test_a_memory_without_its_rule_or_model_is_told(place, tmp_path, monkeypatch):
    name = f"{place / 'rules.py'}:Fine"
    memory = memtool.load(place / "memory")
    with pytest.raises(NotFoundError, match=r"no weights at .*absent"):
        memtool.load(place / "memory", weights=tmp_path / "absent").attach()
    other = memtool.create_backbone(memory.config.backbone)
    other.sha256 = "0" * 64
    with pytest.raises(SpaceMismatchError, match="backbone"):
        memory.attach(other)
    monkeypatch.setattr("memtool.registry._FOUND", set())
    monkeypatch.delitem(sys.modules, registry._module_name(str(place / "rules.py")))
    with pytest.raises(NotFoundError, match=r"rules.py:Fine', which is not installed") as caught:
        memtool.load(place / "memory")
    assert caught.value.remedy == f"--method {name}"
    found = memtool.load(place / "memory", overrides={"method": name})
    assert found.config.method == name


def test_a_blob_that_no_rule_wrote_is_told(place):
    method = _opened(place, "Fine")
    store = method.workspace.store
    with store.transaction("by hand") as txn:
        txn.put_blob("routing.1", b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CorruptError, match=r"blob 'routing.1' .* holds \[\]"):
        method.retrieve(task="1")
    store.rollback("HEAD~1")
