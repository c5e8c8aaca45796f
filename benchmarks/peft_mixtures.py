"""LoRA adapters trained by PEFT, mixed per prompt: a memory beside PEFT's merges and Arrow.

Six tasks of TRACE, an adapter each, trained by `peft` on stories260K and imported as files, with 40
training prompts of each. Loss in nats per answer token, mean over the tasks, on 20 test texts of
each. Weights, densities, Arrow's temperature and its top-k are chosen on 10 validation texts of
each; the memory has nothing that is chosen here. Needs $MEMTOOL_DATA.

Limits: the memory is within 0.25 of the adapters that are told the task; adapters are worth the
same in PEFT and here, to 0.001.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import environment, progress
from memtool.backbones.causal_lm import PAD, EncodedTexts
from memtool.config import resolve
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.routed.measure import answering, as_they_are
from memtool.methods.routed.memory import hardest, only, uniform
from memtool.paths import expand
from memtool.streams.task import Task, Texts, spread

TASKS = ("C-STANCE", "FOMC", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
ASKED, TESTED, TUNED = 40, 20, 10
RANK, EPOCHS, BATCH, RATE = 8, 2, 8, 5e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MERGES = {
    "cat": [{"weight": w} for w in (0.1, 1 / len(TASKS), 0.5)],
    "linear": [{"weight": w} for w in (0.1, 1 / len(TASKS), 0.5)],
    "ties": [{"weight": w, "density": d} for w in (0.5, 1.0) for d in (0.2, 0.5)],
    "dare_ties": [{"weight": w, "density": d} for w in (0.5, 1.0) for d in (0.2, 0.5)],
}
ARROW = [{"top_k": k, "router_temperature": t} for k in (1, 3, 6) for t in (0.1, 1.0, 10.0)]


def _padded(encoded: EncodedTexts) -> list[dict[str, Tensor]]:
    """Batches as transformers take them; labels are those of the answers."""
    found = []
    for rows in torch.arange(len(encoded.tokens)).split(BATCH):
        tokens = encoded.tokens[rows]
        tokens = tokens[:, int((tokens != PAD).any(dim=0).int().argmax()) :]
        real = tokens != PAD
        places = torch.arange(tokens.shape[1])
        answer = places >= tokens.shape[1] - encoded.answers[rows].unsqueeze(1)
        found.append(
            {
                "input_ids": tokens.clamp_min(0),
                "attention_mask": real.long(),
                "position_ids": (real.cumsum(1) - 1).clamp_min(0),
                "labels": tokens.masked_fill(~answer, -100),
            }
        )
    return found


def _loss(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean −log p of the answer tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            many = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * many, count + many
    return total / count


class _Peft:
    """The base model in transformers, and what PEFT makes of it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def base(self) -> Any:
        """A fresh model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def train(self, batches: Sequence[dict[str, Tensor]], seed: int, to: Path) -> None:
        """Train one adapter and save it."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(self.base(), config)
        learned = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(learned, RATE, weight_decay=0.0)
        order = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for place in torch.randperm(len(batches), generator=order).tolist():
                model(**batches[place]).loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        model.save_pretrained(to)

    def alone(self, adapter: Path) -> Any:
        """The model under one adapter."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.base(), adapter).eval()

    def merged(self, adapters: Sequence[Path], kind: str, weight: float, **more: Any) -> Any:
        """The model under one adapter that PEFT makes of all."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.base(), adapters[0], adapter_name="a0")
        names = [f"a{place}" for place in range(len(adapters))]
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(adapter, adapter_name=name)
        torch.manual_seed(0)
        weights = [weight] * len(names)
        model.add_weighted_adapter(names, weights, "all", combination_type=kind, **more)
        model.set_adapter("all")
        return model.eval()

    def arrow(self, adapters: Sequence[Path], **settings: Any) -> Any:
        """The model under PEFT's Arrow: every token chooses adapters, without training."""
        from peft import ArrowConfig, create_arrow_model

        config = ArrowConfig(rng_seed=0, **settings)
        return create_arrow_model(self.base(), [str(one) for one in adapters], config).eval()


