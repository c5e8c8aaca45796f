"""Ablations: one experiment again and again, with one choice changed.

Where not all variants can have what is configured, none has it: all but "adapters" and "memory"
have one key a task and mix; "query" and "protect" learn random keys, "read" the configured ones,
under softmax and delta, both of these unfrozen where freeze would keep query modules from learning
(`Extent.besides` says so). The adapters are trained once
and shared by all variants, unless they depend on the variant. Every variant has a memory of its
own, so that it can be looked at afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memtool.config import with_values
from memtool.errors import ConfigError, did_you_mean
from memtool.evaluation.record import Metrics, Record, Row
from memtool.experiments import run as experiment
from memtool.experiments.plan import plan, seconds_a_sample
from memtool.paths import store_beside
from memtool.progress import Progress
from memtool.sections import SETTLES
from memtool.settings import AT_ONCE, BackboneSettings, Config, get, sections

SEPARATIONS = ("affine", "identity", "softmax", "relu", "tanh", "topk")

ADAPTERS_PER_TASK = (1, 5, 10)

ONE_KEY = {"memory.keys_of": "task", "memory.routing": "mixture"}
"""What every kind of keys and every separation can have."""

DEFAULT_EPOCHS = 4
"""Epochs of key learning where a variant learns keys and the configuration does not."""


@dataclass(frozen=True)
class Ablation:
    """A choice: `variants` gives the settings that each word changes, by dotted key.

    `trains` says whether it changes the training of adapters.
    """

    question: str
    variants: Callable[[Config], Mapping[str, Mapping[str, Any]]]
    trains: bool = False


def _learning(config: Config) -> dict[str, Any]:
    """Settings under which keys learn by gradient, starting at random: the paper's form."""
    epochs = config.consolidate.epochs or DEFAULT_EPOCHS
    return {**ONE_KEY, "consolidate.keys": "random", "consolidate.epochs": epochs}


def _query_modules(config: Config) -> dict[str, dict[str, Any]]:
    learning = {**_learning(config), **_unfrozen(config, "random")}
    return {word: {**learning, "memory.query": word} for word in ("identity", "linear", "mlp")}


def _unfrozen(config: Config, keys: str) -> dict[str, Any]:
    """What lets query modules learn where freeze would leave them as they began.

    They learn at the first consolidation alone then, and of one adapter nothing: a softmax over one
    key has no gradient. Keys in closed form cannot have dual-gpm.
    """
    at_once = config.stream.setting in AT_ONCE
    if config.consolidate.protect != "freeze" or config.adapter.per_task > 1 or at_once:
        return {}
    return {"consolidate.protect": "none" if keys == "closed-form" else "dual-gpm"}


def _keys(config: Config) -> dict[str, dict[str, Any]]:
    learning = _learning(config)
    fixed = {**ONE_KEY, "consolidate.epochs": 0}
    solved = {"consolidate.keys": "closed-form", "consolidate.protect": "freeze"}
    closed = {**fixed, **solved}
    variants = {
        "learned": learning,
        "random": {**fixed, "consolidate.keys": "random"},
        "mean-query": {**fixed, "consolidate.keys": "mean-query"},
        "closed-form": closed,
        "closed-form-learned": {**learning, **solved},
    }
    similarity, separation = config.memory.similarity, config.memory.separation
    if separation == "softmax" and similarity in ("dot", "scaled-dot"):
        variants["closed-form-of-classes"] = {**closed, "memory.keys_of": "class"}
    return variants


def _protections(config: Config) -> dict[str, dict[str, Any]]:
    learning = _learning(config)
    if (setting := config.stream.setting) in AT_ONCE:
        raise ConfigError(
            f"an ablation of protection under setting {setting}",
            expected=f"tasks in an order, dil or cil: all sources of {setting} are learned at once"
            if setting == "dg"
            else f"tasks in an order, dil, cil or vil: all of {setting} are learned at once",
        )
    return {
        word: {**learning, "consolidate.protect": word} for word in ("dual-gpm", "freeze", "none")
    }


@functools.cache
def _depth(backbone: BackboneSettings) -> int:
    """Blocks of a backbone, which is made for it once."""
    from memtool.backbones import create_backbone

    return create_backbone(backbone).depth


