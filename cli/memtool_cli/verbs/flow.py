"""The five steps: train-adapter, write, consolidate, retrieve, eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtool.errors import ConfigError
from memtool.methods.records import numbered
from memtool.remembered import require_held_back
from memtool.settings import choices
from memtool_cli import complete, written
from memtool_cli.commands import Verbs
from memtool_cli.options import (
    ADAPTERS,
    COMPUTE,
    CONFIGURATION,
    DRY_RUN,
    GATE,
    HELD_OUT,
    KEYS,
    LOCK_TIMEOUT,
    MEMORY,
    METHOD,
    MIX,
    RANK,
    SEED,
    SEP,
    SPLIT,
    SPLITS,
    STORE,
    TEXTS,
    Call,
    ImageSubject,
    PromptSubject,
    ReportFile,
    TaskOfForeign,
    TaskSubject,
    examples,
    one_of,
    share,
    verb,
)
from memtool_cli.output import Table, brief, duration, percent, size
from memtool_cli.plan import show_plan
from memtool_cli.predictions import predicted, say_unlike, unlike
from memtool_cli.scores import show
from memtool_cli.unread import say_decided, say_unread_stream

if TYPE_CHECKING:
    from memtool.methods.method import Method
    from memtool.methods.results import AtomsResult, RecallResult, RetrieveResult

app = Verbs()

MOST_SHOWN = 100
"""Adapters of a mixture that are all shown, recalled or not."""


@app.command(
    "train-adapter",
    epilog=examples(
        "memtool train-adapter --task 3",
        "memtool train-adapter --task inverted --rank 8 --fresh",
        "memtool train-adapter --task 1 --dry-run --json",
        "dir=$(memtool train-adapter --task 2 -q)",
    ),
)
@verb(
    STORE,
    METHOD,
    MEMORY,
    *GATE,
    RANK,
    *ADAPTERS,
    SPLITS,
    HELD_OUT,
    SEED,
    *COMPUTE,
    *CONFIGURATION,
    DRY_RUN,
)
def train_adapter(
    call: Call,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Number from 1, or name.",
            rich_help_panel="Training",
            autocompletion=complete.tasks,
        ),
    ],
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh/--resume",
            help="Train anew, or go on where an interrupted training was.",
            rich_help_panel="Training",
        ),
    ] = False,
) -> None:
    """Train the adapter of one task, as a PEFT directory under runs/."""
    if call.dry_run:
        return show_plan(call, "train-adapter", task=task)
    with call.out.progress() as progress:
        results = call.method(progress).adapt(task, fresh=fresh)
    rows = [
        (
            result.name,
            f"{result.task} {result.task_name}",
            "-" if result.train_accuracy is None else percent(result.train_accuracy),
            f"{result.loss:.4f}",
            duration(result.seconds),
            size(result.bytes),
            result.path,
        )
        for result in results
    ]
    columns = ("adapter", "task", "train accuracy", "loss", "time", "size", "path")
    call.out.data(results, Table(columns, rows), ids=[result.path for result in results])
    if any(result.skipped for result in results):
        call.out.note("trained already; --fresh trains it anew")
    call.out.next(call.command("write"))
    return None


@app.command(
    "write",
    epilog=examples(
        "memtool write",
        "memtool write runs/adapters/my-adapter",
        "memtool write --store shared/memory -q",
    ),
)
@verb(
    STORE,
    LOCK_TIMEOUT,
    METHOD,
    MEMORY,
    RANK,
    SPLITS,
    HELD_OUT,
    SEED,
    *COMPUTE,
    *CONFIGURATION,
    DRY_RUN,
)
def write(
    call: Call,
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="PEFT directories; none: all not yet in memory."),
    ] = None,
    task: TaskOfForeign = None,
) -> None:
    """Put trained adapters into the memory, as one version."""
    call.refuse_version()
    if call.dry_run:
        return show_plan(call, "write")
    written.write(call, directories or None, task=task)
    return None


@app.command(
    "consolidate",
    epilog=examples(
        "memtool consolidate",
        "memtool consolidate --sep affine",
        "memtool consolidate --set consolidate.epochs=10 --set consolidate.lr=0.02",
    ),
)
@verb(
    STORE,
    LOCK_TIMEOUT,
    METHOD,
    SEP,
    MIX,
    *KEYS,
    MEMORY,
    RANK,
    SPLITS,
    HELD_OUT,
    SEED,
    *COMPUTE,
    *CONFIGURATION,
    DRY_RUN,
    remembers=True,
)
def consolidate(call: Call) -> None:
    """Let the memory learn the keys of its adapters, as one version."""
    call.refuse_version()
    if call.dry_run:
        return show_plan(call, "consolidate")
    with call.out.progress() as progress:
        result = call.method(progress).consolidate()
    rows: list[tuple[str, str]] = [
        ("version", result.version),
        ("tasks", numbered(result.tasks)),
    ]
    if result.schema_ == "memtool.consolidate":
        rows += [
            ("separation", result.separation),
            ("mix", result.mix),
            ("key learning", f"{result.epochs} epochs"),
            ("train accuracy", percent(result.train_accuracy)),
            *(
                [("validation accuracy", percent(result.validation_accuracy))]
                if result.validation_accuracy is not None
                else []
            ),
            ("drift of older keys", f"{result.key_drift_degrees:.2f} degrees"),
        ]
        rows.append(("time", duration(result.seconds)))
    elif result.schema_ == "memtool.consolidate-moram":
        if result.head is not None:
            rows.append(("head", f"{result.head}, {result.scope}"))
    elif result.schema_ == "memtool.consolidate-routed":
        if result.new:  # nothing where all of a collection is solved anew from what was kept
            rows.append(("new", numbered(result.new)))
        rows.append(("time", duration(result.seconds)))
    else:
        rows.append(("memories", ", ".join(result.memories)))
        if result.train_task_accuracy is not None:
            right = percent(result.train_task_accuracy)
            rows.append(("task predictor", f"{result.epochs} epochs, {right} of training tasks"))
        rows.append(("time", duration(result.seconds)))
    call.out.data(result, Table((), rows), ids=[result.version])
    if result.schema_ == "memtool.consolidate-moram" and result.head is None:
        call.out.note(
            "there is nothing to learn: atoms find themselves, and the model has its head"
        )
    elif result.unchanged:
        call.out.note("nothing changed since the last consolidation: no new version")
    call.out.next(_after(call))
    return None


@app.command(
    "retrieve",
    epilog=examples(
        "memtool retrieve --image photo.png --json",
        "memtool retrieve --query query.safetensors --store memory@HEAD~1",
        "memtool retrieve --preset modulation-til --task 7 --memory bayes-pcn --out adapter",
        "memtool retrieve --preset moram-trace --prompt 'Once upon a time'",
    ),
)
@verb(STORE, METHOD, MEMORY, RANK, SPLITS, HELD_OUT, SEED, *COMPUTE, *CONFIGURATION, remembers=True)
def retrieve(
    call: Call,
    task: TaskSubject = None,
    image: ImageSubject = None,
    prompt: PromptSubject = None,
    query: Annotated[
        Path | None,
        typer.Option(
            "--query",
            metavar="FILE",
            help="Queries as safetensors.",
            rich_help_panel="Memory",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write the mixture as a PEFT directory.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Show the mixture of adapters that a task, an image, a prompt or a query recalls."""
    call.require_one_subject("retrieve", task=task, image=image, prompt=prompt, query=query)
    say_decided(call)
    if query is not None:
        say_unread_stream(call)
    with call.out.progress() as progress:
        result = call.method(progress).retrieve(
            task=task, image=image, prompt=prompt, query=query, version=call.version, out=out
        )
    if result.schema_ == "memtool.recall":
        _show_recall(call, result)
    elif result.schema_ == "memtool.retrieve-atoms":
        _show_atoms(call, result)
    else:
        _show_mixture(call, result)
    call.out.next(_after(call))


