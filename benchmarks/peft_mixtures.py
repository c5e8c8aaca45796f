"""LoRA adapters trained by PEFT, mixed per prompt: a memory beside PEFT's merges and Arrow.

Six tasks of TRACE, an adapter each, trained by `peft` on stories260K and imported as files, with 40
training prompts of each. The rows are those of `memtool eval --compare peft`: loss in nats per
answer token, mean over the tasks, on 20 test texts of each. Weights, densities, Arrow's temperature
and its top-k are chosen on 20 validation texts of each; the memory has nothing that is chosen here.
Needs $MEMTOOL_DATA.

Limits: the memory is within 0.25 of the adapters that are told the task; adapters are worth the
same in PEFT and here, to 0.001.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import environment, progress
from memtool.backbones.answering import trimmed
from memtool.backbones.causal_lm import EncodedTexts
from memtool.config import resolve
from memtool.methods.mira.peft_rows import PeftLM, load_base
from memtool.methods.mira.prompts import PromptMemory
from memtool.streams.task import spread
from memtool.workspace import Workspace

TASKS = ("C-STANCE", "FOMC", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
ASKED, TESTED = 40, 20
RANK, EPOCHS, BATCH, RATE = 8, 2, 8, 5e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _train(work: Workspace, texts: EncodedTexts, seed: int, to: Path) -> None:
    """Train one adapter by `peft`, and save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(work), config)
    lm = PeftLM(work.backbone, model)
    learned = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, RATE, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    batches = torch.arange(len(texts.tokens)).split(BATCH)
    for _ in range(EPOCHS):
        for place in torch.randperm(len(batches), generator=order).tolist():
            tokens, answers = trimmed(texts.tokens[batches[place]]), texts.answers[batches[place]]
            (lm.answer_loss(tokens, answers).sum() / answers.sum()).backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(to)


def _opened(folder: Path) -> PromptMemory:
    overrides = {
        "store": str(folder / "memory"),
        "runs": folder / "runs",
        "stream.order": ",".join(TASKS),
        "stream.test_per_task": TESTED,
        "text.epochs": None,
        "engine.device": "cpu",
        "engine.precision": "fp32",
    }
    config = resolve(preset="mira-trace", overrides=overrides, ambient=False).config
    found = PromptMemory.open(config, seed=0)
    assert isinstance(found, PromptMemory)
    return found


def run(repeats: int) -> dict[str, Any]:
    """All of it once; `repeats` is not used, nothing is timed."""
    del repeats
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        return _compared(Path(place))


def _compared(folder: Path) -> dict[str, Any]:
    method = _opened(folder)
    work, adapters = method.workspace, folder / "adapters"
    lines = []
    for number, task in enumerate(work.stream.tasks):
        progress(f"peft trains {task.name}")
        encoded = work.backbone.encode(task.train.prompts, task.train.answers)
        _train(work, encoded, number, adapters / task.name)
        prompts = spread(task.train, ASKED).prompts
        lines += [json.dumps({"adapter": task.name, "prompt": prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    method.collect([str(adapters)], folder / "prompts.jsonl")
    method.consolidate()
    progress("measured beside PEFT")
    record = method.evaluate(compare=True, rivals=("peft",))
    rows = {row.id: row for row in record.metrics.rows}
    losses = {id: row.metrics["loss.final"] for id, row in rows.items()}
    oracle, other = losses["peft-oracle"], losses["oracle"]
    limits = {"memory": oracle + 0.25, "oracle": oracle + 1e-3}
    cases = [
        {
            "name": rows[id].label,
            "value": value,
            "limit": limits.get(id),
            "passed": value <= limits.get(id, math.inf),
        }
        for id, value in losses.items()
    ]
    return {
        "environment": environment(),
        "unit": "nats per answer token",
        "cases": cases,
        "passed": all(case["passed"] for case in cases) and abs(oracle - other) <= 1e-3,
    }
