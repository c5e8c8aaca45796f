"""The clocks of the machines that write to a store, which never agree quite.

icechunk takes no version that is not younger than the one before it, and none whose time is more
than ten minutes from the time that the disk or the bucket gives its file. A clock that is a little
behind is waited for; one that is further behind, or ahead, is an error that says how far.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from memtool_stores.errors import ClockError

PATIENCE = timedelta(minutes=5)
"""How far the clock of a writer may be behind the last commit: so long it is waited for."""

BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
"""No memory is older: a clock that says so was never set."""

_LOOK = timedelta(seconds=1)
"""While waiting, how often it is looked whether another writer has committed."""

_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,6})?)\d* UTC")

_log = logging.getLogger(__name__)


def now() -> datetime:
    """The time that this machine believes it is, aware (UTC)."""
    return datetime.now(UTC)


def pause(span: timedelta) -> None:
    """Wait so long."""
    time.sleep(span.total_seconds())


def wait_until_after(
    moment: datetime, version: str, doing: str, where: str, overtaken: Callable[[], bool]
) -> None:
    """Return when this clock is past `moment`, the time of `version`, or when `overtaken` says so.

    Raises:
        ClockError: the clock is further behind than `PATIENCE`.
    """
    behind = moment - now()
    if behind > PATIENCE:
        raise behind_by(behind, version, doing, where)
    if behind >= timedelta(0):
        _log.warning(
            "waiting %s to %s: the clock of this machine is that far behind the last version of %s",
            span(behind),
            doing,
            where,
        )
    while (behind := moment - now()) >= timedelta(0) and not overtaken():
        # One step further: times that are equal do not increase.
        pause(min(behind + timedelta(milliseconds=1), _LOOK))


def behind_by(behind: timedelta, version: str, doing: str, where: str) -> ClockError:
    """The error of a clock that is too far behind the last version."""
    return ClockError(
        f"could not {doing} in {where}: the clock of this machine is {span(behind)} behind "
        f"{version}, or the clock that wrote that was ahead; nothing was stored",
        expected=f"clocks that are less than {span(PATIENCE)} apart",
        remedy=f"set the clocks right (`date -u` shows this one: {now():%Y-%m-%d %H:%M:%S}); if "
        "the other one was wrong, `memtool rollback` to the version before it, then again",
    )


def of_message(text: str, doing: str, where: str) -> ClockError | None:
    """The error that icechunk tells with two times in its message; None when it tells another."""
    ordering = "invalid snapshot timestamp ordering" in text
    if not ordering and "snapshot timestamp is invalid" not in text:
        return None
    text = re.sub(r"\s*\n[\s|]*", " ", text)  # icechunk breaks its lines anywhere
    times = [datetime.fromisoformat(found).replace(tzinfo=UTC) for found in _TIME.findall(text)]
    if len(times) < 2:
        return ClockError(
            f"could not {doing} in {where}: the clocks are too far apart; nothing was stored",
            remedy="set the clocks right",
        )
    first, second = times[:2]
    if ordering:
        return behind_by(first - second, "the last version", doing, where)
    side = "ahead of" if first > second else "behind"
    return ClockError(
        f"could not {doing} in {where}: the clock of this machine is {span(abs(first - second))} "
        f"{side} the one that dates the files there; nothing was stored",
        expected="clocks that are less than 10 minutes apart",
        remedy=f"set the clocks right (`date -u` shows this one: {now():%Y-%m-%d %H:%M:%S})",
    )


def span(length: timedelta) -> str:
    """A length of time in words, with the two units that count: `2 minutes 5 seconds`."""
    seconds = length.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f} seconds"
    rest, words = round(seconds), []
    for name, size in (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, rest = divmod(rest, size)
        if count:
            words.append(f"{count} {name}{'s' if count > 1 else ''}")
    return " ".join(words[:2])