def _authors(config: Config) -> dict[str, dict[str, Any]]:
    """The keys of MIRA's authors, frozen, as configured or in closed form; and cures beside them.

    Closed-form keys do not learn, nor does anything but a shared head then.
    """
    if config.memory.scope != "block":
        raise ConfigError(
            f"ablation authors with memory.scope {config.memory.scope}",
            expected="a memory in every block, as the presets mira-dg-authors, mira-dil-authors",
            remedy="--preset mira-dil-authors",
        )
    later = {"memory.blocks": tuple(range(1, _depth(config.backbone)))}
    fitting = {"memory.key_bias": True, "memory.key_norm": "none"}
    closed = {
        **ONE_KEY,
        **later,
        **fitting,
        "memory.similarity": "scaled-dot",
        "memory.query": "identity",
        "consolidate.keys": "closed-form",
        "consolidate.protect": "freeze",
        "consolidate.lr": 0.0,
    }
    variants: dict[str, dict[str, Any]] = {
        "keys-frozen": {"consolidate.lr": 0.0},
        "as-configured": {},
        "closed-form": closed,
        "closed-form-softmax": {**closed, "memory.separation": "softmax"},
        "without-block-0": later,
        "softmax": {"memory.separation": "softmax", "memory.beta": 10.0},
    }
    if config.consolidate.protect == "dual-gpm":
        step = {"consolidate.guard": "step"}
        variants |= {
            "unprotected": {"consolidate.protect": "none"},
            "keys-of-their-own": {"memory.key_norm": "none"},
            "step-projected": step,
            "centred": {**step, "memory.centre": "first-task"},
            "centred-without-block-0": {**step, **later, "memory.centre": "first-task"},
        }
    return variants


def _reads(config: Config) -> dict[str, dict[str, Any]]:
    """Three readings with as many learned numbers as a query module takes, and one without it."""
    epochs = config.consolidate.epochs or DEFAULT_EPOCHS
    module = "mlp" if config.memory.query == "mlp" else "linear"
    similarity = config.memory.similarity
    shared = {
        **ONE_KEY,
        "memory.separation": "softmax",
        "memory.similarity": similarity if similarity in SETTLES else SETTLES[0],
        "memory.mix": "delta",
        "memory.frozen": "none",
        "consolidate.epochs": epochs,
        **_unfrozen(config, config.consolidate.keys),
    }
    plain = {**shared, "memory.read": "mixture", "memory.query": "identity"}
    learned = {**shared, "memory.query": module}
    return {
        "mixture": plain,
        f"mixture-{module}": {**learned, "memory.read": "mixture"},
        f"energy-{module}": {**learned, "memory.read": "energy"},
        f"decoder-{module}": {**plain, "memory.read": "decoder", "memory.read_width": module},
    }


ABLATIONS: dict[str, Ablation] = {
    "separation": Ablation(
        "how similarities become coefficients",
        lambda _: {word: {**ONE_KEY, "memory.separation": word} for word in SEPARATIONS},
    ),
    "query": Ablation("what a block's input goes through before it meets the keys", _query_modules),
    "adapters": Ablation(
        "adapters per task",
        lambda _: {str(count): {"adapter.per_task": count} for count in ADAPTERS_PER_TASK},
        trains=True,
    ),
    "keys": Ablation("keys learned, random, or in closed form", _keys),
    "authors": Ablation("the keys of MIRA's authors, and what cures them", _authors),
    "protect": Ablation("what key learning may not change", _protections),
    "read": Ablation("a mixture, a query that settles, or a decoder, of equal size", _reads),
    "memory": Ablation("the memory, a hard choice, or the same mixture for all", lambda _: {}),
}
"""Every ablation by its word."""


@dataclass(frozen=True)
class Extent:
    """What an ablation comes to before anything is trained.

    `besides` are the settings that every variant has other than they were configured: dotted key to
    (configured, in the ablation). `trainings` are those of adapters, one a task; `steps` theirs
    together, and `seconds` a rough count of what they take.
    """

    variants: tuple[str, ...]
    besides: Mapping[str, tuple[Any, Any]]
    trainings: int
    steps: int
    seconds: float


