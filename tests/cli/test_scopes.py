"""Weights of every token from the command line: import, consolidate, explain, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_collection import memtool
from tests.methods.test_collection import (
    PROMPTS,
    write_collection,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)

TOKEN = ("--set", "memory.scope=token", "--set", "memory.look_at=prefix")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a memory of three adapters whose tokens choose."""
    folder = write_collection(tmp_path_factory.mktemp("scopes"))
    words = ("import", "adapters", "--base", "hf:model", "--prompts", "prompts.jsonl")
    refused = memtool(folder, *words, "--set", "memory.scope=token")
    assert refused.returncode == 2
    assert "--set memory.look_at=prefix" in refused.stderr
    assert memtool(folder, *words, *TOKEN).returncode == 0
    done = memtool(folder, "consolidate")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_memory_of_tokens_answers_and_says_what_is_unlike(place: Path) -> None:
    done = memtool(place, "generate", "--prompt", PROMPTS["sums"][0], "--most", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert sum(one["weight"] for one in json.loads(done.stdout)["answers"][0]["weights"]) > 0.99
    known = memtool(place, "retrieve", "--prompt", PROMPTS["sums"][0])
    assert "novelty\t0." in known.stdout
    assert "unlike" not in known.stderr
    strange = memtool(place, "retrieve", "--prompt", "zzzz qqqq:::::qqqq zzzz")
    assert "unlike all that the memory learned" in strange.stderr
    assert "99 of 100 prompts" in strange.stderr
    out = memtool(place, "retrieve", "--prompt", "a", "--out", "mixture")
    assert out.returncode == 2
    assert "every token has a mixture of its own" in out.stderr


def test_an_explanation_has_a_line_for_every_token(place: Path) -> None:
    done = memtool(place, "explain", "--prompt", "7 and", "--block", "1", "--out", "why.html")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if len(line) == 2][-6:] == ["<s>", "7", "␣", "a", "n", "d"]
    assert "block 1" in done.stdout
    assert (place / "why.html").read_text(encoding="utf-8").count("<svg") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "memory.look_at=blocks,tokens"), "1 pass of the frozen model over it before"),
        (("--set", "memory.look_at=tokens"), "no pass before the answer"),
        (TOKEN, "every token, others in every block: 360 for 60 tokens, no pass"),
    ],
)
def test_a_plan_says_what_weights_cost(place: Path, words: tuple[str, ...], said: str) -> None:
    own = (
        "stream.source=facts.yaml",
        "backbone.name=hf:model",
        "text.prompt_tokens=60",
        "text.answer_tokens=6",
    )
    sets = [word for one in (*own, "text.epochs=none") for word in ("--set", one)]
    run = ("run", "--dry-run", "--preset", "mira-trace", "--store", "new")
    done = memtool(place, *run, *sets, *words)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    told = json.loads(memtool(place, *run, *sets, *words, "--json").stdout)["plan"]["cost"]
    assert told["passes"] == int("1 pass" in said)
    assert told["mixing"] == 3 * 8 * 2 * (16 + 16 + 16 + 8 + 16 + 8 + 16 + 16)
    entries = {"blocks,tokens": 2 * 16 + 43 + 1, "tokens": 43 + 1, "prefix": 2 * (16 + 1)}
    assert told["keys_bytes"] == 4 * 3 * entries[words[-1].partition("=")[2]]
    assert told["asking"] == (2 * 3 * 17 if told["scope"] == "token" else 0)
