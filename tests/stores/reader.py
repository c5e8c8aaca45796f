"""A process that reads the newest version of a store until its stdin is closed.

python reader.py URL

Its last line is how many versions and rows it has looked at, and how many rows were wrong.
"""

from __future__ import annotations

import select
import sys

import numpy as np

from memtool_stores import MemoryStore
from memtool_stores.testing import some_values


def main() -> None:
    store = MemoryStore.open(sys.argv[1])
    print("ready", flush=True)
    versions, rows, wrong = set(), 0, 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        view = store.view()
        versions.add(view.version)
        values = view.values()
        wrong += len(values) != len(view)
        for record, row in zip(view.adapters, values, strict=True):
            expected = some_values(store.space, record.meta["number"])
            wrong += not np.array_equal(row, expected)
            wrong += not np.array_equal(view.value(record.id), expected)
            rows += 1
    print(len(versions), rows, wrong)


if __name__ == "__main__":
    main()
