"""Choosing the settings of every row on validation samples, before any test sample is read.

Every cell of the grid is a whole run of one tuning seed, the baselines included, in which the
samples that `stream.validation` holds back take the place of the test samples: those are not in its
stream at all. Each row, and each reading of a baseline, takes its own best cell; rows that read the
memory in other ways take the memory's. Then the seeds that are reported run with what was chosen,
and the test samples are read for the first time.

A cell that is finished is one file below `select/`; a run that was killed goes on in the cell where
it was. Values that the memory or a baseline cannot have, or diverges with, are left out for its
rows alone, with the reason; what has none left is an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from memtool import __version__
from memtool.config import not_read_under, parse_assignment, with_values
from memtool.engine import Engine
from memtool.errors import ConfigError, DataError, DivergedError, MemtoolError
from memtool.evaluation.record import Row
from memtool.evaluation.selection import Cell, Choice, Selection, first_best
from memtool.experiments import run as experiment
from memtool.experiments.baselines import readers_of
from memtool.learning.known import is_fixed
from memtool.methods import open_method
from memtool.methods.kept import fingerprint_of, kept
from memtool.paths import store_beside
from memtool.progress import Progress
from memtool.registry import SHIPPED
from memtool.sections import owners_of
from memtool.settings import Config, get, keys, sections

SHARE = 0.2
"""What a cell holds back where `stream.validation` is 0; the runs that are reported do not."""

TUNING_SEED = 1000
"""The tuning seed where nobody names one: the first from here on that is not reported."""

SHARED = ("adapter", "train", "head", "text")
"""Sections that can be chosen beside those of the method: what is learned, not on what."""

AFTERWARDS = ("memory", "consolidate", "head")
"""Sections that adapters do not learn by: cells that differ in these alone share their adapters,
unless adapters learn on top of a memory, or `head` knows all classes in advance."""

NOT_CHOSEN = ("text.generate", "text.shots")
"""Of these, what is measured and what only some baselines read."""


def cells_of(config: Config, selections: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of `KEY=VALUE,VALUE`: all combinations, equal ones once.

    Values of a setting that holds several are separated by `;`. Raises ConfigError for a key that
    is no setting, that nothing reads in any of the cells, or that says what is measured; for a
    value that cannot be used, comes twice, or is the only one.
    """
    axes: dict[str, list[Any]] = {}
    for text in selections:
        key, values = _axis(config, text)
        if key in axes:
            raise ConfigError(
                f"--select {text}: {key} is selected twice", expected="once, with all"
            )
        axes[key] = values
    found: dict[str, Cell] = {}
    unread: dict[str, str] = {}
    read: set[str] = set()
    for combination in itertools.product(*axes.values()):
        cell = with_values(config, dict(zip(axes, combination, strict=True)), "--select")
        under = {key: not_read_under(cell, key) or _without_its_rows(cell, key) for key in axes}
        unread |= {key: other for key, other in under.items() if other is not None}
        plain = {key: _plain(get(cell, key)) for key, other in under.items() if other is None}
        read |= plain.keys()
        found.setdefault(fingerprint_of(plain), Cell(values=plain))
    for key, other in unread.items():
        if key not in read:
            rows = readers_of(key) if other == "baselines" else ()
            value = get(config, other)
            said = ",".join(value) if isinstance(value, tuple) else _plain(value)
            raise ConfigError(
                f"--select {key} has no effect under {other} {said}",
                expected=f"--baselines with {' or '.join(rows)}, which read it"
                if rows
                else "a setting that something reads",
                remedy=f"the same without --select {key}",
            )
    return tuple(found.values())


def _without_its_rows(config: Config, key: str) -> str | None:
    """As `not_read_under`, of a setting that only baselines read which nobody named."""
    rows = readers_of(key)
    of_the_head = key == "head.width" and config.head.kind == "rp-ridge"
    own = ("all", "none", *SHIPPED["baselines"])
    of_others = [name for name in config.baselines if name not in own]
    named = {*rows} & {*config.baselines} or of_the_head or of_others
    return "baselines" if rows and not named else None


