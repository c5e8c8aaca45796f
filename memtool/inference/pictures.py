"""Predictions for the picture files of a list, in its order: decoding runs beside the model.

    for told in predicted(predictor, files):
        told.file, told.predicted or told.problem

A batch is computed while threads read and decode those after it; a file that is no picture is told
in its place, and holds nothing up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.errors import DataError, NotFoundError
from memtool.inference.predictor import Predicted, Predictor
from memtool.streams.images import image_bytes, quiet_decoders

BATCH = 64
"""Pictures in one pass of the model."""

WORKERS = 2
"""Threads that read and decode."""

AHEAD = 2
"""Batches that are decoded while one is computed."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Told:
    """What is told of one file: a prediction, or the `problem` for which there is none.

    `abstained`: the memory is not sure enough of what it predicts.
    """

    file: Path
    predicted: Predicted | None
    problem: str | None = None
    abstained: bool = False


def predicted(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    topk: int = 1,
    batch: int = BATCH,
    workers: int = WORKERS,
) -> Iterator[Told]:
    """What the memory says of picture files, in their order; files that are none do not stop it.

    So many `files` are in one pass (`batch`), and `AHEAD` times as many are held decoded.
    """
    with quiet_decoders(), ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        left = iter(files)
        waiting: deque[tuple[Path, Future[Pixels | str]]] = deque()

        def send(count: int) -> None:
            read = partial(_read, predictor)
            waiting.extend((file, pool.submit(read, file)) for file in islice(left, count))

        try:
            send((1 + AHEAD) * batch)
            while waiting:
                ready = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
                yield from _together(predictor, [(file, one.result()) for file, one in ready], topk)
                send(batch)
        finally:
            for _, one in waiting:
                one.cancel()


def _together(
    predictor: Predictor, read: Sequence[tuple[Path, Pixels | str]], topk: int
) -> Iterator[Told]:
    """One pass over those that could be read."""
    pixels = [one for _, one in read if not isinstance(one, str)]
    said = iter(predictor.predict(np.stack(pixels), topk=topk) if pixels else ())
    for file, one in read:
        yield Told(file, None, one) if isinstance(one, str) else Told(file, next(said))


def _read(predictor: Predictor, file: Path) -> Pixels | str:
    """The pixels of a file, or why there are none."""
    try:
        return predictor.pixels(image_bytes(file), str(file))
    except (DataError, NotFoundError) as error:
        limit = error.expected if "limits." in (error.expected or "") else None
        return error.message if limit is None else f"{error.message}; expected {limit}"
