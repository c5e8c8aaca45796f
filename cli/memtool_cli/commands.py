"""Verbs as commands of Typer: what they refuse is named, and so is what may have been meant.

The parser below Typer takes the last of several values without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from memtool.errors import ConfigError
from memtool.words import either, near
from memtool_stores.printable import shown


class VerbCommand(TyperCommand):
    """A command that refuses an option given twice, unless it takes several or is a switch."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base. Raises ConfigError that names the option."""
        if not ctx.resilient_parsing:
            try:
                *_, order = self.make_parser(ctx).parse_args(args=list(args))
            except typer.TyperException as error:
                if getattr(error, "ctx", None) is None:
                    vars(error)["ctx"] = ctx  # whose help is named
                option = getattr(error, "option_name", None)
                if option is None or getattr(error, "possibilities", None) is None:
                    raise
                raise self._unknown(option, ctx) from error
            for option in order:
                if _takes_one(option) and order.count(option) > 1:
                    flags = "/".join((*option.opts, *option.secondary_opts))
                    raise ConfigError(
                        f"{flags} is given {order.count(option)} times", expected="one value"
                    )
        return super().parse_args(ctx, args)

    def _unknown(self, option: str, ctx: Any) -> ConfigError:
        """An option that the verb does not have, and what it may stand for: also a setting."""
        from memtool.settings import keys

        flags = [flag for one in self.params for flag in (*one.opts, *one.secondary_opts)]
        known = {flag.lstrip("-"): flag for flag in flags if flag.startswith("--")}
        word = option.lstrip("-").replace("_", "-")
        named = [key for key in keys() if key.rpartition(".")[2] == word.replace("-", "_")]
        if named and "set" in known:
            meant = [f"--set {key}=VALUE" for key in named]
        else:
            meant = [known[one] for one in near(word, known)]
        return ConfigError(
            f"{ctx.command_path} has no option {shown(option)}",
            expected=f"did you mean {either(meant)}?" if meant else None,
            remedy=f"{ctx.command_path} --help",
        )


class VerbGroup(TyperGroup):
    """A group that says of a word that is no verb which ones it may stand for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base. Raises ConfigError."""
        if args and args[0] not in self.commands and not ctx.resilient_parsing:
            meant = near(args[0], self.commands)
            here = ctx.command_path
            raise ConfigError(
                f"{here} has no verb {shown(args[0])}",
                expected=f"did you mean {either(meant)}?" if meant else None,
                remedy=f"{here} {meant[0]} --help" if len(meant) == 1 else f"{here} --help",
            )
        return super().resolve_command(ctx, args)


class Verbs(typer.Typer):
    """The verbs of one module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(rich_markup_mode="rich", cls=VerbGroup, **settings)

    def command(  # type: ignore[override]  # fewer settings: what a verb may choose
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """As the base, of `VerbCommand`s."""
        return super().command(name, cls=VerbCommand, **settings)


def _takes_one(parameter: Any) -> bool:
    if parameter.param_type_name != "option" or parameter.multiple:
        return False
    return not parameter.is_flag or bool(parameter.secondary_opts)
