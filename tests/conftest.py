"""For all tests: no deadlines on a busy machine, a cache of their own, and what was skipped."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator

import hypothesis
import pytest

from memtool.reports.script import script_file
from memtool.streams import digits
from memtool_stores import limits

hypothesis.settings.register_profile("memtool", deadline=None, print_blob=True)
hypothesis.settings.load_profile("memtool")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded images and mapped values go to a temporary folder, not to the user's cache.

    The script of reports, which takes seconds to make and depends on nothing else, comes along.
    """
    made = script_file()
    os.environ["MEMTOOL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    if made.is_file():
        script_file().parent.mkdir()
        shutil.copy(made, script_file())


@pytest.fixture(scope="session", autouse=True)
def _drawn_once() -> Iterator[None]:
    """The embedded images, which take a second to draw, are drawn once for all that open them.

    Nothing writes to them. tests/streams/test_digits.py draws them itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "digits_table", functools.lru_cache(8)(digits.digits_table))
        yield


@pytest.fixture(autouse=True)
def _own_limits() -> Iterator[None]:
    """What a command line puts in force is for its own process, which here is that of all tests."""
    before = limits.current()
    yield
    limits.use(before)


@contextlib.contextmanager
def no_pages() -> Iterator[None]:
    """Runs write no report inside the block: drawing its figures takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memtool.experiments.run.write_report", lambda *_, **__: None)
        yield


@pytest.fixture
def no_page() -> Iterator[None]:
    """The runs of a test write no report; those of fixtures of its module do."""
    with no_pages():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped because the real data is not there."""
    skipped = terminalreporter.stats.get("skipped", [])
    missing = [report for report in skipped if "MEMTOOL_DATA" in str(report.longrepr)]
    if missing:
        terminalreporter.write_line(
            f"{len(missing)} tests on real data were skipped: MEMTOOL_DATA names no folder"
        )