def _memory(folder: Path, adapters: Path, tasks: Sequence[Task[Texts]], base: str) -> PromptMemory:
    """The adapters in a memory, with keys from 40 training prompts of each."""
    lines = [
        json.dumps({"adapter": task.name, "prompt": prompt})
        for task in tasks
        for prompt in spread(task.train, ASKED).prompts
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    method = _opened(folder, base)
    method.collect([str(adapters)], folder / "prompts.jsonl")
    method.consolidate()
    return method


def _opened(folder: Path, base: str) -> PromptMemory:
    overrides = {
        "store": str(folder / "memory"),
        "runs": folder / "runs",
        "backbone.name": base,
        "stream.order": ",".join(TASKS),
        "text.epochs": None,
        "engine.device": "cpu",
        "engine.precision": "fp32",
    }
    config = resolve(preset="mira-trace", overrides=overrides, ambient=False).config
    found = PromptMemory.open(config, seed=0)
    assert isinstance(found, PromptMemory)
    return found


def _best(grid: Sequence[dict[str, Any]], make: Callable[..., Any], tuned: Any) -> dict[str, Any]:
    """The settings of a grid with the least mean loss on the validation texts."""

    def loss(settings: dict[str, Any]) -> float:
        model = make(**settings)
        return sum(_loss(model, batches) for batches in tuned)

    return min(grid, key=loss)


def run(repeats: int) -> dict[str, Any]:
    """All of it once; `repeats` is not used, nothing is timed."""
    del repeats
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        return _compared(Path(place))


def _compared(folder: Path) -> dict[str, Any]:
    base = str(resolve(preset="mira-trace", ambient=False).config.backbone.name)
    work = _opened(folder, base).workspace
    peft, lm = _Peft(str(expand(base.removeprefix("hf:")))), work.backbone
    tasks = [work.task(name) for name in TASKS]
    encoded = {
        (task.name, part): lm.encode(samples.prompts, samples.answers)
        for task in tasks
        for part, samples in (
            ("train", task.train),
            ("tuned", spread(task.validation, TUNED)),
            ("test", spread(task.test, TESTED)),
        )
    }

    def batches(part: str) -> list[list[dict[str, Tensor]]]:
        return [_padded(encoded[name, part]) for name in TASKS]

    adapters = [folder / "adapters" / name for name in TASKS]
    for number, (own, adapter) in enumerate(zip(batches("train"), adapters, strict=True)):
        progress(f"peft trains {adapter.name}")
        peft.train(own, number, adapter)
    method = _memory(folder, folder / "adapters", tasks, base)
    test, tuned = batches("test"), batches("tuned")

    def mean(loss: Callable[[int], float]) -> float:
        return sum(loss(place) for place in range(len(TASKS))) / len(TASKS)

    memory = method.read()

    def here(way: Any) -> float:
        found = answering(work, memory, way)
        return mean(lambda place: found.loss(encoded[TASKS[place], "test"]))

    def told(place: int) -> float:
        name, routing = TASKS[place], memory.routing
        (index,) = (i for i, record in enumerate(memory.records) if record.name == name)
        way = only(int(routing.owners[index]), routing.owners)
        return answering(work, memory, way).loss(encoded[name, "test"])

    rows: dict[str, float] = {
        "oracle adapter, in PEFT": mean(lambda i: _loss(peft.alone(adapters[i]), test[i])),
        "oracle adapter, in memtool": mean(told),
        "memory": here(as_they_are),
        "memory, hard choice": here(hardest),
        "uniform mixture": here(uniform),
        "frozen model": mean(lambda i: _loss(peft.base(), test[i])),
    }
    chosen: dict[str, Any] = {}
    makers: dict[str, tuple[Any, Callable[..., Any]]] = {
        f"PEFT {kind}": (grid, partial(peft.merged, adapters, kind))
        for kind, grid in MERGES.items()
    }
    makers["PEFT Arrow"] = (ARROW, partial(peft.arrow, adapters))
    for name, (grid, make) in makers.items():
        progress(name)
        chosen[name] = _best(grid, make, tuned)
        model = make(**chosen[name])
        rows[name] = sum(_loss(model, one) for one in test) / len(test)
    return _result(rows, chosen)


def _result(rows: dict[str, float], chosen: dict[str, Any]) -> dict[str, Any]:
    oracle, other = rows["oracle adapter, in PEFT"], rows["oracle adapter, in memtool"]
    limits = {"memory": oracle + 0.25, "oracle adapter, in memtool": oracle + 1e-3}
    cases = [
        {
            "name": name,
            "value": value,
            "limit": limits.get(name),
            "passed": value <= limits.get(name, math.inf),
            **({"chosen": chosen[name]} if name in chosen else {}),
        }
        for name, value in rows.items()
    ]
    return {
        "environment": environment(),
        "unit": "nats per answer token",
        "cases": cases,
        "passed": all(case["passed"] for case in cases) and abs(oracle - other) <= 1e-3,
    }
