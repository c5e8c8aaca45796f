"""A chain of two data sets of three colours each, with one name in both, and a run over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from memtool.config import resolve
from memtool.settings import Config

COLOURS = {
    "warm": {"red": (220, 40, 30), "dark_yellow": (160, 150, 20), "both": (200, 120, 120)},
    "cold": {"blue": (30, 60, 210), "green": (40, 180, 60), "both": (90, 160, 170)},
}


def write_chain(folder: Path) -> Path:
    """Images and descriptions in a folder; the file of the chain."""
    generator = np.random.default_rng(0)
    for data, classes in COLOURS.items():
        for part, each in (("train", 8), ("test", 5)):
            for name, colour in classes.items():
                where = folder / f"images of {data}" / part / name
                where.mkdir(parents=True)
                for number in range(each):
                    noise = generator.normal(0, 25, (32, 32, 3)) + colour
                    Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(
                        where / f"{number}.png"
                    )
        content = {"kind": "folder", "path": f"images of {data}"}
        (folder / f"{data}.yaml").write_text(yaml.safe_dump(content))
    content = {
        "kind": "chain",
        "sources": ["warm.yaml", "cold.yaml"],
        "prompts": {"warm": "a warm {}.", "cold": "a cold {}."},
    }
    (folder / "chain.yaml").write_text(yaml.safe_dump(content))
    return folder / "chain.yaml"


def chain_config(chain: Path, folder: Path, **overrides: object) -> Config:
    """Setting xtail over the chain, with everything under `folder`."""
    values = {
        "stream.source": str(chain),
        "stream.setting": "xtail",
        "stream.shots": 6,
        "head.kind": "prototype",
        "train.iterations": 3,
        "train.batch_size": 9,
        "train.lr": 1e-3,
        "engine.device": "cpu",
        "engine.precision": "fp32",
        "store": str(folder / "memory"),
        "runs": str(folder / "runs"),
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return resolve(preset="digits-dil", overrides=values, environ={}, cwd=folder).config
