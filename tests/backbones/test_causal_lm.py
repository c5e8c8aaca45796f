"""The language model against transformers' own forward pass, and generation against a slow loop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM

from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones import create_backbone
from memtool.backbones.answering import Growing, Wish, grow, trimmed
from memtool.backbones.causal_lm import PAD, CausalLM, create_causal_lm
from memtool.backbones.families import FAMILIES
from memtool.backbones.footprint import footprint, footprint_of
from memtool.errors import ConfigError, DataError, MismatchError, NotFoundError
from memtool.memories.rank1 import AtomGate, Rank1Memory, init_atoms
from memtool.settings import BackboneSettings, TextSettings
from tests.backbones.tiny_lm import tiny_config, tiny_model, tiny_tokenizer, write_tiny

LIMITS = TextSettings(prompt_tokens=40, answer_tokens=24)
PROMPTS = ["who is it", "a", "the sum of 3 and 4 is", "zz top 99."]


def build(family: str = "llama", text: TextSettings = LIMITS, **changes: object) -> CausalLM:
    model = tiny_model(family, **changes).double()
    return CausalLM(model, tiny_tokenizer(), "tiny", text)


def atoms(lm: CausalLM, targets: tuple[str, ...] | None = None) -> Recall:
    """Two tasks of three atoms with values that matter."""
    bank = Rank1Memory(lm.sites(targets or lm.targets))
    generator = torch.Generator().manual_seed(3)
    layout = Layout(bank.sites, 3)
    for owner in range(2):
        flat = init_atoms(layout, generator=generator, dtype=torch.float64)
        flat += torch.randn(flat.shape, generator=generator, dtype=torch.float64) * 0.5
        bank.grow(flat, rank=3, owner=owner, scaling=2.0)
    bank.freeze()
    return bank.eval().recall(AtomGate(topk=3, temperature=0.1, threshold=0.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    reference = tiny_model(family).double().eval()
    lm = build(family)
    tokens = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(tokens).logits
        torch.testing.assert_close(lm.logits(tokens), wanted, rtol=1e-10, atol=1e-10)


def test_the_loss_is_the_cross_entropy_of_the_answer_alone() -> None:
    lm = build()
    answers = ["x", "yes", "7.", "no way"]
    encoded = lm.encode(PROMPTS, answers)
    losses = lm.answer_loss(encoded.tokens, encoded.answers)
    for place, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        row = [*lm.tokenizer(prompt).input_ids]
        said = [*lm.tokenizer(answer, add_special_tokens=False).input_ids, 2]
        logits = lm.logits(torch.tensor([row + said]))[0, len(row) - 1 : -1]
        wanted = F.cross_entropy(logits, torch.tensor(said), reduction="sum")
        torch.testing.assert_close(losses[place], wanted)
        assert int(encoded.answers[place]) == len(said)


def test_the_loss_has_the_gradient_of_the_adapters_alone() -> None:
    lm = build()
    layout = Layout(lm.sites(("q", "v")), 2)
    flat = init_lora(layout, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = AdapterValues.from_flat(flat, layout, 1.0, trainable=True)
    encoded = lm.encode(PROMPTS[:2], ["x", "y"])
    lm.answer_loss(encoded.tokens, encoded.answers, every(values)).sum().backward()
    assert all(factor.grad is not None and factor.grad.abs().max() > 0 for factor in values.b)
    assert all(parameter.grad is None for parameter in lm.parameters())


def slow_answer(lm: CausalLM, prompt: str, recall: Recall | None, most: int) -> list[int]:
    """Greedy decoding of one prompt, everything computed again for every token."""
    row: list[int] = list(lm.tokenizer(prompt).input_ids)
    said: list[int] = []
    while len(said) < most:
        with torch.no_grad():
            token = int(lm.logits(torch.tensor([row + said]), recall)[0, -1].argmax())
        if token in lm.ends:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_generation_of_a_padded_batch_equals_the_slow_loop_one_by_one(
    family: str, adapted: bool
) -> None:
    lm = build(family, seed=1)
    recall = atoms(lm) if adapted else None
    batch = lm.generate(lm.encode(PROMPTS).tokens, recall)
    slow = [slow_answer(lm, prompt, recall, LIMITS.answer_tokens) for prompt in PROMPTS]
    assert batch == slow
    assert [lm.generate(lm.encode([prompt]).tokens, recall)[0] for prompt in PROMPTS] == slow
    if adapted:
        assert batch != lm.generate(lm.encode(PROMPTS).tokens)


def test_a_long_prompt_ends_beside_an_answer_that_fills_the_context() -> None:
    lm = build("gpt2")  # which has learned positions, and none beyond its context
    tokens = lm.encode(["a" * 38, "b"]).tokens
    lm.ends = (0,)  # which does not come here

    def answers(rows: Tensor, mosts: tuple[int, ...]) -> list[str]:
        found = [Growing(lm, Wish(most=most)) for most in mosts]
        grow(lm, rows, None, found, lambda: None)
        assert [one.tokens for one in found] == list(mosts)
        return [one.text for one in found]

    long, short = lm.context - 39, lm.context - 2
    assert answers(tokens, (long, short)) == [
        *answers(tokens[:1], (long,)),
        *answers(trimmed(tokens[1:]), (short,)),
    ]


def test_generation_ends_at_any_end_token() -> None:
    lm = build(seed=1)
    whole = lm.generate(lm.encode(PROMPTS).tokens)
    longest = max(whole, key=len)
    assert len(longest) > 3
    end = longest[2]
    lm.ends = (*lm.ends, end)
    for before, after in zip(whole, lm.generate(lm.encode(PROMPTS).tokens), strict=True):
        assert after == (before[: before.index(end)] if end in before else before)


def test_logits_do_not_see_padding() -> None:
    lm = build()
    recall = atoms(lm)
    tokens = lm.encode(PROMPTS).tokens
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        alone = lm.logits(lm.encode([prompt]).tokens, recall)[0]
        together = lm.logits(tokens, recall)[tokens.eq(row).all(1).nonzero()[0, 0]]
        torch.testing.assert_close(together[row != PAD], alone)


def test_a_long_prompt_keeps_its_begin_token_and_its_end() -> None:
    lm = build()
    prompt = "abcdefghij" * 5 + "question:"
    encoded = lm.encode([prompt, "a"], ["yes" * 20, "b"])
    assert (encoded.cut_prompts, encoded.cut_answers) == (1, 1)
    row = encoded.tokens[0]
    assert len(row) == 40 + 24
    assert int(row[0]) == 1
    assert lm.decode(row[1:40].tolist()) == prompt[-39:]
    assert int(row[-1]) == 2  # a cut answer ends, too


def test_a_long_prompt_is_refused_where_asked() -> None:
    lm = build(text=LIMITS.model_copy(update={"long_prompts": "refuse"}))
    with pytest.raises(DataError, match="prompt 2 has 51 tokens"):
        lm.encode(["a", "b" * 50])


def test_of_megabytes_only_the_end_is_cut_into_tokens() -> None:
    lm, asked = build(), "ab" * 2**22 + "question:"
    seen: list[int] = []

    class Watched(type(lm.tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **how: object) -> object:
            seen.append(len(text))
            return super().__call__(text, **how)

    lm.tokenizer.__class__ = Watched
    encoded = lm.encode([asked], ["yes" * 2**20])
    assert max(seen) == 2**16
    assert (encoded.cut_prompts, encoded.cut_answers) == (1, 1)
    assert lm.decode(encoded.tokens[0, 1:40].tolist()) == asked[-39:]
    with pytest.raises(DataError, match="prompt 1 has more than 65"):
        build(text=LIMITS.model_copy(update={"long_prompts": "refuse"})).encode([asked])


def test_limits_beyond_the_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="whose context is 64"):
        build(text=TextSettings(prompt_tokens=50, answer_tokens=20))
    lm = build()
    with pytest.raises(MismatchError, match="at most 64 tokens"):
        lm.generate(lm.encode(["a" * 39]).tokens, most=40)


def test_sites_are_whole_linear_layers_in_block_order() -> None:
    lm = build()
    sites = lm.sites(("o", "q", "down"))
    assert [site.name for site in sites[:3]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [site.block for site in sites] == [0, 0, 0, 1, 1, 1]
    assert (lm.sites(("v",))[0].in_features, lm.sites(("v",))[0].out_features) == (16, 8)
    with pytest.raises(ConfigError, match="no target 'proj'"):
        lm.sites(("proj",))
    with pytest.raises(ConfigError, match="no targets"):
        lm.sites(())


def test_every_target_changes_the_answer() -> None:
    lm = build()
    tokens = lm.encode(["who"]).tokens
    plain = lm.logits(tokens)
    for target in lm.targets:
        assert not torch.equal(lm.logits(tokens, atoms(lm, (target,))), plain)


def test_a_folder_is_read_and_hashed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    settings = BackboneSettings(name=f"hf:{folder}")
    lm = create_causal_lm(settings, LIMITS)
    assert (lm.depth, lm.dim, lm.context, len(lm.sha256)) == (2, 16, 64, 64)
    assert create_causal_lm(settings, LIMITS, dtype=torch.bfloat16).sha256 == lm.sha256
    other = write_tiny(tmp_path / "other", seed=1)
    assert create_causal_lm(BackboneSettings(name=f"hf:{other}"), LIMITS).sha256 != lm.sha256
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    assert not lm.train().training


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'nano' is no language model"):
        create_causal_lm(BackboneSettings(name="nano"), LIMITS)
    with pytest.raises(NotFoundError, match="there is no folder"):
        create_causal_lm(BackboneSettings(name=f"hf:{tmp_path / 'gone'}"), LIMITS)
    (tmp_path / "empty").mkdir()
    with pytest.raises((NotFoundError, ConfigError)):
        create_causal_lm(BackboneSettings(name=f"hf:{tmp_path / 'empty'}"), LIMITS)
    weights = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match=r"backbone\.weights"):
        create_causal_lm(BackboneSettings(name="hf:x/y", weights=weights), LIMITS)
    folder = write_tiny(tmp_path / "model")
    with pytest.raises(ConfigError, match="is a llama, and this reads images"):
        create_backbone(BackboneSettings(name=f"hf:{folder}"))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = write_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    config |= {"model_type": "theirs", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')")
    settings = BackboneSettings(name=f"hf:{folder}", targets=("q", "v"))
    with pytest.raises(ConfigError, match="is no causal language model"):
        create_causal_lm(settings, TextSettings())
    with pytest.raises(ConfigError, match="is no causal language model"):
        footprint_of(settings, rank=2, tasks=2, gate=AtomGate(2), text=TextSettings())
    assert not ran.exists()


def test_models_that_are_not_expressed_are_refused() -> None:
    config = OPTConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, ffn_dim=8)
    opt = OPTForCausalLM(config)
    with pytest.raises(ConfigError, match="is a OPTForCausalLM, which memtool cannot adapt"):
        CausalLM(opt, tiny_tokenizer(), "opt", LIMITS)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ConfigError, match="rotary positions 'dynamic'"):
        build(rope_parameters=rope)


def test_a_footprint_counts_a_model_of_llama_size_without_weights() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    found = footprint(config, rank=8, tasks=8)
    assert found.parameters == 6_738_415_616  # that of Llama 2 7B
    assert found.weights == 2 * found.parameters
    assert found.atoms == 4 * 8 * 8 * 32 * 4 * (4096 + 4096)
    assert found.learning == 3 * found.atoms // 8
    assert found.cache == 2 * 2 * 32 * 4096
    # Of a layer at least: four inputs of its linear layers, two of norms, q, k, v, and the MLP's.
    least = 32 * 2 * (9 * 4096 + 3 * 11008)
    assert least < found.per_token < 3 * least
    assert found.training(1, 64, 8) < found.training(1, 64, 8, fused=False)
    assert found.generation(2, 100) - found.generation(1, 100) == 100 * found.cache


def test_a_footprint_counts_what_a_real_model_and_its_atoms_have() -> None:
    found = footprint(tiny_config(), rank=2, tasks=3, dtype=torch.float32)
    lm = CausalLM(tiny_model(), tiny_tokenizer(), "tiny", LIMITS)
    assert found.parameters == sum(parameter.numel() for parameter in lm.parameters())
    values = Layout(lm.sites(("q", "k", "v", "o")), 2).numel
    assert (found.atoms, found.learning) == (3 * 4 * values, 3 * 4 * values)


def test_the_context_of_longrope_is_that_of_its_first_training() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.0],
        "long_factor": [2.0, 2.0],
    }
    limits = TextSettings(prompt_tokens=10, answer_tokens=6)
    lm = build(text=limits, rope_parameters=rope)
    assert lm.context == 16
    with pytest.raises(ConfigError, match="whose context is 16"):
        build(text=LIMITS, rope_parameters=rope)


def test_a_footprint_in_four_bits_is_that_of_the_packed_layers() -> None:
    config = tiny_config(hidden_size=64, intermediate_size=96, head_dim=16)
    plain, packed = (footprint(config, dtype=torch.float32, packed=one) for one in (False, True))
    # q and o, k and v of half as many rows, three of the MLP, in each of two blocks
    numbers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert plain.weights - packed.weights == numbers * (4 - 0.5 - 4 / 64)


def test_a_footprint_of_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ConfigError, match="another norm"):
        footprint(tiny_config(), gate=AtomGate(score_norm="task"))
    with pytest.raises(ConfigError, match="0 tasks"):
        footprint(tiny_config(), tasks=0)


@pytest.mark.skipif(
    not os.environ.get("MEMTOOL_DATA"), reason="MEMTOOL_DATA is not set: no stories260K"
)
def test_stories260k_writes_stories() -> None:
    settings = BackboneSettings(name="hf:${MEMTOOL_DATA}/weights/stories260K")
    lm = create_causal_lm(settings, TextSettings(prompt_tokens=256, answer_tokens=128))
    prompts = ["Once upon a time", "There was a little girl named Lily who"]

    def told(tokens: Tensor) -> list[str]:
        return [lm.decode(ids) for ids in lm.generate(tokens, most=24)]

    together = told(lm.encode(prompts).tokens)
    assert together == [told(lm.encode([prompt]).tokens)[0] for prompt in prompts]
    assert "there was a" in together[0]

    def loss(answers: list[str]) -> Tensor:
        encoded = lm.encode(prompts, answers)
        with torch.no_grad():
            return lm.answer_loss(encoded.tokens, encoded.answers) / encoded.answers

    assert (loss(together) < loss([story[::-1] for story in together]) / 2).all()
