"""Verbs as commands of Typer: an option that takes one value is given once, or refused by name.

The parser below Typer takes the last of several values without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from memtool.errors import ConfigError


class VerbCommand(TyperCommand):
    """A command that refuses an option given twice, unless it takes several or is a switch."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base. Raises ConfigError that names the option."""
        if not ctx.resilient_parsing:
            *_, order = self.make_parser(ctx).parse_args(args=list(args))
            for option in order:
                if _takes_one(option) and order.count(option) > 1:
                    flags = "/".join((*option.opts, *option.secondary_opts))
                    raise ConfigError(
                        f"{flags} is given {order.count(option)} times", expected="one value"
                    )
        return super().parse_args(ctx, args)


class Verbs(typer.Typer):
    """The verbs of one module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(rich_markup_mode="rich", **settings)

    def command(  # type: ignore[override]  # fewer settings: what a verb may choose
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """As the base, of `VerbCommand`s."""
        return super().command(name, cls=VerbCommand, **settings)


def _takes_one(parameter: Any) -> bool:
    if parameter.param_type_name != "option" or parameter.multiple:
        return False
    return not parameter.is_flag or bool(parameter.secondary_opts)