def _after(call: Call) -> str:
    """What comes next for a memory that was consolidated: a collection has no texts of its own."""
    if call.reads_texts and not call.config.stream.names_texts:
        return call.command("generate --prompt TEXT")
    return call.command("eval")


def _show_mixture(call: Call, result: RetrieveResult) -> None:
    shown = [*range(len(result.adapters))]
    if len(shown) > MOST_SHOWN:  # of so many only those that are recalled
        shown = [place for place in shown if any(block[place] for block in result.blocks)]
    named = [result.adapters[place] for place in shown]
    best = sorted(named, key=lambda adapter: -abs(adapter.coefficient))
    mixture = Table(
        ("adapter", "task", "coefficient"),
        [(a.name, a.task, f"{a.coefficient:.3f}") for a in best],
        title=f"{brief(result.subject)}: {result.separation}, {result.mix}, "
        f"version {result.version}",
    )
    blocks = Table(
        ("block", *(adapter.name for adapter in named)),
        [
            (
                # One look of a language model is behind its last block, and for all of them.
                "all" if call.reads_texts and len(result.blocks) == 1 else number,
                *(f"{block[place]:.3f}" for place in shown),
            )
            for number, block in zip(result.block_numbers, result.blocks, strict=True)
        ],
    )
    first = predicted(result.prediction, result.answer, result.novelty)
    call.out.data(result, *first, mixture, blocks, ids=[adapter.name for adapter in best[:1]])
    say_unlike(call.out, result.prediction)
    if result.unlike:
        call.out.note(unlike(result.novelty, "prompts"))
    if result.accuracy is not None:
        call.out.note(f"accuracy on {result.samples} samples: {percent(result.accuracy)}")
    if result.left_out is not None:
        left = percent(result.left_out)
        call.out.note(f"separation topk leaves out {left} of the softmax of all adapters")
    if result.loss is not None:
        call.out.note(f"loss on {result.samples} texts: {result.loss:.3f} nats per answer token")
    if result.out is not None:
        call.out.note(f"the mixture is in {result.out}")


