"""The options of verbs that can work on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

RAY = "Ray"

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on a Ray cluster: auto (that of this machine), HOST:PORT, ray://HOST:PORT, or "
        "local (one that is started here).",
        rich_help_panel=RAY,
        show_default=False,
    ),
]
Resources = Annotated[
    str | None,
    typer.Option(
        "--resources",
        metavar="NAME=N,…",
        help="What each run or replica reserves there, as cpu=2,gpu=0.5; else one CPU, and a GPU "
        "where the engine takes one.",
        rich_help_panel=RAY,
        show_default=False,
    ),
]
