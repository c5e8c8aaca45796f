"""A LoRA per task, found by keys that are the names of its classes (setting xtail, a text tower).

The text tower of the frozen CLIP reads the prompt of every class, and each is a key of its task.
The frozen image tower asks; with cosines q·k and the model's own scale s,

    w_t = Σ_{c of task t} softmax_c(s q·k_c)          over the classes of all tasks

weighs the LoRA of task t, for the whole image tower. Nothing about keys is learned, so that none is
forgotten, and tasks that come later have theirs already: their weight goes to the frozen model. The
text of a class is read under the LoRA of its own task. Under `head.kind: prototype` the prototypes
of the frozen features stand in for texts, as they do in the head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from memtool.adapters.recalls import given_for_each
from memtool.adapters.values import AdapterValues
from memtool.heads import CosineHead
from memtool.learning.known import fixed_head
from memtool.learning.learner import Learner
from memtool.streams.task import Task


class TextKeys(Learner):
    """`values` learn the newest task, `stored` are those of all that were learned, in order.

    `told` has the texts of all classes, each as its task left it; of later ones as they are.
    """

    id: ClassVar[str] = "text-keys"
    title: ClassVar[str] = "LoRA per task, keys of class names"

    stored: AdapterValues | None
    told: CosineHead | None

    def begin(self) -> None:
        """The first LoRA."""
        super().begin()
        self.stored = self.told = None

    def before_task(self, task: Task) -> None:
        """A LoRA of its own, which changes nothing yet."""
        del task
        self.values = self.fresh(1)

    def after_task(self, task: Task) -> None:
        """Keep the LoRA, and the texts of its classes as it makes them."""
        flat = self.values.flat()
        if self.stored is not None:
            flat = torch.cat([self.stored.flat(), flat])
        self.stored = self.work.stacked(flat.detach())
        read, own = self.objective.head.prototypes, list(task.classes)
        told = (self.told or fixed_head(self.work)).prototypes.clone()
        told[own] = read[own]
        self.told = self.objective.head = CosineHead(told, self.objective.head.scale)

    @torch.no_grad()
    def weights(self, images: Any) -> Tensor:
        """How much each learned task is asked: (n, learned); the rest to one is of later tasks."""
        head, backbone, engine = fixed_head(self.work), self.work.backbone, self.work.engine
        logits = engine.predict(lambda x: head(backbone.features(backbone.preprocess(x))), images)
        shares = logits.softmax(dim=1)
        own = [shares[:, list(task.classes)].sum(dim=1) for task in self.seen]
        return torch.stack(own, dim=1) if own else shares.new_zeros(len(shares), 0)

    @torch.no_grad()
    def features_of(self, samples: Any) -> Tensor:
        """Features (n, dim) of images under the tasks that they ask for, on the CPU."""
        stored = self.stored
        if stored is None:
            return self.work.features(samples.images)

        def features(images: Tensor, weights: Tensor) -> Tensor:
            recall = given_for_each(stored, weights.unsqueeze(1), "delta")
            found: Tensor = self.objective.features(images, recall)
            return found

        return self.work.engine.predict(features, samples.images, self.weights(samples.images))
