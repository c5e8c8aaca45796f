"""An image model of timm from nothing: all weights, on the classes of described data sets at once.

    python -m memtool.experiments.pretrain_timm --model resnet10t --source pretraining.yaml
        --image-size 64 --steps 1500 --out resnet10t.safetensors

It serves to compare backbones that saw the same images, where no published weights are at hand: the
same source, seed, steps and batch size give every model the same batches. What comes out is
measured on test images that were never trained on: the share whose class is the highest of all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool import sealed
from memtool.backbones import create_backbone
from memtool.backbones.interface import Backbone
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.engine import Batch, Batches, Engine
from memtool.experiments.pretrained import (
    Pretrained,
    add_options,
    how_of,
    report,
    require_free,
    stream_of,
)
from memtool.learning.augment import augmented
from memtool.progress import Progress
from memtool.settings import BackboneSettings, EngineSettings, StreamSettings, TrainSettings
from memtool.streams import create_stream
from memtool.streams.task import Stream, Task


def pretrain_timm(
    model: str,
    stream: StreamSettings,
    image_size: int,
    out: Path,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
) -> Pretrained:
    """Train a model of timm on all tasks of a stream at once and write it to `out`.

    At least so many steps, to the end of an epoch; images are flipped and cropped at random. `out`
    is a safetensors file with timm's tensor names, without a classifier, for `backbone.weights`
    beside `backbone.name: timm:<model>`. Raises AlreadyExistsError when `out` exists; further
    errors as `create_backbone`, `create_stream`.
    """
    require_free(out)
    engine = Engine(EngineSettings(), threads=threads)
    tasks = create_stream(stream, image_size)
    settings = BackboneSettings(name=f"timm:{model}", weights="random", image_size=image_size)
    learner = _Learner(create_backbone(settings), model, len(tasks.class_names), seed)
    train = TrainSettings(
        iterations=steps, batch_size=batch_size, lr=lr, weight_decay=0.05, augment="flip-crop"
    )
    everything = Task.pooled(tasks.tasks).train
    batches = Batches(
        everything.images,
        everything.labels,
        batch_size,
        train.epochs_for(len(everything)),
        seed,
    )

    def loss(learner: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(learner(augmented(batch.inputs, batch.seed, train)), batch.labels)

    fit = engine.fit(
        learner.train(), batches, loss, train, stage=f"pretrain {model}", progress=progress
    )
    learner.eval()
    tensors = {
        name: t.detach().cpu().contiguous() for name, t in learner.model.state_dict().items()
    }
    sealed.write_tensors(out, tensors, {"steps": str(fit.steps), "seed": str(seed)})
    return Pretrained(
        path=out,
        sha256=tensor_sha256(tensors),
        parameters=sum(parameter.numel() for parameter in learner.model.parameters()),
        steps=fit.steps,
        seconds=fit.seconds,
        loss=fit.losses[-1],
        accuracy=_accuracy(engine, learner, tasks),
        chance=1 / len({one for task in tasks.tasks for one in task.classes}),
    )


class _Learner(nn.Module):
    """A model whose weights all learn, and a classifier; images are read as `frozen` reads them."""

    def __init__(self, frozen: Backbone, model: str, classes: int, seed: int) -> None:
        from memtool.backbones.timm_models import build_timm

        super().__init__()
        self.read = frozen.preprocess
        with torch.random.fork_rng(devices=[]):  # timm draws from the global generator
            torch.manual_seed(seed)
            self.model = build_timm(model, frozen.image_size)
            self.classifier = nn.Linear(frozen.dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of uint8 images."""
        logits: Tensor = self.classifier(self.model(self.read(images)))
        return logits


def _accuracy(engine: Engine, learner: nn.Module, stream: Stream) -> dict[str, float]:
    """The share of the test images of each task that get their own class."""
    found = {}
    for task in stream.tasks:
        right = engine.predict(learner, task.test.images).argmax(dim=1) == torch.from_numpy(
            np.asarray(task.test.labels)
        )
        found[task.name] = float(right.double().mean())
    return found


def main(arguments: list[str]) -> int:
    """The command of the module's first lines."""
    parser = argparse.ArgumentParser(description="An image model of timm from nothing.")
    parser.add_argument("--model", required=True, help="a name of timm, as memtool backbones lists")
    add_options(parser)
    given = parser.parse_args(arguments)
    return report(
        lambda: pretrain_timm(
            given.model, stream_of(given), given.image_size, given.out, **how_of(given)
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
