"""Whole experiments: every task of a stream, every seed, baselines and report; resumable.

All state is on disk (finished adapters, committed versions, finished baselines), so a run that was
killed goes on at the first step that is not there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import memtool_stores
from memtool.alone import alone
from memtool.config import resolve, with_values
from memtool.engine import Engine
from memtool.errors import CapacityError, ConfigError, DivergedError, MemtoolError
from memtool.evaluation.inside import Cost
from memtool.evaluation.record import (
    RECORD,
    Environment,
    Metrics,
    OrderBound,
    Record,
    Row,
    write_record,
)
from memtool.evaluation.selection import Selection
from memtool.evaluation.writers import write_avalanche, write_domainbed, write_results
from memtool.experiments.at_once import adapt_at_once, require_independent
from memtool.experiments.baselines import baseline_rows, chosen_baselines
from memtool.experiments.follow import Follow, Followed, Said, followed
from memtool.experiments.in_turn import held_out, over_domains
from memtool.experiments.orders import at_bounds, of_seed
from memtool.methods import open_method
from memtool.methods.method import Method
from memtool.paths import store_beside, without_home
from memtool.progress import Progress
from memtool.reports.html import write_report
from memtool.settings import AT_ONCE, HOLDS_OUT, Config
from memtool.streams.task import Task
from memtool.trackers import require_services
from memtool.workspace import Workspace
from memtool_stores.names import below, check_name

REPORT = "report.html"

FAILURES = (ConfigError, CapacityError, DivergedError)
"""What settings are to blame for: a value that a model does not have, no room, or divergence."""


def run(
    config: Config,
    *,
    progress: Progress | None = None,
    resume: bool = True,
    baselines: bool = True,
    command: str | None = None,
    preset: str | None = None,
    adapters: Path | None = None,
    selection: Selection | None = None,
    of: dict[str, str] | None = None,
    failed: dict[str, MemtoolError] | None = None,
    log: Sequence[str] = (),
    said: Said | None = None,
    bound: OrderBound | None = None,
    say: Callable[[str], None] | None = None,
    tables: bool = True,
    parallel_tasks: int = 1,
) -> list[Record]:
    """Learn all tasks in order, one memory a seed, then evaluate; one record a seed.

    With several seeds, seed s uses the store `<store>-seed-<s>`; adapters, records and baselines
    lie in `<runs>/seed-<s>`. Settings dg and dgcl hold every domain out in turn, each time with
    a memory `<store>-without-<domain>` of its own and results in `without-<domain>`. With
    `orders` bounds, all of it three times, in the folders `hardest`, `median` and `easiest`.
    `resume` False begins anew: the memory is rolled back to its first version (the old one stays
    as a backup branch) and adapters are trained again. `adapters` is the `runs` of another
    experiment, to go on from the adapters that it trained. With `selection` every row has the
    settings that were chosen for it. `of` is filled with the baseline that each row is of, `failed`
    with why a baseline of `FAILURES` has none; without it such an error is raised.
    `log` names services that follow the run (`memtool.trackers`; `say` is told where to look), and
    `said` is what whoever started it says of it. `bound` is recorded of a configuration whose order
    is at one. Without `tables` nothing is written beside the folders of the seeds. The adapters of
    `parallel_tasks` tasks are trained at once, in processes of their own or in one pass
    (`engine.tasks_at_once`), where a task needs none before it; what they come to is the same, bit
    for bit or up to rounding. Raises BusyError while another process
    runs the same seed in the same `runs`, ConfigError for a service that is not there, and for
    parallel tasks that need each other.
    """
    follow = Follow(require_services(log), said or Said(), config.runs, anew=not resume)
    if say is not None:
        follow = dataclasses.replace(follow, say=say)
    doing = _Doing(
        progress,
        resume,
        baselines,
        command,
        preset,
        selection,
        {} if of is None else of,
        failed,
        follow,
        bound,
        parallel_tasks,
    )
    if selection is not None:
        config = with_values(config, selection.memory.values, "what was selected")
    if config.orders == "bounds":
        records = []
        for place, one in at_bounds(config):
            order = OrderBound(name=place.name, similarity=place.similarity)
            changes = {
                "runs": config.runs / place.name,
                "store": store_beside(config.store, f"-{place.name}"),
            }
            there = one.model_copy(update=changes)
            records += _every_seed(there, dataclasses.replace(doing, bound=order), adapters)
    else:
        records = _every_seed(config, doing, adapters)
    if not tables:
        return records
    write_domainbed(records, config.runs / "results.jsonl")
    write_avalanche(records, config.runs / "results.csv")
    if len(records) > 1 or selection is not None:
        write_results(records, config.runs / "results.json")
    return records


def _every_seed(config: Config, doing: _Doing, adapters: Path | None) -> list[Record]:
    """One record a seed, each in a folder and with a memory of its own."""
    records = []
    for seed in config.seed:
        several = len(config.seed) > 1
        place = of_seed(config, seed).model_copy(
            update={
                "runs": folder_of(config, seed),
                "store": store_beside(config.store, f"-seed-{seed}") if several else config.store,
            }
        )
        every_domain = holds_out_in_turn(config)
        one = _each_domain_in_turn if every_domain else _one_memory
        shared = adapters / f"seed-{seed}" / "adapters" if adapters else None
        with ExitStack() as held:
            lock = place.runs / ".lock"
            where = f"running an experiment in {place.runs}"
            Engine(config.engine).on_main(partial(held.enter_context, alone(lock, where)))
            records.append(one(place, seed, doing, adapters=shared))
    return records


def folder_of(config: Config, seed: int) -> Path:
    """Where `run` puts the record, the report and the adapters of a seed."""
    return config.runs / f"seed-{seed}"


def folders_of(config: Config, seed: int) -> list[Path]:
    """As `folder_of`, one for each order."""
    if config.orders == "given":
        return [folder_of(config, seed)]
    names = ("hardest", "median", "easiest")
    return [config.runs / name / f"seed-{seed}" for name in names]


def demo(directory: Path, *, progress: Progress | None = None) -> tuple[Record, Path]:
    """The whole pipeline on the embedded backbone and data; the record and the report's path."""
    defaults = resolve(
        preset="digits-dil",
        overrides={
            "store": str(directory / "memory"),
            "runs": str(directory),
            "baselines": ("frozen", "sequential", "joint"),  # it is to end within a minute or so
        },
        ambient=False,
    )
    (record,) = run(defaults.config, progress=progress, command="memtool demo", preset="digits-dil")
    return record, directory / "seed-0" / REPORT