def besides(config: Config, name: str) -> dict[str, tuple[Any, Any]]:
    """The settings that an ablation changes besides its choice, as `Extent.besides`.

    Raises ConfigError as `ablate`.
    """
    variants = list(_variants(config, name).values())
    changed = [
        {key: get(with_values(config, one, f"ablation {name}"), key) for key in one}
        for one in variants
    ]
    shared = set.intersection(*map(set, changed)) if changed else set()
    return {
        key: (get(config, key), changed[0][key])
        for key in (changed[0] if changed else ())
        if key in shared
        and all(one[key] == changed[0][key] for one in changed)
        and changed[0][key] != get(config, key)
    }


def extent(config: Config, name: str) -> Extent:
    """How much an ablation is, at most: what is on disk already is not trained again.

    Opens data and backbone. Raises ConfigError as `ablate`.
    """
    variants = _variants(config, name)
    shared, each = besides(config, name), variants or {"": {}}
    settings = [with_values(config, one, f"ablation {name}") for one in each.values()]
    if not _of_its_own(config, name):
        settings = settings[:1]
    plans = [plan(one, seed=config.seed[0], verb="train-adapter") for one in settings]
    seeds = len(config.seed)
    steps = seeds * sum(sum(one["steps"]) for one in plans)
    return Extent(
        variants=tuple(variants),
        besides=shared,
        trainings=seeds * sum(sum(count > 0 for count in one["steps"]) for one in plans),
        steps=steps,
        seconds=steps * config.train.batch_size * seconds_a_sample(config),
    )


def _variants(config: Config, name: str) -> Mapping[str, Mapping[str, Any]]:
    """The variants of an ablation by their words. Raises ConfigError as `ablate`."""
    if name not in ABLATIONS:
        raise ConfigError(f"no ablation {name!r}", expected=did_you_mean(name, ABLATIONS))
    if name not in ("adapters", "memory") and not {"memory", "consolidate"} <= (
        sections(config.method).keys()
    ):
        raise ConfigError(
            f"ablation {name} under method {config.method}",
            expected="a method that has the sections memory and consolidate, as mira",
        )
    return ABLATIONS[name].variants(config)


def _of_its_own(config: Config, name: str) -> bool:
    """Whether every variant trains adapters of its own.

    So it is where they start from, or on top of, what a variant's memory made of those before.
    """
    return (
        ABLATIONS[name].trains
        or config.adapter.residual
        or (
            config.adapter.warm_start != "none"
            and "consolidate" in sections(config.method)
            and config.consolidate.value_lr > 0
        )
    )


def ablate(
    config: Config,
    name: str,
    *,
    progress: Progress | None = None,
    command: str | None = None,
    preset: str | None = None,
) -> list[Record]:
    """One record a seed, with a row for every variant; finished parts are taken from disk.

    Raises ConfigError for an unknown ablation, and for settings that the method does not have.
    """
    variants, own = _variants(config, name), _of_its_own(config, name)
    of_variants: list[list[Record]] = []
    labels: list[str] = []
    for word, changes in (variants or {"": {}}).items():
        place = config.runs / f"ablate-{name}" / word
        store = store_beside(config.store, "".join(f"-{part}" for part in (name, word) if part))
        values = {**changes, "runs": place, "store": store}
        changed = with_values(config, values, f"ablation {name}")
        found = experiment.run(
            changed,
            progress=progress,
            baselines=False,
            command=command,
            preset=preset,
            adapters=None if own else config.runs,
        )
        of_variants.append(found)
        labels.append(word + (_sizes(changed, config.seed[0]) if name == "read" else ""))
    words = [*(variants or {"": {}})]
    return [
        _side_by_side(name, words, labels, records) for records in zip(*of_variants, strict=True)
    ]


def _sizes(config: Config, seed: int) -> str:
    """How many numbers a reading has, and how many of those of the adapters that is."""
    cost = plan(config, seed=seed, verb="consolidate")["cost"]
    reading = cost["read_numbers"]
    return f", {reading:,} numbers ({reading / cost['adapter_numbers']:.2g} of the adapters')"


def _side_by_side(
    name: str, words: Sequence[str], labels: Sequence[str], records: tuple[Record, ...]
) -> Record:
    """The records of one seed as one: the memory of every variant, or all rows of the only one."""
    if len(records) == 1:
        return records[0]
    rows: list[Row] = []
    for word, label, record in zip(words, labels, records, strict=True):
        memory = record.row("memory")
        rows.append(memory.model_copy(update={"id": f"{name}-{word}", "label": f"{name} {label}"}))
    return records[0].model_copy(update={"metrics": Metrics(rows=tuple(rows))})
