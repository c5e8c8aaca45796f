"""A whole experiment on a stream of texts: MoRAM's memory, the baselines beside it, and the record.

All state is on disk: committed versions, scores of each version, finished baselines. A run that was
killed goes on at the first of them that is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pydantic import TypeAdapter

from memtool import __version__
from memtool.config import Config
from memtool.errors import ConfigError
from memtool.evaluation.record import Environment, Metrics, Record, Row
from memtool.methods.baselines.text import TEXT_BASELINES
from memtool.methods.kept import fingerprint_of, kept
from memtool.methods.text import TextWorkspace
from memtool.methods.text_memory import TextMoram
from memtool.progress import Progress
from memtool.reports.html import Cost

_ROW = TypeAdapter(Row)


def run_texts(
    config: Config,
    seed: int,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
    baselines: bool = True,
    command: str | None = None,
    preset: str | None = None,
) -> tuple[Record, list[Cost]]:
    """Learn all tasks in order into one memory, and measure it and the baselines.

    What was written before is not trained again, nor are finished adapters unless `fresh`. Raises
    ConfigError for another method than moram, and for a memory of other settings or seed.
    """
    begin = time.perf_counter()
    method = TextMoram.open(config, seed=seed, progress=progress)
    work = method.workspace
    _require_same_seed(work)
    work.require_fitting(work.stream.tasks)
    for task in work.stream.tasks:
        method.learn(task, fresh=fresh)
    record = method.evaluate(history=True, command=command, preset=preset)
    rows = list(record.metrics.rows)
    learned = work.store.view().atom_records
    spent = sum((r.meta.get("provenance") or {}).get("seconds", 0.0) for r in learned)
    rows[0] = rows[0].model_copy(update={"seconds": spent})
    if baselines:
        wanted = config.baselines
        for name, measure in TEXT_BASELINES.items():
            if "all" in wanted or name in wanted:
                rows.append(_baseline(work, name, measure))
    record = record.model_copy(
        update={
            "metrics": Metrics(rows=tuple(rows)),
            "environment": Environment.here(str(work.engine.device), time.perf_counter() - begin),
        }
    )
    numbers = work.layout.numel * len(learned)
    costs = [
        Cost("adapt: atoms of all tasks", seconds=spent, parameters=numbers, bytes=4 * numbers)
    ]
    return record, costs


def _require_same_seed(work: TextWorkspace) -> None:
    if not work.has_store:
        return
    for record in work.store.view().atom_records:
        if record.meta.get("seed") not in (None, work.seed):
            raise ConfigError(
                f"the memory {work.store_path!r} holds atoms of seed {record.meta['seed']}",
                expected=f"seed {work.seed}, or an empty memory",
                remedy="another --store and --set runs=DIR, or --fresh to begin this one anew",
            )


def _baseline(work: TextWorkspace, name: str, measure: Callable[[TextWorkspace], Row]) -> Row:
    """The row of a baseline: from its file when an earlier run finished it, else measured."""
    decides = [
        __version__,
        work.config.model_dump(mode="json", include={"adapter", "train", "text"}),
        work.config.backbone.targets,
        work.stream.fingerprint,
        work.backbone.sha256,
        work.seed,
        work.engine.precision,
        str(work.engine.device),
        work.config.past.energy if name == "inf-lora" else None,
    ]
    file = work.config.runs / "baselines" / f"{name}-{fingerprint_of(decides)[:16]}.json"
    return kept(file, _ROW, work.engine, lambda: measure(work))
