"""What is known of prompts, and the keys of a memory of prompts that are solved from it.

    routing.<task>    the moments of the training prompts of a task
    looks.<adapter>   the moments of the example prompts that an adapter came with, by its id
    prompt-keys       how prompts were looked at; in rows beside it, whose keys there are
    prompt-reach      how far from the others the example prompts lie

Moments are counts and means by cluster, and a root of the scatter within clusters; all of a task's
add up. Where every block has keys of its own, they are solved from the columns that it sees: those
of a root are a root of its scatter. What all tasks add up to is kept, see `sums`, so that those of
earlier ones are not read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

import memtool_stores
from memtool.errors import CorruptError, DataError, MismatchError
from memtool.learning.looks import columns_of
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.clusters import clustered
from memtool.memories.moments import Moments
from memtool.methods.mira.first import require_same_first, taken_along
from memtool.methods.mira.prompt_reach import REACH, WITNESS_WIDE, put_reach
from memtool.methods.mira.sums import ASKED, Asked, drop_asked
from memtool.methods.on_demand import OnDemand
from memtool.methods.pieces import StateInRows
from memtool.methods.records import task_of
from memtool.methods.routed.memory import Kept, kept_blob, kept_bytes
from memtool.tensor_bytes import load_tensors, read_tensors

SHRINKAGE = 0.1
"""Of the covariance within tasks, toward a multiple of the identity.

