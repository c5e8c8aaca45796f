"""Records with invented numbers, for the tests of tables and reports."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

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
        ("uniform", "uniform mixture", "baseline", 0.86, 0.01),
        ("sequential", "one LoRA, sequential", "baseline", 0.92, 0.09),
        ("routed", "routing by LDA", "baseline", 0.89, 0.005),
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
                more={"task_accuracy": 0.91 + 0.01 * seed} if id in ("memory", "routed") else None,
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
