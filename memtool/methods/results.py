"""What the steps of a method return: typed records that the command line prints as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Result(BaseModel):
    """Frozen; `schema` and `schema_version` say how to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: int = 1


class AdaptResult(Result):
    """One trained adapter, written as a PEFT directory."""

    schema_: Literal["memtool.adapt"] = Field("memtool.adapt", alias="schema")
    path: Path
    name: str
    task: int
    task_name: str
    seed: int
    train_accuracy: float
    loss: float
    seconds: float
    parameters: int
    bytes: int
    resumed: bool = False
    skipped: bool = False


class WrittenAdapter(BaseModel):
    """Name and id of an adapter now in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    id: str


class WriteResult(Result):
    """What `write` added; `skipped` names the adapters that were in memory already."""

    schema_: Literal["memtool.write"] = Field("memtool.write", alias="schema")
    version: str
    added: tuple[WrittenAdapter, ...]
    skipped: tuple[str, ...] = ()


class ConsolidateResult(Result):
    """What consolidation learned.

    `train_accuracy` is on the training images of the last task, recalled without its label;
    `key_drift_degrees` is the mean angle by which the keys of older adapters turned.
    """

    schema_: Literal["memtool.consolidate"] = Field("memtool.consolidate", alias="schema")
    version: str
    tasks: tuple[int, ...]
    separation: str
    mix: str
    epochs: int
    seconds: float
    train_accuracy: float
    key_drift_degrees: float
    unchanged: bool = False


class AdapterCoefficient(BaseModel):
    """The mean coefficient of an adapter over the samples and the blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    task: int
    coefficient: float


class Prediction(BaseModel):
    """The most probable class of one image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    probability: float


class RetrieveResult(Result):
    """The mixture that a task's test images, an image or a query recall.

    `blocks[l]` are the coefficients at memory l, averaged over the samples, adapters in the order
    of `adapters`; `block_numbers` says at which block each memory looks.
    """

    schema_: Literal["memtool.retrieve"] = Field("memtool.retrieve", alias="schema")
    version: str
    subject: str
    samples: int
    mix: str
    separation: str
    adapters: tuple[AdapterCoefficient, ...]
    blocks: tuple[tuple[float, ...], ...]
    block_numbers: tuple[int, ...]
    prediction: Prediction | None = None
    accuracy: float | None = None
    out: Path | None = None
