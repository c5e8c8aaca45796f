"""predict: what a memory says of pictures and prompts; calibrate: when it had better be silent."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from memtool.errors import ConfigError
from memtool.progress import ProgressEvent
from memtool_cli import complete, records
from memtool_cli.commands import Verbs
from memtool_cli.failure import NO
from memtool_cli.options import (
    COMPUTE,
    CONFIGURATION,
    LOCK_TIMEOUT,
    METHOD,
    STORE,
    Call,
    examples,
    verb,
)
from memtool_cli.output import Out, Table, duration, percent
from memtool_stores.files import is_special, is_stdout
from memtool_stores.printable import as_cell, printable

if TYPE_CHECKING:
    from memtool.inference.pictures import Told
    from memtool.inference.predictor import Predictor
    from memtool.methods.calibration import Threshold
    from memtool.methods.method import Method
    from memtool.progress import Progress
    from memtool_stores import MemoryView

app = Verbs()

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""The formats of --out, by the suffix of the file."""

ADAPTERS_SHOWN = 2
"""Adapters of a prediction that a table on a terminal has room for."""


Wrong = Annotated[
    float | None,
    typer.Option(
        "--wrong",
        metavar="SHARE",
        help="With --reject: the share of images that may get a wrong label (0.05).",
        rich_help_panel="Memory",
        show_default=False,
    ),
]


Pictures = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH ...]",
        help="Pictures: files, folders, patterns between quotes; - for a list of paths on stdin.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='For a language model: one a line, as text or as {"prompt": "…"}.',
        rich_help_panel="Memory",
    ),
]
RowsFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write the rows to FILE.csv or FILE.jsonl; - is CSV on stdout.",
        rich_help_panel="Output",
    ),
]


@app.command(
    "predict",
    epilog=examples(
        "memtool predict photos --out predictions.csv",
        "memtool predict 'photos/*.jpg' --reject --wrong 0.01 --out sure.jsonl",
        "find photos -name '*.png' | memtool predict - --out -",
        "memtool predict --store texts@good --prompts prompts.jsonl --json",
    ),
)
@verb(STORE, METHOD, *COMPUTE, *CONFIGURATION, remembers=True)
def predict(
    call: Call,
    paths: Pictures = None,
    prompts: Prompts = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="All inputs are of this task: use its adapter.",
            rich_help_panel="Memory",
            autocompletion=complete.remembered,
        ),
    ] = None,
    reject: Annotated[
        bool,
        typer.Option(
            "--reject",
            help="Give no label where the memory is not sure enough (memtool calibrate).",
            rich_help_panel="Memory",
        ),
    ] = False,
    wrong: Wrong = None,
    out: RowsFile = None,
    topk: Annotated[
        int,
        typer.Option(
            "--topk", metavar="K", min=1, help="Classes of a row.", rich_help_panel="Output"
        ),
    ] = 5,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            min=1,
            max=65536,
            help="Pictures (64) or prompts in one pass.",
            rich_help_panel="Compute",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            max=64,
            help="Threads that read and decode pictures.",
            rich_help_panel="Compute",
        ),
    ] = 2,
) -> None:
    """Say of every picture what it shows, or answer every prompt; one row each, in their order."""
    if (prompts is None) == (not paths):
        said = "what should be predicted?" if prompts is None else "paths and --prompts together"
        raise ConfigError(said, expected="paths of pictures, or --prompts FILE")
    if wrong is not None and not reject:
        raise ConfigError("--wrong without --reject", remedy=f"--reject --wrong {wrong:g}")
    file = None if out is None else call.writes_to(out)
    rows = _Rows(call.out, _format(call, out), file)
    view = call.view()
    _require_kind(call, texts=prompts is not None)
    if prompts is not None:
        if reject:
            raise ConfigError(
                "--reject with --prompts: answers have no probability that could be calibrated",
                expected="pictures",
            )
        return _answer(call, view, rows, prompts, task, batch)
    from memtool.inference.pictures import BATCH
    from memtool.inference.sources import files_named

    words = paths or []
    _require_a_pipe(words)
    named = files_named(words, sys.stdin.buffer)
    for note in named.notes:
        call.out.note(f"note: {note}")
    threshold = _threshold(call, view, wrong, task) if reject else None
    with call.out.progress() as progress:
        predictor = _predictor(call.method(progress), view, task)
        shown = min(topk, len(predictor.classes))
        told = _told(predictor, named.files, progress, threshold, shown, batch or BATCH, workers)
        return _pictures(call, view, rows, told, shown, threshold)


