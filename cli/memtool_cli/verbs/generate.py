"""generate: a language model answers prompts, each by the mixture of adapters that it recalls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memtool.errors import ConfigError
from memtool_cli import records
from memtool_cli.commands import Verbs
from memtool_cli.options import COMPUTE, CONFIGURATION, METHOD, STORE, Call, examples, verb
from memtool_cli.output import Table

if TYPE_CHECKING:
    from torch import Tensor

    from memtool.methods.attached import AttachedTexts
    from memtool_stores import MemoryView

app = Verbs()

SHOWN = 3
"""Adapters of an answer that a person is shown."""

LEAST_TOLD = 0.0005
"""A weight below this is not told."""


@app.command(
    "generate",
    epilog=examples(
        "memtool generate --prompt 'Once upon a time'",
        "memtool generate --prompts prompts.jsonl --json",
        "memtool generate --prompt 'Once upon a time' --task poems",
        "memtool generate --prompt '<image> What colour is it?' --image photo.png",
    ),
)
@verb(STORE, METHOD, *COMPUTE, *CONFIGURATION, remembers=True)
def generate(
    call: Call,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="A prompt.", rich_help_panel="Memory"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='Many: one a line, as text or as {"prompt": "…"}, perhaps with "image".',
            rich_help_panel="Memory",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="A picture of --prompt, for a model of images and text; repeatable.",
            rich_help_panel="Memory",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Use the adapter of this task for all of them.",
            rich_help_panel="Memory",
        ),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option(
            "--most", metavar="N", min=1, help="Tokens of an answer.", rich_help_panel="Output"
        ),
    ] = None,
    beams: Annotated[
        int,
        typer.Option(
            "--beams",
            metavar="N",
            min=1,
            max=64,
            help="Search the most probable answer with N beams; 1: token by token.",
            rich_help_panel="Output",
        ),
    ] = 1,
) -> None:
    """Answer prompts; the weights that a prompt chooses stay while it is answered."""
    if (prompt is None) == (prompts is None):
        said = "what should be answered?" if prompt is None else "--prompt and --prompts together"
        raise ConfigError(said, expected="one of --prompt and --prompts")
    if image and prompts is not None:
        raise ConfigError(
            "--image with --prompts, a file that names its pictures itself",
            expected='lines of {"prompt": "…", "image": "photo.png"}',
        )
    view = call.view()
    if not call.reads_texts:
        raise ConfigError(
            f"the memory {call.store_path!r} reads images, and generates no texts",
            expected="a memory over a language model",
            remedy="memtool retrieve --image FILE",
        )
    from memtool.inference.sources import prompts_in
    from memtool.methods.attached import AttachedTexts
    from memtool.streams import with_pictures

    asked = (
        with_pictures([prompt], [image] if image else None)
        if prompt is not None
        else prompts_in(prompts or Path())
    )
    if not all(one.strip() for one in asked):
        raise ConfigError("a prompt is empty", expected="text with a visible character")
    with call.out.progress() as progress:
        method = call.method(progress)
        precision = method.workspace.engine.precision
        model = method.attach(call.version, task=task, precision=precision)
        assert isinstance(model, AttachedTexts)
        model.eval().requires_grad_(False)
        batch = call.config.engine.eval_batch_size
        texts, weights = model.answered(asked, batch=batch, most=most, beams=beams)
    answers = tuple(
        records.Answer(prompt=one, text=text, weights=_named(model.names, row))
        for one, text, row in zip(asked, texts, weights, strict=True)
    )
    result = records.Generated(version=view.version, answers=answers)
    rows = [
        (" ".join(f"{one.name} {one.weight:.2f}" for one in answer.weights[:SHOWN]), answer.text)
        for answer in answers
    ]
    table = Table(("adapters", "answer"), rows)
    call.out.data(result, table, ids=[answer.text for answer in answers])
    _say_left_out(call, view, model, asked, by_name=task is not None)


def _say_left_out(
    call: Call, view: MemoryView, model: AttachedTexts, asked: list[str], *, by_name: bool
) -> None:
    """Say which adapters no prompt can choose, and how many prompts were cut."""
    silent = [record.name for record in view.live if record.name not in model.names]
    if silent and not by_name:
        call.out.note(
            f"{len(silent)} of {len(view.live)} adapters have no key ({', '.join(silent[:3])}): "
            "memtool consolidate, or memtool import with their prompts before"
        )
    lm = model.backbone
    if cut := lm.encode(asked).cut_prompts:
        call.out.note(
            f"{cut} prompts were longer than {lm.prompt_tokens} tokens (text.prompt_tokens), and "
            "cut: their end was read"
        )


def _named(names: tuple[str, ...], weights: Tensor) -> tuple[records.Weight, ...]:
    """The weights of one prompt that count, the largest first."""
    found = sorted(zip(names, weights.tolist(), strict=True), key=lambda one: -one[1])
    return tuple(records.Weight(name=n, weight=w) for n, w in found if w >= LEAST_TOLD)
