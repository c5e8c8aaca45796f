"""Records with invented numbers, for the tests of tables and reports."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from memtool.evaluation.inside import Cost, Curve, Example, Inside, Keys, Recalled, picture_text
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import (
    BackboneIdentity,
    DataIdentity,
    Environment,
    Kind,
    Metrics,
    Record,
    Row,
    Run,
    TaskIdentity,
)
from memtool.evaluation.right import Share

TASKS = ("upright", "inverted", "rotated", "noisy", "blurred")


def matrix(tasks: tuple[str, ...], level: float, loss: float, seed: int) -> AccuracyMatrix:
    """Accuracy `level` once learned, `loss` less for every later task, noise by seed."""
    noise = np.random.default_rng(seed)
    built = AccuracyMatrix.empty(tasks)
    for i in range(len(tasks) + 1):
        scores = [
            (level - loss * (i - j - 1) if j < i else 0.35 * level) + noise.uniform(-0.03, 0.03)
            for j in range(len(tasks))
        ]
        built = built.with_row(i, [min(max(score, 0.0), 1.0) for score in scores])
    return built


def only_last(whole: AccuracyMatrix) -> AccuracyMatrix:
    """The same without all rows but the last."""
    last = len(whole.tasks)
    return AccuracyMatrix.empty(whole.tasks).with_row(last, whole.values[last].tolist())


def record(seed: int = 0, tasks: tuple[str, ...] = TASKS, method_level: float = 0.93) -> Record:
    """One run of a memory beside four baselines and an upper bound."""
    rows: list[Row] = []
    kinds: list[tuple[str, str, Kind, float, float]] = [
        ("memory", "MIRA memory", "method", method_level, 0.01),
        ("frozen", "frozen backbone, ridge head", "baseline", 0.8, 0.0),
        ("lwf", "uniform mixture", "baseline", 0.86, 0.01),
        ("sequential", "one LoRA, sequential", "baseline", 0.92, 0.09),
        ("s-prompts", "routing by LDA", "baseline", 0.89, 0.005),
        ("oracle", "oracle adapter", "upper bound", 0.95, 0.0),
    ]
    for number, (id, label, kind, level, loss) in enumerate(kinds):
        whole = matrix(tasks, level, loss, 100 * seed + number)
        rows.append(
            Row.measured(
                id,
                label,
                kind,
                only_last(whole) if id == "oracle" else whole,
                more={"task_accuracy": 0.91 + 0.01 * seed}
                if id in ("memory", "s-prompts")
                else None,
                seconds=12.25 + number,
            )
        )
    return Record(
        run=Run(
            method="MIRA",
            setting="dil",
            preset="mira-dil",
            configuration={
                "store": "memory",
                "seed": [seed],
                "backbone": {"name": "nano", "image_size": 32, "targets": ["q", "v"]},
                "adapter": {"rank": 4, "alpha": 8.0, "per_task": 1, "warm_start": "previous"},
                "train": {"epochs": 8, "batch_size": 50, "lr": 0.01, "augment": "none"},
                "memory": {"separation": "affine", "mix": "delta", "query_norm": True},
                "engine": {"device": "cpu", "threads": None},
            },
            command="memtool run --preset mira-dil --seed 0 1 2",
            mix="delta",
            separation="affine",
            backbone=BackboneIdentity(name="nano", sha256="5f" * 32),
            data=DataIdentity(name="digits", fingerprint="a7" * 32),
            tasks=tuple(
                TaskIdentity(name=name, domain=name, classes=("0", "1", "2"), test_samples=360)
                for name in tasks
            ),
            class_order=("0", "1", "2"),
            seed=seed,
            store="memory",
            store_version="V1CSJ2R4M7K8Y3Q5B0DG",
            created=datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
        ),
        metrics=Metrics(rows=tuple(rows)),
        environment=Environment(
            device="cpu (AMD EPYC, 2 threads, fp32)",
            python="3.11.2",
            platform="Linux-6.1-x86_64",
            packages={"memtool": "0.1.0", "torch": "2.15.0", "timm": "1.0.15"},
            wall_seconds=81.5,
            peak_memory_bytes=734_003_200,
        ),
    )


def without_negative(whole: Record, loss: float = 0.02) -> Record:
    """The record with the row of negative coefficients at zero, and the drift of the memory's."""
    names = whole.run.task_names
    memory = whole.row("memory")
    scores = [None if x is None else max(x - loss, 0.0) for x in memory.accuracy[-1]]
    matrix = AccuracyMatrix.empty(names).with_row(len(names), scores)
    zero = Row.measured("memory-nonnegative", "negative at zero", "baseline", matrix)
    drift = {"coefficient_drift": 0.0123 + 0.001 * whole.run.seed, "new_coefficients": 0.2}
    drifted = memory.model_copy(update={"metrics": {**memory.metrics, **drift}})
    rows = tuple(drifted if row.id == "memory" else row for row in whole.metrics.rows)
    return whole.model_copy(update={"metrics": Metrics(rows=(*rows, zero))})


