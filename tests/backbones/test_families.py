"""Every family under adapters, against peft's merged weights and transformers' own generation."""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from memtool.adapters.layout import Layout, Site
from memtool.adapters.lora import init_lora
from memtool.adapters.mixing import Mixture
from memtool.adapters.peft_files import read_peft
from memtool.adapters.recalls import given_for_each
from memtool.adapters.stock import OneAdapter, united
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.causal_lm import PAD, CausalLM, create_causal_lm
from memtool.backbones.families import FAMILIES
from memtool.errors import ConfigError
from memtool.settings import BackboneSettings, TextSettings
from tests.backbones.tiny_lm import tiny_model, tiny_tokenizer, write_tiny

# Of peft itself, which calls transformers by older names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:.*will be removed.*")

LIMITS = TextSettings(prompt_tokens=40, answer_tokens=12)
PROMPTS = ["who is it", "a", "the sum of 3 and 4 is", "zz top 99."]
FUSED = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}


def wide(family: str) -> torch.dtype:
    """Gemma 2 has its own attention, which masks padding wrongly in float64."""
    return torch.float32 if family == "gemma2" else torch.float64


def lora(family: str, place: int) -> LoraConfig:
    """Unlike adapters: some targets at rank 2, all linear layers at rank 3, one layer at rank 1."""
    usual = {"target_modules": FUSED.get(family, ["q_proj", "v_proj"]), "r": 2, "lora_alpha": 3}
    kinds: list[dict[str, Any]] = [
        usual,
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 4, "use_rslora": True},
        {**usual, "r": 1, "layers_to_transform": [1]},
    ]
    return LoraConfig(**kinds[place], fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")


def adapted(family: str, place: int) -> Any:
    """A model of peft with random A and B."""
    model = get_peft_model(tiny_model(family).to(wide(family)), lora(family, place))
    generator = torch.Generator().manual_seed(place)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * 0.3)
    return model.eval()


def language_model(family: str) -> CausalLM:
    return CausalLM(tiny_model(family).to(wide(family)), tiny_tokenizer(), "tiny", LIMITS)


def stacked(lm: CausalLM, family: str, folder: Path) -> AdapterValues:
    """The three adapters as peft saved them."""
    found = []
    sites: tuple[Site, ...] = lm.sites(lm.targets)
    for place in range(3):
        adapted(family, place).save_pretrained(folder / str(place))
        one = read_peft(folder / str(place), sites)
        found.append(OneAdapter(one.layout, one.value, one.scaling))
    return united(found, sites)


def slow_answer(model: Any, prompt: str, most: int) -> list[int]:
    """Greedy decoding of one prompt, everything computed again for every token."""
    row: list[int] = list(tiny_tokenizer()(prompt).input_ids)
    said: list[int] = []
    while len(said) < most:
        with torch.no_grad():
            token = int(model(torch.tensor([row + said])).logits[0, -1].argmax())
        if token == 2:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_unlike_adapters_answers_as_merged_models(family: str, tmp_path: Path) -> None:
    lm = language_model(family)
    values = stacked(lm, family, tmp_path)
    weights = torch.eye(3)[[0, 1, 2, 1]]
    recall = given_for_each(values, weights.unsqueeze(1), "delta")
    tokens = lm.encode(PROMPTS).tokens
    merged = [adapted(family, place).merge_and_unload() for place in range(3)]
    slow = [
        slow_answer(merged[place], prompt, 12)
        for place, prompt in zip((0, 1, 2, 1), PROMPTS, strict=True)
    ]
    assert lm.generate(tokens, recall) == slow
    assert lm.generate(tokens) != slow
    with torch.no_grad():
        found = lm.logits(tokens, recall)
        for row, place, prompt in zip(range(4), (0, 1, 2, 1), PROMPTS, strict=True):
            wanted = merged[place](lm.encode([prompt]).tokens).logits[0]
            torch.testing.assert_close(found[row][tokens[row] != PAD], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "gpt2"])
def test_a_mixture_answers_as_a_model_with_the_sum_of_all_changes(
    family: str, tmp_path: Path
) -> None:
    lm = language_model(family)
    values = stacked(lm, family, tmp_path)
    weights = torch.tensor([0.5, 0.3, 0.2])
    recall = given_for_each(values, weights.expand(4, 1, 3), "delta")
    base = tiny_model(family).to(wide(family)).eval()
    before = {name: one.clone() for name, one in base.state_dict().items()}
    for place, weight in enumerate(weights.tolist()):
        merged = adapted(family, place).merge_and_unload().state_dict()
        with torch.no_grad():
            for name, one in base.state_dict().items():
                one += weight * (merged[name] - before[name])
    slow = [slow_answer(base, prompt, 12) for prompt in PROMPTS]
    assert lm.generate(lm.encode(PROMPTS).tokens, recall) == slow


