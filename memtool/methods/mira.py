"""MIRA: adapters in a memory of learned keys, recalled per sample without a task label.

    adapt        train J adapters per task (stage 1)
    write        append them to the store, one version
    consolidate  learn the keys (stage 2), one version
    retrieve     which mixture does this input recall?
    evaluate     accuracy on every task, at any version

Where the paper is silent, or where our trials found better, the default is ours and the paper's
form is an option: keys in closed form (`consolidate.keys: random` with `epochs`), an analytic head
per task (`head.kind: linear`, `head.scope: shared`), one early look for all blocks (`memory.scope:
block`), softmax (`memory.separation: affine`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import memtool_stores
from memtool.adapters.values import AdapterValues
from memtool.config import Config
from memtool.errors import (
    ConfigError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import (
    Record,
    Row,
)
from memtool.memories.keyed import KeyedMemory
from memtool.methods import consolidate as stage_two
from memtool.methods.attached import AttachedAdapters, AttachedImages, AttachedMixture
from memtool.methods.exchange import (
    recalled_adapter,
    require_new,
)
from memtool.methods.measure import Measure, drift, share_right
from memtool.methods.method import Method, newest_after_each, require_unmoved
from memtool.methods.recall import MemoryModel, memory_blocks
from memtool.methods.records import recorded, task_of
from memtool.methods.results import (
    AdapterCoefficient,
    ConsolidateResult,
    RetrieveResult,
)
from memtool.methods.seen import predicted, seen_by
from memtool.methods.state import (
    HEAD,
    PAST_QUERIES,
    QUERY_MODULES,
    MemoryState,
    Snapshot,
    classes_of,
    features_blob,
    going_on,
    queries_blob,
    solve_recalled_head,
)
from memtool.methods.subject import first, joined, read_query
from memtool.streams import load_image
from memtool.streams.task import Task
from memtool.workspace import require_learnable

SUBJECT_SAMPLES = 256
"""Test images of a task that `retrieve --task` looks at."""

SETTINGS = ("dil", "til", "cil", "dg")
"""Settings that `evaluate` knows: task inferred (dil, cil), given (til), or never seen (dg)."""


class Mira(Method):
    """The five steps over one configuration and seed."""

    @property
    def key_epochs(self) -> int:
        """Epochs of key learning."""
        return self.config.consolidate.epochs

    def _beneath(self, task: Task) -> tuple[MemoryModel | None, str]:
        """The consolidated memory, where adapters are residual; none before the first task."""
        if not self.config.adapter.residual or not self.workspace.has_store:
            return None, ""
        snapshot = self._snapshot("HEAD")
        if snapshot.state is None or task.number in snapshot.state.tasks:
            return None, ""
        if snapshot.state.memory.mix != "delta":
            raise ConfigError(
                f"an adapter on top of a memory of mix {snapshot.state.memory.mix!r}",
                expected="mix delta: what is added stays added",
                remedy="--mix delta, or --set adapter.residual=false",
            )
        return snapshot.model, snapshot.version

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> ConsolidateResult:
        """Give every adapter in memory its key, and solve the head; one version.

        Only the images of tasks that were not consolidated before are read. Running it again
        without new adapters or other settings changes nothing.
        """
        begin = time.perf_counter()
        work, config = self.workspace, self.config
        done = self._consolidated_before() if work.has_store else None
        if done is not None:
            return done
        snapshot = self._snapshot("HEAD")
        view = snapshot.view
        if not view.adapters:
            raise NotFoundError(
                f"the memory {work.store_path!r} holds no adapters",
                remedy="memtool train-adapter --task 1 && memtool write",
            )
        state = snapshot.state
        self._require_same_queries(state)
        queries = snapshot.query_statistics()
        tasks = list(queries)
        new_tasks: list[int] = []
        for record in view.adapters:
            number = task_of(record)
            if number not in (*tasks, *new_tasks):
                new_tasks.append(number)
        unchanged = (
            not new_tasks
            and state is not None
            and state.adapters == view.ids
            and state.memory == config.memory
            and state.head == config.head
            and state.consolidate == config.consolidate
        )
        grown_tasks = self._grown_tasks(snapshot)
        features = snapshot.feature_statistics()
        probe = self._probe_memory(snapshot)
        for number in grown_tasks:
            # Queries of the frozen model stay; features come through all adapters of the task.
            task = work.task(str(number))
            own = snapshot.own_values(number, work.engine.device)
            seen, _ = stage_two.count_task(
                work.engine, work.backbone, probe, config.memory, own, task.train
            )
            features[number] = work.counted(seen, task.train)
        beneath = snapshot.model if config.adapter.residual else None
        for number in work.telling("consolidate: count", new_tasks):
            task = work.task(str(number))
            require_learnable(task)
            own = snapshot.own_values(number, work.engine.device)
            seen, asked = stage_two.count_task(
                work.engine, work.backbone, probe, config.memory, own, task.train, beneath
            )
            queries[number] = stage_two.count_queries(
                asked, task.train.labels, by_class=config.memory.keys_of == "class"
            )
            features[number] = work.counted(seen, task.train)
        tasks += new_tasks
        features = {number: features[number] for number in tasks}
        adapter_tasks = tuple(tasks.index(task_of(record)) for record in view.adapters)
        trained = {task_of(r): snapshot.own_head(r.name) for r in view.adapters}
        stored = view.keys()
        before = None if stored is None else torch.from_numpy(stored.copy())
        keys = stage_two.start_keys(
            config.consolidate,
            config.memory,
            list(queries.values()),
            adapter_tasks,
            work.engine.generator(self.seed),
        )
        resolved = config.head.features == "recalled"
        learns = config.consolidate.epochs > 0 or config.consolidate.keys == "random"
        protects = config.consolidate.protect == "dual-gpm"
        if learns and config.memory.routing != "mixture":
            raise ConfigError(
                f"key learning under memory.routing {config.memory.routing}",
                expected="a mixture: a hard choice has no gradient, and keys of its own",
                remedy="--routing mixture, or --set consolidate.epochs=0 with keys in closed form",
            )
        refines = config.consolidate.value_lr > 0
        if refines and config.head.kind in ("lda", "ridge", "ncm") and not resolved:
            raise ConfigError(
                f"consolidate.value_lr {config.consolidate.value_lr:g} with head.features own: "
                "the head would be solved on features of values that then change",
                remedy="--set head.features=recalled",
            )
        kept, validation, learned = 0, None, None
        if (learns or protects) and before is not None:
            if not _same_separation(state, config):
                raise ConfigError(
                    "the keys in memory were made for another separation or similarity; learning "
                    "them again would need the images of all tasks",
                    remedy="--sep and memory.similarity as before, consolidate.epochs 0 with keys "
                    "in closed form, or another --store",
                )
            kept = before.shape[1]
        model = self._model(snapshot, keys)
        if protects and state is not None and state.consolidate.protect != "dual-gpm":
            raise ConfigError(
                f"--protect dual-gpm, but tasks {list(state.tasks)} were consolidated under "
                f"{state.consolidate.protect!r}: what they asked was not kept",
                remedy=f"--protect {state.consolidate.protect}, or a new --store",
            )
        past = snapshot.past_queries() if protects else None
        if before is not None and kept and config.consolidate.keys != "closed-form":
            # Closed-form keys are relative to each other: all are solved anew.
            keys[:, :kept] = before
        if past is not None:
            keys[:, kept:] = past.free_keys(model.memory, keys[:, kept:])
        model.memory.set_keys(keys)
        # Tasks written together are learned together; older ones are not seen again.
        fresh = [*grown_tasks, *new_tasks]
        shown = [work.task(str(number)) for number in fresh] or [work.task(str(tasks[-1]))]
        head = solve_recalled_head(config.head, features, trained, adapter_tasks)
        if config.head.kind == "shared" and snapshot.head is not None:
            head = going_on(snapshot.head, head)
        if config.consolidate.epochs > 0 and kept < len(view.adapters):
            teacher = head
            if resolved or (config.head.scope == "shared" and config.head.kind in ("ridge", "ncm")):
                # A head that is solved anew afterwards learns along, as one trained by gradient
                # does: solved now it would leave the keys nothing to learn. Else keys learn under
                # the head as it is, or under lda, whose scores are log posteriors.
                kind = "shared" if resolved else "lda"
                other = config.head.model_copy(update={"kind": kind})
                teacher = solve_recalled_head(other, features, trained, adapter_tasks)
            learned_head, learned = stage_two.learn(
                work.engine,
                model,
                teacher.to(work.engine.device),
                joined([task.train for task in shown]),
                config.consolidate,
                kept=kept,
                classes=sorted({label for task in shown for label in task.classes}),
                seed=self.seed,
                head_learns=config.head.kind == "shared" or resolved,
                past=past,
                validation=joined([task.validation for task in shown]),
                augment=config.train.augment,
                progress=work.progress,
                stage=f"task {' '.join(str(task.number) for task in shown)}: consolidate",
            )
            keys, validation = model.memory.keys().cpu(), learned.score
            if config.head.kind == "shared":
                head = learned_head.to("cpu")
        if config.head.features == "recalled":
            for number in fresh:
                task = work.task(str(number))
                seen = stage_two.features_recalled(work.engine, model, task.train)
                features[number] = work.counted(seen, task.train)
            if config.head.kind in ("lda", "ridge", "ncm"):
                head = solve_recalled_head(config.head, features, trained, adapter_tasks)
        if past is not None:
            for number in new_tasks:
                past.observe(
                    work.engine,
                    model,
                    work.task(str(number)).train.images,
                    start=config.consolidate.energy,
                    progress=(tasks.index(number) + 1) / len(work.stream.tasks),
                )
        last = shown[-1]
        accuracy = Measure(work).accuracy(
            model, head.to(work.engine.device), first(last.train, 4 * SUBJECT_SAMPLES)
        )
        # A task with more classes than all before has made every adapter's row of keys longer.
        width = keys.shape[-1] if before is None else min(before.shape[-1], keys.shape[-1])
        drift = (
            0.0
            if before is None
            else stage_two.drift_degrees(before[..., :width], keys[:, : before.shape[1], :width])
        )
        new_state = MemoryState(
            memory=config.memory,
            head=config.head,
            consolidate=config.consolidate,
            tasks=tuple(tasks),
            adapters=view.ids,
            adapter_tasks=adapter_tasks,
            class_names=work.stream.class_names,
            fingerprint=work.stream.fingerprint,
        )
        result = ConsolidateResult(
            version=view.version,
            tasks=tuple(tasks),
            separation=config.memory.separation,
            mix=config.memory.mix,
            epochs=config.consolidate.epochs,
            seconds=time.perf_counter() - begin,
            train_accuracy=accuracy,
            validation_accuracy=validation,
            key_drift_degrees=drift,
            unchanged=unchanged,
        )
        if unchanged:
            return result
        blobs = {
            **{queries_blob(number): queries[number].to_bytes() for number in new_tasks},
            HEAD: head.to_bytes(),
            **{
                features_blob(number): features[number].to_bytes()
                for number in (*grown_tasks, *new_tasks)
            },
        }
        if past is not None:
            blobs[PAST_QUERIES] = past.to_bytes()
        learned_modules = _query_modules(model.memory)
        if learned_modules is not None:
            blobs[QUERY_MODULES] = learned_modules
        array = np.ascontiguousarray(keys.numpy(), dtype=np.float32)

        refined = model.values.flat().cpu().numpy() if refines and learned is not None else None

        def commit(txn: memtool_stores.Transaction) -> None:
            require_unmoved(txn, view)
            if refined is not None:
                for record, value in zip(view.adapters[kept:], refined[kept:], strict=True):
                    txn.remove(record.id)
                    about = {"byte_identical": False, "refined_from": record.sha256}
                    txn.add(record.name, value, {**record.meta, **about})
            ids = tuple(record.id for record in txn.adapters)
            state = new_state.model_copy(update={"adapters": ids})
            txn.set_keys(array)
            state.put(txn)
            for name, data in blobs.items():
                txn.put_blob(name, data)
            if learned_modules is None and QUERY_MODULES in txn.base.blobs():
                txn.delete_blob(QUERY_MODULES)

        described = " ".join(str(number) for number in tasks)
        metadata = {
            **self._metadata("consolidate"),
            "learned": tasks,
            "consolidate": config.consolidate.model_dump(mode="json"),
            "seconds": result.seconds,
            "train_accuracy": accuracy,
            "validation_accuracy": validation,
        }
        message = f"consolidate tasks {described}"
        work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
        return result.model_copy(update={"version": work.store.head()})

    def _consolidated_before(self) -> ConsolidateResult | None:
        """What consolidation came to, where there is nothing new since; no image is read for it."""
        begin, store, config = time.perf_counter(), self.workspace.store, self.config
        view = store.view("HEAD")
        state = MemoryState.load(view)
        if state is None or (state.adapters, state.memory, state.head, state.consolidate) != (
            view.ids,
            config.memory,
            config.head,
            config.consolidate,
        ):
            return None
        kept = {blob(task) for task in state.tasks for blob in (queries_blob, features_blob)}
        if not kept <= {*view.blobs()}:
            return None  # an older memtool did not keep them apart: they are counted again
        for version in store.log(view.version):
            said = version.metadata
            accuracy, validation = said.get("train_accuracy"), said.get("validation_accuracy")
            if isinstance(accuracy, float) and said.get("learned") == list(state.tasks):
                return ConsolidateResult(
                    version=view.version,
                    tasks=state.tasks,
                    separation=state.memory.separation,
                    mix=state.memory.mix,
                    epochs=state.consolidate.epochs,
                    seconds=time.perf_counter() - begin,
                    train_accuracy=accuracy,
                    validation_accuracy=validation if isinstance(validation, float) else None,
                    key_drift_degrees=0.0,
                    unchanged=True,
                )
        return None  # an older memtool consolidated it and did not say

    def _require_same_queries(self, state: MemoryState | None) -> None:
        """Queries that were counted one way cannot be asked another way later."""
        if state is None:
            return
        now, then = self.config.memory, state.memory
        for name in ("token", "query", "query_norm", "scope", "look_at", "keys_of"):
            if getattr(now, name) != getattr(then, name):
                raise ConfigError(
                    f"memory.{name} is {getattr(now, name)!r}, but the queries of tasks "
                    f"{list(state.tasks)} were counted with {getattr(then, name)!r}",
                    remedy=f"--set memory.{name}={getattr(then, name)}, or a new --store",
                )

    def _grown_tasks(self, snapshot: Snapshot) -> list[int]:
        """Consolidated tasks that got more adapters since."""
        state = snapshot.state
        if state is None:
            return []
        new = [record for record in snapshot.view.adapters if record.id not in state.adapters]
        grown = sorted({task_of(record) for record in new} & set(state.tasks))
        if grown and state.memory.scope == "block":
            raise ConfigError(
                f"task {grown[0]} was consolidated with fewer adapters than it has now; with "
                "memory.scope block its queries would have to be counted again",
                remedy="write all adapters of a task before memtool consolidate; memtool rollback "
                "goes back to before it",
            )
        return grown

    def _probe_memory(self, snapshot: Snapshot) -> KeyedMemory:
        """A memory without content, for its query modules: what would each block be asked?"""
        work, settings = self.workspace, self.config.memory
        blocks = memory_blocks(settings, work.layout)
        empty = torch.zeros(len(blocks), 1, work.backbone.dim + 1)
        memory = KeyedMemory.from_settings(
            settings,
            blocks,
            work.backbone.dim,
            empty,
            prefix_tokens=work.backbone.prefix_tokens,
            generator=work.engine.generator(self.seed),
        )
        _keep_query_modules(memory, snapshot)
        return memory.to(work.engine.device).requires_grad_(False)

    def _model(self, snapshot: Snapshot, keys: Tensor) -> MemoryModel:
        work, settings = self.workspace, self.config.memory
        view = snapshot.view
        values = AdapterValues.from_flat(
            torch.from_numpy(view.values().copy()),
            work.layout,
            torch.tensor([record.scaling for record in view.adapters], dtype=torch.float32),
        )
        memory = KeyedMemory.from_settings(
            settings,
            memory_blocks(settings, work.layout),
            work.backbone.dim,
            keys,
            prefix_tokens=work.backbone.prefix_tokens,
            generator=work.engine.generator(self.seed),
        )
        _keep_query_modules(memory, snapshot)
        model = MemoryModel(work.backbone, values, memory, settings)
        return model.to(work.engine.device).requires_grad_(False)

    # Retrieve -------------------------------------------------------------------------------

    def retrieve(
        self,
        *,
        task: str | None = None,
        image: Path | None = None,
        prompt: str | None = None,
        query: Path | None = None,
        version: str = "HEAD",
        out: Path | None = None,
    ) -> RetrieveResult:
        """The mixture that a task's test images, one image, or a query recall.

        `query` is a safetensors file with a tensor `query` (d,) or (memories, d): what a memory
        would be asked. `out` is a folder that the recalled adapter is written to as a PEFT
        directory (the mean coefficients, exact for them).
        """
        if prompt is not None or sum(one is not None for one in (task, image, query)) != 1:
            raise ConfigError(
                "what should recall?", expected="exactly one of --task, --image and --query"
            )
        if out is not None:
            require_new(out)
        snapshot = self.read(version) if task is None else self._snapshot(version)
        state, model, head = snapshot.consolidated()
        accuracy, prediction = None, None
        if query is not None:
            subject, samples = str(query), 1
            coefficients = self._recall_query(model, query)
        else:
            if task is not None:
                chosen = self.workspace.task(task, held_out=True)
                shown = first(chosen.test, SUBJECT_SAMPLES)
                subject, samples = f"task {chosen.number} {chosen.name}", len(shown)
                images = shown.images
            else:
                assert image is not None
                loaded = load_image(image, self.config.backbone.image_size)
                subject, samples, images = str(image), 1, loaded[None]
            logits, recalled = Measure(self.workspace).recall(model, head, images)
            coefficients = recalled.mean(dim=0)
            if task is not None:
                accuracy = share_right(logits, shown)
            else:
                far = seen_by(self.workspace.engine, snapshot, loaded)
                prediction = predicted(head.probabilities(logits)[0], state.class_names, far)
        if out is not None:
            recalled_adapter(out, self.workspace, snapshot, coefficients)
        mean = coefficients.mean(dim=0)
        return RetrieveResult(
            version=snapshot.version,
            subject=subject,
            samples=samples,
            mix=state.memory.mix,
            separation=state.memory.separation,
            adapters=tuple(
                AdapterCoefficient(name=r.name, task=task_of(r), coefficient=float(a))
                for r, a in zip(snapshot.records, mean, strict=True)
            ),
            blocks=tuple(tuple(float(a) for a in row) for row in coefficients),
            block_numbers=model.memory.blocks,
            prediction=prediction,
            accuracy=accuracy,
            out=out,
        )

    def _recall_query(self, model: MemoryModel, path: Path) -> Tensor:
        """Coefficients (memories, t) for the query in a safetensors file."""
        asked = read_query(path, self.workspace.backbone)
        memories, dim = len(model.memory.blocks), self.workspace.backbone.dim
        if asked.ndim == 1:
            asked = asked.expand(memories, -1)
        if tuple(asked.shape) != (memories, dim):
            raise MismatchError(
                f"{path}: query of shape {tuple(asked.shape)}",
                expected=f"({dim},) or ({memories}, {dim})",
            )
        rows = []
        for block, one in zip(model.memory.blocks, asked, strict=True):
            memory = model.memory[block]
            full = torch.cat([one.to(memory.keys), one.new_ones(1).to(memory.keys)])
            rows.append(memory.answer(full.unsqueeze(0))[0])
        return torch.stack(rows).detach().cpu()

    # Evaluate -------------------------------------------------------------------------------

    def evaluate(
        self,
        *,
        setting: str | None = None,
        version: str = "HEAD",
        history: bool = False,
        compare: bool = False,
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """Accuracy on the test images of every task that the memory has learned.

        `setting` dil and cil infer the task; til is given it and recalls its adapter exactly, with
        the head trained with it; dg measures on the domain that is held out. `history` reads the
        version after each task and fills the whole matrix, and says how far old coefficients
        drifted; `compare` adds hard choice, uniform mixture and the oracle adapter.
        """
        begin = time.perf_counter()
        setting = self._setting(setting)
        snapshot = self._snapshot(version)
        measure = Measure(self.workspace)
        learned = self._learned(snapshot, setting)
        shown = learned
        if setting == "dg":
            shown = [self._held_out()]
            rows = [self._generalised(snapshot, learned, shown)]
        elif setting == "til":
            rows = [self._told(snapshot, learned, history=history)]
        else:
            rows = [self._in_turn(snapshot, learned, history=history)]
        if compare and setting != "til":
            rows += measure.other_ways(snapshot, learned, shown)
        return self.record(
            rows,
            shown,
            setting=setting,
            snapshot=snapshot,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def _in_turn(self, snapshot: Snapshot, learned: Sequence[Task], *, history: bool) -> Row:
        """The memory on all tasks, after each of them or after the last."""
        measure = Measure(self.workspace)
        versions = {len(learned): snapshot.version}
        if history:
            versions = self._history(snapshot, learned, "dil")
        matrix = AccuracyMatrix.empty([task.name for task in learned])
        then: dict[int, Tensor] = {}
        more: dict[str, float] = {}
        for count, at in self.workspace.telling("evaluate", sorted(versions.items())):
            there = snapshot if at == snapshot.version else self._snapshot(at)
            scored = measure.scores(there, learned)
            matrix = matrix.with_row(count, scored.accuracy)
            then[count] = scored.coefficients[count - 1]
            more["task_accuracy"] = scored.task_accuracy
        if len(then) == len(learned):
            before = [then[count] for count in range(1, len(learned))]
            more |= drift(before, scored.coefficients[:-1])
        return Row.measured("memory", "memory", "method", matrix, more=more)

    def _told(self, snapshot: Snapshot, learned: Sequence[Task], *, history: bool) -> Row:
        """Exact recall of every task's own adapters."""
        measure = Measure(self.workspace)
        versions = {len(learned): snapshot.version}
        if history:
            versions = self._history(snapshot, learned, "til")
        matrix = AccuracyMatrix.empty([task.name for task in learned])
        for count, at in self.workspace.telling("evaluate", sorted(versions.items())):
            there = snapshot if at == snapshot.version else self._snapshot(at)
            own = [measure.own_accuracy(there, task) for task in learned[:count]]
            matrix = matrix.with_row(count, [*own, *[None] * (len(learned) - count)])
        return Row.measured("memory", "task given, exact recall", "method", matrix)

    def _generalised(
        self, snapshot: Snapshot, sources: Sequence[Task], shown: Sequence[Task]
    ) -> Row:
        """The memory on a domain that it never saw, and on the sources' validation images."""
        measure = Measure(self.workspace)
        _, model, head = snapshot.consolidated()
        scores = measure.scores(snapshot, shown).accuracy
        matrix = AccuracyMatrix.empty([task.name for task in shown]).with_row(len(shown), scores)
        held = [task.validation for task in sources if len(task.validation)]
        more = {}
        if held:
            known = [measure.accuracy(model, head, samples) for samples in held]
            more["dg.validation"] = sum(known) / len(known)
        return Row.measured("memory", "memory", "method", matrix, more=more)

    def _held_out(self) -> Task:
        """The domain that is held out. Raises ConfigError when none is."""
        stream = self.workspace.stream
        if stream.held_out is None:
            raise ConfigError(
                "setting dg measures a domain that nothing was learned from; none is held out",
                expected="one of " + ", ".join(task.name for task in stream.tasks),
                remedy="--held-out DOMAIN for every step of one memory, or memtool run for all",
            )
        return stream.held_out

    def _setting(self, setting: str | None) -> str:
        """What is known at test time, checked; without a word, as the tasks were cut."""
        setting = setting or self.config.stream.setting
        if setting not in SETTINGS:
            raise ConfigError(
                f"setting {setting!r} cannot be evaluated from one memory",
                expected=" or ".join(SETTINGS),
            )
        cut = self.workspace.stream.setting
        if setting not in ("til", cut):
            raise ConfigError(
                f"setting {setting!r} on tasks that were cut for {cut!r}",
                expected=f"til or {cut}",
                remedy=f"--set stream.setting={setting} and a memory that was trained so",
            )
        return setting

    def record(
        self,
        rows: Sequence[Row],
        learned: Sequence[Task],
        *,
        setting: str,
        snapshot: Snapshot,
        seconds: float,
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """The record of rows measured on the learned tasks at a version."""
        state = snapshot.state
        settings = state.memory if state else self.config.memory
        used = self.config
        if state is not None:
            # What the memory was consolidated with, whatever the configuration says now.
            used = used.model_copy(update={"memory": state.memory, "head": state.head})
        return self._record(
            rows,
            learned,
            setting=setting,
            version=snapshot.version,
            used=used,
            mix=settings.mix,
            separation=settings.separation,
            seconds=seconds,
            command=command,
            preset=preset,
        )

    def _learned(self, snapshot: Snapshot, setting: str) -> list[Task]:
        """The tasks in the order in which they were learned."""
        if setting == "til":
            numbers = list(dict.fromkeys(task_of(record) for record in snapshot.view.adapters))
            if not numbers:
                raise NotFoundError(
                    f"the memory holds no adapters at version {snapshot.version}",
                    remedy="memtool write",
                )
        else:
            numbers = list(snapshot.consolidated()[0].tasks)
        return [self.workspace.task(str(number)) for number in numbers]

    def _history(self, snapshot: Snapshot, learned: Sequence[Task], setting: str) -> dict[int, str]:
        """The newest version at which the first i tasks, and no more, were learned, for every i."""
        store = self.workspace.store

        def known(version: memtool_stores.Version) -> tuple[int, ...]:
            if setting != "til":
                return tuple(version.metadata.get("learned") or ())
            records = store.view(version.id).adapters
            return tuple(dict.fromkeys(task_of(record) for record in records))

        history = ((version.id, known(version)) for version in store.log(snapshot.version))
        return newest_after_each(history, [task.number for task in learned])

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks that a version can be measured on; none before consolidation."""
        view = self.workspace.store.view(version)
        if self.config.stream.setting == "til":
            return tuple(dict.fromkeys(task_of(record) for record in view.adapters))
        state = MemoryState.load(view)
        return state.tasks if state is not None and view.keys() is not None else ()

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks: faa, task_accuracy. Errors as `evaluate`.

        Where the task is given, one without an adapter scores 0.
        """
        setting = self._setting(setting)
        measure = Measure(self.workspace)
        snapshot = self._snapshot(version)
        shown = [self.workspace.task(str(number)) for number in tasks]
        if setting == "til":
            here = {task_of(record) for record in snapshot.view.adapters}
            own = [measure.own_accuracy(snapshot, task) for task in shown if task.number in here]
            return {"faa": sum(own) / len(tasks), "task_accuracy": 1.0}
        scored = measure.scores(snapshot, shown)
        mean = sum(scored.accuracy) / len(scored.accuracy)
        return {"faa": mean, "task_accuracy": scored.task_accuracy}

    # Shared ---------------------------------------------------------------------------------

    def snapshot(self, version: str = "HEAD") -> Snapshot:
        """The memory at a version, on the device."""
        return self._snapshot(version)

    def read(self, version: str = "HEAD") -> Snapshot:
        """The memory at a version, on the device; the stream is not opened."""
        work = self.workspace
        return Snapshot.read(
            work.store, work.version_of(version), work.backbone, work.layout, work.backbone.device
        )

    def _snapshot(self, version: str) -> Snapshot:
        work, snapshot = self.workspace, self.read(version)
        state = snapshot.state
        if state is not None and state.class_names != work.stream.class_names:
            raise MismatchError(
                f"the classes of {work.stream.name} are not those of the memory's head",
                expected=", ".join(state.class_names[:8]),
                remedy="the stream that the memory was trained on, or another --store",
            )
        for record in snapshot.view.adapters:
            self._require_same_task(record)
        return snapshot

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> AttachedImages:
        """A version as a module; with `task` the exact adapter of that task and its own head.

        Raises ConfigError for a memory that was never consolidated, and for a task of several
        adapters; NotFoundError for a task that is not there.
        """
        snapshot = self.read(version)
        if task is None:
            return AttachedMixture(snapshot, precision)
        record = recorded(snapshot.view, task)
        head = snapshot.own_head(record.name)
        if head is None:
            raise NotFoundError(
                f"adapter {record.name!r} came without a trained head",
                remedy="attach without a task",
            )
        values = snapshot.own_values(task_of(record), self.workspace.backbone.device)
        return AttachedAdapters(
            self.workspace.backbone,
            values,
            [head],
            precision,
            places=[snapshot.view.adapters.index(record)],
            adapters=len(snapshot.view.adapters),
            told=0,
        )

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores."""
        state = MemoryState.load(view)
        return state.class_names if state is not None else classes_of(view)


def _same_separation(state: MemoryState | None, config: Config) -> bool:
    """Learned keys stay only where they mean the same as before."""
    return state is not None and (state.memory.separation, state.memory.similarity) == (
        config.memory.separation,
        config.memory.similarity,
    )


def _keep_query_modules(memory: KeyedMemory, snapshot: Snapshot) -> None:
    """Go on with the query modules that were learned before, when they are of the same kind."""
    if snapshot.model is None:
        return
    learned = snapshot.model.memory.state_dict()
    names = {name for name in memory.state_dict() if not name.endswith(".keys")}
    if names == {name for name in learned if not name.endswith(".keys")}:
        kept = {name: learned[name].cpu() for name in names}
        memory.load_state_dict({**memory.state_dict(), **kept})


def _query_modules(memory: KeyedMemory) -> bytes | None:
    """The learned query modules as safetensors, when there are any."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in memory.state_dict().items()
        if not name.endswith(".keys")
    }
    return save(tensors) if tensors else None
