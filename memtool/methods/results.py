"""What the steps of a method return: typed records that the command line prints as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A piece of a result: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(Part):
    """A whole result; `schema` and `schema_version` say how to read it."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: int = 1


class AdaptResult(Result):
    """One trained adapter, written as a PEFT directory; texts have no accuracy in training."""

    schema_: Literal["memtool.adapt"] = Field("memtool.adapt", alias="schema")
    path: Path
    name: str
    task: int
    task_name: str
    seed: int
    train_accuracy: float | None
    loss: float
    seconds: float = Field(description="its share of the pass that trained all of its task")
    parameters: int
    bytes: int
    resumed: bool = False
    skipped: bool = False
    losses: tuple[float, ...] = Field((), description="mean loss of every epoch")


class WrittenAdapter(Part):
    """Name and id of an adapter now in memory."""

    name: str
    id: str


class AsAtoms(Part):
    """What a LoRA that acts whole is worth on the test samples of its task, and what as atoms.

    `plain` is the adapter alone, `atoms` the memory with its atoms: accuracies, with a head that is
    solved from the same samples, or losses in nats per answer token.
    """

    name: str
    task: int
    measure: Literal["accuracy", "loss"]
    plain: float
    atoms: float


class WriteResult(Result):
    """What `write` added; `known` are the adapters that were there, `skipped` their names.

    `unchanged` says that there was nothing new, of them and of their prompts: no new version.
    `as_atoms` has those that were trained to act whole and became atoms; `notes` say what is
    doubtful about what was written.
    """

    schema_: Literal["memtool.write"] = Field("memtool.write", alias="schema")
    version: str
    added: tuple[WrittenAdapter, ...]
    skipped: tuple[str, ...] = ()
    known: tuple[WrittenAdapter, ...] = ()
    as_atoms: tuple[AsAtoms, ...] = ()
    notes: tuple[str, ...] = ()
    unchanged: bool = False


class MergeResult(Result):
    """What came of another memory, `source` at `source_version`; the rest as of `WriteResult`.

    `renumbered` has the tasks that have another number here, by name.
    """

    schema_: Literal["memtool.merge"] = Field("memtool.merge", alias="schema")
    version: str
    source: str
    source_version: str
    kind: Literal["adapter", "atoms"]
    added: tuple[WrittenAdapter, ...]
    known: tuple[WrittenAdapter, ...] = ()
    renumbered: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    unchanged: bool = False


class ConsolidateResult(Result):
    """What consolidation learned.

    `train_accuracy` is on the training images of the last task, recalled without its label;
    `validation_accuracy` on the validation images, after the epoch of key learning that was best;
    `key_drift_degrees` is the mean angle by which the keys of older adapters turned.
    """

    schema_: Literal["memtool.consolidate"] = Field("memtool.consolidate", alias="schema")
    version: str
    tasks: tuple[int, ...]
    separation: str
    mix: str
    epochs: int
    seconds: float
    train_accuracy: float
    validation_accuracy: float | None = None
    key_drift_degrees: float
    unchanged: bool = False


class RoutedResult(Result):
    """What consolidation did for a rule of one's own: it kept something of the `new` tasks."""

    schema_: Literal["memtool.consolidate-routed"] = Field(
        "memtool.consolidate-routed", alias="schema"
    )
    version: str
    tasks: tuple[int, ...]
    new: tuple[int, ...]
    seconds: float
    unchanged: bool = False


class PredictorResult(Result):
    """What consolidation did for Modulation.

    `epochs` is 0 when no task predictor was trained; `train_task_accuracy` is its share of training
    samples with the right task.
    """

    schema_: Literal["memtool.consolidate-modulation"] = Field(
        "memtool.consolidate-modulation", alias="schema"
    )
    version: str
    tasks: tuple[int, ...]
    memories: tuple[str, ...]
    epochs: int
    seconds: float
    train_task_accuracy: float | None = None
    unchanged: bool = False


class AdapterCoefficient(Part):
    """The mean coefficient of an adapter over the samples and the blocks."""

    name: str
    task: int
    coefficient: float