def held_out_record(seed: int = 0) -> Record:
    """Domain generalisation: every row has only the held-out accuracy of each domain."""
    whole = record(seed)
    rows = []
    for row in whole.metrics.rows:
        last = only_last(row.matrix(TASKS))
        heldout = float(last.values[-1].mean())
        rows.append(Row.measured(row.id, row.label, row.kind, last, more={"dg.heldout": heldout}))
    return whole.model_copy(
        update={
            "run": whole.run.model_copy(update={"setting": "dg"}),
            "metrics": Metrics(rows=tuple(rows)),
        }
    )


def of_flags(rows: dict[str, Sequence[Sequence[int]]], seed: int = 0) -> Record:
    """A record of rows with flags for each of two tasks."""
    whole = record(seed, tasks=("a", "b"))
    made = []
    for id, flags in rows.items():
        matrix = AccuracyMatrix.empty(["a", "b"]).with_row(2, [Share(task) for task in flags])
        kind: Kind = "method" if id == "memory" else "baseline"
        made.append(Row.measured(id, id, kind, matrix))
    return whole.model_copy(update={"metrics": Metrics(rows=tuple(made))})


def inside(tasks: tuple[str, ...] = TASKS) -> Inside:
    """What a memory of four blocks shows of itself: nearly its own adapter for every task."""
    noise = np.random.default_rng(0)
    count = len(tasks)
    weights = [
        np.eye(count)[place] + noise.normal(0, 0.1, (40, 4, count)) for place in range(count)
    ]
    adapters = [f"task-{place + 1}-seed-0" for place in range(count)]
    image = picture_text(noise.integers(0, 255, (96, 96, 3)).astype(np.uint8))
    return Inside(
        recalled=Recalled.of(weights, tasks, adapters, blocks=(0, 1, 2, 3)),
        keys=Keys.of(noise.normal(size=(4, count, 16)), adapters),
        curves=(
            Curve(of="adapters", name="task-1-seed-0", loss=(1.2, 0.4, 0.2)),
            Curve(of="keys", name="after 1 tasks", loss=(0.9, 0.3)),
        ),
        examples=(
            Example(
                task=tasks[0],
                image=image,
                label="0",
                said="1",
                probability=0.61,
                weights=((adapters[0], 0.9), (adapters[-1], -0.2)),
            ),
            Example(task=tasks[-1], text="Who <b>wrote</b> it?", label="nobody"),
        ),
        costs=(
            Cost(label="adapt", seconds=41.25, parameters=294_912, bytes=1_200_000),
            Cost(label="retrieve, one image", seconds=0.0241),
        ),
    )


def shown_record(seed: int = 0) -> Record:
    """A record that holds all that a report can show: flags, classes, costs, replay, inside."""
    noise = np.random.default_rng(seed)
    whole = record(seed)
    labels = [noise.integers(0, 3, 60) for _ in TASKS]
    kinds: list[tuple[str, str, Kind, float]] = [
        ("memory", "memory", "method", 0.93),
        ("uniform", "uniform mixture", "baseline", 0.7),
        ("sequential", "sequential LoRA", "baseline", 0.5),
        ("er", "ER (replays 200 samples)", "baseline", 0.99),
        ("joint", "joint LoRA", "upper bound", 0.6),
    ]
    rows = []
    for id, words, kind, level in kinds:
        built = matrix(TASKS, level, 0.01, seed)
        scores = []
        for own in labels:
            right = noise.random(60) < level
            scores.append(Share.of_classes(np.where(right, own, (own + 1) % 3), own))
        built = built.with_row(len(TASKS), scores)
        rows.append(
            Row.measured(
                id,
                words,
                kind,
                built,
                seconds=3.5,
                replay=id == "er",
                reading=id == "uniform",
                parameters=1000,
                bytes=4000,
                ms_per_input=1.25,
            )
        )
    return whole.model_copy(update={"metrics": Metrics(rows=tuple(rows)), "inside": inside()})


def text_record() -> Record:
    """A run on texts of which only losses were measured."""
    whole, tasks = record(tasks=("poems", "sums")), ("poems", "sums")
    rows = []
    for id, kind, level in (("memory", "method", 0.4), ("sequential", "baseline", 0.9)):
        losses = ((2.0, 2.1), (level, 2.2), (level + 0.1, level))
        empty = AccuracyMatrix.empty(tasks)
        row = Row.measured(id, id, kind, empty, more={"loss.final": level + 0.05})
        rows.append(row.model_copy(update={"loss": losses}))
    run = whole.run.model_copy(update={"setting": "trace", "class_order": ()})
    return whole.model_copy(update={"run": run, "metrics": Metrics(rows=tuple(rows))})