@dataclass(frozen=True)
class _Doing:
    """How an experiment is run: what all of its memories have in common."""

    progress: Progress | None
    resume: bool
    baselines: bool
    command: str | None
    preset: str | None
    selection: Selection | None
    of: dict[str, str]
    failed: dict[str, MemtoolError] | None
    follow: Follow
    bound: OrderBound | None
    parallel_tasks: int = 1


def _each_domain_in_turn(
    config: Config, seed: int, doing: _Doing, *, adapters: Path | None = None
) -> Record:
    """A memory for every domain that is held out; one record with a column a domain.

    The adapters of a domain are the same in all memories and trained once, unless their training
    starts from what a memory holds.
    """
    begin = time.perf_counter()
    whole = open_method(config, seed=seed, progress=doing.progress)
    # The folder and the memory of each are named after it.
    domains = [check_name(t.name, "a held-out domain") for t in whole.workspace.stream.tasks]
    require_independent(whole, doing.parallel_tasks)
    alone = whole.needs_before is None
    shared = (adapters or whole.workspace.adapter_folder) if alone else None
    if alone and (doing.parallel_tasks > 1 or not doing.resume):
        fresh = adapters is None and not doing.resume
        adapt_at_once(whole, whole.workspace.stream.tasks, doing.parallel_tasks, fresh=fresh)
    found = [_one_memory(_without(config, name), seed, doing, adapters=shared) for name in domains]
    record = found[-1].model_copy(
        update={
            "run": found[-1].run.model_copy(
                update={
                    "tasks": tuple(
                        held_out(one, task)
                        for one, task in zip(found, whole.workspace.stream.tasks, strict=True)
                    ),
                    "configuration": config.recorded(),
                    "store": without_home(config.store),
                }
            ),
            "metrics": Metrics(
                rows=tuple(over_domains([one.metrics.rows for one in found], domains))
            ),
            "environment": Environment.here(
                str(whole.workspace.engine.device),
                time.perf_counter() - begin,
                kernels={name for one in found for name in one.environment.kernels},
            ),
        }
    )

    def write() -> None:
        write_record(record, config.runs / RECORD)
        write_report(record, config.runs / REPORT)

    whole.workspace.engine.on_main(write)
    return record


