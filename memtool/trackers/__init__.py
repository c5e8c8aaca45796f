"""Where the curves of a run go while it runs: CSV, TensorBoard, Trackio, Weights & Biases, MLflow.

    with following(("csv", "mlflow"), card) as send:
        send({"loss/task 1": 0.7}, step=10, axis="step")

Every service gets the same names, numbers and settings. Each has a thread of its own: a run never
waits for one, and goes on without one that fails, which is said once (`memtool.trackers.sending`).
A service is a class with `begin`, `log` and `end`; its package is imported when it is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from memtool.errors import ConfigError, did_you_mean

Axis = Literal["step", "tasks"]
"""What a curve runs over: steps of one training, or the number of tasks learned."""


@dataclass(frozen=True)
class Card:
    """What a service is told of a run.

    name: names files, too; group: the experiment that the run is a part of; settings: by dotted
    key, as records hold them; folder: of this run alone; shared: of all runs of the experiment;
    anew: what an earlier run of the same name left is not gone on with.
    """

    name: str
    group: str
    settings: Mapping[str, Any]
    folder: Path
    shared: Path
    note: str | None = None
    tags: tuple[str, ...] = ()
    anew: bool = False


class Points(NamedTuple):
    """Numbers by the names of their curves, at one place of an axis.

    time: seconds since 1970 at which they were measured.
    """

    values: Mapping[str, float]
    step: int
    axis: Axis
    time: float


class Tracker(Protocol):
    """One service; whatever it raises ends its part and not the run."""

    def begin(self, card: Card) -> str:
        """Open it for a run; returns how to look at it, as a command or the path of a file."""

    def log(self, points: Iterable[Points]) -> None:
        """Take what was measured since the last call, in order."""

    def end(self, *, failed: bool) -> None:
        """Everything was said; `failed` where the run ended with an error."""


class Service(NamedTuple):
    """Where a tracker is, the package that it needs, and the extra that installs that."""

    place: str
    package: str | None = None
    extra: str | None = None


SERVICES: Mapping[str, Service] = {
    "csv": Service("memtool.trackers.csv_file:CsvFile"),
    "tensorboard": Service(
        "memtool.trackers.tensorboard:TensorBoard", "tensorboard", "tensorboard"
    ),
    "trackio": Service("memtool.trackers.trackio:Trackio", "trackio", "trackio"),
    "wandb": Service("memtool.trackers.wandb:Wandb", "wandb", "wandb"),
    "mlflow": Service("memtool.trackers.mlflow:Mlflow", "mlflow", "mlflow"),
}
"""Every service by its name."""


def require_services(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, when there are such services and their packages are installed.

    Raises ConfigError.
    """
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in SERVICES:
            raise ConfigError(f"--log {name}", expected=did_you_mean(name, SERVICES))
        service = SERVICES[name]
        if service.package is not None and find_spec(service.package) is None:
            raise ConfigError(
                f"--log {name} needs the package {service.package}",
                remedy=f"pip install 'memtool[{service.extra}]'",
            )
    return found


def open_tracker(name: str) -> Tracker:
    """The service of a name; its package is imported. ConfigError as `require_services`."""
    (name,) = require_services((name,))
    place, _, attribute = SERVICES[name].place.partition(":")
    tracker: Tracker = getattr(import_module(place), attribute)()
    return tracker
