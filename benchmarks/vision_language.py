"""Three tasks of questions about pictures on a small LLaVA: the memory beside frozen and oracle.

A random LLaVA made here (CLIP, a projection, Llama: 0.2 million parameters; one token a character),
and pictures of coloured figures drawn here. Each task asks one thing, in a language of its own: the
colour in English, the figure in French, how many in German. The five verbs as `memtool run` does
them: an adapter a task, keys from what the frozen model sees, questions answered by the mixture.
Losses in nats per answer token on test pictures, mean over the tasks.

Limits: the mixture is below the frozen model, and within 0.1 of the adapters that are told the
task; and of the colour the memory says less when it is shown another picture.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.small_llava import MARK, SIDE, small_config, small_processor
from benchmarks.timing import environment, progress
from memtool.config import resolve
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.routed.measure import answering
from memtool.pictured import Prompt

TRAINED, TESTED = 240, 60
WITHIN = 0.1
COLOURS = {"red": (220, 30, 30), "green": (30, 170, 40), "blue": (40, 60, 220)}
FIGURES = {"disc": "cercle", "box": "carré", "rise": "triangle"}
COUNTS = {1: "eins", 2: "zwei", 4: "vier"}
ASKED = {
    "colour": "which colour?",
    "shape": "quelle forme ?",
    "count": "wie viele sind es?",
}


def write_model(folder: Path) -> None:
    """The random model and its processor, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

    letters = sorted(set("".join([*ASKED.values(), *COLOURS, *FIGURES.values(), *COUNTS.values()])))
    words = ["<unk>", "<s>", "</s>", MARK, *letters]
    cut = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    cut.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    cut.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cut, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    small_processor(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    config = small_config(text, mark=words.index(MARK), width=64, num_attention_heads=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def draw(file: Path, chance: random.Random) -> dict[str, str]:
    """A picture of figures that are alike, and what is to be said of it for each task."""
    from PIL import Image, ImageDraw

    colour, figure, count = (chance.choice(list(one)) for one in (COLOURS, FIGURES, COUNTS))
    image = Image.new("RGB", (SIDE, SIDE), (235, 235, 235))
    pen = ImageDraw.Draw(image)
    for place in chance.sample(range(4), count):
        left, top = (
            12 * (place % 2) + chance.randint(0, 2),
            12 * (place // 2) + chance.randint(0, 2),
        )
        box = (left, top, left + 9, top + 9)
        if figure == "disc":
            pen.ellipse(box, fill=COLOURS[colour])
        elif figure == "box":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(left, top + 9), (left + 9, top + 9), (left + 4, top)], COLOURS[colour])
    image.save(file)
    return {"colour": colour, "shape": FIGURES[figure], "count": COUNTS[count]}


def write_stream(folder: Path, trained: int = TRAINED, tested: int = TESTED) -> None:
    """A folder a task, with train.json, test.json and its pictures."""
    for task, question in ASKED.items():
        chance = random.Random(task)
        (folder / task / "pictures").mkdir(parents=True)
        for part, count in (("train", trained), ("test", tested)):
            entries = []
            for number in range(count):
                name = f"pictures/{part}-{number}.png"
                said = draw(folder / task / name, chance)
                prompt = f"{MARK} {question}"
                entries.append({"prompt": prompt, "answer": said[task], "image": name})
            (folder / task / f"{part}.json").write_text(json.dumps(entries), encoding="utf-8")


def opened(folder: Path, **changes: Any) -> PromptMemory:
    """MIRA over the model in `model` and the stream in `stream`."""
    overrides = {
        "store": str(folder / "memory"),
        "runs": folder / "runs",
        "backbone.name": f"hf:{folder / 'model'}",
        "backbone.targets": ("q", "k", "v", "o", "gate", "up", "down"),
        "stream.source": str(folder / "stream"),
        "stream.order": tuple(ASKED),
        "adapter.rank": 16,
        "adapter.alpha": 32.0,
        "train.epochs": 12,
        "train.batch_size": 16,
        "train.lr": 5e-3,
        "text.prompt_tokens": None,
        "text.answer_tokens": None,
        "text.epochs": None,
        "text.dropout": 0.0,
        "text.generate": True,
        "engine.device": "cpu",
        "engine.precision": "fp32",
        **changes,
    }
    found = PromptMemory.open(
        resolve(preset="mira-trace", overrides=overrides, ambient=False).config, seed=0
    )
    assert isinstance(found, PromptMemory)
    return found


def run(repeats: int) -> dict[str, Any]:
    """All of it once; `repeats` is not used, nothing is timed."""
    del repeats
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder / "model")
        write_stream(folder / "stream")
        return measured(opened(folder))


def measured(method: PromptMemory) -> dict[str, Any]:
    """The five verbs, and the losses of the memory beside those that bound it."""
    work = method.workspace
    for task in work.stream.tasks:
        progress(f"{task.name}: an adapter learns")
        method.adapt(str(task.number))
        method.write()
    method.consolidate()
    progress("measured")
    record = method.evaluate(compare=True)
    rows = {row.id: row for row in record.metrics.rows}
    losses = {id: row.metrics["loss.final"] for id, row in rows.items()}
    limits = {"memory": min(losses["frozen"], losses["oracle"] + WITHIN)}
    cases = [
        {
            "name": f"{rows[id].label}: nats per answer token",
            "value": value,
            "limit": limits.get(id),
            "passed": value <= limits.get(id, value),
        }
        for id, value in losses.items()
    ]
    cases += [
        _case(f"{rows[id].label}: right answers", rows[id].metrics["op.trace"], None)
        for id in ("memory", "oracle")
        if "op.trace" in rows[id].metrics
    ]
    name = "colour: nats with its own picture, less those with another"
    cases.append(_case(name, -_of_other_pictures(method), 0.0))
    return {
        "environment": environment(),
        "cases": cases,
        "passed": all(case["passed"] for case in cases),
    }


def _case(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "passed": limit is None or value <= limit,
    }


def _of_other_pictures(method: PromptMemory) -> float:
    """How much more the answers of the first task cost with the pictures of others, in nats."""
    work = method.workspace
    task = work.stream.tasks[0]
    own, answers = task.test.prompts, task.test.answers
    moved = own[1:] + own[:1]
    others = [Prompt(str(one), other.album.pictures) for one, other in zip(own, moved, strict=True)]
    said = answering(work, method.snapshot("HEAD"))
    return said.loss(work.backbone.encode(others, answers)) - said.loss(
        work.backbone.encode(own, answers)
    )