@app.command(
    "calibrate",
    epilog=examples(
        "memtool calibrate",
        "memtool calibrate --wrong 0.01 --json",
    ),
)
@verb(STORE, LOCK_TIMEOUT, METHOD, *COMPUTE, *CONFIGURATION, remembers=True)
def calibrate(call: Call, wrong: Wrong = None) -> None:
    """Measure how sure the memory is of images that were held back, for predict --reject."""
    call.store_to_change()
    from memtool.inference.calibrate import calibrate as measure
    from memtool.methods.calibration import WRONG

    with call.out.progress() as progress:
        result = measure(call.method(progress), wrong=WRONG if wrong is None else wrong)
    rows = [
        ("version", result.version),
        ("held-back images", f"{result.images:,}"),
        ("right", percent(result.accuracy_of_all)),
        ("least odds to the next class", _odds(result.odds)),
        ("coverage", percent(result.coverage)),
        ("right of those", percent(result.accuracy)),
    ]
    call.out.data(result, Table((), rows), ids=[result.version])
    call.out.note(
        f"with --reject at most {percent(result.wrong)} of images like these get a wrong label"
    )
    if not result.coverage:
        call.out.note(
            "so the memory is never sure enough: allow more with --wrong, or let it learn from more"
        )
    if result.unchanged:
        call.out.note("nothing changed since the last calibration: no new version")
    given = "" if wrong is None else f" --wrong {wrong:g}"
    call.out.next(call.command(f"predict PATH --reject{given}"))


# Pictures ---------------------------------------------------------------------------------------


def _predictor(method: Method, view: MemoryView, task: str | None) -> Predictor:
    from memtool.inference.predictor import Predictor
    from memtool.memory import Memory
    from memtool.methods.attached import AttachedImages

    work = method.workspace
    model = method.attach(view.version, task=task, precision=work.engine.precision)
    assert isinstance(model, AttachedImages)
    model.eval().requires_grad_(False)
    return Predictor(Memory(work.store, view, work.config), model.to(work.engine.device))


def _told(
    predictor: Predictor,
    files: Sequence[Path],
    progress: Progress,
    threshold: Threshold | None,
    topk: int,
    batch: int,
    workers: int,
) -> Iterator[Told]:
    """What is told of every file; where the memory is not sure enough, that it abstains."""
    from memtool.inference.pictures import predicted

    told = predicted(predictor, files, topk=topk, batch=batch, workers=workers)
    for done, one in enumerate(told, start=1):
        said = one.predicted
        if threshold is not None and said is not None and said.sure < threshold.sure:
            one = replace(one, abstained=True)
        yield one
        progress(ProgressEvent("predict", done, len(files)))


def _pictures(
    call: Call,
    view: MemoryView,
    rows: _Rows,
    told: Iterable[Told],
    topk: int,
    threshold: Threshold | None,
) -> None:
    """Write a row for each, and say what came of them all. Exits with 1 where a file was broken."""
    from memtool.inference import rows as form

    began = time.perf_counter()
    counts = dict.fromkeys(("files", "predicted", "abstained", "unlike"), 0)
    broken: list[str] = []
    columns = ("file", "label", "probability", "adapters", "unlike")
    with rows.open(form.picture_header(topk), columns):
        for one in told:
            cells = form.picture_cells(one, topk)
            rows.add(cells, form.picture_document(one), cells[1], _short(one))
            said = one.predicted
            counts["files"] += 1
            if said is None:
                broken.append(one.problem or "")
                continue
            counts["abstained" if one.abstained else "predicted"] += 1
            counts["unlike"] += bool(said.unlike)
    seconds = time.perf_counter() - began
    answerable = counts["predicted"] + counts["abstained"]
    result = records.Predicted(
        version=view.version,
        **counts,
        broken=len(broken),
        coverage=counts["predicted"] / answerable if threshold and answerable else None,
        odds=None if threshold is None else threshold.odds,
        seconds=seconds,
        out=rows.file,
    )
    rows.close(result)
    _say(call.out, result, threshold, broken)
    if broken:
        raise typer.Exit(NO)


def _short(one: Told) -> tuple[str, ...]:
    """The cells of a picture on a terminal."""
    from memtool.inference.rows import as_file

    said = one.predicted
    if said is None:
        return (as_file(one.file), "-", "-", "could not be read", "")
    weights = [f"{share.adapter} {share.weight:.2f}" for share in said.weights[:ADAPTERS_SHOWN]]
    label = "abstains" if one.abstained else said.label
    unlike = "unlike" if said.unlike else ""
    return (as_file(one.file), label, percent(said.probability), ", ".join(weights), unlike)


