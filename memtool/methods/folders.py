"""Where adapters of others lie: PEFT folders, folders of them, and the tasks that are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memtool.adapters.peft_config import CONFIG_NAME
from memtool.adapters.peft_tensors import WEIGHTS_NAME
from memtool.errors import NotFoundError
from memtool.outside import is_file, is_folder


def adapter_folders(places: Sequence[str]) -> list[tuple[Path, str | None]]:
    """The PEFT folders at these places, or one below them, with the task that was named.

    Raises NotFoundError for a place that is none and holds none.
    """
    found: list[tuple[Path, str | None]] = []
    for place in places:
        path, task = Path(place), None
        if not is_folder(path) and ":" in place:
            folder, _, task = place.rpartition(":")
            path = Path(folder)
        inside = []
        if is_folder(path):
            inside = sorted(one for one in path.glob("*") if is_file(one / CONFIG_NAME))
        if is_file(path / CONFIG_NAME):
            inside = [path]
        if not inside:
            raise NotFoundError(
                f"no adapter in {place}",
                expected=f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a folder of such",
            )
        found += [(one, task) for one in inside]
    return found


def places_of(places: Sequence[str | Path]) -> tuple[list[Path], dict[Path, str]]:
    """The folders at these places, and the tasks of those that one was named for.

    As `adapter_folders`, but a folder that holds no adapter stands for itself: what is wrong with
    it is said where it is read.
    """
    folders: list[Path] = []
    tasks: dict[Path, str] = {}
    for place in places:
        try:
            found = adapter_folders([str(place)])
        except NotFoundError:
            found = [(Path(place), None)]
        for folder, task in found:
            folders.append(folder)
            if task is not None:
                tasks[folder] = task
    return folders, tasks
