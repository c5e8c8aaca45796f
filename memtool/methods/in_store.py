"""What methods keep in a store alike, beside values: how a memory is read, heads, and moments.

Blobs: `head` (what retrieval ends in), `head.<adapter>` (the classifier that was trained with an
adapter) and `features.<task>` (moments of a task's features alone, that heads are solved from).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save

import memtool_stores
from memtool.errors import CorruptError, MismatchError
from memtool.heads import FeatureStatistics, LinearClassifier
from memtool.methods.on_demand import OnDemand
from memtool.methods.records import own_head_blob
from memtool.outside import parsed_json
from memtool.tensor_bytes import read_tensors

HEAD = "head"


def features_blob(task: int) -> str:
    """Name of the blob that holds the moments of a task's features."""
    return f"features.{task}"


class StoredState(BaseModel):
    """How a memory is read: the JSON blob `blob` of a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blob: ClassVar[str]

    schema_version: int

    @classmethod
    def load(cls, view: memtool_stores.MemoryView) -> Self | None:
        """The state at a version; None before there is any.

        Raises CorruptError, or MismatchError for one that a newer memtool wrote.
        """
        if not view.has_blob(cls.blob):
            return None
        newest = cls.model_fields["schema_version"].default
        said = parsed_json(view.blob(cls.blob), f"blob {cls.blob!r}")
        written = said.get("schema_version")
        if isinstance(written, int) and written < 1:
            raise CorruptError(f"blob {cls.blob!r} has schema version {written}")
        if isinstance(written, int) and written > newest:
            raise MismatchError(
                f"blob {cls.blob!r} at version {view.version} has schema version {written}, made "
                "by a newer memtool",
                expected=f"at most {newest}",
                remedy="upgrade memtool",
            )
        try:
            return cls.model_validate(cls._whole(said, view))
        except ValidationError as error:
            raise CorruptError(
                f"blob {cls.blob!r} at version {view.version}: {error.errors()[0]['msg']}",
                remedy="memtool verify; a newer memtool may have written it",
            ) from error

    @classmethod
    def _whole(cls, said: Mapping[str, Any], view: memtool_stores.MemoryView) -> Mapping[str, Any]:
        """All fields, of what the blob says; here it says all."""
        del view
        return said

    def put(self, txn: memtool_stores.Transaction) -> None:
        """Make it the state of the version that is being written."""
        txn.put_blob(self.blob, self.model_dump_json().encode())


def put_changed(txn: memtool_stores.Transaction, name: str, data: bytes) -> None:
    """Put a blob, unless it is there as it is."""
    if txn.base.blob_sha256(name) != hashlib.sha256(data).hexdigest():
        txn.put_blob(name, data)


def drop(txn: memtool_stores.Transaction, name: str) -> None:
    """Take a blob away, if it is there."""
    if txn.base.has_blob(name):
        txn.delete_blob(name)


def classifier_bytes(classifier: LinearClassifier) -> bytes:
    """A classifier as a safetensors file."""
    return save({"weight": classifier.weight.contiguous(), "bias": classifier.bias.contiguous()})


def classifier_of(data: bytes, where: str) -> LinearClassifier:
    """What `classifier_bytes` wrote."""
    tensors = read_tensors(data, where, weight="c d", bias="c")
    return LinearClassifier(tensors["weight"], tensors["bias"])


def own_head(view: memtool_stores.MemoryView, adapter: str) -> LinearClassifier | None:
    """The classifier that was trained with an adapter, if it came with one."""
    name = own_head_blob(adapter)
    return classifier_of(view.blob(name), name) if view.has_blob(name) else None


def classes_of(view: memtool_stores.MemoryView) -> tuple[str, ...]:
    """The classes of the heads that came with the adapters of a version, in their order.

    A class that no adapter knows has a number for a name.
    """
    names: dict[int, str] = {}
    count = 0
    for record in view.live:
        head = own_head(view, record.name)
        if head is not None:
            count = max(count, len(head.bias))
            ids = record.meta.get("class_ids", head.bias.isfinite().nonzero()[:, 0].tolist())
            names |= dict(zip(ids, map(str, record.classes), strict=False))
    return tuple(names.get(index, f"class {index}") for index in range(count))


def feature_statistics(
    view: memtool_stores.MemoryView, tasks: Sequence[int]
) -> OnDemand[FeatureStatistics]:
    """Moments of the features of tasks at a version, in order, each read when it is asked for."""

    def read(task: int) -> FeatureStatistics:
        blob = features_blob(task)
        return FeatureStatistics.from_bytes(view.blob(blob), f"blob {blob!r}")

    return OnDemand(tasks, read)