def holds_out_in_turn(config: Config) -> bool:
    """Whether every domain is held out in turn, each with a memory of its own."""
    return config.stream.setting in HOLDS_OUT and config.stream.held_out is None


def _without(config: Config, name: str) -> Config:
    """The configuration of the memory that a domain is held out of."""
    return config.model_copy(
        update={
            "stream": config.stream.model_copy(update={"held_out": name}),
            "store": store_beside(config.store, f"-without-{name}"),
            "runs": below(config.runs, f"without-{name}"),
        }
    )


def _one_memory(
    config: Config, seed: int, doing: _Doing, *, adapters: Path | None = None
) -> Record:
    """Learn the tasks of one memory, then evaluate it beside the baselines.

    In order, one after another; or all at once, where the setting has no order. `adapters` is the
    folder of the trained adapters where several memories share them.
    """
    bound = None if doing.bound is None else doing.bound.name
    main = not doing.follow.services or Engine(config.engine).is_main
    with followed(doing.follow, config, seed, bound, doing.progress, main=main) as told:
        record = _learned_and_measured(config, seed, doing, told, adapters=adapters)
        told.measured(record)
    return record


def _learned_and_measured(
    config: Config, seed: int, doing: _Doing, told: Followed, *, adapters: Path | None
) -> Record:
    """As `_one_memory`, told to whoever follows."""
    begin = time.perf_counter()
    method = open_method(config, seed=seed, progress=told.progress, adapters=adapters)
    work = method.workspace
    method.require_able()
    require_independent(method, doing.parallel_tasks)
    work.require_fitting(work.stream.tasks)
    learned = list(work.stream.tasks)
    names = chosen_baselines(method) if doing.baselines else ()
    _learn(method, learned, doing, told, fresh=not doing.resume and adapters is None)
    start = time.perf_counter()
    record = method.evaluate(
        setting=config.stream.setting,
        history=True,
        # Texts are not answered once more for it.
        compare=work.reads == "images" or not config.text.generate,
        command=doing.command,
        preset=doing.preset,
    )
    evaluated = time.perf_counter() - start
    rows = list(record.metrics.rows)
    spent = _spent(work)
    rows[0] = rows[0].model_copy(update=_kept_by(method, spent))
    rows += _baselines(method, learned, doing, told.progress, names)
    if any(row.id == "zero-shot" for row in rows):  # which is the frozen model, of texts
        rows = [row for row in rows if row.id != "frozen" or work.reads == "images"]
    record = record.model_copy(
        update={
            "run": record.run.model_copy(
                update={
                    "selection": doing.selection,
                    "bound": doing.bound,
                    **doing.follow.said.of_record,
                }
            ),
            "metrics": Metrics(rows=tuple(rows)),
            "environment": Environment.here(
                str(work.engine.device),
                time.perf_counter() - begin,
                kernels=work.engine.kernels,
            ),
        }
    )
    held_out = work.stream.held_out
    inside = method.inside([*learned, *([] if held_out is None else [held_out])])
    costs = tuple(_costs(method, spent, evaluated))
    record = record.model_copy(update={"inside": inside.model_copy(update={"costs": costs})})

    def write() -> None:
        write_record(record, config.runs / RECORD)
        write_report(record, config.runs / REPORT)

    work.engine.on_main(write)
    return record


def _baselines(
    method: Method,
    tasks: Sequence[Task],
    doing: _Doing,
    progress: Progress | None,
    names: Sequence[str],
) -> list[Row]:
    """The rows of baselines; of one that fails there is none, where failures are noted."""
    rows: list[Row] = []
    for name in names:
        try:
            found = baseline_rows(method, name, tasks, doing.selection, progress)
        except FAILURES as error:
            if doing.failed is None:
                raise
            doing.failed[name] = error
            continue
        doing.of.update({row.id: name for row in found})
        rows += found
    return rows


