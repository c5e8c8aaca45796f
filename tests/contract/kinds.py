"""Every method on every kind of sample that it reads, small: what the contract is asked of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtool.config import resolve
from memtool.methods import open_method
from memtool.settings import Config
from tests.methods.facts import settings_of, write_facts
from tests.shown import METHOD, write_shown

SMALL: Mapping[str, object] = {
    "stream.train_per_task": 40,
    "stream.test_per_task": 20,
    "train.epochs": 1,
    "adapter.rank": 2,
    "modulation.hidden": 16,
    "modulation.predictor_epochs": 1,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}
KINDS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "mira on images": ("digits-dil", {}),
    "moram on images": ("moram-digits", {"stream.splits": 5}),
    "modulation on images": ("modulation-digits", {}),
    "mira on texts": ("mira-trace", {}),
    "modulation on texts": ("modulation-trace", {"modulation.hidden": 16}),
    "moram on texts": ("moram-trace", {}),
    "nearest-mean on images": ("digits-dil", {}),
    "nearest-mean on texts": ("moram-trace", {}),
}
"""By name: a preset, and what is changed in it."""


def config_of(kind: str, folder: Path, place: Path | None = None) -> Config:
    """The settings of a kind, with everything in `folder`; texts, models and code in `place`."""
    place = place or folder
    preset, changes = KINDS[kind]
    values: dict[str, object] = {"store": str(folder / "memory"), "runs": folder / "runs"}
    if kind.endswith("texts"):
        if not (place / "facts.yaml").exists():
            write_facts(place)
        values |= settings_of(place, folder)
    else:
        values |= SMALL
    if kind.startswith("nearest-mean"):
        if not (place / METHOD.partition(":")[0]).exists():
            write_shown(place)
        values["method"] = str(place / METHOD)
    return resolve(preset=preset, overrides={**values, **changes}, environ={}, cwd=folder).config


def opened(kind: str, folder: Path, place: Path | None = None) -> Any:
    """The method of a kind, of seed 0; arguments as in `config_of`."""
    config = config_of(kind, folder, place)
    return open_method(config, seed=0)


def subject(kind: str, folder: Path) -> dict[str, Any]:
    """One input that is no task, as `retrieve` takes it."""
    if kind.endswith("texts"):
        return {"prompt": "after a comes"}
    return {"image": folder / "image.png"}