def _show_atoms(call: Call, result: AtomsResult) -> None:
    tasks = sorted(result.tasks, key=lambda one: -one.share)
    shares = Table(
        ("atoms of", "task", "share"),
        [(one.name, one.task, f"{one.share:.3f}") for one in tasks],
        title=f"{brief(result.subject)}: norm over the {result.score_norm}, {result.topk} atoms "
        f"a token, version {result.version}",
    )
    blocks = Table(
        ("block", *(one.name for one in result.tasks)),
        [
            (number, *(f"{share:.3f}" for share in block))
            for number, block in zip(result.block_numbers, result.blocks, strict=True)
        ],
    )
    atoms = Table(
        ("atom at", "task", "number", "share of what is added there"),
        [(atom.site, atom.task, atom.rank, percent(atom.share)) for atom in result.atoms],
    )
    first = predicted(result.prediction, result.answer)
    call.out.data(result, *first, shares, blocks, atoms, ids=[one.name for one in tasks[:1]])
    missing = 1 - sum(one.share for one in tasks)
    call.out.note(f"{percent(missing)} of the weight fell below the threshold")
    say_unlike(call.out, result.prediction)
    if result.accuracy is not None:
        call.out.note(f"accuracy on {result.samples} samples: {percent(result.accuracy)}")
    if result.loss is not None:
        call.out.note(f"loss on {result.samples} texts: {result.loss:.3f} nats per answer token")


def _show_recall(call: Call, result: RecallResult) -> None:
    facts = [
        ("memory", f"{result.memory}, {result.stored} adapters"),
        ("key", f"{result.key_numbers:,} numbers"),
        ("recalled", result.adapter),
        ("recall error", f"{result.recall_error:.2e}"),
        ("energy", f"{result.energy:.6g}"),
        ("novelty", f"{result.novelty:.3f}"),
    ]
    tables = predicted(result.prediction, result.answer)
    tables += [Table((), facts, title=f"{brief(result.subject)}, version {result.version}")]
    if result.shares:
        best = sorted(result.shares, key=lambda one: -abs(one.share))[:10]
        rows = [(one.name, one.task, f"{one.share:.6f}") for one in best]
        tables.append(Table(("adapter", "task", "share"), rows))
    call.out.data(result, *tables, ids=[result.adapter])
    if result.novelty > 0.5:
        call.out.note("this key is unlike every stored one; what was recalled may mean nothing")
    if result.accuracy is not None:
        call.out.note(f"accuracy of the recalled adapter on its task: {percent(result.accuracy)}")
    if result.loss is not None:
        loss = f"{result.loss:.3f} nats per answer token"
        call.out.note(f"loss of the recalled adapter on its task: {loss}")
    if result.out is not None:
        call.out.note(f"the recalled adapter is in {result.out}")


