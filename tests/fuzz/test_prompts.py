"""The door of example prompts: a file that anybody wrote, beside adapters that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool.methods.mira.collection import prompts_of
from tests.fuzz.door import STRANGE, cases, damaged, long, refused_or_taken

pytestmark = long

GOOD = b"""{"adapter": "poems", "prompt": "Write four lines about rain."}

{"prompt": "7 and 1 is", "adapter": "sums"}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts") / "prompts.jsonl"


@cases
@given(content=damaged(GOOD) | STRANGE | st.binary(max_size=200))
def test_prompts_are_texts_of_adapters_that_are_there(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    found = None
    with refused_or_taken():
        found = prompts_of(file, {"poems", "sums"})
    if found is not None:
        assert found.keys() <= {"poems", "sums"}
        asked = [prompt for prompts in found.values() for prompt in prompts]
        assert asked
        assert all(isinstance(one, str) and one.strip() for one in asked)


def test_the_good_file_is_taken(file: Path) -> None:
    file.write_bytes(GOOD)
    assert prompts_of(file, {"poems", "sums"}) == {
        "poems": ["Write four lines about rain."],
        "sums": ["7 and 1 is"],
    }
