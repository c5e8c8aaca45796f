"""What icechunk 2.x says when something is wrong, recorded from its 2.3.0 as the tests ran there.

On Python 3.11, which has icechunk 1.x only, this is how its messages are known.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memtool_stores import ice

RECORDING = json.loads(
    (Path(__file__).parent / "fixtures" / "icechunk-2.json").read_text(encoding="utf-8")
)["recorded"]


@pytest.mark.parametrize("recorded", RECORDING, ids=lambda recorded: recorded["said"][:40])
def test_each_message_is_the_error_that_it_means(recorded: dict[str, str]) -> None:
    error = ice._of_message(recorded["said"], "read the store", "memory")
    assert type(error).__name__ == recorded["raises"]
    assert "memory" in str(error) or error.remedy
    assert "icechunk/src" not in str(error)  # no call stack of its own


def test_everything_that_is_told_apart_was_recorded() -> None:
    found = {recorded["raises"] for recorded in RECORDING}
    assert found == {
        *("AlreadyExistsError", "ConflictError", "IntegrityError"),
        *("NotFoundError", "StorageError"),
    }
