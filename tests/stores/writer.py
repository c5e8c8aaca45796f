"""A process that commits adapters to a store and says on stdout what was acknowledged.

python writer.py URL PREFIX COUNT SECONDS_IN_FUNCTION
"""

from __future__ import annotations

import sys
import time

from memtool_stores import MemoryStore, Transaction
from memtool_stores.testing import some_values


def main() -> None:
    url, prefix, count, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    store = MemoryStore.open(url)
    print("ready", flush=True)
    for number in range(count):
        name = f"{prefix}-{number}"

        def write(txn: Transaction, name: str = name, number: int = number) -> None:
            time.sleep(seconds)
            txn.add(name, some_values(store.space, number), {"number": number})
            txn.put_blob(f"blob-{prefix}", name.encode() * 10)

        store.run(write, f"write {name}")
        print(name, flush=True)


if __name__ == "__main__":
    main()
