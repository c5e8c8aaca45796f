"""Where samples come from, images or texts, and how they are cut into tasks.

`create_stream(StreamSettings(source="pacs", setting="dil"), 96)` reads a data set (the embedded
digits, a YAML description, a folder), decodes it once into a cache, and cuts it into tasks.
Everything heavy is imported inside the functions, so that `import memtool.streams` stays light.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from memtool.streams.task import Images, Stream, Task, Texts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from memtool.settings import Crop, StreamSettings
    from memtool.streams.table import Table

__all__ = [
    "Images",
    "Stream",
    "Task",
    "Texts",
    "create_stream",
    "list_sources",
    "load_image",
    "open_table",
    "outline",
    "with_pictures",
]

_log = logging.getLogger(__name__)


def create_stream(settings: StreamSettings, image_size: int) -> Stream:
    """The stream that `settings` describe: images of (image_size, image_size, 3), or texts.

    The first opening of a data set decodes it into the cache (minutes for a big one); later
    openings map that file into memory. Raises NotFoundError (no such source), ConfigError (a
    setting or description that cannot be used) and DataError (data that cannot be read or cut).
    What is worth knowing of the data is in the stream's `notes`, and told to the log.

        >>> from memtool import resolve
        >>> settings = resolve(preset="digits-dil", ambient=False).config.stream
        >>> stream = create_stream(settings, 32)
        >>> [task.name for task in stream.tasks]
        ['upright', 'inverted', 'rot90', 'rot180-noise', 'mirror-texture']
    """
    return _told(_opened(settings, image_size))


def outline(settings: StreamSettings, image_size: int) -> Stream:
    """As `create_stream`, for who asks for no image: those that are drawn here are not."""
    return _told(_opened(settings, image_size, drawn=False))


def _told(stream: Stream) -> Stream:
    for note in stream.notes:  # the command line says it on stderr
        _log.warning("%s", note)
    return stream


def _opened(settings: StreamSettings, image_size: int, *, drawn: bool = True) -> Stream:
    from memtool.streams.likeness import made_alike, require_able

    require_able(settings)
    if settings.setting == "trace":
        from memtool.streams.text import open_text_stream

        return open_text_stream(settings)
    from memtool.streams.cuts import cut
    from memtool.streams.sources import templates

    if settings.source == "digits":
        from memtool.streams.digits import digits_table

        seed = settings.seed if settings.test_seed is None else settings.test_seed
        table = digits_table(settings.setting, seed, image_size, drawn=drawn)
        return made_alike(cut(table, settings), settings)
    table = open_table(
        settings.source, image_size, crop=settings.crop, skip_broken=settings.skip_broken
    )
    return made_alike(cut(table, settings, templates(settings.source)), settings)


def open_table(
    source: str, image_size: int, *, crop: Crop = "centre", skip_broken: bool = False
) -> Table:
    """All images of a source (not of `digits`, which depends on the setting), before any cut.

    `source` is the name or path of a description, a folder, or a table; `crop` and `skip_broken` as
    in `StreamSettings`. Errors as `create_stream`.
    """
    from memtool.streams.cache import open_cached
    from memtool.streams.sources import find_source

    found = find_source(source)
    table = open_cached(found, image_size, crop=crop, skip_broken=skip_broken)
    return dataclasses.replace(table, notes=(*found.notes, *table.notes))


def list_sources() -> list[str]:
    """The names that `StreamSettings.source` knows; a YAML path or a folder works as well."""
    from memtool.streams.sources import built_in_descriptions

    return ["digits", *sorted(built_in_descriptions())]


def load_image(
    path: str | PathLike[str], image_size: int, crop: Crop = "centre"
) -> npt.NDArray[np.uint8]:
    """A user's photo, prepared as the data sets are: uint8 (image_size, image_size, 3).

    Raises NotFoundError where there is no such file, DataError where it is not a readable image.
    """
    from memtool.streams.images import load_square

    return load_square(path, image_size, crop)


def with_pictures(prompts: Sequence[str], images: Sequence[Any] | None) -> list[str]:
    """Prompts with the pictures of each, for a model of images and text.

    Of each a path, a PIL image, uint8 (height, width, 3), a list of several, or None; they belong
    where the prompt has the model's mark for a picture. Raises DataError for another number of
    images than of prompts, and for what is no image.
    """
    from memtool.streams.pictures import with_pictures as made

    return made(prompts, images)
