"""Settings that a verb was given and does not read: they are named, not ignored."""

from __future__ import annotations

from memtool.config import COMMAND_LINE
from memtool.settings import sections
from memtool_cli.options import Call

DECIDED = ("adapter.warm_start", "baselines", "train")
"""Settings that were decided when a memory was made, beside the sections of its method."""


def say_decided(call: Call) -> None:
    """Say which settings of the command line a verb that only reads a memory does not go by."""
    _say(call, (*DECIDED, *sections(call.config.method)), "a memory is read as it was made")


def say_unread_stream(call: Call) -> None:
    """Say which settings of the command line name data, beside a query, for which none are read."""
    _say(call, ("stream",), "a query stands for itself")


def _say(call: Call, names: tuple[str, ...], why: str) -> None:
    resolved = call.resolved
    already = " ".join(resolved.without_effect())
    for key, place in resolved.origin.items():
        named = any(key == name or key.startswith(f"{name}.") for name in names)
        if named and place == COMMAND_LINE and f"{key} has no effect" not in already:
            call.out.note(f"note: {key} has no effect here: {why}")
