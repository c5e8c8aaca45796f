"""The folder of all caches on this machine, and what is taken out of it again."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from memtool_stores.files import is_part

PART_SECONDS = 24 * 3600.0
"""After so long a folder in the making is one that a dead process left."""


def root() -> Path:
    """$MEMTOOL_CACHE, where `~` is the user's folder, else the user's cache folder; absolute."""
    given = os.environ.get("MEMTOOL_CACHE")
    if given:
        return Path(os.path.expandvars(given)).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("memtool").absolute()


def remove_parts(folder: Path) -> None:
    """Take away what processes that died were making in a folder; what cannot be stays."""
    before = time.time() - PART_SECONDS
    for path in folder.iterdir():
        with suppress(OSError):
            if is_part(path.name) and path.lstat().st_mtime < before:
                shutil.rmtree(path, ignore_errors=True)