class Prediction(Part):
    """The most probable class of one image.

    `novelty` says how far the image lies from all that was learned: 99 of 100 images of a learned
    task lie within 1, and an image beyond that is `unlike` all of them: its class means little.
    None where the memory does not hold what tells.
    """

    label: str
    probability: float
    novelty: float | None = None
    unlike: bool | None = None


class RetrieveResult(Result):
    """The mixture that a task's test images, an image or a query recall.

    `blocks[l]` are the coefficients at memory l, averaged over the samples, adapters in the order
    of `adapters`; `block_numbers` says at which block each memory looks. `novelty` and `unlike` are
    those of a `Prediction`, for a prompt. `left_out` is the share of adapters that separation topk
    leaves out, of the softmax of all: a mean over samples and memories.
    """

    schema_: Literal["memtool.retrieve"] = Field("memtool.retrieve", alias="schema")
    version: str
    subject: str
    samples: int
    mix: str
    separation: str
    adapters: tuple[AdapterCoefficient, ...]
    blocks: tuple[tuple[float, ...], ...]
    block_numbers: tuple[int, ...]
    prediction: Prediction | None = None
    accuracy: float | None = None
    answer: str | None = None
    loss: float | None = None
    novelty: float | None = None
    unlike: bool | None = None
    left_out: float | None = None
    out: Path | None = None

    def _repr_html_(self) -> str:
        rows = [(one.name, str(one.task), f"{one.coefficient:.4f}") for one in self.adapters]
        return _shown(self, ("adapter", "task", "weight"), rows)


class HeadResult(Result):
    """What consolidation did for MoRAM: a head under other settings; atoms learn nothing there.

    A memory of texts has no head.
    """

    schema_: Literal["memtool.consolidate-moram"] = Field(
        "memtool.consolidate-moram", alias="schema"
    )
    version: str
    tasks: tuple[int, ...]
    head: str | None = None
    scope: str | None = None
    unchanged: bool = False


class TaskShare(Part):
    """The gate's weight on the atoms of a task, mean over samples, tokens and adapted maps."""

    name: str
    task: int
    task_name: str | None
    share: float


class AtomWeight(Part):
    """One atom, number `rank` of its task at a site, and its share of what atoms add there."""

    site: str
    task: int
    rank: int
    share: float


class AtomsResult(Result):
    """Which atoms the tokens of an image or prompt, or of a task's test samples, choose (MoRAM).

    `blocks[l]` are the shares of the tasks in block `block_numbers[l]`, tasks in the order of
    `tasks`; what is missing to one fell below the threshold. `atoms` are those that add most.
    Images give a prediction and an accuracy; a prompt gives an answer, a task of texts its loss.
    """

    schema_: Literal["memtool.retrieve-atoms"] = Field("memtool.retrieve-atoms", alias="schema")
    version: str
    subject: str
    samples: int
    score_norm: str
    topk: int
    tasks: tuple[TaskShare, ...]
    blocks: tuple[tuple[float, ...], ...]
    block_numbers: tuple[int, ...]
    atoms: tuple[AtomWeight, ...]
    prediction: Prediction | None = None
    accuracy: float | None = None
    answer: str | None = None
    loss: float | None = None

    def _repr_html_(self) -> str:
        rows = [
            (one.task_name or one.name, str(one.task), f"{one.share:.4f}") for one in self.tasks
        ]
        return _shown(self, ("atoms of", "task", "share"), rows)


class TaskAccuracy(Part):
    """Accuracy, or loss, on the test samples of a task before and after a change."""

    task: int
    task_name: str
    before: float
    after: float


class PruneResult(Result):
    """Atoms that add next to nothing, and what taking them out does; `done` when they are out.

    `ranks` names them by row of atoms and site; `below` is in parts of what an atom of the same
    site adds on average.
    """

    schema_: Literal["memtool.prune"] = Field("memtool.prune", alias="schema")
    version: str
    below: float
    atoms: int
    pruned: int
    ranks: dict[str, dict[str, list[int]]]
    tasks: tuple[TaskAccuracy, ...]
    measure: Literal["accuracy", "loss"] = "accuracy"
    done: bool = False