Chosen on the validation prompts of TRACE, from 200 and from 30 prompts a task, among 1e-3 to 0.3.
"""


class PromptState(StateInRows):
    """How prompts are looked at, and whose keys there are: the JSON blob `prompt-keys`.

    `adapters` are the ids behind the keys, in their order: those that prompts were known of, and
    `rows` how many keys each of them has; both are in rows of their own. `moments` is the hash of
    what the keys were solved from, and `parts` how many blobs that was; where they learned from
    there, `epochs` and `lr` say how. `apart` is how many blocks have keys of their own, and how
    many entries of a look each sees alone: they come first, block by block.
    `first` are the ids of the adapters that prompts were looked at under, where they were.
    """

    blob: ClassVar[str] = "prompt-keys"

    BY_ROW: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "adapters": {"id": "adapters", "rows": "rows"}
    }

    schema_version: int = 2
    look_at: tuple[str, ...]
    look_under: str = "frozen"
    first: tuple[str, ...] = ()
    scope: str = "model"
    clusters: int = 1
    chat: bool = False
    apart: tuple[PositiveInt, PositiveInt] | None = None
    adapters: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    moments: str = ""
    parts: int = 0
    epochs: int = 0
    lr: float | None = None

    def without_keys(self) -> PromptState:
        """The same way to look at prompts, before there are keys."""
        none = {"adapters": (), "rows": (), "moments": "", "parts": 0, "epochs": 0, "lr": None}
        return self.model_copy(update=none)

    def put(self, txn: memtool_stores.Transaction) -> None:
        """As `StateInRows.put`; a key each where nothing else is said, as once all had."""
        rows = self.rows or (1,) * len(self.adapters)
        super(PromptState, self.model_copy(update={"rows": rows})).put(txn)

    @classmethod
    def drop(cls, txn: memtool_stores.Transaction) -> None:
        """Leave the version that is being written without a state, and without sums."""
        super().drop(txn)
        for name in (ASKED, REACH):
            drop_asked(txn, name)


def looks_blob(adapter: str) -> str:
    """Name of the blob that holds what the example prompts of an adapter, by its id, look like."""
    return f"looks.{adapter}"


def parts_in(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> OnDemand[list[Kept]]:
    """What is known of the prompts of every task of these records, by its number, when asked for.

    That is what was kept of its training prompts, `new` or in a version, and of the example prompts
    of each of its adapters. Asking raises CorruptError.
    """
    names: dict[int, list[str | None]] = {}
    for number, name in _names(view, records, new):
        names.setdefault(number, []).append(name)

    def read(number: int) -> list[Kept]:
        each = names[number]
        return [new[number] if name is None else read_moments(view, name) for name in each]

    return OnDemand(names, read)


def _names(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> list[tuple[int, str | None]]:
    """Task and blob of all that is known of prompts; None for what is new."""
    blobs, found = {*view.blobs()}, dict[tuple[int, str | None], None]()
    for record in records:
        number = task_of(record)
        if number in new:
            found[number, None] = None
        elif kept_blob(number) in blobs:
            found[number, kept_blob(number)] = None
        if looks_blob(record.id) in blobs:
            found[number, looks_blob(record.id)] = None
    return [*found]


def tasks_in(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> set[int]:
    """Numbers of the tasks of these records of which prompts are known; none of them is read."""
    return {number for number, _ in _names(view, records, new)}


def digest_of(
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
    new: Mapping[int, Kept],
) -> str:
    """The hash of all that the keys of these records are solved from."""
    return _digest(view, _names(view, records, new), new)


def _digest(
    view: memtool_stores.MemoryView,
    names: Sequence[tuple[int, str | None]],
    new: Mapping[int, Kept],
) -> str:
    hashes = view.blob_hashes
    parts = [
        hashes[name]
        if name is not None
        else hashlib.sha256(kept_bytes(new[number], "mira")).hexdigest()
        for number, name in names
    ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _summed(
    view: memtool_stores.MemoryView,
    names: Sequence[tuple[int, str | None]],
    new: Mapping[int, Kept],
) -> int:
    """Of how many tasks, from the first, a version keeps the sums: all that it has keys of, or 0.

    None where anything is known of one of them that was not then.
    """
    state = PromptState.load(view)
    if state is None or not state.parts or state.parts > len(names):
        return 0
    then, since = names[: state.parts], names[state.parts :]
    tasks = {number for number, _ in then}
    if tasks & {number for number, _ in since} or _digest(view, then, new) != state.moments:
        return 0
    return len(tasks)


def moments_of(rows: Tensor, clusters: int, seed: int, apart: int | None = None) -> Kept:
    """Counts (c,), means (c, d) and a root (r, d) of rows (n, d), in at most so many clusters.

    rootᵀ root is the scatter Σ (x − mean)(x − mean)ᵀ about the means of the clusters: of few rows
    much less than d x d. With `apart` only the scatters of so many columns each are kept, side by
    side, and r is at most as many.
    """
    wide = rows.double()
    owners = clustered(rows, clusters, seed)
    counts = torch.bincount(owners)
    sums = wide.new_zeros(len(counts), wide.shape[1]).index_add(0, owners, wide)
    means = sums / counts.unsqueeze(1)
    parts = (wide - means[owners]).split(apart or wide.shape[1], dim=1)
    root = torch.cat([torch.linalg.qr(part, mode="r").R for part in parts], dim=1)
    return {"count": counts, "mean": means.float(), "root": root.float()}


def read_moments(view: memtool_stores.MemoryView, blob: str) -> Kept:
    """What `PromptMemory.kept_of` gave. Raises CorruptError for anything else."""
    where, data = f"blob {blob!r}", view.blob(blob)
    if "some" in load_tensors(data, where):
        found = read_tensors(data, where, count="int64 c", mean="c d", root="n d", some="m w")
        fits = len(found["some"]) > 0
    else:  # as it was kept before there were clusters and witnesses
        found = read_tensors(data, where, count="int64 c", mean="d", root="n d")
        fits = len(found["count"]) == 1
        found["mean"] = found["mean"].unsqueeze(0)
        found["some"] = found["mean"][:0]
    counts = found["count"]
    finite = all(bool(found[name].isfinite().all()) for name in ("mean", "root", "some"))
    wide = min(WITNESS_WIDE, found["mean"].shape[1])
    fits = fits and (not len(found["some"]) or found["some"].shape[1] == wide)
    fits = fits and len(counts) > 0 and bool(((counts >= 1) & (counts <= 2**40)).all())
    if not fits or not finite:
        raise CorruptError(
            f"{where} holds no moments of prompts", expected="counts, and finite numbers"
        )
    kept: Kept = found
    return kept


def classes_of(parts: Sequence[Kept]) -> list[list[int]]:
    """The class, from 0, of every cluster of every part of a task.

    Each is a class of its own; but where no part has several, all of the task is one.
    """
    sizes = [len(part["count"]) for part in parts]
    if max(sizes) == 1:
        return [[0]] * len(parts)
    firsts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [[*range(first, first + size)] for first, size in zip(firsts, sizes, strict=True)]


def counted(parts: Sequence[Kept], apart: tuple[int, int] | None = None) -> QueryStatistics:
    """The moments of the prompts of one task, as each memory sees them: a class for each cluster.

    `apart` as in `PromptState`; without it one memory sees all. Raises MismatchError for looks of
    several widths.
    """
    width = parts[0]["mean"].shape[1]
    columns, classes = columns_of(apart, width), classes_of(parts)
    moments = Moments(len(columns), columns.shape[1], classes[-1][-1] + 1)
    for part, mine in zip(parts, classes, strict=True):
        _require_width(part["mean"].shape[1], width)
        counts, places = part["count"].double(), torch.tensor(mine)
        means, root = part["mean"].double(), part["root"].double()
        moments.counts.index_add_(0, places, counts)
        for memory, own in enumerate(columns):
            seen, within = means[:, own], root[:, own]
            weighed = counts.unsqueeze(1) * seen
            moments.sums[memory].index_add_(0, places, weighed)
            moments.second[memory] += within.T @ within + seen.T @ weighed
    return QueryStatistics.of(moments)


def _of_one_width(
    tasks: Iterable[Sequence[Kept]], apart: tuple[int, int] | None, before: Asked | None
) -> Iterator[QueryStatistics]:
    """What is `counted` of tasks; MismatchError for looks of another width than those before."""
    width = 0 if before is None else before.whole.dim
    for parts in tasks:
        found = counted(parts, apart)
        _require_width(found.dim, width or found.dim)
        width = found.dim
        yield found


def _require_width(found: int, width: int) -> None:
    if found != width:
        raise MismatchError(
            f"prompts that look like {found} numbers, and like {width}",
            expected="all looked at in the same places",
            remedy="memtool rollback, or another --store",
        )


def solved_keys(asked: Asked) -> list[Tensor]:
    """The keys (memories, m, d + 1), float32, of every task, of what is `counted` of all.

    m is the number of clusters of the task. With x = [look, 1] the sum of exp(x · key) over them is
    p(task | look) up to a factor that all tasks share, of Gaussian clusters of one covariance.
    Raises DataError where no cluster has two prompts that differ.
    """
    moments = asked.whole.moments
    try:
        rule = moments.lda(SHRINKAGE, equal_priors=True)
    except DataError as error:
        raise DataError(
            "no adapter has two prompts that differ",
            expected="a few dozen example prompts of each",
            remedy="--prompts FILE with more of them",
        ) from error
    # Tasks are as likely as each other, and not their clusters.
    each = moments.counts.split([*asked.sizes])
    bias = rule.bias + torch.cat([(one / one.sum()).log() for one in each])
    keys = torch.cat([rule.weight, bias.unsqueeze(-1)], dim=-1).float()
    return [*keys.split([*asked.sizes], dim=1)]


Refine = Callable[[Sequence[int], Sequence[Tensor]], Sequence[Tensor]]
"""Keys of the tasks of these numbers that learned on from those in closed form."""


def put_keys(
    txn: memtool_stores.Transaction,
    *,
    view: memtool_stores.MemoryView,
    new: Mapping[int, Kept],
    state: PromptState,
    refine: Refine | None = None,
) -> None:
    """Give every live adapter of which prompts are known its keys, solved with those of all.

    (memories, adapters, m · (d + 1)): m of every adapter, one after another, zeros where it has
    fewer. `state` says how prompts are looked at, and what `refine` does.
    """
    live = txn.adapters
    names, parts = _names(view, live, new), parts_in(view, live, new)
    tasks, first = [*parts], _summed(view, names, new)
    before = Asked.read(view, tasks=first) if first else None
    first = first if before else 0
    others = _of_one_width((parts[task] for task in tasks[first:]), state.apart, before)
    asked = Asked.of(others, by_class=True, before=before)
    found: Sequence[Tensor] = solved_keys(asked)
    if refine is not None:
        found = refine([*parts], found)
    most = max(one.shape[1] for one in found)
    padded = [F.pad(one, (0, 0, 0, most - one.shape[1])).flatten(1) for one in found]
    rows = {
        task: (one.shape[1], keys) for task, one, keys in zip(parts, found, padded, strict=True)
    }
    none = (0, torch.zeros_like(padded[0]))
    each = [rows.get(task_of(record), none) for record in live]
    txn.set_keys(torch.stack([keys for _, keys in each], dim=1).contiguous().numpy())
    changes = {
        "adapters": tuple(record.id for record in live if task_of(record) in rows),
        "rows": tuple(count for count, _ in each if count),
        "moments": _digest(view, names, new),
        "parts": len(names),
    }
    state.model_copy(update=changes).put(txn)
    asked.put(txn)
    put_reach(txn, view, parts, first)


def solve_without(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, gone: set[str]
) -> None:
    """In a transaction that takes adapters away: the keys of the others, solved without them.

    In closed form, also where they had learned: those that learned did so beside the forgotten.
    No keys where what is left of the prompts is too little to tell adapters apart. Without an
    adapter that prompts were looked at under all that was counted goes, too: training prompts are
    counted again by consolidation, example prompts by the next import of them.
    """
    state = PromptState.load(view)
    if state is not None and gone & {*state.first}:
        _drop_all(txn, view)
        return
    if state is None or view.keys() is None or not gone & {*state.adapters}:
        return
    without = state.without_keys()
    try:
        if tasks_in(view, txn.adapters, {}):
            put_keys(txn, view=view, new={}, state=without)
            return
    except DataError:
        pass
    txn.set_keys(None)
    if not txn.adapters:
        PromptState.drop(txn)
        return
    without.put(txn)
    for name in (ASKED, REACH):
        drop_asked(txn, name)


def _drop_all(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> None:
    """Leave a memory that knows no prompts: no keys, nothing that was counted."""
    known = {kept_blob(task_of(one)) for one in txn.adapters}
    known |= {looks_blob(one.id) for one in txn.adapters}
    for name in sorted({*view.blobs()} & known):
        txn.delete_blob(name)
    PromptState.drop(txn)
    txn.set_keys(None)


def join(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> tuple[str, ...]:
    """In a transaction that took adapters of another memory in: one way to look at prompts.

    Raises MismatchError where prompts were looked at in another way.
    """
    here, there = PromptState.load(txn.base), PromptState.load(view)
    if there is None:
        return ()
    if here is None:
        first = taken_along(txn, view, there.first)
        there.without_keys().model_copy(update={"first": first}).put(txn)
        return ()
    alike = ("memory.look_at", "memory.look_under", "memory.scope", "memory.clusters", "text.chat")
    for name in alike:
        word = name.partition(".")[2]
        ours, theirs = getattr(here, word), getattr(there, word)
        if ours != theirs:
            raise MismatchError(
                f"prompts were looked at under {name} {_words(theirs)} in the other memory, "
                f"and {_words(ours)} in this one",
                expected=f"two memories of one {name}",
                remedy="another --store",
            )
    require_same_first(txn.base, here.first, view, there.first)
    return ()


def _words(setting: object) -> str:
    return ",".join(setting) if isinstance(setting, tuple) else str(setting)
