"""What a step looks at: some samples of tasks, or a query that somebody made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from memtool.backbones.interface import FrozenModel
from memtool.errors import CorruptError, DataError, MismatchError
from memtool.outside import parsed_json, read_file
from memtool.streams.task import Samples
from memtool.tensor_bytes import load_tensors
from memtool_stores.printable import shown


def joined(parts: Sequence[Samples]) -> Samples:
    """The samples of several tasks, one after another."""
    if len(parts) == 1:
        return parts[0]
    return Samples(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def first(samples: Samples, count: int) -> Samples:
    """At most `count` samples, spread evenly."""
    if len(samples) <= count:
        return samples
    chosen = np.linspace(0, len(samples) - 1, count).astype(np.int64)
    return Samples(samples.images[chosen], samples.labels[chosen])


def read_query(path: Path, backbone: FrozenModel) -> Tensor:
    """The tensor `query` of a safetensors file, float32.

    Its metadata may say the `backbone_sha256` that it was made with. Raises DataError for another
    file or numbers that are not finite, MismatchError for a query of another backbone.
    """
    data = read_file(path, "array_bytes")
    try:
        tensors = load_tensors(data, str(path))
    except CorruptError as error:
        raise DataError(
            error.message, expected="a safetensors file with a tensor 'query'"
        ) from error
    query = tensors.get("query")
    if query is None:
        raise DataError(f"{path} has no tensor named 'query'", expected="query (d,)")
    if not (query.is_floating_point() and bool(query.float().isfinite().all())):
        raise DataError(f"{path}: the query is of {query.dtype}", expected="finite floats")
    header = parsed_json(data[8 : 8 + int.from_bytes(data[:8], "little")], str(path))
    made_with = (header.get("__metadata__") or {}).get("backbone_sha256", backbone.sha256)
    if made_with != backbone.sha256:
        raise MismatchError(
            f"{path} was made with the backbone {shown(made_with)}",
            expected=f"{backbone.name} ({backbone.sha256})",
            remedy="a query of this backbone: what another one sees has no meaning here",
        )
    return query.float()