class RecalledShare(Part):
    """How much of a stored adapter is in a recalled one."""

    name: str
    task: int
    share: float


class RecallResult(Result):
    """One adapter that a memory completed from its key (Modulation).

    `recall_error` is |recalled − stored| / |stored| against `adapter`; `energy` is that of the
    memory, lower for what it knows; `novelty` goes from 0 (a known key) to 1 (an unknown one).
    `shares` are the coefficients of a Hopfield memory, empty for BayesPCN. Of texts a prompt has an
    `answer`, a task the `loss` of the recalled adapter on its test texts.
    """

    schema_: Literal["memtool.recall"] = Field("memtool.recall", alias="schema")
    version: str
    subject: str
    memory: str
    adapter: str
    task: int
    key_numbers: int
    stored: int
    recall_error: float
    energy: float
    novelty: float
    shares: tuple[RecalledShare, ...] = ()
    prediction: Prediction | None = None
    accuracy: float | None = None
    answer: str | None = None
    loss: float | None = None
    out: Path | None = None

    def _repr_html_(self) -> str:
        rows = [(one.name, str(one.task), f"{one.share:.4f}") for one in self.shares]
        return _shown(
            self, ("adapter", "task", "share"), rows or [(self.adapter, str(self.task), "1")]
        )


class Purged(Part):
    """What a purge freed and proved.

    Bytes of so many `hashes` were looked for in all stored `objects`; `left` names what was still
    found, and where.
    """

    versions_removed: int
    freed_bytes: int
    hashes: int
    objects: int
    left: dict[str, tuple[str, ...]]


class ForgetResult(Result):
    """What left the memory; `blobs` were its own, `left` adapters remain."""

    schema_: Literal["memtool.forget"] = Field("memtool.forget", alias="schema")
    version: str
    adapters: tuple[str, ...]
    tasks: tuple[int, ...]
    blobs: tuple[str, ...]
    left: int
    purged: Purged | None = None


class Probe(Part):
    """One version that bisect looked at; a reason instead of a value where it has none."""

    version: str
    message: str
    time: AwareDatetime
    value: float | None = None
    fell: bool | None = None
    reason: str | None = None


class BisectResult(Result):
    """The commit after which a metric fell by `drop` (a fraction) below its value at `good`.

    A loss rose by so many nats instead.

    `culprit` is None when it never fell. `suspects` could not be measured and lie just before it:
    the fall may be theirs. `tasks` are those that the good version knows.
    """

    schema_: Literal["memtool.bisect"] = Field("memtool.bisect", alias="schema")
    metric: str
    drop: float
    good: str
    bad: str
    tasks: tuple[str, ...]
    good_value: float
    bad_value: float
    probes: tuple[Probe, ...]
    culprit: Probe | None
    suspects: tuple[Probe, ...] = ()


Consolidated = ConsolidateResult | PredictorResult | HeadResult | RoutedResult
"""What consolidation says, told apart by its `schema`."""

Retrieved = RetrieveResult | RecallResult | AtomsResult
"""What retrieval says, told apart by its `schema`."""


def _shown(found: Retrieved, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """What was retrieved, for a notebook: what came of it, above who was recalled."""
    from memtool.reports.notebook import table_html
    from memtool.reports.table import Grid

    said = []
    if found.prediction is not None:
        said.append(f"{found.prediction.label} ({100 * found.prediction.probability:.1f} %)")
    if found.accuracy is not None:
        said.append(f"accuracy {100 * found.accuracy:.1f} %")
    if found.loss is not None:
        said.append(f"loss {found.loss:.3f}")
    if found.answer is not None:
        said.append(found.answer)
    count = getattr(found, "samples", 1)
    words = found.subject if count == 1 else f"{found.subject}, {count:,} samples"
    return table_html(Grid(": ".join([words, *said]), header, tuple(rows)))
