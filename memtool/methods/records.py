"""What the catalog of a memory says of an adapter: words of a file, whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtool.errors import DataError

if TYPE_CHECKING:
    from memtool_stores import AdapterRecord


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
