"""Predicting files: `memtool predict` against the bare loop over the attached model.

The bare loop has the pictures decoded in memory and does nothing but run the model, in batches of
the same size. `memtool predict` opens 500 PNG files, decodes them, runs the model, makes rows of
what it says and writes them as CSV. How long the same takes with one picture read after another, no
thread beside the model, is told as well.

nano ships with memtool; ViT-Tiny at 96 pixels, on PACS, needs its weights and data below the folder
MEMTOOL_DATA.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import memtool
from benchmarks.timing import case, environment, interleaved, progress
from memtool.config import resolve
from memtool.inference.pictures import BATCH, Pixels, predicted
from memtool.inference.predictor import Predictor
from memtool.inference.rows import picture_cells, picture_header, write_cells
from memtool.methods import open_method
from memtool.settings import Config

IMAGES = 500
WANTED = 1.5
"""Times the bare loop, at most."""

TASKS = ("1", "2")
SMALL = {
    "stream.train_per_task": 60,
    "stream.test_per_task": IMAGES // len(TASKS),
    "train.epochs": 1,
    "engine.precision": "fp32",
}


def run(repeats: int, device: str = "cpu") -> dict[str, Any]:
    """The cases of nano, and of ViT-Tiny where MEMTOOL_DATA is set."""
    cases = [measured("nano, 32 px, digits", "digits-dil", repeats, device)]
    if os.environ.get("MEMTOOL_DATA"):
        cases.append(measured("ViT-Tiny, 96 px, PACS", "mira-dil", repeats, device))
    else:
        progress("ViT-Tiny is left out: MEMTOOL_DATA is not set")
    return {
        "benchmark": "predict",
        "environment": environment(device),
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def measured(name: str, preset: str, repeats: int, device: str) -> dict[str, Any]:
    """A memory of two tasks, and their test images as files."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        places = {
            "store": str(here / "memory"),
            "runs": str(here / "runs"),
            "engine.device": device,
        }
        config = resolve(preset=preset, overrides={**SMALL, **places}).config
        progress(f"{name}: two tasks are learned")
        images = learned(config)
        files = written(images, here / "images")
        predictor = Predictor.of(memtool.load(config.store), device=device)
        ways = {
            "predict": lambda: to_csv(predictor, files, here / "out.csv"),
            "read in turn": lambda: in_turn(predictor, files, here / "out.csv"),
            "bare loop": lambda: bare(predictor, images),
        }
        ways["predict"]()
        require_same(predictor, images, here / "out.csv")
        seconds = interleaved(ways, repeats)
    return case(
        f"{name}: {len(files)} files / bare loop",
        seconds,
        "predict",
        "bare loop",
        at_most=WANTED,
        images=len(files),
    )


def learned(config: Config) -> Pixels:
    """The test images (n, size, size, 3) of tasks that a new memory has learned."""
    method = open_method(config, seed=0)
    for task in TASKS:
        method.adapt(task)
        method.write()
        method.consolidate()
    return np.concatenate([method.workspace.task(task).test.images for task in TASKS])


def written(images: Pixels, folder: Path) -> list[Path]:
    """Pictures as PNG files."""
    folder.mkdir()
    files = [folder / f"{place:03}.png" for place in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return files


def to_csv(predictor: Predictor, files: Sequence[Path], out: Path) -> None:
    """What the verb does from the files to the file of rows."""
    with out.open("w", encoding="utf-8", newline="") as stream:
        write_cells(stream, picture_header(1))
        for told in predicted(predictor, files):
            write_cells(stream, picture_cells(told, 1))


def in_turn(predictor: Predictor, files: Sequence[Path], out: Path) -> None:
    """The same, with nothing running beside the model."""
    with out.open("w", encoding="utf-8", newline="") as stream:
        for low in range(0, len(files), BATCH):
            some = files[low : low + BATCH]
            pixels = [predictor.pixels(file.read_bytes(), str(file)) for file in some]
            for file, one in zip(some, predictor.predict(np.stack(pixels)), strict=True):
                write_cells(stream, [str(file), one.label, f"{one.probability}"])


@torch.inference_mode()
def bare(predictor: Predictor, images: Pixels) -> list[int]:
    """The model alone, over pictures that are in memory."""
    found: list[int] = []
    device = next(predictor.model.parameters()).device
    for low in range(0, len(images), BATCH):
        out = predictor.model(torch.from_numpy(images[low : low + BATCH]).to(device))
        found += out.logits.argmax(dim=1).tolist()
    return found


def require_same(predictor: Predictor, images: Pixels, out: Path) -> None:
    """Raise AssertionError where rows and loop do not agree: PNG loses nothing."""
    rows = out.read_text(encoding="utf-8").splitlines()[1:]
    said = [row.split(",")[1] for row in rows]
    if said != [predictor.classes[place] for place in bare(predictor, images)]:
        raise AssertionError("predict and the bare loop say different things")
