"""What the commands share that make a model from nothing: options, progress and report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtool.errors import AlreadyExistsError, MemtoolError
from memtool.progress import ProgressEvent
from memtool.settings import StreamSettings


@dataclass(frozen=True)
class Pretrained:
    """What was made: accuracies on held-out images by data set, and the chance to be right."""

    path: Path
    sha256: str
    parameters: int
    steps: int
    seconds: float
    loss: float
    accuracy: dict[str, float]
    chance: float


def require_free(out: Path) -> None:
    """Raise AlreadyExistsError for a file that is there."""
    if out.exists():
        raise AlreadyExistsError(
            f"{out} is already there", remedy="name another file, or remove it"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of every model that is made from nothing."""
    parser.add_argument("--source", required=True, help="a chain or another data set")
    parser.add_argument("--order", help="only these data sets of the chain: a,b,c")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")


def stream_of(given: argparse.Namespace) -> StreamSettings:
    """The data sets that the options name, their classes side by side."""
    order = tuple(given.order.split(",")) if given.order else None
    return StreamSettings(source=given.source, setting="xtail", order=order, seed=given.seed)


def how_of(given: argparse.Namespace) -> dict[str, Any]:
    """How long, with what, and how it is told: keyword arguments of what makes a model."""
    names = ("steps", "batch_size", "lr", "seed", "threads")
    return {**{name: getattr(given, name) for name in names}, "progress": told}


def told(event: ProgressEvent) -> None:
    """Every hundredth step on stderr."""
    if event.step % 100 == 0 or event.step == event.total:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in event.metrics.items())
        sys.stderr.write(f"{event.stage}: {event.step}/{event.total} {numbers}\n")


def report(make: Callable[[], Pretrained]) -> int:
    """Print what was made as JSON, or on stderr what went wrong and what to do; the exit status."""
    try:
        made = make()
    except MemtoolError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    sys.stdout.write(json.dumps({**made.__dict__, "path": str(made.path)}, indent=2) + "\n")
    return 0
