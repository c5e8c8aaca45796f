"""How sure a memory is of images that were held back, measured for predictions that abstain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

import memtool_stores
from memtool.errors import ConfigError
from memtool.inference.predictor import Predictor
from memtool.memory import Memory
from memtool.methods.attached import AttachedImages
from memtool.methods.calibration import WRONG, Calibration, Threshold, calibration_of, digest_of
from memtool.methods.method import Method, require_unmoved
from memtool.methods.results import Result
from memtool.remembered import require_held_back
from memtool.streams.task import Task

BATCH = 64

TRAIN_ANEW = "train a new one with --set stream.validation=0.1 --set runs=DIR --store PATH"
"""What helps where a memory held no image back."""


class CalibrateResult(Result):
    """What a memory is on held-back images: all of them, and those that it answers.

    `wrong` is the share of images that may get a wrong label, `odds` how many times as probable as
    the next class the best one must be then, `coverage` the share of the images that it answers,
    `accuracy` the share of those that is right, None where there are none, and `accuracy_of_all`
    that of all images.
    """

    schema_: Literal["memtool.calibrate"] = Field("memtool.calibrate", alias="schema")
    version: str
    tasks: tuple[int, ...]
    images: int
    wrong: float
    odds: float
    coverage: float
    accuracy: float | None
    accuracy_of_all: float
    unchanged: bool = False


def calibrate(method: Method, *, wrong: float = WRONG) -> CalibrateResult:
    """Measure the newest version on the held-back images of its tasks; one version with that.

    `stream.validation` says how many of the training images were held back, as the memory was made
    with it. `wrong` is only for what is told: the memory keeps what it measured, and any share can
    be asked for later. Nothing is done where it was measured already.

    Raises ConfigError for a memory of texts, one that held nothing back or may have learned from
    what is held back now, and as `Calibration.threshold`; ChangedMeanwhileError where another
    process committed.
    """
    work = method.workspace
    if work.reads == "texts":
        raise ConfigError(
            "the answers of a language model have no probability that could be calibrated",
            expected="a memory of images",
        )
    view = work.store.view("HEAD")
    if not work.config.stream.validation:
        raise _nothing_held_back(view)
    require_held_back(work.store, work.config, view.version, asked="calibrate")
    numbers = method.known_tasks(view.version)
    found = calibration_of(view)
    if found is not None:
        return _result(view.version, numbers, found, found.threshold(wrong), unchanged=True)
    tasks = [work.task(str(number)) for number in numbers]
    if not any(len(task.validation) for task in tasks):
        raise _nothing_held_back(view)
    model = method.attach(view.version, precision=work.engine.precision)
    assert isinstance(model, AttachedImages)
    memory = Memory(work.store, view, work.config)
    found = _measured(method, Predictor(memory, model.to(work.engine.device)), tasks)
    threshold = found.threshold(wrong)
    told = {"images": len(found.sure), "coverage": threshold.coverage, "wrong": wrong}

    def commit(txn: memtool_stores.Transaction) -> None:
        require_unmoved(txn, view)
        found.put(txn)

    message = f"calibrate on {len(found.sure)} held-back images"
    metadata = {"verb": "calibrate", **told}
    work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
    return _result(work.store.head(), numbers, found, threshold)


def _measured(method: Method, predictor: Predictor, tasks: Sequence[Task]) -> Calibration:
    work = method.workspace
    names = work.stream.class_names
    sure: list[float] = []
    right: list[bool] = []
    for task in work.telling("calibrate", tasks):
        images, labels = task.validation.images, task.validation.labels.tolist()
        for low in range(0, len(labels), BATCH):
            batch = predictor.predict(np.array(images[low : low + BATCH]))
            sure += [one.sure for one in batch]
            said = zip(batch, labels[low : low + BATCH], strict=True)
            right += [one.label == names[label] for one, label in said]
    return Calibration(
        measured=digest_of(predictor.memory.view), sure=tuple(sure), right=tuple(right)
    )


def _result(
    version: str,
    tasks: Sequence[int],
    found: Calibration,
    threshold: Threshold,
    *,
    unchanged: bool = False,
) -> CalibrateResult:
    return CalibrateResult(
        version=version,
        tasks=tuple(tasks),
        images=threshold.images,
        wrong=threshold.wrong,
        odds=threshold.odds,
        coverage=threshold.coverage,
        accuracy=threshold.accuracy,
        accuracy_of_all=sum(found.right) / len(found.right),
        unchanged=unchanged,
    )


def _nothing_held_back(view: memtool_stores.MemoryView) -> ConfigError:
    return ConfigError(
        f"the memory at version {view.version} learned from all its training images "
        "(stream.validation 0): it was never seen on others",
        expected="a memory that held some of them back",
        remedy=TRAIN_ANEW,
    )
