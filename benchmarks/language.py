"""Hundreds of LoRA of one language model: import, and answers beside PEFT and the frozen model.

A random Llama of about 100 million parameters, adapters of rank 8 at q and v with random numbers.
Answers: a batch of 8 prompts of 128 tokens, 32 greedy tokens each, float32; every prompt uses three
adapters of its own. `repeats` rounds, each candidate once a round; ratios of the medians, and
`spread` their least and greatest by round.

Limits: at most 1.15 times PEFT with one adapter for all; with 50 adapters in memory at most 1.1
times the same with those alone that are used; a store at most 1.05 times its files.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.timing import environment, interleaved, progress
from memtool.config import resolve
from memtool.methods.mira.prompts import PromptMemory

STORED, USED, BATCH, PROMPT, ANSWER, RANK = 50, 3, 8, 128, 32, 8
MANY = 1000
WORDS = 8192


def _model(folder: Path, *, hidden: int, layers: int) -> None:
    """A random Llama with a tokenizer of numbered words, as `save_pretrained` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _adapter(folder: Path, base: Path, seed: int, hidden: int, layers: int) -> None:
    """Random numbers as `peft` saves them."""
    generator = torch.Generator().manual_seed(seed)
    stem = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    tensors = {}
    for layer in range(layers):
        for name in "qv":
            a, b = (
                torch.randn(RANK, hidden, generator=generator),
                torch.randn(hidden, RANK, generator=generator),
            )
            tensors[stem.format(layer, name, "A")] = 0.02 * a
            tensors[stem.format(layer, name, "B")] = 0.02 * b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _opened(folder: Path, base: Path) -> PromptMemory:
    overrides = {
        "store": str(folder / "memory"),
        "backbone.name": f"hf:{base}",
        "backbone.targets": ("q", "v"),
        "memory.look_at": ("tokens",),
        "text.prompt_tokens": None,
        "text.answer_tokens": None,
        "text.epochs": None,
        "engine.device": "cpu",
        "engine.precision": "fp32",
    }
    config = resolve(preset="mira-trace", overrides=overrides, environ={"MEMTOOL_DATA": "."}).config
    found = PromptMemory.open(config, seed=0)
    assert isinstance(found, PromptMemory)
    return found


def _asked(count: int) -> dict[str, list[str]]:
    """Example prompts: every adapter has words of its own."""
    span = (WORDS - 3) // count
    return {
        f"a{n:04}": [
            " ".join(f"w{3 + n * span + (7 * k + i) % span}" for i in range(20)) for k in range(4)
        ]
        for n in range(count)
    }


