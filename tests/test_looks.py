"""What a frozen language model sees in prompts: the same alone and in any batch."""

from __future__ import annotations

import pytest
import torch

from memtool.config import resolve
from memtool.errors import ConfigError
from memtool.learning import looks
from memtool.learning.looks import PromptLook, looks_of
from memtool.workspace import Workspace
from tests.methods.facts import settings_of, write_facts

PROMPTS = ["after a comes", "b", "turn ab: 12"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    place = write_facts(tmp_path_factory.mktemp("facts"))
    config = resolve(preset="mira-trace", overrides=settings_of(place, place), ambient=False).config
    return Workspace(config, seed=0)


@pytest.mark.parametrize(
    ("places", "width"),
    [
        (("final",), 16),
        (("block:1",), 16),
        (("blocks",), 32),
        (("tokens",), 43),
        (("blocks", "tokens", "final"), 91),
        (("blocks", "block:0"), 32),
    ],
)
def test_a_prompt_looks_the_same_alone_and_in_a_batch(
    work: Workspace, places: tuple[str, ...], width: int
) -> None:
    look = PromptLook(places)
    together = looks_of(work, PROMPTS, look)
    assert together.shape == (3, width) == (3, look.width(work.backbone))
    alone = torch.cat([looks_of(work, [prompt], look) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_parts_are_what_they_say(work: Workspace) -> None:
    lm = work.backbone
    (tokens,) = lm.encode(["aab"]).tokens.tolist()
    seen = PromptLook(("block:1", "tokens"))(lm, torch.tensor([tokens]))
    inputs: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        lm.hidden(torch.tensor([tokens]), lambda block, h: inputs.update({block: h.clone()}))
    mean = inputs[1][0].mean(dim=0)
    normed = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(seen[0, :16], normed)
    words = seen.shape[1] - 16
    shares = torch.bincount(torch.tensor(tokens), minlength=words) / len(tokens)
    torch.testing.assert_close(seen[0, 16:], (words * shares).sqrt())


def test_what_is_wide_is_projected_always_in_the_same_way(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = PromptLook(("blocks", "tokens"))
    wide = looks_of(work, PROMPTS, look)
    monkeypatch.setattr(looks, "MOST_WIDE", 48)
    narrow = looks_of(work, PROMPTS, look)
    assert narrow.shape == (3, 48) == (3, look.width(work.backbone))
    torch.testing.assert_close(narrow, looks_of(work, PROMPTS, look))
    assert not torch.equal(narrow[0], narrow[1])
    far, near = torch.cdist(wide, wide), torch.cdist(narrow, narrow)
    apart = ~torch.eye(3, dtype=torch.bool)
    assert bool(((near / far)[apart] > 0.6).all() and ((near / far)[apart] < 1.5).all())


def test_tokens_of_a_large_vocabulary_share_places(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "TOKEN_PLACES", 8)
    seen = looks_of(work, PROMPTS, PromptLook(("tokens",)))
    assert seen.shape == (3, 8)
    torch.testing.assert_close(seen.square().sum(dim=1), torch.full((3,), 8.0))


def test_a_block_that_is_not_there_is_named(work: Workspace) -> None:
    with pytest.raises(ConfigError, match="block 2 of a model of 2 blocks"):
        looks_of(work, PROMPTS, PromptLook(("block:2",)))
