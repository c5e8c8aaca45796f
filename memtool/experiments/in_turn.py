"""One record of many: every domain of a stream held out in turn, each with a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Record, Row, TaskIdentity
from memtool.streams.task import Task


def held_out(record: Record, task: Task) -> TaskIdentity:
    """The domain that the memory of a record never learned; of dg it is its only task."""
    if record.run.setting == "dg":
        return record.run.tasks[0]
    right = record.metrics.rows[0].unseen_right
    classes = tuple(record.run.class_order[one] for one in task.classes)
    samples = None if right is None else right.samples
    return TaskIdentity(name=task.name, domain=task.domain, classes=classes, test_samples=samples)


def over_domains(found: Sequence[Sequence[Row]], domains: Sequence[str]) -> list[Row]:
    """Every row with its score on each held-out domain, from the rows of each domain."""
    rows = []
    for model_row in found[0]:
        parts = [row for one in found for row in one if row.id == model_row.id]
        if len(parts) != len(domains):
            continue
        in_turn = any(row.unseen for row in parts)
        last = [[row.last_unseen] if in_turn else row.last for row in parts]
        scores = [score for each in last for score in each if score is not None]
        if len(scores) != len(domains):
            continue
        matrix = AccuracyMatrix.empty(domains).with_row(len(domains), scores)
        known = [row.metrics.get("dg.validation") for row in parts]
        validation = [value for value in known if value is not None]
        more = {}
        if len(validation) == len(domains):
            more["dg.validation"] = sum(validation) / len(validation)
        if in_turn:
            more |= _after_all(parts)
        else:
            more["dg.heldout"] = sum(scores) / len(scores)
        seconds = [row.seconds for row in parts if row.seconds is not None]
        rows.append(
            Row.measured(
                model_row.id,
                model_row.label,
                model_row.kind,
                matrix,
                more=more,
                seconds=sum(seconds) if len(seconds) == len(domains) else None,
                replay=model_row.replay,
                reading=model_row.reading,
                unseen=_curve(parts),
            )
        )
    return rows


def _curve(parts: Sequence[Row]) -> tuple[float | None, ...]:
    """The mean over the held-out domains of what is unseen, before any task and after each."""
    each = zip(*(row.unseen for row in parts), strict=True)
    return tuple(
        None if None in scores else sum(score or 0.0 for score in scores) / len(parts)
        for scores in each
    )


_OF_SEEN = ("forgetting.max", "forgetting.first", "forgetting.step", "bwt.gem")


def _after_all(parts: Sequence[Row]) -> dict[str, float]:
    """Means over the held-out domains of what each memory is worth on it and on what it learned."""
    found = {"dgcl.seen": [row.metrics.get("faa") for row in parts]}
    for id in ("dgcl.heldout", "dgcl.average", *_OF_SEEN):
        found[id] = [row.metrics.get(id) for row in parts]
    return {
        id: sum(known) / len(parts)
        for id, values in found.items()
        if len(known := [value for value in values if value is not None]) == len(parts)
    }