def test_slices_and_whole_layers_of_one_model_are_stacked_exactly(tmp_path: Path) -> None:
    lm = language_model("phi3")
    sites = lm.sites(lm.targets)
    adapted("phi3", 0).save_pretrained(tmp_path / "whole")
    whole = read_peft(tmp_path / "whole", sites)
    assert {site.slice for site in whole.layout.sites} == {""}
    layout = Layout(lm.sites(("q", "v", "down")), 2)
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(layout.numel, generator=generator, dtype=torch.float64) * 0.3
    some = OneAdapter(layout, value, 1.5)
    both = united([OneAdapter(whole.layout, whole.value, whole.scaling), some], sites)
    tokens = lm.encode(PROMPTS).tokens
    with torch.no_grad():
        alone = lm.logits(tokens, every_of(AdapterValues.from_flat(value[None], layout, 1.5)))
        found = lm.logits(tokens, given_for_each(both, torch.eye(2)[[1] * 4].unsqueeze(1), "delta"))
    real = tokens != PAD
    torch.testing.assert_close(found[real], alone[real], rtol=1e-9, atol=1e-9)


def every_of(values: AdapterValues) -> Recall:
    ones = torch.ones(4, 1, 1)
    return given_for_each(values, ones, "delta")


@pytest.fixture
def llama(tmp_path: Path) -> tuple[CausalLM, AdapterValues]:
    lm = language_model("llama")
    return lm, stacked(lm, "llama", tmp_path)


def of(values: AdapterValues, place: int, count: int = 4) -> Recall:
    chosen = torch.eye(3)[[place] * count].unsqueeze(1)
    return given_for_each(values, chosen, "delta")


