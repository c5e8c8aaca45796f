"""The head that knows all classes in advance (setting xtail): prototypes, or a text tower's words.

`head.kind: text` reads the prompts of the stream with the text tower of a CLIP. `head.kind:
prototype` stands in for it where a backbone has none: the prototypes of all classes, those of later
tasks too, from the training images on frozen features. Either gives every model a score for classes
that it has not learned yet, so that Transfer can be measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.interface import Backbone, TwoTowers
from memtool.devices import sent
from memtool.errors import ConfigError, DataError
from memtool.heads import CosineHead, RecalledHead, prototype_head
from memtool.settings import Config
from memtool.streams.prompts import prompts
from memtool.streams.task import Stream, Task
from memtool.workspace import Workspace


def is_fixed(config: Config) -> bool:
    """Whether the configuration's head is known in advance."""
    return config.head.is_fixed


def learned_under(config: Config, stream: Stream) -> list[object]:
    """All that decides what is learned under a fixed head; nothing of another. JSON values."""
    head = config.head
    if head.kind == "prototype":
        return [head.kind, head.scale, head.rivals]
    if head.kind != "text":
        return []
    return [head.kind, *(["seen"] if head.texts == "seen" else []), *prompts(stream)]


def fixed_head(work: Workspace) -> CosineHead:
    """The head of `head.kind` over all classes of a stream, of the frozen model, on its device.

    Made once for a workspace. Raises ConfigError for a head that is not fixed and for texts without
    a text tower, DataError for a prompt that two classes share.
    """
    return work.once("fixed head", lambda: _fixed_head(work))


def _fixed_head(work: Workspace) -> CosineHead:
    config, engine, backbone, stream = work.config, work.engine, work.backbone, work.stream
    if not is_fixed(config):
        raise ConfigError(
            f"head.kind {config.head.kind!r} does not know classes before they are learned",
            expected="head.kind prototype or text",
        )
    if config.head.kind == "text":
        tokens = PromptTokens(backbone, stream)
        with torch.no_grad(), engine.autocast():
            return tokens.head(backbone, None, range(len(stream.class_names)))
    images = np.concatenate([task.train.images for task in stream.tasks])
    labels = np.concatenate([task.train.labels for task in stream.tasks])
    features = engine.predict(lambda x: backbone.features(backbone.preprocess(x)), images)
    head = prototype_head(
        features, torch.from_numpy(labels), len(stream.class_names), config.head.scale
    )
    return head.to(engine.device)


def kept_head(work: Workspace) -> RecalledHead:
    """The fixed head of the frozen model as a memory keeps it, on the CPU. Errors as there."""
    return RecalledHead.of_cosines(fixed_head(work))


def frozen_scores(
    work: Workspace, images: npt.NDArray[np.uint8], allowed: Sequence[int] | None = None
) -> Tensor:
    """Logits (n, classes) of images under the fixed head, no adapter in place."""
    return fixed_head(work).to("cpu")(work.features(images), allowed)


class PromptTokens:
    """The tokens of every class's prompt, and heads made of them by a text tower."""

    def __init__(self, backbone: Backbone, stream: Stream) -> None:
        """Raises ConfigError for a backbone without text tower, DataError for equal prompts."""
        if not isinstance(backbone, TwoTowers):
            raise ConfigError(
                f"head.kind text with backbone {backbone.name}, which has no text tower",
                expected="backbone open_clip:<model name>",
                remedy="--set head.kind=prototype",
            )
        self.prompts = prompts(stream)
        if len(set(self.prompts)) < len(self.prompts):
            twice = next(text for text in self.prompts if self.prompts.count(text) > 1)
            raise DataError(
                f"two classes of {stream.name} have the prompt {twice!r}",
                expected="a prompt of its own for every class",
                remedy="another template in the description, or other class names",
            )
        self.tokens = backbone.tokenize(self.prompts)

    def head(
        self, backbone: Backbone, recall: Recall | None, classes: Sequence[int] | Tensor
    ) -> CosineHead:
        """The head of some classes under the adapters that `recall` gives; others are unknown."""
        assert isinstance(backbone, TwoTowers)
        labels = torch.as_tensor(classes, dtype=torch.int64).cpu()
        device = next(backbone.parameters()).device
        directions = backbone.text_features(sent(self.tokens[labels], device), recall)
        return CosineHead.of_classes(directions, labels, len(self.prompts), backbone.logit_scale)


def compared(config: Config, stream: Stream, task: Task) -> tuple[int, ...]:
    """The classes that the images of a task are told apart from while it is learned.

    Under prototypes with `head.rivals=seen` those of all tasks up to it: an elephant that is drawn
    must win over the ones in photographs, too. Else the classes of the task.
    """
    if config.head.kind != "prototype" or config.head.rivals == "task":
        return task.classes
    before = (one for other in stream.tasks if other.number < task.number for one in other.classes)
    return tuple(sorted({*before, *task.classes}))


def head_under(work: Workspace, recall: Recall, kind: str) -> CosineHead:
    """The fixed head of a kind over all classes; that of a text tower under what `recall` says."""
    if kind != "text":
        return fixed_head(work)
    with torch.no_grad(), work.engine.autocast():
        tokens = PromptTokens(work.backbone, work.stream)
        return tokens.head(work.backbone, recall, range(len(work.stream.class_names)))
