"""A memory as a file of `torch.export`: what it recalls and says, to be run by torch alone.

    export_model("memory@good", Path("memory.pt2"))
    program = torch.export.load("memory.pt2").module()
    program(pixels)["logits"]       pixels float32 (n, 3, size, size), n as it comes

The file needs no memtool where it is run. Beside the program it holds `memtool.json`: the version,
the classes, the names of the adapters and the preprocessing of a picture.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtool.errors import ConfigError, MismatchError
from memtool.memory import load

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memtool.memory import Memory
    from memtool.methods.attached import AttachedImages

NOTE = "memtool.json"
"""The name of what is said beside the program: an entry of `extra_files`."""


@dataclass(frozen=True)
class Program:
    """A file that was written: the shapes of what goes in and comes out, `n` images at once."""

    path: Path
    version: str
    nbytes: int
    input: tuple[str | int, ...]
    outputs: dict[str, tuple[str | int, ...]]
    classes: int


def export_model(store: str | Path, path: Path, *, task: str | int | None = None) -> Program:
    """Write a version of a memory of images as a file that `torch.export.load` reads.

    `task` as in `Memory.attach`. Before it appears the file was loaded again, and answered batches
    of other sizes as the memory does.

    Raises:
        ConfigError: a memory of texts.
        MismatchError: torch cannot write this memory as a program, or not so that it answers alike.
        MemtoolError: the file system refuses.
    """
    memory = load(store)
    if memory.reads == "texts":
        raise ConfigError(
            f"{store} is a memory of a language model, which is no one program: what it recalls "
            "is chosen for every prompt before its tokens are generated",
            expected="a memory of images",
            remedy="memtool export --out DIR for PEFT directories, which vLLM serves",
        )
    from memtool.methods.attached import AttachedImages

    model = memory.attach(task=task)
    assert isinstance(model, AttachedImages)
    model.hold_all()  # a program reads nothing
    return _written(memory, model, path)


def _written(memory: Memory, model: AttachedImages, path: Path) -> Program:
    import tempfile

    import torch

    from memtool.atomic import write_atomic

    answering = _answering(model)
    size = model.backbone.image_size
    drawn = torch.Generator().manual_seed(0)

    def pixels(count: int) -> Tensor:
        images = torch.randint(0, 256, (count, size, size, 3), generator=drawn, dtype=torch.uint8)
        return model.pixels(images)

    with tempfile.TemporaryDirectory(prefix="memtool-export-") as folder:
        file = Path(folder) / "program.pt2"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about its own ways
                program = torch.export.export(
                    answering, (pixels(4),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)
                )
                _without_paths(program.graph_module)
                said = {NOTE: json.dumps(_note(memory, model), ensure_ascii=False)}
                torch.export.save(program, file, extra_files=said)
                again = torch.export.load(file).module()
        except ConfigError:
            raise
        except Exception as error:
            raise MismatchError(
                f"torch {torch.__version__} cannot write this memory of method "
                f"{memory.config.method} as a program that it reads again: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                expected="a memory that torch.export understands",
                remedy='memtool.load("memory").attach() is the same as a module',
            ) from error
        for count in (1, 3):
            batch = pixels(count)
            _require_equal(again(batch), answering(batch))
        data = file.read_bytes()
        outputs = {name: _shape(value) for name, value in again(pixels(2)).items()}
    write_atomic(path, data)
    return Program(
        path=path,
        version=memory.version,
        nbytes=len(data),
        input=("n", 3, size, size),
        outputs=outputs,
        classes=len(memory.classes),
    )


def _without_paths(graph: nn.Module) -> None:
    """Take away which lines of which files every step came from: the program may go to others."""
    for module in graph.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)


def _answering(model: AttachedImages) -> nn.Module:
    """The model with a plain dictionary for an answer, which torch reads without memtool."""
    from torch import nn

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = model

        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            out = self.memory(pixels)
            return {field.name: getattr(out, field.name) for field in fields(out)}

    return Answering().eval().requires_grad_(False)


def _shape(value: Tensor) -> tuple[str | int, ...]:
    return ("n", *value.shape[1:])


def _note(memory: Memory, model: AttachedImages) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "schema": "memtool.program",
        "schema_version": 1,
        "version": memory.version,
        "method": memory.config.method,
        "backbone": backbone.name,
        "backbone_sha256": backbone.sha256,
        "classes": list(memory.classes),
        "adapters": [record.name for record in memory.adapters],
        "image_size": backbone.image_size,
        "mean": [float(value) for value in backbone.mean],
        "std": [float(value) for value in backbone.std],
    }


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    import torch

    for name, value in expected.items():
        if not torch.allclose(found[name], value, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise MismatchError(
                f"the program answers {len(value)} images otherwise than the memory ({name})",
                expected="the same numbers",
                remedy="tell us which memory; attach() answers rightly",
            )