@dataclass(frozen=True)
class Imported:
    """What making a memory took: seconds of the import and of the keys, bytes of the import."""

    import_seconds: float
    key_seconds: float
    peak_bytes: int


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _imported(
    folder: Path, base: Path, count: int, *, keyed: bool = True, **shape: int
) -> tuple[PromptMemory, Imported]:
    """A memory of so many adapters, with keys where it is `keyed`, and what it took."""
    for number in range(count):
        _adapter(folder / "adapters" / f"a{number:04}", base, number, **shape)
    lines = [
        json.dumps({"adapter": name, "prompt": prompt})
        for name, asked in _asked(count).items()
        for prompt in asked
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    method = _opened(folder, base)
    _ = method.sites  # the model is opened
    before, begin = _peak(), time.perf_counter()
    method.collect([str(folder / "adapters")], folder / "prompts.jsonl")
    peak, between = _peak(), time.perf_counter()
    if keyed:
        method.consolidate()
    end = time.perf_counter()
    return method, Imported(between - begin, end - between, peak - before)


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _collection(place: Path) -> list[dict[str, Any]]:
    """A thousand small adapters: import, bytes, and the first answer."""
    shape = {"hidden": 256, "layers": 4}
    base = place / "small"
    _model(base, **shape)
    _, few = _imported(place / "fewer", base, MANY // 4, keyed=False, **shape)
    method, took = _imported(place / "many", base, MANY, **shape)
    files, store = (_nbytes(place / "many" / name) for name in ("adapters", "memory"))
    kept = sum(
        len(method.workspace.store.view().blob(name))
        for name in method.workspace.store.view().blobs()
        if name.startswith("looks.")
    )
    begin = time.perf_counter()
    model = _opened(place / "many", base).attach()
    attached = time.perf_counter() - begin
    (asked,) = _asked(MANY)["a0500"][:1]
    (weights,) = model.weights([asked])  # type: ignore[operator]
    right = int(weights.argmax()) == 500
    return [
        _case(f"import of {MANY} adapters, s", took.import_seconds),
        _case("their keys, s", took.key_seconds),
        _case(f"peak memory of the import of {MANY // 4}, MB", few.peak_bytes / 1e6),
        _case(f"more for {MANY}, MB", took.peak_bytes / 1e6),
        _case("their files, MB", files / 1e6),
        _case("store / files, without what is kept of prompts", (store - kept) / files, 1.05),
        _case("what is kept of prompts / files", kept / files),
        _case("attach, s", attached),
        _case("a prompt finds its adapter among them", float(right)),
    ]


def _case(name: str, value: float, limit: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "passed": limit is None or value <= limit,
        **more,
    }


def _answers(place: Path, repeats: int) -> list[dict[str, Any]]:
    """Answers of a mixed batch, beside PEFT and the frozen model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shape = {"hidden": 768, "layers": 12}
    base = place / "large"
    _model(base, **shape)
    method, _ = _imported(place / "fifty", base, STORED, **shape)
    lm, routing = method.workspace.backbone, method.read().routing
    lm.ends = (-2,)  # an answer has its full length
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, WORDS, (BATCH, PROMPT), generator=generator)
    weights = torch.zeros(BATCH, STORED)
    for row in range(BATCH):
        chosen = torch.randperm(STORED, generator=generator)[:USED]
        weights[row, chosen] = torch.tensor([0.5, 0.3, 0.2])
    used = weights.any(dim=0).nonzero()[:, 0]
    few, _ = _imported(place / "few", base, len(used), **shape)
    few_routing = few.read().routing
    few.workspace.backbone = lm
    adapters = [str(place / "fifty" / "adapters" / f"a{n:04}") for n in range(BATCH)]
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    one = PeftModel.from_pretrained(theirs, adapters[0], adapter_name="a0").eval()
    for number, adapter in enumerate(adapters[1:], start=1):
        one.load_adapter(adapter, adapter_name=f"a{number}")
    one.set_adapter("a0")
    names = [f"a{number}" for number in range(BATCH)]
    said = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def of_peft(most: int = ANSWER, **more: Any) -> object:
        length = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False}
        with torch.no_grad():
            return one.generate(**said, **length, **more)

    def frozen() -> object:
        with one.disable_adapter():
            return of_peft()

    def ours(most: int = ANSWER) -> object:
        return lm.generate(tokens, routing.recall(weights), most=most)

    candidates: dict[str, Callable[[], object]] = {
        "memory": ours,
        "memory, prompt": lambda: ours(1),
        "memory of those alone": lambda: lm.generate(
            tokens, few_routing.recall(weights[:, used]), most=ANSWER
        ),
        "ours, frozen": lambda: lm.generate(tokens, None, most=ANSWER),
        "transformers, frozen": frozen,
        "peft, one adapter": of_peft,
        "peft, prompt": lambda: of_peft(1),
        "peft, adapter_names": lambda: of_peft(adapter_names=names),
    }
    seconds = interleaved(candidates, repeats)
    for whole, prompt in (("memory", "memory, prompt"), ("peft, one adapter", "peft, prompt")):
        both = zip(seconds[whole], seconds[prompt], strict=True)
        seconds[prompt.replace("prompt", "tokens")] = [a - b for a, b in both]
    pairs = (
        ("memory", "peft, one adapter", 1.15),
        ("memory, prompt", "peft, prompt", 1.15),
        ("memory, tokens", "peft, tokens", 1.15),
        ("memory", "memory of those alone", 1.10),
        ("memory", "peft, adapter_names", None),
        ("memory", "ours, frozen", None),
        ("memory", "transformers, frozen", None),
        ("peft, one adapter", "transformers, frozen", None),
    )
    cases = []
    for name, other, limit in pairs:
        ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
        value = statistics.median(seconds[name]) / statistics.median(seconds[other])
        cases.append(_case(f"{name} / {other}", value, limit, spread=[min(ratios), max(ratios)]))
    return cases


def run(repeats: int) -> dict[str, Any]:
    """A thousand adapters in a store, then answers of fifty."""
    with tempfile.TemporaryDirectory() as place:
        progress(f"{MANY} adapters")
        cases = _collection(Path(place))
        progress("answers")
        cases += _answers(Path(place), repeats)
    return {
        "environment": environment(),
        "cases": cases,
        "passed": all(case["passed"] for case in cases),
    }