def test_two_threads_each_get_their_own(llama: tuple[CausalLM, AdapterValues]) -> None:
    lm, values = llama
    tokens = lm.encode(PROMPTS).tokens
    wanted = [lm.generate(tokens, of(values, place)) for place in (0, 1)]
    found: dict[int, list[Any]] = {0: [], 1: []}

    def ask(place: int) -> None:
        for _ in range(4):
            found[place].append(lm.generate(tokens, of(values, place)))

    threads = [threading.Thread(target=ask, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wanted[0] != wanted[1]
    assert found == {0: [wanted[0]] * 4, 1: [wanted[1]] * 4}


def test_nothing_stays_after_an_error(llama: tuple[CausalLM, AdapterValues]) -> None:
    lm, values = llama
    tokens = lm.encode(PROMPTS).tokens
    plain = lm.logits(tokens)

    def fails(block: int, hidden: Tensor) -> Mixture | None:
        if block:
            raise ArithmeticError("in the second block")
        return of(values, 0)(block, hidden)

    with pytest.raises(ArithmeticError, match="in the second block"):
        lm.logits(tokens, fails)
    assert (lm.call.recall, lm.call.mixture, lm.call.running) == (None, None, False)
    torch.testing.assert_close(lm.logits(tokens), plain)


def test_a_pass_within_a_pass_is_an_error(llama: tuple[CausalLM, AdapterValues]) -> None:
    lm, _ = llama
    tokens = lm.encode(PROMPTS).tokens

    def asks_again(block: int, hidden: Tensor) -> Mixture | None:
        lm.logits(tokens)
        return None

    with pytest.raises(RuntimeError, match="asked anew while it runs"):
        lm.logits(tokens, asks_again)
    lm.logits(tokens)


def test_a_copy_has_a_call_of_its_own(llama: tuple[CausalLM, AdapterValues]) -> None:
    lm, values = llama
    other = copy.deepcopy(lm)
    tokens = lm.encode(PROMPTS).tokens
    assert other.call is not lm.call
    seen: list[bool] = []

    def asks_the_other(block: int, hidden: Tensor) -> Mixture | None:
        seen.append(torch.equal(other.logits(tokens), plain))
        return of(values, 1)(block, hidden)

    plain = lm.logits(tokens)
    found = lm.logits(tokens, asks_the_other)
    assert seen == [True, True]
    torch.testing.assert_close(found, lm.logits(tokens, of(values, 1)))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    lm = language_model("llama")
    values = stacked(lm, "llama", tmp_path)
    for parameter in values.parameters():
        parameter.requires_grad_(True)
    encoded = lm.encode(PROMPTS, ["x", "yes", "7.", "no"])

    def gradients() -> tuple[list[Tensor], int]:
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        values.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = lm.answer_loss(encoded.tokens, encoded.answers, of(values, 1)).sum()
        loss.backward()
        return [p.grad.clone() for p in values.parameters() if p.grad is not None], kept

    plain, whole = gradients()
    lm.gradient_checkpointing()
    again, less = gradients()
    assert len(plain) == len(again) > 0
    assert less < whole / 3
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_model_gives_the_same(llama: tuple[CausalLM, AdapterValues]) -> None:
    lm, values = llama
    tokens = lm.encode(PROMPTS).tokens
    torch.compiler.reset()
    compiled = torch.compile(lm.logits, backend="aot_eager")
    with torch.no_grad():
        for place in (0, 1):
            recall = of(values, place)
            found, wanted = compiled(tokens, recall), lm.logits(tokens, recall)
            torch.testing.assert_close(found[tokens != PAD], wanted[tokens != PAD])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_are_those_of_transformers_with_the_merged_model(family: str, tmp_path: Path) -> None:
    lm = language_model(family)
    values = stacked(lm, family, tmp_path)
    places = (0, 1, 2, 1)
    chosen = torch.eye(3)[list(places)].repeat_interleave(3, dim=0).unsqueeze(1)
    found = lm.generate(lm.encode(PROMPTS).tokens, given_for_each(values, chosen, "delta"), beams=3)
    for answer, place, prompt in zip(found, places, PROMPTS, strict=True):
        merged = adapted(family, place).merge_and_unload()
        row = lm.encode([prompt]).tokens
        said = merged.generate(
            row,
            attention_mask=torch.ones_like(row),
            num_beams=3,
            length_penalty=0.0,
            max_new_tokens=12,
            do_sample=False,
        )
        wanted = said[0, row.shape[1] :].tolist()
        assert answer == (wanted[: wanted.index(2)] if 2 in wanted else wanted)


# Few bits ---------------------------------------------------------------------------------------


def test_four_bits_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings = BackboneSettings(name=f"hf:{write_tiny(tmp_path / 'tiny')}", quantise="4bit")
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        create_causal_lm(settings, LIMITS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_four_bits_are_those_of_bitsandbytes_and_take_adapters(family: str, tmp_path: Path) -> None:
    bits = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "n_inner": 64}
    folder = write_tiny(tmp_path / "tiny", family=family, **sizes)
    settings = BackboneSettings(name=f"hf:{folder}")
    plain = create_causal_lm(settings, LIMITS)
    lm = create_causal_lm(settings.model_copy(update={"quantise": "4bit"}), LIMITS)
    assert lm.sha256 == plain.sha256
    module = lm.sites(lm.targets)[0].module
    packed, frozen = (one.model.get_submodule(_inside(module)).linear for one in (lm, plain))
    assert isinstance(packed, bits.nn.Linear4bit)
    assert packed.weight.dtype == torch.uint8
    weight = bits.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.linear(x, weight.float(), frozen.bias)
    torch.testing.assert_close(packed(x), wanted, rtol=1e-4, atol=1e-4)

    tokens = lm.encode(PROMPTS).tokens
    assert not torch.allclose(lm.logits(tokens), plain.logits(tokens))
    layout = Layout(lm.sites(("q", "o")), 2)
    flat = init_lora(layout, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    values = AdapterValues.from_flat(flat, layout, 1.0)
    answers = lm.generate(tokens, every_of(values))
    assert answers != lm.generate(tokens)
    assert answers[0] == lm.generate(lm.encode(PROMPTS[:1]).tokens, alone(values))[0]


def alone(values: AdapterValues) -> Recall:
    return given_for_each(values, torch.ones(1, 1, 1), "delta")


def _inside(module: str) -> str:
    """The path of an adapted layer within the blocks that stand for the model's own."""
    head, number, rest = module.partition(".0.")
    return f"{head}{number}layer.{rest}"


# Chats ------------------------------------------------------------------------------------------


def test_a_chat_template_frames_the_prompt() -> None:
    text = LIMITS.model_copy(update={"chat": True})
    with pytest.raises(ConfigError, match="no chat template"):
        CausalLM(tiny_model(), tiny_tokenizer(), "tiny", text)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}u: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} a:{% endif %}"
    )
    lm = CausalLM(tiny_model(), tokenizer, "tiny", text)
    row = lm.encode(["hi"]).tokens[0].tolist()
    assert row == [1, *tokenizer("u: hi a:", add_special_tokens=False).input_ids]
