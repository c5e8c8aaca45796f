"""What a verb would do, for --dry-run: tasks, training, baselines and bytes; nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memtool.backbones.footprint import Footprint, footprint_of
from memtool.evaluation.selection import Cell
from memtool.experiments.baselines import chosen_baselines
from memtool.experiments.orders import require_bounds
from memtool.experiments.run import FAILURES, holds_out_in_turn
from memtool.experiments.select import SHARE, cell_config, held_back
from memtool.heads.solve import SOLVED
from memtool.methods import open_method
from memtool.methods.baselines import joint_rank, passes
from memtool.methods.moram.state import gate_of
from memtool.methods.pieces import rows_bytes
from memtool.sections import MoramSettings
from memtool.settings import Config, HeadSettings
from memtool.streams import create_stream
from memtool.workspace import Workspace
from memtool_stores.cost import state_bytes


def plan_of_selection(
    config: Config, cells: Sequence[Cell], *, seed: int, baselines: int
) -> dict[str, Any]:
    """What `--select` adds to a plan: the cells and how much is trained at most.

    A training is that of a memory or of a baseline; steps are those of the memories, and a baseline
    takes about as many as one. `failed` says of which cells it is clear now that a memory cannot
    have them, and why. Raises the error of the first where it is all of them.
    """
    steps, failed = list[int](), dict[str, str]()
    for cell in cells:
        try:
            with held_back(config):
                found = plan(cell_config(config, cell, seed), seed=seed, verb="run")
        except FAILURES as error:
            failed[cell.text] = error.message
            steps.append(0)
            if len(failed) == len(cells):
                raise
        else:
            steps.append(sum(found["steps"]))
    reported = len(config.seed)
    return {
        "seed": seed,
        "validation": config.stream.validation or SHARE,
        "cells": [cell.text for cell in cells],
        "steps": steps,
        "failed": failed,
        "trainings_to_choose": len(cells) * (1 + baselines),
        "trainings_at_most": len(cells) * (1 + baselines) + reported * (1 + len(cells) * baselines),
        "steps_at_most": (sum(steps) + reported * max(steps))
        + baselines * (sum(steps) + reported * sum(steps)),
    }


@dataclass(frozen=True)
class _Task:
    """What is known of a task before anything is learned; without `epochs` it is not learned."""

    name: str
    train: int
    test: int
    epochs: int


def plan(config: Config, *, seed: int, verb: str, task: str | None = None) -> dict[str, Any]:
    """The facts of a plan, ready for JSON.

    Lists have one entry a task, in the order of their `numbers`: of `task` alone where it names one
    that is to be learned. A domain that is held out is among them with no training samples; under
    setting dg it alone has test samples. Where every domain is held out in turn (`held_out` None),
    all have both, and there is a memory for each. `adapters_from` is the first block that has
    adapters, `joint_rank` that of joint training.
    `bytes_in_all` is of all memories of one seed. Of a language model only the configuration is
    read, and `memory` says in bytes where its memory goes with atoms; None without. `cost` is what
    a memory of mixtures adds, `head_bytes` what a random projection takes, solving included.
    `commit` says of every commit of a task about how many bytes of it are new, and how many are a
    state that does not grow with them: `write`, and `consolidate` where keys are solved or learned.
    `baseline_passes` are those of baselines that run an image more than once: in a step of
    training, and in a test after the last task. Raises what opening method, data and backbone does.
    """
    if verb == "run" and config.orders == "bounds":
        require_bounds(config)
    method = open_method(config, seed=seed)
    baselines = list(chosen_baselines(method)) if verb == "run" else None
    work, memory, cost = method.workspace, None, None
    if work.reads == "texts":
        atoms = method.kind == "atoms"
        found = _footprint(work, config.moram if atoms else MoramSettings())
        numbers = found.atoms // 4 // len(work.stream.tasks)
        memory, begin = _memory(config, found) if atoms else None, found.begin
        cost = method.cost(numbers=numbers, parameters=found.parameters, tokens=found.limits[0])
        tasks = [
            _Task(task.name, len(task.train), len(task.test), work.epochs(task))
            for task in work.stream.tasks
        ]
    else:
        method.require_able()
        tasks, numbers = _image_tasks(work), work.layout.numel
        begin = config.adapted_from(work.backbone.depth)
        cost = method.cost(numbers=numbers, parameters=0, tokens=0)
    numbered = list(enumerate(tasks, start=1))
    if task is not None:
        chosen = work.task(task).number
        numbered = [(number, one) for number, one in numbered if number == chosen]
        tasks = [one for _, one in numbered]
    in_turn = task is None and holds_out_in_turn(config)
    memories = len(tasks) if in_turn else 1
    learned = sum(task.epochs > 0 for task in tasks) - in_turn
    head = config.head if method.has_head else None
    return {
        "verb": verb,
        "method": config.method,
        "setting": config.stream.setting,
        "held_out": config.stream.held_out,
        "backbone": config.backbone.name,
        "device": str(work.engine.device),
        "precision": work.engine.precision,
        "head": head.kind if head else None,
        "head_bytes": _projection_bytes(work) if head else None,
        "head_scope": head.scope if head and _has_scope(head) else None,
        "numbers": [number for number, _ in numbered],
        "tasks": [task.name for task in tasks],
        "train_samples": [task.train for task in tasks],
        "test_samples": [task.test for task in tasks],
        "epochs": [task.epochs for task in tasks],
        "steps": [_steps(task, config) for task in tasks],
        "crop": config.stream.crop if work.reads == "images" else None,
        "batch_size": config.train.batch_size,
        "consolidation_epochs": method.key_epochs,
        "kind": method.kind,
        "adapters_per_task": config.adapter.per_task,
        "adapters_from": begin,
        "rank": config.adapter.rank,
        "joint_rank": joint_rank(work) if "joint" in (baselines or ()) else None,
        "parameters_per_adapter": numbers,
        "bytes_per_adapter": numbers * 4,
        "memories": memories,
        "bytes_in_all": numbers * 4 * config.adapter.per_task * learned * memories,
        "memory": memory,
        "cost": cost,
        "commit": _commits(work, verb, numbers * 4, cost, heads=method.has_head),
        "baselines": baselines,
        "baseline_passes": _passes(baselines or [], len(tasks)),
        "store": work.store_path,
        "store_exists": work.has_store,
        "runs": str(config.runs),
        "notes": list(work.stream.notes),
    }


def _commits(
    work: Workspace, verb: str, adapter: int, cost: Mapping[str, Any] | None, *, heads: bool
) -> dict[str, dict[str, int]]:
    """Bytes of the commits of a verb, by what is committed: `new_bytes` and `state_bytes`.

    Of adapters of so many bytes, some a task. Keys are those of all tasks, as when they are solved
    anew together.
    """
    config, view = work.config, work.store.view() if work.has_store else None
    count, images = config.adapter.per_task, work.reads == "images"
    classes = len(work.stream.class_names) if images else 0
    own_head = 4 * classes * (work.backbone.dim + 1) if images and heads else 0
    new = {"write": count * (adapter + own_head)}
    blobs = {"write": 1 + count}
    if cost is not None and "keys_bytes" in cost:
        moments = cost.get("queries_bytes", 0) // max(1, len(work.stream.tasks))
        features = 8 * (classes + work.backbone.dim) * work.backbone.dim if images else 0
        sums = cost.get("sums_bytes", 0)
        if config.head.scope == "task":
            own_head = rows_bytes(len(work.stream.tasks) * own_head)
        elif config.head.kind in SOLVED:
            sums += features
        new["consolidate"] = cost["keys_bytes"] + moments + features + own_head + sums
        blobs["consolidate"] = 8
    wanted = [verb] if verb in ("write", "consolidate") else [*new] if verb == "run" else []
    return {
        name: {"new_bytes": new[name], "state_bytes": state_bytes(view, blobs[name])}
        for name in wanted
        if name in new
    }


def training_steps(work: Workspace) -> list[int]:
    """Steps that train the adapters of each task of a stream of images."""
    return [_steps(task, work.config) for task in _image_tasks(work)]


def _steps(task: _Task, config: Config) -> int:
    return task.epochs * math.ceil(task.train / config.train.batch_size)


def seconds_a_sample(config: Config) -> float:
    """What one image takes in a step of training: three passes, timed once here on eight images.

    Of texts 0: how long they are is not known before they are read.
    """
    work = Workspace(config, seed=config.seed[0])
    if work.reads == "texts":
        return 0.0
    images = np.zeros((8, work.backbone.image_size, work.backbone.image_size, 3), dtype=np.uint8)

    def timed() -> float:
        begin = time.perf_counter()
        work.engine.predict(
            lambda some: work.backbone.features(work.backbone.preprocess(some)), images
        )
        return time.perf_counter() - begin

    timed()  # the first pass also allocates
    return 3 * min(timed(), timed()) / len(images)


def _passes(baselines: Sequence[str], tasks: int) -> dict[str, dict[str, int]]:
    """Forward passes of the baselines that have more than one of an image."""
    each = {name: passes(name, tasks) for name in baselines}
    return {
        name: {"step": step, "test": test}
        for name, (step, test) in each.items()
        if (step, test) != (1, 1)
    }


def _footprint(work: Workspace, gate: MoramSettings) -> Footprint:
    """Where the memory goes with the atoms of all tasks, counted without weights.

    Under score norm task it is that of norm bank, which keeps as much.
    """
    config = work.config
    counted = gate.model_copy(update={"score_norm": "bank", "scaled_threshold": False})
    return footprint_of(
        config.backbone,
        rank=config.adapter.rank,
        tasks=len(work.stream.tasks),
        gate=gate_of(counted, config.adapter.rank),
        text=config.text,
        dtype=work.dtype,
        adapted_from=config.adapted_from,
    )


def _memory(config: Config, found: Footprint) -> dict[str, int]:
    """Bytes of the parts of a language model that learns atoms, at the limits of the texts."""
    tokens, answers = sum(found.limits), found.limits[1]
    samples = math.ceil(config.train.batch_size / config.engine.accumulate)
    asked = config.engine.eval_batch_size
    return {
        "weights_bytes": found.weights,
        "atoms_bytes": found.atoms,
        "learning_bytes": found.learning,
        "step_samples": samples,
        "step_tokens": tokens,
        "step_bytes": found.training(samples, tokens, answers),
        "generation_samples": asked,
        "generation_bytes": found.generation(asked, tokens),
    }


def _image_tasks(work: Workspace) -> list[_Task]:
    """The tasks of a stream of images, the one that is held out in its place."""
    stream, config = work.stream, work.config
    apart = stream.setting == "dg"
    found = {}
    for task in stream.tasks:
        test = len(task.test)
        if apart:
            test = 0
            if stream.held_out is None:  # its turn comes, and all of its images are for testing
                turn = config.stream.model_copy(update={"held_out": task.name})
                other = create_stream(turn, config.backbone.image_size).held_out
                test = len(other.test) if other is not None else 0
        epochs = config.train.epochs_for(len(task.train))
        found[task.number] = _Task(task.name, len(task.train), test, epochs)
    if stream.held_out is not None:
        held = stream.held_out
        found[held.number] = _Task(held.name, 0, len(held.test), 0)
    return [found[number] for number in sorted(found)]


def _projection_bytes(work: Workspace) -> int | None:
    """Bytes of the moments of a random projection, and of solving the head; None without one."""
    head = work.config.head
    return work.projection_bytes(head.width).total if head.kind == "rp-ridge" else None


def _has_scope(head: HeadSettings) -> bool:
    """Whether there is one head for all tasks or one a task: not where one learns on."""
    return head.kind not in ("shared", "prototype", "text")
