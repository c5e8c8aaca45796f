"""`memtool`: the table of verbs, each loaded only when it is called, and the way out.

`memtool --help` must answer at once, so this module knows the name, the panel and one sentence of
every verb, and nothing else of it.
"""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand

from memtool import __version__
from memtool.errors import ConfigError
from memtool_cli import failure
from memtool_cli.commands import VerbGroup
from memtool_cli.terminal import prepare
from memtool_stores import limits
from memtool_stores.printable import shown


class Verb(NamedTuple):
    """Where a verb is and how the list of verbs names it."""

    module: str
    panel: str
    sentence: str


FLOW, HISTORY, FILES, SETUP = "The flow", "History", "Files", "Setup"

VERBS = {
    "tour": Verb("tour", FLOW, "Show the five steps, one after the other, in a folder of its own."),
    "demo": Verb("experiments", FLOW, "Run everything on the embedded data, in about a minute."),
    "run": Verb("experiments", FLOW, "Run a whole experiment, tasks by seeds; goes on where left."),
    "sweep": Verb("sweep", FLOW, "Run a grid of settings by seeds, on any number of machines."),
    "runs": Verb("runs", FLOW, "List runs, and compare their settings and what they came to."),
    "train-adapter": Verb("flow", FLOW, "Train the adapter of one task, as a PEFT directory."),
    "write": Verb("flow", FLOW, "Put trained adapters into the memory, as one version."),
    "consolidate": Verb("flow", FLOW, "Let the memory learn the keys of its adapters."),
    "retrieve": Verb("flow", FLOW, "Show the mixture that a task, an image or a query recalls."),
    "predict": Verb("predict", FLOW, "Say what pictures show, or answer prompts; a row each."),
    "calibrate": Verb("predict", FLOW, "Measure when the memory is sure, for predict --reject."),
    "generate": Verb("generate", FLOW, "Answer prompts by the adapters that each recalls."),
    "serve": Verb("serve", FLOW, "Serve the memory over HTTP, with a page to try it."),
    "eval": Verb("flow", FLOW, "Measure the memory on the test images of all its tasks."),
    "explain": Verb("explain", FLOW, "Show which adapters fire for an image, and what each adds."),
    "ablate": Verb("experiments", FLOW, "Run one experiment with one choice changed at a time."),
    "study": Verb("study", FLOW, "Ask what capacity, similar tasks and interference do."),
    "report": Verb("experiments", FLOW, "Make an HTML page from evaluation records."),
    "ls": Verb("history", HISTORY, "List the adapters in the memory."),
    "log": Verb("history", HISTORY, "List the versions of the memory, newest first."),
    "show": Verb("history", HISTORY, "Show one version and what is in it."),
    "diff": Verb("history", HISTORY, "Show what changed from one version to another."),
    "tag": Verb("history", HISTORY, "Name a version."),
    "rollback": Verb("history", HISTORY, "Go back to a version; what came after is kept aside."),
    "verify": Verb("history", HISTORY, "Check every stored byte."),
    "gc": Verb("history", HISTORY, "Remove old versions and free their space."),
    "migrate": Verb("history", HISTORY, "Bring the memory to the newest schema of the store."),
    "forget": Verb("care", HISTORY, "Take tasks or adapters out; the rest is re-normalised."),
    "bisect": Verb("care", HISTORY, "Find the commit after which the memory got worse."),
    "import": Verb("exchange", FILES, "Put PEFT adapters, or a whole bundle, into a memory."),
    "export": Verb("exchange", FILES, "Write adapters as PEFT directories, or all as one file."),
    "merge": Verb("exchange", FILES, "Take the adapters of another memory in."),
    "clone": Verb("exchange", FILES, "Copy a whole memory to another folder or bucket."),
    "push": Verb("publish", FILES, "Publish a whole memory on the Hugging Face Hub."),
    "pull": Verb("publish", FILES, "Fetch a whole memory from the Hugging Face Hub."),
    "init": Verb("setup", SETUP, "Write memtool.yaml, with a comment on every setting."),
    "config": Verb("setup", SETUP, "Show the settings, where they come from, and the presets."),
    "backbones": Verb("setup", SETUP, "List timm's models as backbones, with their targets."),
    "doctor": Verb("setup", SETUP, "Check versions, device, data, cache and memory."),
    "pretrain": Verb("experiments", SETUP, "Train the embedded backbone from its data."),
}


class Verbs(VerbGroup):
    """Lists verbs from the table; imports a verb's module when it is called or completed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, listed in VERBS.items():
            self.commands[name] = TyperCommand(
                name, help=listed.sentence, rich_help_panel=listed.panel
            )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base, but with the real command in place of the listed one."""
        name, listed, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, listed, rest
        module = import_module(f"memtool_cli.verbs.{VERBS[name].module}")
        return name, typer.main.get_group(module.app).commands[name], rest


app = typer.Typer(
    cls=Verbs,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"[bold]Exit codes[/bold]\n{failure.EXIT_CODES}",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"memtool {__version__}\n")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def memtool(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Adapters in a versioned associative memory: a frozen model that learns without forgetting."""


def run() -> None:
    """The console script `memtool`."""
    prepare()
    code = main(sys.argv[1:])
    if "icechunk" in sys.modules:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End without tearing the interpreter down, after all that is to be done at exit.

    Threads of icechunk's runtime may want the interpreter once more, and abort the process when it
    is half gone: everything was done and said, but the exit code is that of a crash.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run one command line; the exit code. Unforeseen errors are raised."""
    if "_MEMTOOL_COMPLETE" in os.environ:
        app(prog_name="memtool")
    command = typer.main.get_command(app)
    before = limits.current()
    try:
        _require_no_nul(arguments)
        with command.make_context("memtool", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except failure.EXPECTED as error:
        if "--debug" in arguments:
            failure.show_traceback(error)
        return failure.report(error)
    except SystemExit as stop:
        # rich turns a closed pipe into an exit of its own while it prints a help page.
        if isinstance(stop.__context__, BrokenPipeError):
            failure.close_stdout()
            return failure.BROKEN_PIPE
        raise
    finally:
        limits.use(before)  # those of this command line hold no longer than it runs
    return 0


def _require_no_nul(arguments: list[str]) -> None:
    for argument in arguments:
        if "\0" in argument:
            raise ConfigError(f"the argument {shown(argument)}", expected="text without NUL")
