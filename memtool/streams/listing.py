"""What a data set is before any image of it is decoded."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memtool.errors import DataError
from memtool_stores.printable import shown


@dataclass(frozen=True, eq=False)
class Listing:
    """The rows of a source before any image is decoded.

    labels and domains int64 (n,), is_test bool (n,); `encoded` gives the bytes of some rows'
    images, `where` says in words where a row is. `notes` are sentences on what was left out.
    """

    labels: npt.NDArray[np.int64]
    domains: npt.NDArray[np.int64] | None
    is_test: npt.NDArray[np.bool_]
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    encoded: Callable[[Sequence[int]], list[bytes]]
    where: Callable[[int], str]
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """A data set that can be listed."""

    @property
    def name(self) -> str:
        """What it is called in messages and in the cache."""

    @property
    def key(self) -> str:
        """Changes whenever the data may have changed; found without reading any image."""

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The domains, as far as they are known without opening it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken for what, and what was left out, as far as is known without opening it."""

    def open(self) -> AbstractContextManager[Listing]:
        """The rows; readable until the context ends. Raises DataError."""


def check_word(word: str, where: str, what: str) -> str:
    """The name of a class or domain, when it is one.

    Raises DataError, beginning with `where`, for white space alone and for characters that end
    lines, steer terminals or are none.
    """
    strange = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in word)
    if strange or not word.strip():
        raise DataError(
            f"{where}: the {what} {shown(word)}" if word.strip() else f"{where}: no {what}",
            expected="text of one line",
            remedy="correct it, or take the row out",
        )
    return word
