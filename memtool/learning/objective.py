"""What a model learns by: how samples go in, what the loss is, and the head that learns along.

    Classify    a linear head on the features of images learns along
    Known       all classes are known in advance: prototypes, or what a text tower reads
    Answer      −log p of the answer to a prompt, by the head that a language model has

An objective is a module whose parameters that require gradients are its own: those of its head.
Adapters come in by the recall of a forward pass and know nothing of it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.values import Recall
from memtool.backbones.answering import by_length, trimmed
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.backbones.interface import Backbone
from memtool.devices import sent
from memtool.engine import Batch
from memtool.heads import CosineHead, LinearClassifier, LinearHead, both_ways, over_seen_texts
from memtool.learning.adapt import class_mask
from memtool.learning.augment import augmented
from memtool.learning.known import PromptTokens, compared, fixed_head, is_fixed
from memtool.learning.past_inputs import PastInputs
from memtool.streams.task import Images, Task, Texts
from memtool.workspace import Workspace

Arrays = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


class Objective(nn.Module, ABC):
    """What adapters of a workspace's backbone learn by.

    `dropout` is the share of the inputs that adapters do not see while they learn.
    """

    dropout = 0.0
    backbone: Any
    is_fixed = False
    """Whether the head knows all classes in advance."""
    reads_classes_of_a_batch = False
    """Whether logits, where targets are given, are those of the targets' classes only."""
    of_texts = False
    """Whether samples are prompts with answers."""

    def __init__(self, work: Workspace) -> None:
        super().__init__()
        self.work = work
        self.backbone = work.backbone

    def begin(self, task: Task) -> None:
        """What changes before a task is learned."""

    def end(self, recall: Recall | None) -> None:
        """What changes once a task was learned, under the adapters of then."""

    @abstractmethod
    def arrays(self, samples: Any) -> Arrays:
        """Samples as what batches are cut from: inputs (n, ...), and targets int64 (n,)."""

    def narrowed(self, inputs: Tensor) -> Tensor:
        """What becomes of the inputs of a batch before they leave the CPU."""
        return inputs

    def targets(self, batch: Batch) -> Tensor:
        """What `loss` is given of a batch: on the CPU where shapes depend on the numbers."""
        return batch.labels

    @abstractmethod
    def prepared(self, batch: Batch) -> Tensor:
        """The inputs of a training step."""

    @abstractmethod
    def logits(self, inputs: Tensor, targets: Tensor | None, recall: Recall | None) -> Tensor:
        """Logits (rows, k), float32: a row a sample, or a row for every token of the answers."""

    @abstractmethod
    def losses(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """−log p of the target of every sample, (b,)."""

    @abstractmethod
    def loss(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """What a step lessens: a mean over its samples or answer tokens."""

    @abstractmethod
    def input_moments(
        self, past: PastInputs, samples: Any, recall: Recall | None
    ) -> dict[str, Tensor]:
        """The second moment of all tokens that enter each adapted module, as `past` counts."""

    def taught(self, tasks: Sequence[Task]) -> Any:
        """The columns of logits that tasks taught."""
        del tasks
        return slice(None)

    def as_it_is(self) -> Objective:
        """One with a copy of the head, which stays as it is while this one learns on."""
        return self

    def copied(self, count: int) -> Objective:
        """One in which each of `count` samples of a batch has a copy of the head to itself."""
        del count
        return self

    def classifier(self) -> LinearClassifier | CosineHead | None:
        """A copy of the head of now; None for a model that brought its own."""
        return None


class OfImages(Objective):
    """A head on the pooled features of images."""

    backbone: Backbone

    def arrays(self, samples: Images) -> Arrays:
        """Images uint8 (n, h, w, 3) and labels."""
        return samples.images, samples.labels

    def prepared(self, batch: Batch) -> Tensor:
        """The images, augmented as `train.augment` says."""
        return augmented(batch.inputs, batch.seed, self.work.config.train)

    def features(self, images: Tensor, recall: Recall | None) -> Tensor:
        """Features (b, dim) of uint8 images (b, h, w, 3)."""
        return self.backbone.features(self.backbone.preprocess(images), recall)

    def begin(self, task: Task) -> None:
        """Compare the classes that images of a task are told apart from."""
        classes = compared(self.work.config, self.work.stream, task)
        count = len(self.work.stream.class_names)
        self.mask = class_mask(classes, count).to(self.work.engine.device)
        self.classes = classes

    def losses(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy over the classes that are compared, (b,)."""
        del inputs
        return F.cross_entropy(logits + self.mask, targets, reduction="none")

    def loss(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Their mean."""
        del inputs
        return F.cross_entropy(logits + self.mask, targets)

    def input_moments(
        self, past: PastInputs, samples: Images, recall: Recall | None
    ) -> dict[str, Tensor]:
        """Of all tokens of the images."""
        with past.counted(self.backbone, lambda x: x.flatten(0, -2)) as moments:
            self.work.features(samples.images, recall)
        return moments

    def taught(self, tasks: Sequence[Task]) -> list[int]:
        """The classes of tasks."""
        return sorted({one for task in tasks for one in task.classes})

    def training_accuracy(self, recall: Recall | None, task: Task) -> float:
        """Share of right answers on the images that a task was learned from."""
        scores = self.work.engine.predict(
            lambda images: self.logits(images, None, recall) + self.mask, task.train.images
        )
        right = scores.argmax(dim=1) == torch.from_numpy(np.asarray(task.train.labels))
        return float(right.double().mean())


class Classify(OfImages):
    """A linear head over all classes of the stream; it starts at zero, or as `start` is."""

    def __init__(self, work: Workspace, start: LinearClassifier | None = None) -> None:
        super().__init__(work)
        self.head = LinearHead(work.backbone.dim, len(work.stream.class_names))
        if start is not None:
            self.head.start_from(start)

    def logits(
        self, inputs: Tensor, targets: Tensor | None = None, recall: Recall | None = None
    ) -> Tensor:
        """Logits (b, classes) of images."""
        del targets
        logits: Tensor = self.head(self.features(inputs, recall))
        return logits.float()

    def classifier(self) -> LinearClassifier:
        """A copy of the head as it is now."""
        return self.head.classifier()

    def learned_head(self, recall: Recall | None) -> LinearClassifier:
        """The head as it is now."""
        del recall
        return self.head.classifier().to("cpu")

    def as_it_is(self) -> Classify:
        """With a copy of the head that is no part of the module; float32, also under autocast."""
        other = copy.copy(self)
        other._modules = {name: m for name, m in self._modules.items() if name != "head"}
        other.__dict__["head"] = self.head.classifier()
        return other

    def copied(self, count: int) -> _HeadOfEach:
        """A head for every sample."""
        return _HeadOfEach(self, count)


class _HeadOfEach(OfImages):
    """`weight` (b, classes, dim) and `bias` (b, classes): sample i goes through head i."""

    def __init__(self, one: Classify, count: int) -> None:
        super().__init__(one.work)
        self.backbone = one.backbone
        head = one.head.classifier()
        self.weight = nn.Parameter(head.weight.unsqueeze(0).repeat(count, 1, 1))
        self.bias = nn.Parameter(head.bias.unsqueeze(0).repeat(count, 1))

    def logits(
        self, inputs: Tensor, targets: Tensor | None = None, recall: Recall | None = None
    ) -> Tensor:
        """Logits (b, classes) of images."""
        del targets
        features = self.features(inputs, recall).unsqueeze(1)
        logits = torch.baddbmm(self.bias.unsqueeze(1), features, self.weight.transpose(1, 2))
        return logits[:, 0].float()


class Known(OfImages):
    """A head over all classes that nothing trains: prototypes, or what a text tower reads.

    A text tower moves with the adapters: while a task is learned it reads the prompts of a batch's
    classes anew, and `head` is as the last task left it.
    """

    is_fixed = True

    def __init__(self, work: Workspace) -> None:
        super().__init__(work)
        self.head: CosineHead = fixed_head(work)
        self.text: PromptTokens | None = None
        if work.config.head.kind == "text":
            self.text = PromptTokens(work.backbone, work.stream)

    @property
    def reads_classes_of_a_batch(self) -> bool:  # type: ignore[override]
        """A text tower does, unless `head.texts` says seen."""
        return self.text is not None and self.work.config.head.texts == "batch"

    def begin(self, task: Task) -> None:
        """As ever; with a text tower count the classes of all tasks so far, too."""
        super().begin(task)
        tasks = self.work.stream.tasks
        so_far = {one for other in tasks if other.number < task.number for one in other.classes}
        self.texts = len(so_far.union(self.classes))

    def logits(
        self, inputs: Tensor, targets: Tensor | None = None, recall: Recall | None = None
    ) -> Tensor:
        """Logits (b, classes) of images.

        With `targets`, any classes, a text tower reads the prompts of these only, or those of the
        task, as `head.texts` says; all others then have −infinity.
        """
        head = self.head
        if self.text is not None and targets is not None:
            told = targets.unique() if self.reads_classes_of_a_batch else self.classes
            head = self.text.head(self.backbone, recall, told)
        return head(self.features(inputs, recall)).float()

    def targets(self, batch: Batch) -> Tensor:
        """The labels; where a text tower reads the prompts of a batch's classes on the CPU."""
        return batch.labels if self.text is None else batch.told

    def loss(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy; of a text tower's from images to texts and back."""
        if self.text is not None and self.work.config.head.texts == "seen":
            return over_seen_texts(logits, sent(targets, logits.device), self.texts)
        if self.text is not None:
            return both_ways(logits, targets)
        return super().loss(logits, inputs, targets)

    def end(self, recall: Recall | None) -> None:
        """A text tower reads the prompts of all classes."""
        if self.text is not None:
            self.head = self.read(recall, range(len(self.work.stream.class_names)))

    def read(self, recall: Recall | None, classes: Sequence[int]) -> CosineHead:
        """The head of some classes as adapters make it."""
        if self.text is None:
            return self.head
        with torch.no_grad(), self.work.engine.autocast():
            return self.text.head(self.backbone, recall, classes)

    def input_moments(
        self, past: PastInputs, samples: Images, recall: Recall | None
    ) -> dict[str, Tensor]:
        """Of all tokens of the images, and of the prompts of their classes."""
        with past.counted(self.backbone, lambda x: x.flatten(0, -2)) as moments:
            self.work.features(samples.images, recall)
            self.read(recall, sorted(set(samples.labels.tolist())))
        return moments

    def learned_head(self, recall: Recall | None) -> LinearClassifier:
        """Linear scores with the ranking of the head; of a text tower's, the classes compared."""
        return self.read(recall, self.classes).linear()

    def as_it_is(self) -> Known:
        """With the head as the last task left it."""
        other = copy.copy(self)
        other.text = None
        return other

    def classifier(self) -> CosineHead:
        """The head as the last task left it."""
        return self.head


class Answer(Objective):
    """−log p of the tokens of an answer, given its prompt."""

    backbone: CausalLM
    of_texts = True

    def __init__(self, work: Workspace) -> None:
        super().__init__(work)
        self.dropout = work.config.text.dropout

    def arrays(self, samples: Texts) -> Arrays:
        """Token ids (n, longest), and the number of tokens of each answer."""
        encoded = self.backbone.encode(samples.prompts, samples.answers)
        return encoded.tokens.numpy(), encoded.answers.numpy()

    def narrowed(self, inputs: Tensor) -> Tensor:
        """Token ids (b, n), padded no more than they need."""
        return trimmed(inputs)

    def targets(self, batch: Batch) -> Tensor:
        """The numbers of tokens of the answers (b,), on the CPU."""
        return batch.told

    def prepared(self, batch: Batch) -> Tensor:
        """Token ids (b, n)."""
        return batch.inputs

    def logits(self, inputs: Tensor, targets: Tensor | None, recall: Recall | None) -> Tensor:
        """Logits (answer tokens, vocabulary) of token ids (b, n) with answers (b,)."""
        assert targets is not None
        return self.backbone.answer_logits(inputs, targets, recall)

    def losses(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sums over the tokens of each answer, (b,)."""
        return self.backbone.answer_losses(logits, inputs, targets)

    def loss(self, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all answer tokens."""
        return self.losses(logits, inputs, targets).sum() / targets.sum()

    @torch.no_grad()
    def input_moments(
        self, past: PastInputs, samples: Texts, recall: Recall | None
    ) -> dict[str, Tensor]:
        """Of all tokens of prompts and answers; padding is no input."""
        engine = self.work.engine
        tokens = self.backbone.encode(samples.prompts, samples.answers).tokens
        real = torch.empty(0)
        with past.counted(self.backbone, lambda x: x[real]) as moments:
            for rows in by_length(tokens, engine.settings.eval_batch_size):
                batch = trimmed(tokens[rows]).to(engine.device)
                real = batch != PAD
                with engine.autocast():
                    self.backbone.hidden(batch, recall)
        return moments


def objective_of(work: Workspace, start: LinearClassifier | None = None) -> Objective:
    """What a workspace's samples are learned by; `start`: the head that a linear one goes on from.

    Raises ConfigError for a head that is known in advance and cannot be made.
    """
    if work.reads == "texts":
        return Answer(work)
    return Known(work) if is_fixed(work.config) else Classify(work, start)
