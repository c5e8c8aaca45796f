"""What consolidation does: every adapter in memory gets its key, and the memory its head.

    inventory  which tasks are new, which grew, and what was counted of the others
    count      features and queries of those, in one pass over their own images
    start      keys in closed form, as mean queries or at random; learned ones stay as they are
    learn      keys by cross-entropy through the recalled mixture, where there are epochs
    resolve    the head again, where it goes by the features that are recalled
    observe    what the new tasks ask, where later learning may not change the answers
    commit     keys, head, moments and state, as one version

Tasks written together are consolidated together; the images of older ones are not read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memtool.engine import FitResult
from memtool.errors import ConfigError
from memtool.heads import FeatureStatistics, RecalledHead, solve_recalled_head
from memtool.heads.solve import SOLVED, going_on
from memtool.learning.known import kept_head
from memtool.memories.keyed import KeyedMemory, set_centre
from memtool.methods.mira.commit import Made, Start, commit, query_modules, result_of
from memtool.methods.mira.count import count_queries, count_task
from memtool.methods.mira.inventory import Inventory, inventory_of
from memtool.methods.mira.keys import Draws, are_drawn, require_keys, start_keys
from memtool.methods.mira.learn import learn
from memtool.methods.mira.look import width_of
from memtool.methods.mira.protect import Protection
from memtool.methods.mira.read import add_decoders
from memtool.methods.mira.recall import MemoryModel, first_norms, memory_blocks, reaches_of
from memtool.methods.mira.state import (
    Snapshot,
)
from memtool.methods.results import ConsolidateResult
from memtool.sections import MemorySettings
from memtool.settings import Config
from memtool.streams.task import Images, Task, spread
from memtool.workspace import Workspace, require_learnable
from memtool_stores.held import Spool


def consolidate(
    work: Workspace, snapshot: Snapshot, *, began: float, metadata: Mapping[str, Any]
) -> ConsolidateResult:
    """Give every adapter its key, and solve the head; one version, with `metadata`.

    `began` is when the verb began, in seconds of `time.perf_counter`. Raises NotFoundError for a
    memory without adapters, ConfigError for settings that do not go with each other or with what
    is in memory, DataError for a task that nothing can be learned from, DivergedError,
    CapacityError for a random projection that is too wide, and ChangedMeanwhileError where another
    process committed.
    """
    with Spool() as spool:
        known = inventory_of(work, snapshot, spool)
        require_can_learn(work.config)
        work.require_fitting(())
        _count(known)
        start = _start(known)
        model = _model(known, start.keys)
        head, fit = _learn(known, start, model)
        head = _resolve(known, model, head)
        _observe(known, start, model)
        made = Made(start, model, head, fit)
        result = result_of(known, made, began)
        if known.unchanged:
            return result
        commit(known, made, result, metadata)
    return result.model_copy(update={"version": work.store.head()})


# Count ------------------------------------------------------------------------------------------


def _count(known: Inventory) -> None:
    """Add the moments of new tasks, and the features of grown ones through all their adapters."""
    work, settings = known.work, known.config.memory
    # A memory without content, for its query modules: what would each block be asked?
    blocks = memory_blocks(settings, work.backbone, work.layout.blocks)
    width = width_of(settings, work.backbone, blocks)
    probe = _memory(known, torch.zeros(len(blocks), 1, width + settings.key_bias))
    probe = probe.to(work.engine.device).requires_grad_(False)
    beneath = known.snapshot.model if known.config.adapter.residual else None
    queries, features = known.queries, known.features

    def seen(task: Task, on: MemoryModel | None) -> tuple[FeatureStatistics, Tensor]:
        own = known.snapshot.own_values(task.number, work.engine.device)
        found, asked = count_task(
            work.engine, work.backbone, probe, known.look, settings, own, task.train, on
        )
        return work.counted(found, task.train), asked

    if settings.centre == "first-task" and known.centre is None:
        known.centre = _centre(known, probe, beneath)
    if known.centre is not None:
        set_centre(probe, known.centre)
    for number in known.grown:
        features.put(number, seen(work.task(str(number)), None)[0])
    for number in work.telling("consolidate: count", known.new):
        task = work.task(str(number))
        require_learnable(task)
        counted, asked = seen(task, beneath)
        features.put(number, counted)
        by_class = settings.keys_of == "class"
        queries.put(number, count_queries(asked, task.train.labels, by_class=by_class))
    features.in_order(known.tasks)


def _centre(known: Inventory, probe: KeyedMemory, beneath: MemoryModel | None) -> Tensor:
    """The mean (memories, d) of what query modules are given by the tasks that are learned first.

    Those are all that are new to a memory without any.
    """
    work, total, count = known.work, torch.zeros(0), 0
    plain = known.config.memory.model_copy(update={"query": "identity"})
    asked = _memory(
        known, torch.zeros(len(probe.blocks), 1, probe[probe.blocks[0]].query.width), plain
    )
    asked = asked.to(work.engine.device).requires_grad_(False)
    for number in known.new:
        task = work.task(str(number))
        own = known.snapshot.own_values(number, work.engine.device)
        _, queries = count_task(
            work.engine, work.backbone, asked, known.look, plain, own, task.train, beneath
        )
        sums = queries.double().sum(dim=1)
        total = sums if not count else total + sums
        count += queries.shape[1]
    return (total / count).float()


# Start ------------------------------------------------------------------------------------------


def _start(known: Inventory) -> Start:
    """The keys before they learn, when nothing speaks against making them."""
    config, before = known.config, known.before
    work = known.work
    blocks = memory_blocks(config.memory, work.backbone, work.layout.blocks)
    width = width_of(config.memory, work.backbone, blocks) + config.memory.key_bias
    keys = start_keys(
        config.consolidate,
        config.memory,
        None if are_drawn(config.consolidate, config.memory) else known.asked,
        known.adapter_tasks,
        Draws(work.seed, known.tasks, blocks, width),
    )
    _require_own_values(known)
    kept, past = _kept(known), _past(known)
    if before is not None and kept and config.consolidate.keys != "closed-form":
        # Closed-form keys are relative to each other: all are solved anew.
        keys[:, :kept] = before
    if past is not None and config.consolidate.guard == "step":
        keys[:, kept:] = past.free_keys(blocks, keys[:, kept:])
    return Start(keys, kept, past)


def _kept(known: Inventory) -> int:
    """How many keys, from the first, are learned ones of before that learning goes on from."""
    config, before = known.config, known.before
    if before is None or not (_learns(config) or config.consolidate.protect == "dual-gpm"):
        return 0
    then = None if known.state is None else known.state.memory
    now = config.memory
    # Learned keys stay only where they mean the same as before.
    if then is None or _meaning(then) != _meaning(now):
        raise ConfigError(
            "the keys in memory were made for another separation, similarity or key_norm; "
            "learning them again would need the images of all tasks",
            remedy="--sep, memory.similarity and memory.key_norm as before, consolidate.epochs 0 "
            "with keys in closed form, or another --store",
        )
    if then.read != now.read:
        raise ConfigError(
            f"memory.read {now.read}, and the keys in memory learned under memory.read {then.read}",
            expected="one reading: learning them again would need the images of all tasks",
            remedy=f"--set memory.read={then.read}, or another --store",
        )
    return before.shape[1]


def _meaning(memory: MemorySettings) -> tuple[str, str, str]:
    """What learned keys mean something under."""
    return memory.separation, memory.similarity, memory.key_norm


def _past(known: Inventory) -> Protection | None:
    """What learning may not change; None where nothing is protected by dual-gpm."""
    if known.config.consolidate.protect != "dual-gpm":
        return None
    state = known.state
    if state is not None and state.consolidate.protect != "dual-gpm":
        raise ConfigError(
            f"--protect dual-gpm, but tasks {list(state.tasks)} were consolidated under "
            f"{state.consolidate.protect!r}: what they asked was not kept",
            remedy=f"--protect {state.consolidate.protect}, or a new --store",
        )
    return known.snapshot.past_queries()


def _learns(config: Config) -> bool:
    """Whether keys are learned, or random: not solved from moments that are there for all tasks."""
    return config.consolidate.epochs > 0 or config.consolidate.keys in ("random", "uniform")


def require_can_learn(config: Config) -> None:
    """Raise ConfigError unless keys go with what asks and protects them, learn through a mixture,
    and values learn before a head is solved.
    """
    require_keys(config.consolidate, config.memory)
    if _learns(config) and config.memory.routing != "mixture":
        raise ConfigError(
            f"key learning under memory.routing {config.memory.routing}",
            expected="a mixture: a hard choice has no gradient, and keys of its own",
            remedy="--routing mixture, or --set consolidate.epochs=0 with keys in closed form",
        )
    refines, resolved = config.consolidate.value_lr > 0, config.head.resolved
    if refines and config.head.kind in SOLVED and not resolved:
        raise ConfigError(
            f"consolidate.value_lr {config.consolidate.value_lr:g} with head.features own: "
            "the head would be solved on features of values that then change",
            remedy="--set head.features=recalled",
        )


def _require_own_values(known: Inventory) -> None:
    """Raise ConfigError for values that would learn on, and are kept as files."""
    rate = known.config.consolidate.value_lr
    own = next((record.name for record in known.view.adapters if record.ragged), None)
    if rate > 0 and own is not None:
        raise ConfigError(
            f"consolidate.value_lr {rate:g} over {own!r}, which is kept as the file that it came "
            "from",
            expected="adapters that were trained here, whose values may learn on",
            remedy="--set consolidate.value_lr=0",
        )


def _model(known: Inventory, keys: Tensor) -> MemoryModel:
    """The memory with these keys, on its frozen backbone."""
    work, config = known.work, known.config
    # Values that do not learn are read when they are used, where not all may be held.
    learn = config.consolidate.value_lr > 0 or config.memory.read == "decoder"
    held = None if learn else config.engine.resident
    values = known.snapshot.values_of(known.view.adapters, held)
    memory = _memory(known, keys)
    if known.config.memory.frozen == "novelty":
        memory[memory.blocks[0]].reaches = reaches_of(known.queries)
    if known.config.memory.read == "decoder":
        before = known.snapshot.model
        add_decoders(
            memory,
            known.config.memory,
            values,
            before=None if before is None else before.memory,
            adapters=len(work.stream.tasks) * known.config.adapter.per_task,
            generator=work.engine.generator(work.seed),
        )
    model = MemoryModel(work.backbone, values, memory, known.config.memory, known.look)
    return model.to(work.engine.device).requires_grad_(False)


def _memory(known: Inventory, keys: Tensor, settings: MemorySettings | None = None) -> KeyedMemory:
    """A memory over keys (memories, t, m · (dim + 1)); query modules that learned go on."""
    work, settings = known.work, settings or known.config.memory
    blocks = memory_blocks(settings, work.backbone, work.layout.blocks)
    memory = KeyedMemory.from_settings(
        settings,
        blocks,
        width_of(settings, work.backbone, blocks),
        keys,
        prefix_tokens=work.backbone.prefix_tokens,
        norms=first_norms(settings, work.backbone, blocks),
        generator=work.engine.generator(work.seed),
    )
    if known.centre is not None:
        set_centre(memory, known.centre)
    if known.snapshot.model is not None:
        learned, fresh = known.snapshot.model.memory.state_dict(), memory.state_dict()
        names = query_modules(fresh)
        if {*names} == {*query_modules(learned)}:  # else they are of another kind
            memory.load_state_dict({**fresh, **{name: learned[name].cpu() for name in names}})
    return memory


# Learn ------------------------------------------------------------------------------------------


def _learn(
    known: Inventory, start: Start, model: MemoryModel
) -> tuple[RecalledHead, FitResult | None]:
    """The head; and, where keys learn, how learning went. The keys in `model` are then learned."""
    work, config = known.work, known.config
    head = _solved(known)
    if config.head.kind == "shared" and known.snapshot.head is not None:
        head = going_on(known.snapshot.head, head)
    elif config.head.kind == "shared" and config.consolidate.fresh_head:
        head = _fresh(head)
    epochs = config.consolidate.epochs_of(first=known.state is None)
    if not epochs or start.kept >= len(known.view.adapters):
        return head, None
    resolved = config.head.resolved
    teacher, shown = head, known.opened(known.fresh)
    of_all = config.head.scope == "shared" and config.head.kind in ("ridge", "ncm")
    if resolved or of_all or config.head.kind == "rp-ridge":
        # A head that is solved anew afterwards learns along, as one trained by gradient
        # does: solved now it would leave the keys nothing to learn. Else keys learn under
        # the head as it is, or under lda, whose scores are log posteriors. What was trained with
        # the adapters knows no features beside theirs.
        trained = resolved and not config.head.beside
        teacher = _solved(known, kind="shared" if trained else "lda")
    learned, fit = learn(
        work.engine,
        model,
        teacher.to(work.engine.device),
        Images.joined([task.train for task in shown]),
        config.consolidate,
        kept=start.kept,
        classes=sorted({label for task in shown for label in task.classes}),
        seed=work.seed,
        epochs=epochs,
        biased=config.head.bias,
        head_learns=config.head.kind == "shared" or resolved,
        past=start.past,
        validation=Images.joined([task.validation for task in shown]),
        stage_1=config.train,
        progress=work.progress,
        stage=f"task {' '.join(str(task.number) for task in shown)}: consolidate",
    )
    return learned.to("cpu") if config.head.kind == "shared" else head, fit


def _fresh(head: RecalledHead) -> RecalledHead:
    """The same head at zero; classes that it does not know stay unknown."""
    bias = head.bias.masked_fill(torch.isfinite(head.bias), 0.0)
    return replace(head, weight=torch.zeros_like(head.weight), bias=bias)


def _solved(known: Inventory, **other: str) -> RecalledHead:
    """The head from what is counted, or from trained ones; `other` settings win."""
    settings = known.config.head.model_copy(update=other)
    if settings.is_fixed:
        return _fixed(known)
    earlier = known.earlier
    if other:  # the heads that are kept were solved by the settings as they are
        earlier = replace(earlier, heads={})
    return solve_recalled_head(
        settings, known.features, known.trained, known.adapter_tasks, earlier
    )


def _fixed(known: Inventory) -> RecalledHead:
    """The head that knows all classes in advance: as it was made once, while it is the same."""
    now, state, head = known.config.head, known.state, known.snapshot.head
    if state is None or head is None:
        return kept_head(known.work)
    same = (state.head.kind, state.head.scale) == (now.kind, now.scale)
    return head.to("cpu") if same else kept_head(known.work)


def _resolve(known: Inventory, model: MemoryModel, head: RecalledHead) -> RecalledHead:
    """The head, where it goes by recalled features solved on those of the tasks that are shown."""
    work, settings = known.work, known.config.head
    if not settings.resolved:
        return head
    for task in known.opened(known.fresh):
        seen = work.engine.predict(model, task.train.images)
        known.features.put(task.number, work.counted(seen, task.train))
    return _solved(known) if settings.kind in SOLVED else head


def _observe(known: Inventory, start: Start, model: MemoryModel) -> None:
    """Add what the new tasks ask to the past that later learning may not change."""
    if start.past is None:
        return
    work = known.work
    settings = known.config.consolidate
    for task in known.opened(known.new):
        one_batch = settings.guard == "gradient"
        shown = spread(task.train, settings.batch_size) if one_batch else task.train
        start.past.observe(
            work.engine,
            model,
            shown.images,
            start=settings.energy,
            progress=(known.tasks.index(task.number) + 1) / len(work.stream.tasks),
            every_token=one_batch,
        )
