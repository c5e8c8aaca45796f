"""Collections of models with fused or transposed layers, and with the names training leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memtool.backbones.answering import RecallOf, answers
from memtool.methods.export import export_peft
from memtool.methods.routed.attached import RoutedTexts
from tests.backbones.tiny_lm import tiny_tokenizer, write_tiny
from tests.methods.facts import write_facts
from tests.methods.test_collection import (
    PROMPTS,
    opened,
    products,
    slow_answer,
    write_adapter,
    write_prompts,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)
LAYERS = {
    "gpt2": (["c_attn"], ["mlp.c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "phi3": (["qkv_proj"], ["gate_up_proj", "o_proj"], {}),
    "gemma3_text": (["q_proj", "v_proj"], ["gate_proj", "down_proj"], {}),
}
NAMES = ("{}", "_orig_mod.{}", "module.{}")


def renamed(folder: Path, pattern: str) -> None:
    """The tensors of an adapter as torch.compile, or training on several devices, saves them."""
    file = folder / "adapter_model.safetensors"
    tensors = {pattern.format(name): one for name, one in load_file(file).items()}
    if pattern == "module.{}":
        tensors = {n.replace(".weight", ".default.weight"): one for n, one in tensors.items()}
    save_file(tensors, file)


@pytest.fixture(params=LAYERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of a family, and three unlike adapters, two with names of another style."""
    folder = write_facts(tmp_path / "place")
    family = request.param
    shutil.rmtree(folder / "model")
    write_tiny(folder / "model", family=family, max_position_embeddings=128)
    some, others, own = LAYERS[family]
    shapes: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 3, "target_modules": some},
        {"r": 3, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
        {"r": 1, "lora_alpha": 2, "target_modules": others, "layers_to_transform": [1]},
    ]
    for seed, (name, shape) in enumerate(zip(PROMPTS, shapes, strict=True)):
        write_adapter(folder / "model", folder / "adapters" / name, seed, **shape, **own)
    shutil.copytree(folder / "adapters", folder / "plain")
    for name, pattern in zip(PROMPTS, NAMES, strict=True):
        renamed(folder / "adapters" / name, pattern)
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    return folder


def test_a_mixed_batch_answers_as_models_with_the_changes_added(
    place: Path, tmp_path: Path
) -> None:
    method = opened(place, tmp_path / "made")
    method.collect([str(place / "adapters")], place / "prompts.jsonl")
    method.consolidate()
    model = method.attach()
    assert isinstance(model, RoutedTexts)
    assert model.names == tuple(PROMPTS)
    asked = [PROMPTS[name][1] for name in PROMPTS]
    assert model.weights(asked).argmax(dim=1).tolist() == [0, 1, 2]
    weights = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.3, 0.3, 0.4]])
    lm = model.backbone.double()
    rows = iter(range(3))
    recall = RecallOf(lambda prompts: model.routing.recall(weights[[next(rows)]].double()))
    found = [answers(lm, [prompt], recall, most=6)[0] for prompt in asked]
    shutil.rmtree(place / "adapters")
    shutil.copytree(place / "plain", place / "adapters")  # with the names that peft reads
    for row, prompt, answer in zip(weights.tolist(), asked, found, strict=True):
        base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64).eval()
        state = base.state_dict()
        for name, weight in zip(PROMPTS, row, strict=True):
            for key, delta in products(place, name).items():
                state[key] += weight * delta
        base.load_state_dict(state)
        ids = list(tiny_tokenizer()(prompt).input_ids)
        said = slow_answer(base, ids, 6, lm.ends)
        assert answer == lm.decode(said).strip()


def test_files_and_mixtures_come_out(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path / "made")
    method.collect([str(place / "adapters")], place / "prompts.jsonl")
    export_peft(method.workspace, None, out=tmp_path / "back")
    for name in PROMPTS:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            original = (place / "adapters" / name / file).read_bytes()
            assert (tmp_path / "back" / name / file).read_bytes() == original
    method.consolidate()
    found = method.retrieve(prompt=PROMPTS["letters"][0], out=tmp_path / "mixture")
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    before = {key: one.clone() for key, one in base.state_dict().items()}
    mixture = PeftModel.from_pretrained(base, tmp_path / "mixture")  # warnings are errors
    of_gpt2 = type(base).__name__.startswith("GPT2")
    assert mixture.peft_config["default"].fan_in_fan_out is of_gpt2
    (name,) = [one.name for one in found.adapters if one.coefficient > 0.99]
    shutil.rmtree(place / "adapters")
    shutil.copytree(place / "plain", place / "adapters")  # with the names that peft reads
    added = products(place, name)
    for key, one in mixture.merge_and_unload().state_dict().items():
        torch.testing.assert_close(one - before[key], added[key], atol=1e-3, rtol=1e-2)