def baselines_alone(
    config: Config,
    *,
    of: dict[str, str],
    failed: dict[str, MemtoolError],
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of the baselines of one seed, as `run` measures them beside a memory, without one.

    `of` and `failed` are filled as by `run`.
    """
    (seed,) = config.seed
    place = of_seed(config, seed).model_copy(update={"runs": folder_of(config, seed)})
    doing = _Doing(
        None, True, True, None, None, None, of, failed, Follow((), Said(), place.runs), None
    )

    def rows(one: Config) -> list[Row]:
        method = open_method(one, seed=seed, progress=progress)
        tasks = list(method.workspace.stream.tasks)
        method.workspace.require_fitting(tasks)
        return _baselines(method, tasks, doing, progress, chosen_baselines(method))

    if not holds_out_in_turn(config):
        return rows(place)
    whole = open_method(place, seed=seed, progress=progress)
    domains = [check_name(t.name, "a held-out domain") for t in whole.workspace.stream.tasks]
    found = [rows(_without(place, name)) for name in domains]
    return over_domains(found, domains)


def _learn(
    method: Method, tasks: Sequence[Task], doing: _Doing, told: Followed, *, fresh: bool
) -> None:
    """Learn tasks into the memory, one after another; or at once, where they have no order.

    `fresh` trains adapters anew that are finished.
    """
    work = method.workspace
    if doing.resume and work.has_store:
        _require_same_experiment(method)
    if not doing.resume and work.has_store:
        work.engine.on_main(lambda: _begin_anew(work.store))
    told.begin(method)
    if doing.parallel_tasks > 1:
        adapt_at_once(method, tasks, doing.parallel_tasks, fresh=fresh)
        fresh = False
    if work.config.stream.setting in AT_ONCE:
        for task in tasks:
            method.adapt(str(task.number), fresh=fresh)
        names = [name for task in tasks for name in method.adapter_names(task)]
        method.write([work.adapter_folder / name for name in names])
    else:
        for task in tasks:
            method.learn(task, fresh=fresh)
            method.task_written(task)
            told.learned(method)
    method.all_written()
    told.learned(method)


def _kept_by(method: Method, spent: Mapping[str, float]) -> dict[str, float]:
    """What the memory took to learn, and what it keeps: adapters and their readers, as float32."""
    view = method.workspace.store.view()
    numbers = method.workspace.layout.numel * len(view.live) + method.reading_numbers(view)
    seconds = spent["adapt"] + spent["consolidate"]
    return {"seconds": seconds, "parameters": int(numbers), "bytes": 4 * int(numbers)}


def _costs(method: Method, spent: Mapping[str, float], evaluated: float) -> list[Cost]:
    """What learning and evaluating took: seconds, numbers and bytes."""
    work, view = method.workspace, method.workspace.store.view()
    key_count = method.reading_numbers(view)
    numbers = work.layout.numel * len(view.live)
    what = "atoms" if method.kind == "atoms" else "adapters"
    costs = [
        Cost(
            label=f"adapt: {what} of all tasks",
            seconds=spent["adapt"],
            parameters=numbers,
            bytes=4 * numbers,
        )
    ]
    if method.consolidates is not None:
        words = " ".join(filter(None, ("consolidate:", method.consolidates))).removesuffix(":")
        costs.append(
            Cost(
                label=words, seconds=spent["consolidate"], parameters=key_count, bytes=4 * key_count
            )
        )
    label = "evaluate: every version, and other ways to read the memory"
    return [*costs, Cost(label=label, seconds=evaluated)]


def _require_same_experiment(method: Method) -> None:
    """A run goes on only in a memory of its own seed and settings."""
    work = method.workspace
    remedy = "another --store and --set runs=DIR, or --fresh to begin this one anew"
    for record in work.store.view().live:
        if record.meta.get("seed") not in (None, method.seed):
            raise ConfigError(
                f"the memory {work.store_path!r} holds adapters of seed {record.meta['seed']}",
                expected=f"seed {method.seed}, or an empty memory",
                remedy=remedy,
            )
    method.require_same_settings(remedy)


def _spent(work: Workspace) -> dict[str, float]:
    """Seconds of training and consolidation, as noted when they happened."""
    records = work.store.view().live
    notes = [version.metadata.get("seconds", 0.0) for version in work.store.log()]
    trained = [(record.meta.get("provenance") or {}).get("seconds", 0.0) for record in records]
    return {"adapt": float(sum(trained)), "consolidate": float(sum(notes))}


def _begin_anew(store: memtool_stores.MemoryStore) -> None:
    versions = store.log()
    if len(versions) > 1:
        store.rollback(versions[-1].id)
