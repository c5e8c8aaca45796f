"""A process that commits to a store in a bucket and says of every commit what it was told.

python bucket_writer.py URL PREFIX COUNT
"""

from __future__ import annotations

import sys

from memtool_stores import MemoryStore, MemtoolError, Transaction
from memtool_stores.testing import small_space, some_values


def main() -> None:
    url, prefix, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store, space = MemoryStore.open(url), small_space()
    for number in range(count):
        name = f"{prefix}-{number}"

        def write(txn: Transaction, name: str = name, number: int = number) -> None:
            txn.add(name, some_values(space, number))
            before = txn.base.blob("count") if txn.base.has_blob("count") else b"0"
            txn.put_blob("count", str(int(before) + 1).encode())

        try:
            store.run(write, name)
            print("stored", name, flush=True)
        except MemtoolError as error:
            print("refused", name, repr(error), flush=True)


if __name__ == "__main__":
    main()