@app.command(
    "eval",
    epilog=examples(
        "memtool eval --history --compare --report report.html",
        "memtool eval --texts texts.jsonl --compare peft",
        "memtool eval --store memory@HEAD~2 --split validation --json",
        "memtool eval --at-least 0.85 -q || echo worse than before",
    ),
)
@verb(
    STORE,
    METHOD,
    MEMORY,
    RANK,
    SPLITS,
    SPLIT,
    HELD_OUT,
    TEXTS,
    SEED,
    *COMPUTE,
    *CONFIGURATION,
    DRY_RUN,
    remembers=True,
)
def evaluate(
    call: Call,
    rivals: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[peft]",
            help="With --compare on a collection of LoRA: what `peft` makes of the same adapters.",
        ),
    ] = None,
    setting: Annotated[
        str | None,
        typer.Option(
            "--setting",
            metavar="|".join(choices("stream.setting")),
            help="What is known at test time; without it, that of the stream.",
            rich_help_panel="Memory",
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history",
            help="Also after every earlier task, by reading the old versions.",
            rich_help_panel="Memory",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also hard choice, uniform mixture and the oracle adapter; of texts the frozen "
            "model.",
            rich_help_panel="Memory",
        ),
    ] = False,
    unseen: Annotated[
        bool,
        typer.Option(
            "--unseen",
            help="Also the tasks that are not in memory (MIRA, MoRAM; always in setting xtail).",
            rich_help_panel="Memory",
        ),
    ] = False,
    report: ReportFile = None,
    at_least: Annotated[
        str | None,
        typer.Option(
            "--at-least",
            metavar="SHARE",
            help="Exit with 1 when the final average accuracy is lower: 0.85 or 85%.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Measure the memory on the test samples of all its tasks, or on what was held back."""
    if setting is not None:
        one_of("--setting", setting, choices("stream.setting"))
    least = None if at_least is None else share("--at-least", at_least)
    if call.dry_run:
        return show_plan(call, "eval")
    if rivals and not compare:
        raise ConfigError(f"{rivals[0]} without --compare", remedy=f"--compare {rivals[0]}")
    report = report and call.writes_to(report)
    say_decided(call)
    if call.config.stream.split == "validation":
        require_held_back(call.store(), call.config, call.version)
    if least is not None and call.reads_texts and not call.config.text.generate:
        raise ConfigError(
            "--at-least where only losses are measured",
            expected="an accuracy to compare it with",
            remedy="--set text.generate=true",
        )
    with call.out.progress() as progress:
        method = call.method(progress)
        more = _also_measured(method, unseen=unseen, rivals=rivals or ())
        record = method.evaluate(
            setting=setting,
            version=call.version,
            history=history,
            compare=compare,
            command=call.line,
            preset=call.resolved.preset,
            **more,
        )
        if report is not None:
            stream = method.workspace.stream
            every = stream.tasks if stream.held_out is None else (*stream.tasks, stream.held_out)
            shown = [task for task in every if task.name in record.run.task_names]
            inside = method.inside(shown, call.version)
            record = record.model_copy(update={"inside": inside})
    average = show(call.out, [record], history=history, report=report)
    if least is not None and average < least:
        call.out.note(f"final average accuracy {average:.4f} is below {least:g}")
        raise typer.Exit(1)
    if report is None:
        call.out.next(call.command("eval --history --compare --report report.html"))
    return None


def _also_measured(method: Method, *, unseen: bool, rivals: Sequence[str]) -> dict[str, Any]:
    """What only some methods measure. Raises ConfigError for what this one does not."""
    name = method.workspace.config.method
    if unseen and not method.measures_unseen:
        raise ConfigError(
            f"--unseen under method {name}",
            expected="method mira or moram, of images: other memories have no classes of tasks "
            "they never saw",
        )
    for rival in rivals:
        if not method.rivals:
            raise ConfigError(
                f"--compare {rival} under method {name}",
                expected="method mira over texts: a memory of whole LoRA of a language model",
            )
        one_of("--compare", rival, method.rivals)
    more: dict[str, Any] = {"unseen": True} if unseen else {}
    return more | ({"rivals": tuple(dict.fromkeys(rivals))} if rivals else {})
