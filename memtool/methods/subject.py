"""What a step looks at: some samples of a task, or an input that somebody brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from memtool.backbones.interface import FrozenModel
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError
from memtool.outside import parsed_json, read_file
from memtool.streams import load_image, with_pictures
from memtool.streams.task import Images, Task, Texts, spread
from memtool.tensor_bytes import load_tensors
from memtool.workspace import Workspace
from memtool_stores.printable import shown

SUBJECT_SAMPLES = {"images": 256, "texts": 32}
"""Test samples of a task that `retrieve --task` and `explain --task` look at."""


@dataclass(frozen=True, eq=False)
class Subject:
    """`words` name it; `task` is None for an input that somebody brought, which has no target."""

    words: str
    samples: Images | Texts
    task: Task | None = None

    def __len__(self) -> int:
        """How many samples it has."""
        return 1 if self.task is None else len(self.samples)

    @property
    def images(self) -> Images:
        """The samples, which are images."""
        assert isinstance(self.samples, Images)
        return self.samples


def subject_of(
    work: Workspace,
    *,
    task: str | None = None,
    image: Path | None = None,
    prompt: str | None = None,
) -> Subject:
    """Some test samples of a task, or an image, or a prompt, which may come with an image.

    Raises ConfigError for anything but one subject, and for one of the other kind of samples.
    """
    asked = prompt is not None and task is None and work.reads == "texts"
    if not asked and sum(one is not None for one in (task, image, prompt)) != 1:
        brought = "--prompt" if work.reads == "texts" else "--image"
        raise ConfigError("what should be looked at?", expected=f"one of --task and {brought}")
    if task is not None:
        chosen = work.task(task, held_out=True)
        samples = spread(chosen.test, SUBJECT_SAMPLES[work.reads])
        return Subject(f"task {chosen.number} {chosen.name}", samples, chosen)
    if not asked and (image is None) != (work.reads == "texts"):
        raise ConfigError(
            f"{'an image' if prompt is None else 'a prompt'} for a memory of {work.reads}",
            expected="--prompt TEXT or --task"
            if work.reads == "texts"
            else "--image FILE or --task",
        )
    if image is not None and not asked:
        loaded = load_image(image, work.config.backbone.image_size, work.config.stream.crop)[None]
        return Subject(str(image), Images(loaded, np.zeros(0, dtype=np.int64)))
    assert prompt is not None
    if not prompt.strip():
        raise ConfigError("--prompt is empty", expected="text with a visible character")
    (brought,) = with_pictures([prompt], None if image is None else [image])
    return Subject(prompt, Texts((brought,), ()))


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