def _say(
    out: Out, result: records.Predicted, threshold: Threshold | None, broken: Sequence[str]
) -> None:
    from memtool.inference.sources import TOLD

    if threshold is not None and result.coverage is not None:
        out.note(
            f"coverage {percent(result.coverage)}: {result.abstained} of "
            f"{result.predicted + result.abstained} images have no label: the best class is "
            f"less than {_odds(threshold.odds)} times as probable as the next, or the image is "
            f"unlike all that was learned. Of {threshold.images} held-back images "
            f"{percent(threshold.coverage)} have one, and {percent(threshold.accuracy)} of these "
            "labels are right"
        )
    if result.unlike:
        out.note(
            f"{result.unlike} of {result.predicted + result.abstained} images are unlike all that "
            "the memory learned: what it says of them means little"
        )
    for problem in broken[:TOLD]:
        out.note(f"error: {problem}")
    if len(broken) > TOLD:
        out.note(f"and {len(broken) - TOLD:,} more")
    left = f"; {len(broken):,} could not be read" if broken else ""
    done = result.predicted + result.abstained
    rate = f", {done / result.seconds:.0f} a second" if result.seconds else ""
    out.note(f"{done:,} images in {duration(result.seconds)}{rate}{left}")


def _threshold(call: Call, view: MemoryView, wrong: float | None, task: str | None) -> Threshold:
    """From how sure on the memory answers. Raises ConfigError where that was never measured."""
    from memtool.inference.calibrate import TRAIN_ANEW
    from memtool.methods.calibration import WRONG, Calibration, calibration_of

    if task is not None:
        raise ConfigError(
            "--reject with --task: how sure the memory is was measured without the task",
            expected="one of the two",
        )
    found = calibration_of(view)
    if found is not None:
        return found.threshold(WRONG if wrong is None else wrong)
    then = "has changed since it was" if view.has_blob(Calibration.blob) else "was never"
    held = call.config.stream.validation
    remedy = call.command("calibrate")
    if not held:
        remedy = f"{TRAIN_ANEW}, then memtool calibrate"
    elif view.version != call.store().head():
        remedy = f"--store {call.store_path}, after memtool calibrate"
    raise ConfigError(
        f"--reject: the memory {call.store_path!r} {then} calibrated at version {view.version}, "
        "so that nothing says how sure is sure enough",
        expected="a version that memtool calibrate made",
        remedy=remedy,
    )


def _require_kind(call: Call, *, texts: bool) -> None:
    """Raise ConfigError where pictures meet a memory of texts, or prompts one of images."""
    if call.reads_texts == texts:
        return
    if texts:
        raise ConfigError(
            f"--prompts: the memory {call.store_path!r} reads images",
            expected="pictures",
            remedy=call.command("predict FOLDER"),
        )
    raise ConfigError(
        f"the memory {call.store_path!r} is of a language model, and looks at no pictures",
        expected="--prompts FILE",
        remedy=call.command("predict --prompts FILE"),
    )


def _require_a_pipe(words: Sequence[str]) -> None:
    if "-" in words and sys.stdin.isatty():
        raise ConfigError(
            "- reads a list of paths from stdin, and that is a terminal",
            expected="a program that writes one path a line",
            remedy="find photos -name '*.jpg' | memtool predict -",
        )


# Prompts ----------------------------------------------------------------------------------------


def _answer(
    call: Call,
    view: MemoryView,
    rows: _Rows,
    prompts: Path,
    task: str | None,
    batch: int | None,
) -> None:
    from memtool.inference import rows as form
    from memtool.inference.answers import answered
    from memtool.inference.sources import prompts_in
    from memtool.methods.attached import AttachedTexts

    asked = prompts_in(prompts)
    began, unlike = time.perf_counter(), 0
    with call.out.progress() as progress:
        method = call.method(progress)
        precision = method.workspace.engine.precision
        model = method.attach(view.version, task=task, precision=precision)
        assert isinstance(model, AttachedTexts)
        model.eval().requires_grad_(False)
        size = batch or call.config.engine.eval_batch_size
        told = answered(method, view, model, asked, batch=size)
        with rows.open(form.PROMPT_HEADER, ("adapters", "answer")):
            for done, one in enumerate(told, start=1):
                cells = form.prompt_cells(one)
                document = form.prompt_document(one)
                rows.add(cells, document, one.answer, (cells[2], one.answer))
                unlike += bool(one.unlike)
                progress(ProgressEvent("predict", done, len(asked)))
    result = records.PredictedPrompts(
        version=view.version,
        prompts=len(asked),
        unlike=unlike,
        seconds=time.perf_counter() - began,
        out=rows.file,
    )
    rows.close(result)
    if unlike:
        call.out.note(
            f"{unlike} of {len(asked)} prompts are unlike all that the memory learned from: what "
            "it says means little"
        )


