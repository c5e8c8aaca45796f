"""A tiny language model and three tasks of little facts, and the settings that learn them."""

from __future__ import annotations

import json
from pathlib import Path

from memtool.config import resolve
from memtool.methods.moram.method import Moram
from memtool.settings import Config
from memtool.workspace import Workspace
from tests.backbones.tiny_lm import write_tiny

FACTS = {
    "letters": [(f"after {a} comes", chr(ord(a) + 1)) for a in "abcdefgh"],
    "sums": [(f"{n} and 1 is", str(n + 1)) for n in range(8)],
    "turned": [(f"turn {word}:", word[::-1]) for word in ("ab", "cd", "ef", "gh", "ij", "kl")],
}


def write_facts(folder: Path) -> Path:
    """The folder, with a model in `model`, texts in `data` and their description `facts.yaml`."""
    write_tiny(folder / "model", max_position_embeddings=128)
    for name, facts in FACTS.items():
        (folder / "data" / name).mkdir(parents=True)
        content = json.dumps([{"prompt": p, "answer": a} for p, a in facts])
        for split in ("train", "test"):
            (folder / "data" / name / f"{split}.json").write_text(content, encoding="utf-8")
    tasks = [{"name": name, "metric": "exact-match"} for name in FACTS]
    description = json.dumps({"path": "data", "tasks": tasks})  # JSON is YAML
    (folder / "facts.yaml").write_text(description, encoding="utf-8")
    return folder


def settings_of(place: Path, where: Path) -> dict[str, object]:
    """Settings over those of the preset: what `write_facts` wrote, everything else in `where`."""
    return {
        "store": str(where / "memory"),
        "runs": where / "runs",
        "backbone.name": f"hf:{place / 'model'}",
        "stream.source": str(place / "facts.yaml"),
        "adapter.rank": 2,
        "adapter.alpha": 4.0,
        "text.prompt_tokens": 60,
        "text.answer_tokens": 6,
        "text.epochs": None,
        "text.dropout": 0.0,
        "train.epochs": 4,
        "train.batch_size": 4,
        "train.lr": 0.02,
        "engine.precision": "fp32",
    }


def config_of(place: Path, where: Path, **changes: object) -> Config:
    """The preset under `settings_of` and changes."""
    overrides = {**settings_of(place, where), **changes}
    return resolve(preset="moram-trace", overrides=overrides, ambient=False).config


def work_of(place: Path, where: Path, **changes: object) -> Workspace:
    """The workspace of seed 0."""
    return Workspace(config_of(place, where, **changes), seed=0)


def moram_of(place: Path, where: Path, **changes: object) -> Moram:
    """The method of seed 0."""
    return Moram.open(config_of(place, where, **changes), seed=0)