def _axis(config: Config, text: str) -> tuple[str, list[Any]]:
    """The key and the values of one --select, each checked by itself."""
    try:
        key, said = parse_assignment(text)
    except ConfigError as error:
        raise ConfigError(
            f"--select {text}", expected="KEY=VALUE,VALUE, as --select train.lr=1e-3,2e-3"
        ) from error
    known, place = keys(config.method), f"--select {text}"
    if key not in known:
        if key in keys():
            owners = " and ".join(owners_of(key.partition(".")[0]))
            raise ConfigError(
                f"{place} has no effect under method {config.method}: it is of method {owners}",
                expected="a section of " + ", ".join((*SHARED, *sections(config.method))),
            )
        with_values(config, {key: said}, place)  # which says what was meant
    section = key.partition(".")[0]
    if section not in (*SHARED, *sections(config.method)) or key in NOT_CHOSEN:
        raise ConfigError(
            f"{place}: {key} says what is measured or how, not how it is learned",
            expected="a section of " + ", ".join((*SHARED, *sections(config.method))),
            remedy=f"--set {key}=VALUE, the same for all rows",
        )
    several = isinstance(get(config, key), tuple) or ";" in said
    words = [word.strip() for word in said.split(";" if several else ",") if word.strip()]
    values = [get(with_values(config, {key: word}, place), key) for word in words]
    for place_of, value in enumerate(values):
        if value in values[:place_of]:
            raise ConfigError(
                f"{place}: {words[place_of]} stands for a value that is there already"
            )
    if len(values) < 2:
        raise ConfigError(
            f"{place} has {len(values)} value{'s'[: len(values) != 1]} to choose from",
            expected="two or more",
            remedy=f"--set {key}={words[0]}" if words else None,
        )
    return key, values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def tuning_seed(config: Config, wanted: int | None = None) -> int:
    """The seed to choose on. Raises ConfigError for one that is reported."""
    if wanted in config.seed:
        raise ConfigError(
            f"--select-seed {wanted} is reported, too",
            expected="a seed that is not among --seed " + " ".join(map(str, config.seed)),
            remedy="without --select-seed, another one is taken",
        )
    if wanted is not None:
        return wanted
    return next(seed for seed in itertools.count(TUNING_SEED) if seed not in config.seed)


def cell_config(config: Config, cell: Cell, seed: int) -> Config:
    """The configuration of a cell's run: its values, the tuning seed, and no test sample.

    A memory of its own, and the adapters of all cells that learn alike.
    """
    changed = with_values(config, cell.values, "--select")
    stream = config.stream.model_copy(
        update={"split": "validation", "validation": config.stream.validation or SHARE}
    )
    name = folder_name(cell.values)
    alike = cell.values
    if not changed.adapter.residual:
        after = {*AFTERWARDS} - ({"head"} if is_fixed(changed) else set())
        alike = {k: v for k, v in cell.values.items() if k.partition(".")[0] not in after}
    return changed.model_copy(
        update={
            "stream": stream,
            "seed": (seed,),
            "orders": "given",
            "store": store_beside(config.store, f"-select-{name}"),
            "runs": config.runs / "select" / folder_name(alike),
        }
    )


@contextmanager
def held_back(config: Config) -> Iterator[None]:
    """Inside, an error about the share that is held back says who asked for it, if nobody did."""
    set_here = f"stream.validation {SHARE:g} "
    try:
        yield
    except (ConfigError, DataError) as error:
        if config.stream.validation or not error.message.startswith(set_here):
            raise
        raise type(error)(
            f"--select holds back {SHARE:.0%} of the training samples to choose by, which "
            f"{error.message.removeprefix(set_here)}",
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def folder_name(values: Mapping[str, Any]) -> str:
    """What the folder of a cell is called: readable, and another one for other values."""
    words = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:40].strip("-.") or "as-configured"
    return f"{readable}-{fingerprint_of(dict(values))[:8]}"


MEMORY, EVERY = "memory", "*"
"""What else can fail in a cell beside a baseline: the memory, or all that is in it."""


