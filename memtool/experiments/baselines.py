"""Which baselines a run measures beside the memory, and their rows, kept when they are finished."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

from memtool import __version__
from memtool.config import with_values
from memtool.errors import ConfigError
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row
from memtool.evaluation.selection import Selection
from memtool.learning.known import is_fixed, learned_under
from memtool.methods import open_method
from memtool.methods.baselines import (
    DG_BASELINES,
    FIRST_SESSION,
    MTL_BASELINES,
    REVISIONS,
    RIVALS,
    HeldOut,
    at_once_baseline,
    baseline,
    baselines_of,
    held_out_baseline,
    require,
    source_of,
)
from memtool.methods.kept import fingerprint_of, kept
from memtool.methods.method import Method
from memtool.progress import Progress
from memtool.registry import SHIPPED
from memtool.settings import Config
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace

_ROWS: TypeAdapter[list[Row]] = TypeAdapter(
    # A baseline of texts, which has one row, was once kept as that row.
    Annotated[list[Row], BeforeValidator(lambda kept: kept if isinstance(kept, list) else [kept])]
)


def chosen_baselines(method: Method) -> tuple[str, ...]:
    """The baselines that `run` measures: those of the known that are wanted.

    `all` are those without the rivals, which are named. Raises ConfigError for a rival that the
    setting, the head or the backbone does not have.
    """
    wanted, known = method.config.baselines, known_baselines(method)
    for name in wanted:
        require(name, method.workspace)
    absent = [name for name in wanted if name in RIVALS and name not in known]
    if absent:
        raise ConfigError(
            f"no baseline {absent[0]} {where_known(method)}",
            expected=f"one of {', '.join(known)}" if known else "--baselines none",
            remedy=f"leave {absent[0]} out of --baselines",
        )
    if not known:
        return ()
    others = [name for name in wanted if name not in ("all", "none", *SHIPPED["baselines"])]
    every = [name for name in known if name not in RIVALS] if "all" in wanted else []
    return (*(name for name in known if name in (*every, *wanted)), *others)


def where_known(method: Method) -> str:
    """What decides which baselines there are, as it is here."""
    config = method.config
    if method.workspace.reads == "images" and is_fixed(config):
        return f"under head.kind {config.head.kind}, which knows all classes in advance"
    return f"under stream.setting {config.stream.setting}"


def known_baselines(method: Method) -> tuple[str, ...]:
    """The baselines that the setting and the head have.

    None where the task is known (til) or predicted apart (mts): `evaluate` compares what there is
    to compare.
    """
    config, reads = method.config, method.workspace.reads
    if config.stream.setting in ("til", "mts"):
        return ()
    if config.stream.setting == "dg":
        return tuple(DG_BASELINES)
    if config.stream.setting == "mtl":
        fixed = reads == "images" and is_fixed(config)
        return tuple(name for name in MTL_BASELINES if not (fixed and name == "frozen"))
    known = baselines_of(reads, fixed_head=reads == "images" and is_fixed(config))
    of_domains = config.stream.setting in ("dil", "dgcl")
    return tuple(name for name in known if name != "s-prompts" or of_domains)


def baseline_rows(
    method: Method,
    name: str,
    tasks: Sequence[Task],
    selection: Selection | None = None,
    progress: Progress | None = None,
) -> Sequence[Row]:
    """The rows of a baseline, each under the settings that were chosen for it where some were."""
    cells = {} if selection is None else selection.rows_of(name)
    if not cells:
        return _baseline(method, name, tasks)
    found: dict[str, Row] = {}
    for text, values in {cell.text: cell.values for cell in cells.values()}.items():
        config = with_values(method.config, values, "what was selected")
        other = open_method(config, seed=method.seed, progress=progress)
        rows = _baseline(other, name, list(other.workspace.stream.tasks))
        found |= {row.id: row for row in rows if row.id in cells and cells[row.id].text == text}
    return [found[id] for id in cells if id in found]


def _baseline(method: Method, name: str, tasks: Sequence[Task]) -> list[Row]:
    """The rows of a baseline: from its file when an earlier run finished it, else measured."""
    work, config = _with_the_whole_budget(method), method.config

    def measure() -> list[Row]:
        held_out = work.stream.held_out
        if held_out is not None and work.unseen is None:
            return _on_held_out(held_out, held_out_baseline(name), work, tasks)
        if config.stream.setting == "mtl":
            return at_once_baseline(name)(work, tasks)
        return baseline(name)(work, tasks)

    file = kept_file(work, name)
    stage = f"baseline: {name}"
    work.tell(stage, 0, 1)
    rows = kept(file, _ROWS, work.engine, measure)
    work.tell(stage, 1, 1)
    return rows


def kept_file(work: Workspace, name: str) -> Path:
    """Where the rows of a baseline lie once they are finished, by all that decides them."""
    decides = _decides_of_texts(work) if work.reads == "texts" else _decides_of_images(work)
    decides += _decides_alone(work.config, name)
    if (source := source_of(name)) is not None:
        decides.append(source)
    if (revision := REVISIONS.get(name, 1)) != 1:  # what was kept before there were any is found
        decides.append({"revision": revision})
    word = re.sub(r"[^\w.-]+", "-", name)  # a name as path/to/file.py:Class is no file name
    return work.config.runs / "baselines" / f"{word}-{fingerprint_of(decides)[:16]}.json"


BUFFERED = ("er", "der++")
"""Baselines that keep samples of earlier tasks: `replay.buffer` of them."""


def readers_of(key: str) -> tuple[str, ...]:
    """The baselines that alone read a setting; none of one that others read, too.

    The memory reads `head.width` where its own head is a random projection.
    """
    if key == "replay.buffer":
        return BUFFERED
    if key == "head.width" or key.startswith("first_session."):
        return FIRST_SESSION
    return ()


def _decides_alone(config: Config, name: str) -> list[object]:
    """Settings that decide what one baseline reaches, and no other."""
    if name == "inf-lora":
        return [config.past.decides()]
    if name in FIRST_SESSION:
        return [None, config.first_session.epochs, config.head.width]
    return [config.replay.buffer] if name in BUFFERED else [None]


_OF_IMAGES = ("adapter", "train", "head", "backbone")


def _decides_of(work: Workspace, part: str) -> Any:
    """What of a section decides what a baseline reaches."""
    return work.adapter_decides if part == "adapter" else getattr(work.config, part).decides()


def _decides_of_images(work: Workspace) -> list[object]:
    """All that decides what a baseline reaches on images."""
    return [
        __version__,
        {part: _decides_of(work, part) for part in _OF_IMAGES},
        work.stream.fingerprint,
        work.config.stream.held_out,
        work.backbone.sha256,
        work.seed,
        work.engine.precision,
        str(work.engine.device),
        learned_under(work.config, work.stream),
    ]


def _decides_of_texts(work: Workspace) -> list[object]:
    """All that decides what a baseline reaches on texts."""
    return [
        __version__,
        {part: _decides_of(work, part) for part in ("adapter", "train", "text")},
        work.config.backbone.targets,
        work.stream.fingerprint,
        work.backbone.sha256,
        work.seed,
        work.engine.precision,
        str(work.engine.device),
    ]


def _with_the_whole_budget(method: Method) -> Workspace:
    """The workspace with as many epochs of training as the memory has in both of its stages."""
    config, more = method.config, method.key_epochs or 0
    train = config.train.model_copy(update={"epochs": config.train.epochs + more})
    if train.steps and more:
        tasks = method.workspace.stream.tasks
        of_keys = more * math.ceil(sum(len(task.train) for task in tasks) / train.batch_size)
        steps = train.steps + math.ceil(of_keys / len(tasks))
        train = train.model_copy(update={"steps": steps})
    other = copy.copy(method.workspace)  # what is open already stays open
    other.config = config.model_copy(update={"train": train})
    return other


def _on_held_out(
    held_out: Task,
    baseline: Callable[[Workspace, Sequence[Task], Images], list[HeldOut]],
    work: Workspace,
    sources: Sequence[Task],
) -> list[Row]:
    """The rows of a baseline of domain generalisation."""
    rows = []
    for one in baseline(work, sources, held_out.test):
        matrix = AccuracyMatrix.empty([held_out.name]).with_row(1, [one.accuracy])
        more = {} if one.validation is None else {"dg.validation": one.validation}
        rows.append(
            Row.measured(one.id, one.label, one.kind, matrix, more=more, seconds=one.seconds)
        )
    return rows
