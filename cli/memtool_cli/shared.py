"""What one shared option is: its flag, what stands in the signature, the setting that it writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from memtool.settings import choices, keys


@dataclass(frozen=True)
class Shared:
    """One shared option. `setting` is the dotted key that it writes, if it writes one."""

    flag: str
    annotation: Any
    default: Any = None
    setting: str | None = None
    implies: Mapping[str, Any] = field(default_factory=dict)
    """Settings that follow from it where the command line does not say them."""

    @property
    def name(self) -> str:
        """The parameter's name: the flag as an identifier."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def parameter(self) -> inspect.Parameter:
        """What stands in the signature."""
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=self.annotation,
        )


def setting(flag: str, key: str, panel: str, help: str | None = None, **more: Any) -> Shared:
    """An option that is another way to write the setting `key`."""
    words = choices(key)
    metavar = more.pop("metavar", "|".join(words) or "VALUE")
    option = typer.Option(
        flag,
        help=help or f"{keys()[key].description}.".capitalize(),
        metavar=metavar,
        rich_help_panel=panel,
        autocompletion=more.pop("autocompletion", _words(words) if words else None),
        show_default=False,
    )
    implies = more.pop("implies", {})
    kind = more.pop("type", str | None)
    return Shared(flag, Annotated[kind, option], setting=key, implies=implies)


def _words(words: tuple[str, ...]) -> Callable[[str], list[str]]:
    def offer(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offer


def switch(flag: str, panel: str, help: str, short: str | None = None) -> Shared:
    """An option that is given or not."""
    names = (flag, short) if short else (flag,)
    return Shared(
        flag, Annotated[bool, typer.Option(*names, help=help, rich_help_panel=panel)], False
    )


def as_text(value: Any) -> str:
    """A value of the command line as one would write it with --set."""
    text = ",".join(value) if isinstance(value, list) else value
    return text.strip().strip("[]").replace(" ", "")
