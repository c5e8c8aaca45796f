"""The options that verbs share, each declared once, and what a verb is called with.

    @app.command("write", epilog=examples("memtool write"))
    @verb(STORE, SEED, *COMPUTE, *CONFIGURATION)
    def write(call: Call, directories: Annotated[list[Path] | None, typer.Argument()] = None):
        ...

`verb` adds the shared options to the signature that Typer reads, and hands their values over as
one `Call`. An option of a setting is only another way to write it, so that every value is checked
in one place, `memtool.config.resolve`, whatever way it came.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memtool.config import Resolved, is_record, parse_assignment, resolve
from memtool.errors import ConfigError, NotFoundError, did_you_mean
from memtool.paths import at_home, split_store, without_home
from memtool.settings import Config
from memtool_cli import complete
from memtool_cli.output import Out
from memtool_cli.shared import Shared, as_text, setting, switch
from memtool_cli.terminal import Plain
from memtool_stores.printable import printable, shown
from memtool_stores.redacted import redacted

if TYPE_CHECKING:
    from memtool.evaluation.selection import Selection
    from memtool.methods.method import Method
    from memtool.progress import Progress
    from memtool_stores import MemoryStore, MemoryView


STORE = setting(
    "--store",
    "store",
    "Memory",
    "The memory: a folder; verbs that only read also take FOLDER@VERSION.",
    metavar="PATH",
    autocompletion=complete.stores,
)
LOCK_TIMEOUT = setting(
    "--lock-timeout",
    "lock_timeout",
    "Memory",
    "How long to wait for another process that writes.",
    metavar="SECONDS",
)
SEP = setting("--sep", "memory.separation", "Memory", "How similarities become coefficients.")
MIX = setting("--mix", "memory.mix", "Memory")
RANK = setting("--rank", "adapter.rank", "Training", "Rank of the adapters.", metavar="N")
MEMORY = setting(
    "--memory",
    "modulation.memory",
    "Memory",
    "Modulation: the memories that recall whole adapters, separated by commas.",
)
METHOD = setting(
    "--method",
    "method",
    "Training",
    "How the memory is grown and read; another package's as module:Class.",
)
GATE = (
    setting("--score-norm", "moram.score_norm", "Memory", "MoRAM: norm of the responses."),
    setting("--topk", "moram.topk", "Memory", "MoRAM: atoms that a token keeps.", metavar="K"),
    setting(
        "--temperature", "moram.temperature", "Memory", "MoRAM: of the softmax.", metavar="TAU"
    ),
    setting(
        "--threshold",
        "moram.threshold",
        "Memory",
        "MoRAM: least score that counts in evaluation.",
        metavar="DELTA",
    ),
)
SPLITS = setting(
    "--splits", "stream.splits", "Training", "Tasks that the classes are cut into.", metavar="N"
)
SPLIT = setting(
    "--split",
    "stream.split",
    "Memory",
    "What is measured: test samples, or those held back (stream.validation).",
)
HELD_OUT = setting(
    "--held-out",
    "stream.held_out",
    "Training",
    "Settings dg and dgcl: the domain that nothing is learned from.",
    metavar="DOMAIN",
    autocompletion=complete.tasks,
)
ADAPTERS = (
    setting(
        "--adapters-per-task",
        "adapter.per_task",
        "Training",
        "Adapters that each task leaves.",
        metavar="N",
    ),
    setting(
        "--warm-start",
        "adapter.warm_start",
        "Training",
        "Where training starts: at the adapter before, the mean of all, or zero.",
    ),
)
KEYS = (
    setting("--routing", "memory.routing", "Memory", "A mixture, or one task's adapters."),
    setting("--query-module", "memory.query", "Memory", "What a block's input goes through."),
    setting("--protect", "consolidate.protect", "Memory", "What key learning may not change."),
    setting("--head", "head.kind", "Memory", "The classifier on the features."),
)
BASELINES = setting(
    "--baselines",
    "baselines",
    "Training",
    "What is trained beside the memory, separated by commas.",
)
BUFFER = setting(
    "--buffer",
    "replay.buffer",
    "Training",
    "Samples that the baselines er and der++ keep.",
    metavar="N",
)
BASE = setting(
    "--base",
    "backbone.name",
    "Memory",
    "The language model of a collection of LoRA adapters.",
    metavar="hf:MODEL",
    implies={
        "method": "mira",
        "stream.setting": "trace",
        "memory.look_at": ("blocks", "tokens"),
        "engine.precision": "fp32",
    },
)
TEXTS = setting(
    "--texts",
    "stream.source",
    "Memory",
    'A collection of LoRA: what it is measured on, lines as {"adapter": "poems", "prompt": "…", '
    '"answer": "…"}; or a stream of texts.',
    metavar="FILE",
    implies={"stream.setting": "trace", "text.epochs": None},
)
SEED = setting(
    "--seed",
    "seed",
    "Training",
    "Seed; `run` takes several: 0,1,2 or 0..4.",
    metavar="N",
    type=list[str] | None,
)
ORDERS = (
    setting("--vary", "vary", "Training", "What each seed changes."),
    setting(
        "--orders", "orders", "Training", "As configured; or the hardest, median and easiest one."
    ),
)
COMPUTE = (
    setting("--device", "engine.device", "Compute", "Where tensors live."),
    setting("--precision", "engine.precision", "Compute", "Number format of the computation."),
)
CONFIGURATION = (
    Shared(
        "--preset",
        Annotated[
            str | None,
            typer.Option(
                "--preset",
                metavar="NAME",
                help="Settings that ship with memtool (`memtool config presets`).",
                rich_help_panel="Configuration",
                autocompletion=complete.preset_names,
            ),
        ],
    ),
    Shared(
        "--config",
        Annotated[
            Path | None,
            typer.Option(
                "--config",
                metavar="FILE",
                help="A YAML file of settings, or the record of a run (.json).",
                rich_help_panel="Configuration",
            ),
        ],
    ),
    Shared(
        "--set",
        Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="KEY=VALUE",
                help="Any setting by its key; may be repeated.",
                rich_help_panel="Configuration",
                autocompletion=complete.settings,
            ),
        ],
    ),
)
DRY_RUN = switch("--dry-run", "Output", "Only say what would be done.")
YES = switch("--yes", "Dangerous", "Do not ask.")
OUTPUT = (
    switch("--json", "Output", "One JSON document a record, nothing else on stdout."),
    switch("--quiet", "Output", "Only ids or one number on stdout, nothing on stderr.", "-q"),
    switch("--verbose", "Output", "Also what the library logs.", "-v"),
    switch("--debug", "Output", "The traceback of an error."),
)


TaskOfForeign = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="What an adapter that memtool did not train was trained on.",
        rich_help_panel="Memory",
        autocompletion=complete.tasks,
    ),
]

ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write an HTML page.", rich_help_panel="Output"),
]

RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed", help="Run again what ended with an error.", rich_help_panel="Training"
    ),
]

TaskSubject = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="The test samples of a task, by number or name.",
        rich_help_panel="Memory",
        autocompletion=complete.tasks,
    ),
]
ImageSubject = Annotated[
    Path | None,
    typer.Option(
        "--image", metavar="FILE", help="A picture, or that of --prompt.", rich_help_panel="Memory"
    ),
]
PromptSubject = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="What a language model is asked (setting trace).",
        rich_help_panel="Memory",
    ),
]


@dataclass(frozen=True)
class Call:
    """One invocation: the shared options that were given, and what follows from them.

    With `remembers` a setting that nobody gave is as the memory was made with it.
    """

    given: Mapping[str, Any]
    shared: tuple[Shared, ...]
    remembers: bool = False

    @cached_property
    def out(self) -> Out:
        """Where the verb writes to."""
        return Out(json=self.given["json"], quiet=self.given["quiet"])

    @cached_property
    def resolved(self) -> Resolved:
        """The configuration in force. Raises ConfigError, NotFoundError.

        What was asked for in vain is said on stderr.
        """
        found = self.resolve()
        found.config.limits.put_in_force()
        if not self.out.json:
            for sentence in self._without_effect(found):
                self.out.note(f"note: {sentence}")
        return found

    def _without_effect(self, found: Resolved) -> tuple[str, ...]:
        """What was asked for in vain: of the method, or of a verb that asks the store alone."""
        if RANK in self.shared:
            return found.without_effect()
        if self._asks_the_store_alone:
            return found.without_effect(reads=OF_THE_STORE)
        return ()

    @property
    def _asks_the_store_alone(self) -> bool:
        return STORE in self.shared and COMPUTE[0] not in self.shared

    def resolve(self, *, ambient: bool = True) -> Resolved:
        """The configuration; without `ambient` only what the command line names counts."""
        given: dict[str, Any] = {
            "preset": self.given.get("preset"),
            "file": self.given.get("config"),
            "overrides": self._overrides(),
            "ambient": ambient,
        }
        if not self.remembers:
            return resolve(**given, of_store=self._asks_the_store_alone)
        from memtool.remembered import remembered
        from memtool_stores import MemoryStore

        found = resolve(**given, of_store=True)
        found.config.limits.put_in_force()
        path, version = split_store(found.config.store)
        if not MemoryStore.exists(path):
            return resolve(**given)
        made_with = remembered(MemoryStore.open(path), version)
        return resolve(**given, remembered=made_with)

    def _overrides(self) -> dict[str, Any]:
        """The settings of the command line. Raises ConfigError for two values of one."""
        found: dict[str, Any] = {}
        written: dict[str, str] = {}

        def put(key: str, value: Any, how: str) -> None:
            if key in found and as_text(found[key]) != as_text(value):
                raise ConfigError(
                    f"{written[key]} and {how}: {key} is given twice", expected="one value"
                )
            found[key], written[key] = value, how

        for text in self.given.get("set") or ():
            put(*parse_assignment(text), f"--set {text}")
        for option in self.shared:
            value = self.given[option.name]
            if option.setting and value not in (None, []):
                put(option.setting, value, f"{option.flag} {as_text(value)}")
        for option in self.shared:
            if self.given[option.name] not in (None, []):
                found = {**option.implies, **found}
        return found

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.resolved.config

    @property
    def selected(self) -> Selection | None:
        """What the rows of the record of --config were chosen to have; None where it is no record.

        Raises the errors of `read_record`.
        """
        file = self.given.get("config")
        if file is None or not is_record(file):
            return None
        from memtool.evaluation.record import read_record

        return read_record(at_home(file)).run.selection

    @property
    def seed(self) -> int:
        """The one seed of a verb that takes one step. Raises ConfigError for several."""
        if len(self.config.seed) > 1:
            raise ConfigError(
                f"{len(self.config.seed)} seeds ({self.resolved.origin['seed']})",
                expected="one: a memory grows by one run",
                remedy="--seed N, or `memtool run` for all of them",
            )
        return self.config.seed[0]

    @property
    def dry_run(self) -> bool:
        """Whether only the plan is wanted."""
        return bool(self.given.get("dry_run"))

    @property
    def store_path(self) -> str:
        """Where the memory is, without a version."""
        return split_store(self.config.store)[0]

    @property
    def version(self) -> str:
        """The version that the store was named with, else HEAD."""
        return split_store(self.config.store)[1]

    def store(self) -> MemoryStore:
        """The memory on disk. Raises NotFoundError, and the errors of the store."""
        from memtool_stores import MemoryStore

        if not MemoryStore.exists(self.store_path):
            raise NotFoundError(
                f"no memory at {self.store_path!r}",
                remedy=f"{self.command('train-adapter --task 1')} && {self.command('write')}; "
                f"{self.command('import DIR --base MODEL')} for LoRA of a language model; "
                "or --store PATH for a memory elsewhere",
            )
        return MemoryStore.open(self.store_path, lock_timeout=self.config.lock_timeout)

    def view(self, version: str | None = None) -> MemoryView:
        """The memory at `version`, else at the version that the store was named with."""
        return self.store().view(version or self.version)

    def store_to_change(self) -> MemoryStore:
        """The memory on disk, named without a version: history is only ever added to."""
        self.refuse_version()
        return self.store()

    def refuse_version(self) -> None:
        """Raise ConfigError when the store was named with a version, which can only be read."""
        path, version = split_store(self.config.store)
        if path != self.config.store:
            raise ConfigError(
                f"--store {self.config.store}: version {version} can be read, not written to",
                expected=path,
                remedy=f"--store {path}, perhaps after `memtool rollback {version}`",
            )

    def writes_to(self, file: Path) -> Path:
        """The file that the verb writes; `-` is stdout, and what is printed goes to stderr then.

        Raises ConfigError for a folder, before any work is done.
        """
        file = Path("/dev/stdout") if str(file) == "-" else file
        if file.is_dir():
            raise ConfigError(f"{file} is a folder", expected="the name of a file")
        self.out.leave_stdout_to(file)
        return file

    @property
    def reads_texts(self) -> bool:
        """Whether the stream is one of texts, not of images."""
        return self.config.stream.setting == "trace"

    def method(self, progress: Progress | None = None) -> Method:
        """The method over this configuration, with one seed."""
        from memtool.methods import open_method

        return open_method(self.config, seed=self.seed, progress=progress)

    def require_one_subject(
        self,
        verb: str,
        *,
        task: str | None,
        image: Path | None,
        prompt: str | None,
        query: Path | None = None,
    ) -> None:
        """Raise ConfigError unless there is one thing to look at, and of the stream's kind."""
        texts = self.reads_texts
        if texts and prompt is not None:  # its picture, for a model of images and text
            image = None
        wrong = "--image" if texts and image is not None else None
        wrong = "--prompt" if not texts and prompt is not None else wrong
        if wrong is not None:
            raise ConfigError(
                f"{wrong} with the stream {self.config.stream.source}, whose tasks are "
                + ("texts" if texts else "images"),
                expected="--prompt TEXT or --task" if texts else "--image FILE or --task",
                remedy=self._missing_memory(),
            )
        if sum(subject is not None for subject in (task, image, prompt, query)) != 1:
            kind = "--prompt" if texts else "--image"
            raise ConfigError(
                f"{verb} needs one subject",
                expected=f"one of --task, {kind} and --query"
                if verb == "retrieve"
                else f"one of --task and {kind}",
                remedy=self.command(f"{verb} --task 1"),
            )

    def _missing_memory(self) -> str | None:
        """What helps where no memory is at hand to say what it reads; None where there is one."""
        from memtool_stores import MemoryStore

        if MemoryStore.exists(self.store_path):
            return None
        return f"--store PATH, as there is no memory at {self.store_path!r}"

    @property
    def asks(self) -> bool:
        """Whether somebody is there to ask."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def confirm(self, deed: str) -> None:
        """Ask before something that cannot be taken back, unless --yes was given.

        Raises typer.Abort on no, ConfigError when nobody is there to ask.
        """
        if self.given["yes"]:
            return
        if not self.asks:
            raise ConfigError(f"{deed}: nobody is there to ask", remedy="the same with --yes")
        typer.confirm(printable(f"{deed}?"), err=True, abort=True)

    @property
    def line(self) -> str:
        """The command line of this call, for the record of what ran."""
        return without_home(redacted(printable(shlex.join(["memtool", *sys.argv[1:]]))))

    def command(self, text: str) -> str:
        """`memtool <text>` with the store and the configuration that this call was given."""
        words = ["memtool", *shlex.split(text)]
        for option in self.shared:
            value = self.given.get(option.name)
            if option in _CARRIED and value not in (None, []):
                for one in value if isinstance(value, list) else [value]:
                    words += [option.flag, str(one)]
        return shlex.join(words)


OF_THE_STORE = ("store", "lock_timeout", "limits")
"""What a verb reads that asks the store alone."""

_CARRIED = (
    STORE,
    LOCK_TIMEOUT,
    METHOD,
    RANK,
    MEMORY,
    SPLITS,
    HELD_OUT,
    *ADAPTERS,
    TEXTS,
    SEED,
    *COMPUTE,
    *CONFIGURATION,
)


def _require_text(name: str, value: Any) -> None:
    """Raise ConfigError for a word that no path and no file can have, whatever it names."""
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, str | Path):
            continue
        try:
            encoded = os.fsencode(one)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise ConfigError(
                f"{name.replace('_', '-')} cannot be {shown(str(one))}",
                expected="text without NUL, in the encoding of this system",
            )


def verb(
    *shared: Shared, remembers: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb its shared options, the output options included; see the top of the file.

    `remembers` as in `Call`.
    """
    options = (*shared, *OUTPUT)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def called(**values: Any) -> None:
            for name, value in values.items():
                _require_text(name, value)
            given = {option.name: values.pop(option.name) for option in options}
            if given["json"] and given["quiet"]:
                raise ConfigError("--json and --quiet", expected="one of them")
            call = Call(given, options, remembers)
            if given["verbose"]:
                handler = logging.StreamHandler(sys.stderr)
                handler.setFormatter(Plain("%(name)s: %(message)s"))
                logging.basicConfig(handlers=[handler])
                logging.getLogger("memtool").setLevel(logging.INFO)
                logging.getLogger("memtool_stores").setLevel(logging.INFO)
                return function(call, **values)
            with call.out.hearing():
                return function(call, **values)

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters += [option.parameter for option in options]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        called.__name__, called.__doc__ = function.__name__, function.__doc__
        return called

    return decorate


def examples(*commands: str) -> str:
    """The end of a verb's help: commands to copy."""
    escaped: Iterable[str] = (command.replace("[", r"\[") for command in commands)
    return "\n".join(["[bold]Examples[/bold]", *(f"$ {command}" for command in escaped)])


def one_of(option: str, value: str, words: tuple[str, ...]) -> str:
    """`value`, when it is one of `words`. Raises ConfigError with the nearest word."""
    if value not in words:
        raise ConfigError(f"{option} {shown(value)}", expected=did_you_mean(value, words))
    return value


def share(option: str, text: str) -> float:
    """A share of the whole: `0.85` or `85%`. Raises ConfigError; 85 alone may mean either."""
    written = text.strip()
    number = written.removesuffix("%").strip()
    try:
        value = float(number) / (100 if number != written else 1)
    except ValueError:
        value = math.nan
    if 0 <= value <= 1:
        return value
    may = f"{option} {number}%" if 1 < value <= 100 else None
    raise ConfigError(
        f"{option} {shown(text)}", expected="a share from 0 to 1, or per cent as 85%", remedy=may
    )