# Rows -------------------------------------------------------------------------------------------


def _format(call: Call, out: Path | None) -> str:
    """In what form rows come out. Raises ConfigError for a file that has none by its name."""
    if out is None:
        if call.out.json:
            return "jsonl"
        if call.out.quiet:
            return "labels"
        return "columns" if call.out.machine else "table"
    if str(out) == "-" or is_special(out):
        return "jsonl" if call.out.json else "csv"
    found = SUFFIXES.get(out.suffix.lower())
    if found is None:
        raise ConfigError(
            f"--out {printable(str(out))}: what its rows should be does not follow from its name",
            expected="a name that ends in .csv or .jsonl, or - for CSV on stdout",
        )
    return found


class _Rows:
    """Where rows go, one by one: a file that appears whole, or stdout as they come."""

    def __init__(self, out: Out, form: str, file: Path | None) -> None:
        self._out, self._form = out, form
        self.file = None if file is None or is_stdout(file) else file
        self._stream: TextIO = sys.stdout
        self._table: list[tuple[str, ...]] = []
        self._columns: tuple[str, ...] = ()

    @contextmanager
    def open(self, header: Sequence[str], columns: tuple[str, ...]) -> Iterator[None]:
        """Rows can be added inside; `columns` are those of a table on a terminal."""
        self._columns = columns
        if self.file is None:
            if not self._stream.isatty() and hasattr(self._stream, "reconfigure"):
                # A file name need not be text: its bytes come out as they are.
                self._stream.reconfigure(encoding="utf-8", errors="surrogateescape")
            self._begin(header)
            yield
            self._stream.flush()
            return
        with _appearing(self.file) as self._stream:
            self._begin(header)
            yield

    def _begin(self, header: Sequence[str]) -> None:
        if self._form in ("csv", "columns"):
            self._line(header)

    def add(
        self,
        cells: Sequence[str],
        document: dict[str, Any],
        label: str,
        short: tuple[str, ...],
    ) -> None:
        """One row, in the form that is wanted: CSV, JSON, its label alone, or a table's."""
        from memtool.inference.rows import write_document

        if not self._out.speaks:
            return
        match self._form:
            case "jsonl":
                write_document(self._stream, document)
            case "labels":
                self._stream.write(printable(label) + "\n")
            case "table":
                self._table.append(short)
                return
            case _:
                self._line(cells)
        if self.file is None:
            self._stream.flush()

    def _line(self, cells: Sequence[str]) -> None:
        from memtool.inference.rows import write_cells

        if self._form == "columns":
            plain = (as_cell(printable(" ".join(cell.split()))) for cell in cells)
            self._stream.write("\t".join(plain) + "\n")
        elif self._stream.isatty():
            write_cells(self._stream, [printable(cell) for cell in cells])
        else:
            write_cells(self._stream, cells)

    def close(self, result: records.Predicted | records.PredictedPrompts) -> None:
        """What is printed once all rows are there: the table, or what was written."""
        if self._form == "table":
            self._out.data(result, Table(self._columns, self._table), ids=())
        elif self.file is not None:
            said = result.model_dump(mode="json", by_alias=True)
            facts = [
                (name.replace("_", " "), _fact(name, value))
                for name, value in said.items()
                if value is not None and not name.startswith("schema")
            ]
            self._out.data(result, Table((), facts), ids=[self.file])


def _odds(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _fact(name: str, value: Any) -> str:
    if name == "odds":
        return _odds(value)
    if name == "seconds":
        return duration(value)
    if name == "coverage":
        return percent(value)
    return str(value)


@contextmanager
def _appearing(file: Path) -> Iterator[TextIO]:
    """A text file that is there once the block ended well. MemtoolError where it cannot be."""
    import io

    from memtool.atomic import cannot_write
    from memtool_stores.files import appearing

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with appearing(file) as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="")
            yield text
            text.flush()
            text.detach()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(file, error) from error
