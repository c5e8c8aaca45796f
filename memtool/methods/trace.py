"""A whole experiment on a stream of texts: MoRAM's memory, the baselines beside it, and the record.

All state is on disk: committed versions, scores of each version, finished baselines. A run that was
killed goes on at the first of them that is not there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import ValidationError

from memtool import __version__
from memtool.atomic import write_atomic
from memtool.config import Config
from memtool.errors import ConfigError
from memtool.evaluation.record import (
    BackboneIdentity,
    DataIdentity,
    Environment,
    Metrics,
    Record,
    Row,
    Run,
    TaskIdentity,
)
from memtool.methods.baselines.text import TEXT_BASELINES
from memtool.methods.text import AtomLearner, TextWorkspace, in_turn
from memtool.progress import Progress
from memtool.reports.html import Cost


def run_texts(
    config: Config,
    seed: int,
    *,
    progress: Progress | None = None,
    baselines: bool = True,
    command: str | None = None,
    preset: str | None = None,
) -> tuple[Record, list[Cost]]:
    """Learn all tasks in order into one memory, then measure the baselines; nothing else is kept.

    Raises ConfigError for another method than moram, and for a memory of other settings or seed.
    """
    if config.method != "moram":
        raise ConfigError(
            f"method {config.method} on a stream of texts (setting trace)",
            expected="method moram",
            remedy="memtool run --preset moram-trace",
        )
    begin = time.perf_counter()
    work = TextWorkspace(config, seed=seed, progress=progress)
    _require_same_seed(work)
    rows = [in_turn(AtomLearner(work, len(work.stream.tasks)))]
    records = work.store.view().atom_records
    spent = sum((r.meta.get("provenance") or {}).get("seconds", 0.0) for r in records)
    rows[0] = rows[0].model_copy(update={"seconds": spent})
    if baselines:
        wanted = config.baselines
        for name, measure in TEXT_BASELINES.items():
            if "all" in wanted or name in wanted:
                rows.append(_baseline(work, name, measure))
    run = Run(
        method=config.method,
        setting=config.stream.setting,
        preset=preset,
        configuration=config.model_dump(mode="json"),
        command=command,
        backbone=BackboneIdentity(name=work.backbone.name, sha256=work.backbone.sha256),
        data=DataIdentity(name=work.stream.name, fingerprint=work.stream.fingerprint),
        tasks=tuple(
            TaskIdentity(name=task.name, test_samples=len(task.test)) for task in work.stream.tasks
        ),
        seed=seed,
        store=work.store_path,
        store_version=work.store.head(),
        created=datetime.now(UTC),
    )
    numbers = work.layout.numel * len(records)
    costs = [
        Cost("adapt: atoms of all tasks", seconds=spent, parameters=numbers, bytes=4 * numbers)
    ]
    environment = Environment.here(str(work.engine.device), time.perf_counter() - begin)
    return Record(run=run, metrics=Metrics(rows=tuple(rows)), environment=environment), costs


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
    ]
    text = json.dumps(decides, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = work.config.runs / "baselines" / f"{name}-{fingerprint}.json"
    if file.is_file():
        try:
            return Row.model_validate_json(file.read_bytes())
        except ValidationError:
            file.unlink()  # cut short by a full disk: measure again
    row = measure(work)
    content = row.model_dump_json(indent=2) + "\n"
    work.engine.on_main(lambda: write_atomic(file, content))
    return row