class _Measured(BaseModel):
    """What a cell gave: figures by row, in their order, and the baselines that rows are of.

    failed: why there are none, by baseline, MEMORY or EVERY.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    figures: dict[str, float | None]
    of: dict[str, str]
    samples: Annotated[int, Field(ge=0)]
    loss: bool
    failed: dict[str, str] = {}

    def reason(self, name: str) -> str | None:
        """Why a baseline or the memory has no figure; None where it did not fail."""
        return self.failed.get(name, self.failed.get(EVERY))


def select(
    config: Config,
    cells: Sequence[Cell],
    *,
    seed: int,
    progress: Progress | None = None,
    resume: bool = True,
    command: str | None = None,
    preset: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Selection:
    """What every row of the table is to have, by the validation samples of one seed.

    `say` is told what failed in a cell. Raises ConfigError where the memory or a baseline failed in
    all of them, and where nothing can be held back, and what `run` raises that no value of a
    setting is to blame for.
    """
    measured: list[_Measured] = []
    errors: list[MemtoolError] = []
    for cell in cells:
        measured.append(_measured(config, cell, seed, errors, progress, resume, command, preset))
        if say is not None:
            for name, reason in measured[-1].failed.items():
                what = "" if name in (MEMORY, EVERY) else f" for {name}"
                say(f"note: {cell.text} failed{what}, and is left out: {reason}")
    for name in (MEMORY, *dict.fromkeys(key for one in measured for key in one.failed)):
        _require_one_left(name, cells, measured, errors)
    of = {id: name for one in measured for id, name in one.of.items()}
    rows = {}
    # Rows in the order of a cell that has them all, or the most.
    ordered = sorted(measured, key=lambda one: -len(one.figures))
    ids = dict.fromkeys(id for one in ordered for id in one.figures)
    lower = any(one.loss for one in measured)
    for id in ids:
        figures = tuple(one.figures.get(id) for one in measured)
        name = of.get(id, MEMORY)
        failed = {
            number: why
            for number, one in enumerate(measured)
            if figures[number] is None and (why := one.reason(name)) is not None
        }
        rows[id] = Choice(
            figures=figures, chosen=first_best(figures, lower=lower), of=of.get(id), failed=failed
        )
    memory = next((choice.chosen for choice in rows.values() if choice.of is None), 0)
    return Selection(
        seed=seed,
        validation=config.stream.validation or SHARE,
        samples=max(one.samples for one in measured),
        measure="loss" if lower else "accuracy",
        cells=tuple(cells),
        rows={
            id: choice if choice.of else choice.model_copy(update={"chosen": memory})
            for id, choice in rows.items()
        },
    )


def _require_one_left(
    name: str,
    cells: Sequence[Cell],
    measured: Sequence[_Measured],
    errors: Sequence[MemtoolError],
) -> None:
    """Raise where a baseline, or the memory, failed in every cell: the error, if it is but one."""
    reasons = [one.reason(name) for one in measured]
    if None in reasons:
        return
    if len({*reasons}) == 1 and (known := [e for e in errors if e.message == reasons[0]]):
        raise known[0]
    said = "; ".join(f"{c.text}: {why}" for c, why in zip(cells, reasons, strict=True))
    what = "the memory" if name in (MEMORY, EVERY) else f"baseline {name}"
    raise ConfigError(
        f"--select: {what} failed with all {len(cells)} settings: {said}",
        expected="values of which one can be learned with",
        remedy=None if name in (MEMORY, EVERY) else f"the same without {name} in --baselines",
    )


def _measured(
    asked: Config,
    cell: Cell,
    seed: int,
    errors: list[MemtoolError],
    progress: Progress | None,
    resume: bool,
    command: str | None,
    preset: str | None,
) -> _Measured:
    """A cell from its file, or run to its end; `errors` is added to by what failed now.

    Only a training that diverged is kept as a failure: what else a cell lacks may be there later.
    """
    config = cell_config(asked, cell, seed)
    found: list[MemtoolError] = []

    def find() -> _Measured:
        of: dict[str, str] = {}
        failed: dict[str, MemtoolError] = {}
        rows: Sequence[Row] = ()
        samples = 0
        try:
            (record,) = experiment.run(
                config,
                progress=progress,
                resume=resume,
                command=command,
                preset=preset,
                of=of,
                failed=failed,
            )
            rows = record.metrics.rows
            samples = sum(task.test_samples or 0 for task in record.run.tasks)
        except experiment.FAILURES as error:
            failed[MEMORY] = error
            rows = experiment.baselines_alone(config, of=of, failed=failed, progress=progress)
        found.extend(failed.values())
        figures = {row.id: _figure(row) for row in rows}
        return _Measured(
            figures=figures,
            of=of,
            samples=samples,
            loss=bool(rows) and not any("faa" in row.metrics for row in rows),
            failed={name: error.message for name, error in failed.items()},
        )

    try:
        with held_back(asked):
            file = config.runs / f"measured-{_decides(config, seed)[:16]}.json"
            if not resume:
                file.unlink(missing_ok=True)
            return kept(
                file,
                TypeAdapter(_Measured),
                Engine(config.engine),
                find,
                worth=lambda: all(isinstance(error, DivergedError) for error in found),
            )
    except experiment.FAILURES as error:
        found.append(error)
        return _Measured(figures={}, of={}, samples=0, loss=False, failed={EVERY: error.message})
    finally:
        errors.extend(found)


def _figure(row: Row) -> float | None:
    """The final average, or the final loss where no answer was scored."""
    return row.metrics.get("faa", row.metrics.get("loss.final"))


def _decides(config: Config, seed: int) -> str:
    """The hash of all that decides what a cell gives."""
    work = open_method(config, seed=seed).workspace
    said = config.model_dump(mode="json", exclude={"store", "runs", "lock_timeout", "limits"})
    return fingerprint_of([__version__, said, seed, work.stream.fingerprint, work.backbone.sha256])
