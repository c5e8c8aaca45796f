"""A small CLIP from nothing: images of described data sets, their captions made of class names.

    python -m memtool.experiments.pretrain_clip --config clip.json --source xtail_small
        --order mnist,eurosat,caltech101 --steps 1500 --out clip.safetensors

It serves to run the whole X-TAIL pipeline where no published CLIP is at hand; it has seen too
little to be compared with one. The captions are the prompts of the stream, the loss is
cross-entropy from images to captions and back (`heads.both_ways`), and what comes out is measured
on test images that were never trained on: the share whose own caption is the nearest of all.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memtool import sealed
from memtool.backbones.open_clip import ClipBackbone, build_clip, read_configuration
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
from memtool.heads import CosineHead, both_ways
from memtool.learning.known import PromptTokens
from memtool.progress import Progress
from memtool.settings import EngineSettings, StreamSettings, TrainSettings
from memtool.streams import create_stream
from memtool.streams.task import Stream, Task

MOST_SCALE = 100.0
"""The factor on cosines learns, up to this (Radford et al. 2021)."""


def pretrain_clip(
    configuration: str,
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
    """Train a CLIP of `configuration` on all tasks of a stream at once and write it to `out`.

    At least so many steps, to the end of an epoch. `out` is a safetensors file with open_clip's
    tensor names, for `backbone.weights` beside `backbone.name: open_clip:<configuration>`. Raises
    AlreadyExistsError when `out` exists; further errors as `create_open_clip`, `create_stream`.
    """
    require_free(out)
    engine = Engine(EngineSettings(), threads=threads)
    tasks = create_stream(stream, image_size)
    model_cfg, preprocessing = read_configuration(configuration)
    with torch.random.fork_rng(devices=[]):  # open_clip draws from the global generator
        torch.manual_seed(seed)
        clip = build_clip(model_cfg, image_size, configuration)
    backbone = ClipBackbone(clip, configuration, **{**_HALF, **preprocessing})
    # Images as they are: a mirrored digit is another one.
    train = TrainSettings(iterations=steps, batch_size=batch_size, lr=lr, weight_decay=0.1)
    learner = _Learner(backbone, tasks)
    everything = Task.pooled(tasks.tasks).train

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return both_ways(model(batch.inputs, batch.told), batch.told)

    batches = Batches(
        everything.images,
        everything.labels,
        batch_size,
        train.epochs_for(len(everything)),
        seed,
    )
    fit = engine.fit(
        learner, batches, loss, train, stage="pretrain a small CLIP", progress=progress
    )
    tensors = open_clip_tensors(backbone)
    sealed.write_tensors(out, tensors, {"steps": str(fit.steps), "seed": str(seed)})
    return Pretrained(
        path=out,
        sha256=tensor_sha256(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        steps=fit.steps,
        seconds=fit.seconds,
        loss=fit.losses[-1],
        accuracy=zero_shot_accuracy(engine, learner, tasks),
        chance=1 / len({one for task in tasks.tasks for one in task.classes}),
    )


_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
"""The normalisation of a configuration that names none: what was learned from is known here."""


class _Learner(nn.Module):
    """All weights of both towers and the scale; `forward` gives logits (b, classes)."""

    def __init__(self, backbone: ClipBackbone, stream: Stream) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(True)
        self.text = PromptTokens(backbone, stream)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of uint8 images against the captions of `labels`, or of all classes."""
        classes = labels.unique() if labels is not None else torch.arange(len(self.text.prompts))
        directions = self.text.head(self.backbone, None, classes)
        scale = self.backbone.clip.logit_scale.exp().clamp(max=MOST_SCALE)
        head = CosineHead(directions.prototypes, scale)
        return head(self.backbone.features(self.backbone.preprocess(images)))


def zero_shot_accuracy(engine: Engine, learner: _Learner, stream: Stream) -> dict[str, float]:
    """The share of the test images of each task whose own caption is the nearest of the stream."""
    known = torch.full((len(stream.class_names),), -torch.inf)
    known[sorted({one for task in stream.tasks for one in task.classes})] = 0.0
    found = {}
    for task in stream.tasks:
        logits = engine.predict(learner, task.test.images) + known
        right = logits.argmax(dim=1) == torch.from_numpy(np.asarray(task.test.labels))
        found[task.name] = float(right.double().mean())
    return found


def open_clip_tensors(backbone: ClipBackbone) -> dict[str, Tensor]:
    """The weights under open_clip's own names, on the CPU, float32."""
    names = {
        ".in_proj.weight": ".attn.in_proj_weight",
        ".in_proj.bias": ".attn.in_proj_bias",
        ".out_proj.": ".attn.out_proj.",
        ".c_fc.": ".mlp.c_fc.",
        ".c_proj.": ".mlp.c_proj.",
    }
    tensors = {}
    for name, tensor in backbone.clip.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor.detach().cpu().contiguous()
    scale = tensors["logit_scale"]
    tensors["logit_scale"] = scale.clamp(max=math.log(MOST_SCALE))
    return tensors


def main(arguments: list[str]) -> int:
    """The command of the module's first lines."""
    parser = argparse.ArgumentParser(description="A small CLIP from nothing.")
    parser.add_argument("--config", required=True, help="open_clip name, or a .json")
    add_options(parser)
    given = parser.parse_args(arguments)
    return report(
        lambda: pretrain_clip(
            given.config, stream_of(given), given.image_size, given.out, **how_of(given)
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
