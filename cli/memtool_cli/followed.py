"""The options of verbs whose runs can be followed: where curves go, and what is said of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memtool.experiments.follow import Said

_SERVICES = ("csv", "tensorboard", "trackio", "wandb", "mlflow")
"""Of `memtool.trackers`, here so that help imports nothing."""

LogTo = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="|".join(_SERVICES),
        help="Where curves go while it runs; several, separated by commas.",
        rich_help_panel="Output",
        autocompletion=lambda incomplete: [
            word for word in _SERVICES if word.startswith(incomplete)
        ],
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="What to call the run.", rich_help_panel="Output"),
]
RunNote = Annotated[
    str | None,
    typer.Option(
        "--note", metavar="TEXT", help="What to remember of the run.", rich_help_panel="Output"
    ),
]
RunTags = Annotated[
    list[str] | None,
    typer.Option(
        "--tag",
        metavar="TAG",
        help="A word to find the run by; may be repeated.",
        rich_help_panel="Output",
    ),
]


def to_follow(
    log: Sequence[str] | None, name: str | None, note: str | None, tags: Sequence[str] | None
) -> tuple[tuple[str, ...], Said]:
    """The services, each once, and what is said of the run.

    Raises ConfigError for a service that is not there, SchemaError for a name.
    """
    from memtool.config import split_values
    from memtool.experiments.follow import Said
    from memtool.trackers import require_services

    services = [word for text in log or () for word in split_values(text)]
    words = [word for text in tags or () for word in split_values(text)]
    return require_services(services), Said(name, note, tuple(words))
