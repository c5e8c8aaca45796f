"""What the catalog of a memory says of an adapter: words of a file, whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool.errors import ConfigError, CorruptError, DataError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memtool_stores import AdapterRecord, MemoryView


MOST_TASKS = 10_000_000
"""Tasks that a version can say it learned."""


def own_head_blob(adapter: str) -> str:
    """Name of the blob that holds the classifier trained with an adapter."""
    return f"head.{adapter}"


def blobs_of_row(id: str, name: str) -> tuple[str, ...]:
    """Names of the blobs that speak of one adapter alone, where there are any; its head is last."""
    return f"looks.{id}", f"prompts.{id}", own_head_blob(name)


def blobs_of_task(number: int) -> tuple[str, ...]:
    """Names of the blobs that speak of one task alone, where there are any."""
    return f"queries.{number}", f"features.{number}", f"routing.{number}"


def task_name(record: AdapterRecord) -> str:
    """The name of the task that an adapter belongs to: its own where none is said."""
    return str(record.meta.get("task_name") or record.name)


def task_numbers(records: Sequence[AdapterRecord]) -> dict[str, int]:
    """The number of every task of these records, by its name."""
    found = ((task_name(record), number_of(record)) for record in records)
    return {name: number for name, number in found if number is not None}


def number_of(record: AdapterRecord) -> int | None:
    """The number of the task that an adapter was trained on; None where no number is said."""
    number = record.meta.get("task")
    return number if isinstance(number, int) else None


def task_of(record: AdapterRecord) -> int:
    """As `number_of`. Raises DataError where no number is said."""
    number = number_of(record)
    if number is None:
        raise DataError(
            f"adapter {record.name!r} does not say which task it was trained on",
            remedy="memtool write DIR --task N, in a new --store",
        )
    return number


def in_runs(numbers: Sequence[int]) -> list[int | list[int]]:
    """Numbers in their order, four and more that follow each other as the first and the last.

    >>> in_runs([1, 2, 3, 7, 8, 9, 10, 5])
    [1, 2, 3, [7, 10], 5]
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    found: list[int | list[int]] = []
    for run in runs:
        found += [[run[0], run[-1]]] if len(run) > 3 else run
    return found


def out_of_runs(said: Iterable[int | Sequence[int]]) -> tuple[int, ...]:
    """What `in_runs` was given. Raises CorruptError for anything else.

    >>> out_of_runs([1, [7, 10], 5])
    (1, 7, 8, 9, 10, 5)
    """
    try:
        runs = [(one, one) if isinstance(one, int) else tuple(one) for one in said]
        fine = all(type(first) is type(last) is int and first <= last for first, last in runs)
        count = sum(last + 1 - first for first, last in runs)
    except (TypeError, ValueError) as error:
        raise CorruptError(f"what a version says that it learned: {error}") from error
    if not fine or count > MOST_TASKS:
        raise CorruptError(f"a version that says it learned {count:,} tasks")
    return tuple(number for first, last in runs for number in range(first, last + 1))


def numbered(numbers: Sequence[int]) -> str:
    """Numbers in words.

    >>> numbered([1, 2, 3, 7, 8, 9, 10, 5])
    '1 2 3 7-10 5'
    """
    return " ".join(
        "-".join(map(str, [one] if isinstance(one, int) else one)) for one in in_runs(numbers)
    )


def recorded(view: MemoryView, task: str) -> AdapterRecord:
    """The one live adapter of a task, by its name or number; or the adapter of that name.

    Raises NotFoundError for a task that is not there, ConfigError for one of several adapters.
    """
    ways = (
        [record for record in view.live if record.meta.get("task_name") == task],
        [record for record in view.live if record.name == task],
        [record for record in view.live if str(number_of(record)) == task],
    )
    found = next(filter(None, ways), [])
    if not found:
        held = dict.fromkeys(
            str(record.meta.get("task_name") or number_of(record)) for record in view.live
        )
        raise NotFoundError(
            f"no adapter of task {task!r} at version {view.version}",
            expected=f"one of the tasks in memory: {', '.join(held) or 'none'}",
        )
    if len(found) > 1:
        raise ConfigError(
            f"task {task!r} has {len(found)} adapters", expected="one, to be used for every input"
        )
    return found[0]
