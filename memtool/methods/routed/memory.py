"""One version of a routed memory: what its rule kept of each task, the adapters, their heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import memtool_stores
from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import given_for_each
from memtool.adapters.stock import Stock
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.causal_lm import CausalLM
from memtool.devices import sent
from memtool.errors import CorruptError, MismatchError, NotFoundError
from memtool.heads import RecalledHead
from memtool.learning.looks import FINAL, PromptLook, is_seen_before
from memtool.methods.in_store import own_head
from memtool.methods.records import task_of
from memtool.tensor_bytes import load_tensors
from memtool.workspace import Workspace

Kept = Mapping[str, Tensor]
"""What a rule keeps of a task, by name."""

Rule = Callable[[Tensor, Sequence[Kept]], Tensor]
"""Weights of inputs that look like (n, dim), by what was kept of every task: (n, tasks).

Of a method whose blocks have memories of their own (n, memories, tasks).
"""

LEAST = 1e-6
"""A weight that is no more than this adds nothing, and its adapter is not read."""

Way = Callable[[Tensor], Tensor]
"""Another use of weights (..., adapters): the same shape."""


def kept_blob(task: int) -> str:
    """Name of the blob that holds what a rule kept of a task."""
    return f"routing.{task}"


def kept_bytes(kept: Kept, rule: str) -> bytes:
    """What the rule of a method keeps, as a safetensors file.

    Raises MismatchError for what is no mapping of words to tensors, or an empty one.
    """
    words = f"method {rule}: keep gave"
    expected = "a mapping of at least one word to a tensor, as {'mean': looks.mean(dim=0)}"
    if not isinstance(kept, Mapping) or not kept:
        found = "an empty one" if isinstance(kept, Mapping) else f"a {type(kept).__name__}"
        raise MismatchError(f"{words} {found}", expected=expected)
    for name, tensor in kept.items():
        if not _is_word(name):
            raise MismatchError(f"{words} the name {name!r}", expected=expected)
        if not isinstance(tensor, Tensor):
            raise MismatchError(f"{words} a {type(tensor).__name__} as {name}", expected=expected)
    whole = torch.contiguous_format  # as a transposed one is not
    return save({k: v.detach().cpu().clone(memory_format=whole) for k, v in kept.items()})


def known_tasks(view: memtool_stores.MemoryView) -> tuple[int, ...]:
    """Numbers of the tasks that have adapters and of which something is kept, as written."""
    blobs = set(view.blobs())
    tasks = dict.fromkeys(task_of(record) for record in view.adapters)
    return tuple(task for task in tasks if kept_blob(task) in blobs)


class Reader(Protocol):
    """What a method says of how its memory is read."""

    def routing(
        self,
        values: AdapterValues | Stock,
        owners: Sequence[int],
        kept: Sequence[Kept],
        look: PromptLook,
    ) -> Routing:
        """Its rule over adapters, each with an owner, and what was kept of their tasks."""

    def look_in(self, view: memtool_stores.MemoryView) -> PromptLook:
        """How a version sees prompts."""

    def known_in(self, view: memtool_stores.MemoryView) -> tuple[int, ...]:
        """Numbers of the tasks that a version can recall, in the order written."""

    def remedy_in(self, view: memtool_stores.MemoryView) -> str:
        """What helps where a version can recall nothing."""

    def kept_in(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Kept]:
        """What its rule goes by, of each of these tasks."""

    def values_in(
        self, view: memtool_stores.MemoryView, records: Sequence[memtool_stores.AdapterRecord]
    ) -> AdapterValues | Stock:
        """The adapters of these records."""


class Routing(nn.Module):
    """Adapters (t) and what a rule kept of their tasks; `owners` (t,) is each one's task, an index.

    `steady` says that nothing is carried from token to token. Nothing of it learns. What was kept
    are its buffers, so that they move with it.
    """

    owners: Tensor
    steady: bool = True

    def __init__(
        self,
        values: AdapterValues | Stock,
        owners: Sequence[int],
        kept: Sequence[Kept],
        rule: Rule,
        name: str = "",
        look: PromptLook = FINAL,
        memories: int | None = None,
    ) -> None:
        """`name` is that of the method whose rule it is, for errors; `look` how it sees prompts.

        `memories` is how many blocks have weights of their own; None: one set for all.
        """
        super().__init__()
        self.name = name
        self.look = look
        self.values = values
        self.memories = memories
        self._told = False
        self.register_buffer("owners", torch.tensor(owners))
        self._rule = rule
        self._names = [tuple(one) for one in kept]
        for index, one in enumerate(kept):
            for name, tensor in one.items():
                self.register_buffer(f"kept_{index}_{name}", tensor)

    @property
    def kept(self) -> list[Kept]:
        """What the rule kept of every task, by name; numbers with a point in float32."""
        found: list[Kept] = []
        for index, names in enumerate(self._names):
            buffers = {name: getattr(self, f"kept_{index}_{name}") for name in names}
            found.append({k: v.float() if v.is_floating_point() else v for k, v in buffers.items()})
        return found

    def weights(self, looks: Tensor) -> Tensor:
        """The weights of inputs by what they look like (n, dim): (n, adapters).

        With memories of their own (n, memories, adapters). Adapters of one task share its weight.
        Raises MismatchError where the rule gives another shape, or numbers that are none for an
        input of finite ones.
        """
        with torch.autocast(looks.device.type, enabled=False):
            found = self._rule(looks.float(), self.kept)
        own = () if self.memories is None else (self.memories,)
        _require_weights(found, looks, (*own, len(self._names)), self.name)
        wide = torch.promote_types(found.dtype, looks.dtype)
        return spread_over(found.to(wide), self.owners)

    @torch.no_grad()
    def weighed(self, lm: CausalLM, prompts: Tensor) -> Tensor:
        """As `weights`, of prompts, token ids (n, length) padded on the left."""
        if self._told:
            return self.weights(torch.zeros(len(prompts), 0, device=prompts.device))
        return self.weights(self.look(lm, prompts))

    def only(self, task: int) -> None:
        """Give the adapters of one task, an index, all weight from here on."""
        chosen = torch.arange(len(self._names)) == task
        self._rule = lambda looks, _: chosen.to(looks).expand(len(looks), -1)
        self._told = True

    def recall(self, weights: Tensor) -> Recall:
        """What inputs recall under weights, as `weights` gives them.

        Of a stock only those adapters are read that an input gives more than `LEAST`.
        """
        values = self.values
        if not isinstance(values, AdapterValues):
            # What is read from the stock is known on the CPU.
            used = (weights.abs() > LEAST).flatten(0, -2).any(dim=0).cpu().nonzero()[:, 0]
            if not len(used):
                return _nothing
            values, weights = (
                values.take(used.tolist(), weights.device),
                weights[..., sent(used, weights.device)],
            )
        given = weights.unsqueeze(1) if weights.ndim == 2 else weights[:, [*values.layout.blocks]]
        return given_for_each(values, given, "delta")

    def recalled(self, lm: CausalLM, prompts: Tensor, way: Way | None = None) -> Recall:
        """What prompts recall; `way` is another use of their weights."""
        if self._looks_on_its_way(lm):
            return RecallOnItsWay(self, lm, prompts, way)
        weights = self.weighed(lm, prompts)
        return self.recall(weights if way is None else way(weights))

    def asked(self, lm: CausalLM, prompts: Tensor) -> tuple[Recall, Callable[[], Tensor]]:
        """What prompts recall; and what tells their weights, as `weighed`, once they ran."""
        if self._looks_on_its_way(lm):
            found: list[Tensor] = []  # and not the recall, which holds adapters

            def keep(weights: Tensor) -> Tensor:
                found.append(weights)
                return weights

            return RecallOnItsWay(self, lm, prompts, keep), lambda: found[0]
        weights = self.weighed(lm, prompts)
        return self.recall(weights), lambda: weights

    def _looks_on_its_way(self, lm: CausalLM) -> bool:
        """Whether prompts are seen whole before any adapter changes what is seen."""
        return not self._told and is_seen_before(self.values.begin, self.look.seen_at(lm.depth))


class RecallOnItsWay:
    """The recall of one run over prompts (b, n) that are looked at as it passes.

    No adapter acts before the block where all is seen; there the weights are found, and stay.
    """

    def __init__(
        self, routing: Routing, lm: CausalLM, prompts: Tensor, way: Way | None = None
    ) -> None:
        """`way` is another use of the weights."""
        self._routing = routing
        self._passing = routing.look.passing(lm, prompts)
        self._way = way
        self._recall: Recall | None = None

    def __call__(self, block: int, hidden: Tensor) -> Mixture | None:
        """The mixture of a block for its input (b, n, dim)."""
        if self._recall is None:
            with torch.no_grad():
                seen = self._passing(block, hidden)
                if seen is None:
                    return None
                weights = self._routing.weights(seen)
                self._recall = self._routing.recall(
                    weights if self._way is None else self._way(weights)
                )
        return self._recall(block, hidden)


@dataclass(frozen=True, eq=False)
class RoutedMemory:
    """One version, on the device: `records` are the adapters of `tasks`, in the order written.

    `head` has the classifier that was trained with each adapter; None of texts.
    """

    version: str
    view: memtool_stores.MemoryView
    tasks: tuple[int, ...]
    records: tuple[memtool_stores.AdapterRecord, ...]
    routing: Routing
    head: RecalledHead | None

    @classmethod
    def read(
        cls, work: Workspace, version: str, reader: Reader, device: torch.device
    ) -> RoutedMemory:
        """Read a version whole.

        Raises NotFoundError for one without consolidated adapters, or of images an adapter without
        a head.
        """
        view = work.store.view(work.version_of(version))
        tasks = reader.known_in(view)
        if not tasks:
            held = f"{len(view.adapters)} adapters, of which nothing is kept to choose by"
            raise NotFoundError(
                f"the memory {work.store_path!r} holds {held}, at version {view.version}",
                remedy=reader.remedy_in(view),
            )
        records = tuple(record for record in view.adapters if task_of(record) in tasks)
        values, kept = reader.values_in(view, records), reader.kept_in(view, tasks)
        owners = [tasks.index(task_of(record)) for record in records]
        head = None if work.reads == "texts" else _heads(view, records).to(device)
        routing = reader.routing(values, owners, kept, reader.look_in(view)).to(device)
        return cls(view.version, view, tasks, records, routing, head)


def _nothing(block: int, hidden: Tensor) -> None:
    """The recall of no adapter."""
    del block, hidden


def of_prompts(weights: Tensor) -> Tensor:
    """Weights (n, adapters): means over the memories, where there are several."""
    return weights if weights.ndim == 2 else weights.mean(dim=1)


def spread_over(weights: Tensor, owners: Tensor) -> Tensor:
    """Weights of tasks (..., tasks) as weights of their adapters (..., adapters)."""
    counts = torch.zeros(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    counts = counts.index_add(0, owners, counts.new_ones(len(owners)))
    return weights[..., owners] / counts[owners]


def hardest(weights: Tensor) -> Tensor:
    """All weight on the adapter that has most: (..., adapters)."""
    return F.one_hot(weights.argmax(dim=-1), weights.shape[-1]).to(weights.dtype)


def uniform(weights: Tensor) -> Tensor:
    """The same weight for all: (..., adapters)."""
    return torch.full_like(weights, 1 / weights.shape[-1])


def only(task: int, owners: Tensor) -> Way:
    """All weight on the adapters of one task, an index."""
    mine = (owners == task).float()
    return lambda weights: (mine / mine.sum()).expand_as(weights)


def _heads(
    view: memtool_stores.MemoryView, records: Sequence[memtool_stores.AdapterRecord]
) -> RecalledHead:
    """The classifier that was trained with each adapter."""
    found = []
    for record in records:
        head = own_head(view, record.name)
        if head is None:
            raise NotFoundError(
                f"adapter {record.name!r} came without a trained head",
                remedy="an adapter made by memtool train-adapter",
            )
        found.append(head)
    return RecalledHead.of_tasks(found, range(len(found)))


def read_kept(view: memtool_stores.MemoryView, blob: str) -> Kept:
    """What a rule kept of a task. Raises CorruptError for what `kept_bytes` cannot have written."""
    found = load_tensors(view.blob(blob), f"blob {blob!r}")
    if not found or not all(map(_is_word, found)):
        raise CorruptError(
            f"blob {blob!r} at version {view.version} holds {sorted(found)}",
            expected="tensors that are named by words",
            remedy="memtool verify",
        )
    return found


def _is_word(name: object) -> bool:
    """Whether it can name a tensor of a blob, and of a module."""
    return isinstance(name, str) and name.isidentifier()


def _require_weights(weights: object, looks: Tensor, wanted: tuple[int, ...], rule: str) -> None:
    """Raise MismatchError unless a rule gave weights (n, *wanted), finite where the looks are."""
    words, shape = f"method {rule}: weights gave", (looks.shape[0], *wanted)
    names = ("inputs", "tasks") if len(shape) == 2 else ("inputs", "memories", "tasks")
    expected = f"a tensor of shape {shape}: ({', '.join(names)})"
    if not isinstance(weights, Tensor):
        raise MismatchError(f"{words} a {type(weights).__name__}", expected=expected)
    if tuple(weights.shape) != shape:
        raise MismatchError(f"{words} shape {tuple(weights.shape)}", expected=expected)
    if torch.compiler.is_compiling():
        return
    broken = ~looks.isfinite().all(dim=1)
    if not bool((weights.isfinite().flatten(1).all(dim=1) | broken).all()):
        raise MismatchError(f"{words} numbers that are not finite", expected="finite numbers")
