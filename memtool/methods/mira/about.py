"""What MIRA needs, and what it makes of new adapters."""

from __future__ import annotations

from importlib.util import find_spec

from memtool.errors import ConfigError
from memtool.methods.about import About
from memtool.sections import SEARCHED, SETTLES, SHARES, ConsolidateSettings, MemorySettings
from memtool.settings import Config

POSTERIORS = SHARES
"""Separations that give shares of one: what keys in closed form are made for."""


def _require(config: Config) -> None:
    """Images and a model of one tower; or texts, and keys in closed form."""
    if config.stream.setting == "trace":
        _require_closed_form(config)
        return
    _require_head_known_ahead(config)
    _require_look_at_images(config)
    _require_look_under(config)
    _require_left_to_frozen(config)
    _require_soft_choice(config.memory)
    _require_of_blocks(config.memory)
    _require_guard(config)
    _require_read(config.memory, config.consolidate)
    _require_index(config.memory)
    for name, found, known in (
        ("memory.scope", config.memory.scope, ("model", "block")),
        ("memory.clusters", config.memory.clusters, (1,)),
    ):
        _require_one_of(name, found, known, "images")
    if config.backbone.name.startswith("open_clip:"):
        raise ConfigError(
            f"method mira on backbone {config.backbone.name}",
            expected="an image model: its memories look at images alone",
            remedy="--set backbone.name=open_clip_image:"
            f"{config.backbone.name.removeprefix('open_clip:')}, its image tower",
        )


def _require_of_blocks(memory: MemorySettings) -> None:
    """Raise ConfigError for what only a memory in every block has."""
    if memory.scope == "block":
        return
    for name, found, plain, why in (
        ("memory.query_norm", memory.query_norm, "layer", "the norm of the block that is asked"),
        ("memory.blocks", memory.blocks, "all", "a memory in every block, some of them left out"),
    ):
        if found == "block" or (name == "memory.blocks" and found is not None):
            written = found if isinstance(found, str) else ",".join(map(str, found or ()))
            raise ConfigError(
                f"{name} {written} under memory.scope {memory.scope}",
                expected=f"memory.scope block: {why}",
                remedy=f"--set memory.scope=block, or --set {name}={plain}",
            )


def _require_guard(config: Config) -> None:
    """Raise ConfigError for a gradient that would be projected for some of what learns alone."""
    memory, learn = config.memory, config.consolidate
    published = learn.protect == "dual-gpm" and learn.guard == "gradient"
    if published and memory.query != "identity":
        raise ConfigError(
            f"consolidate.guard gradient with memory.query {memory.query}",
            expected="identity: only gradients of keys and head are projected",
            remedy="--set memory.query=identity, or --set consolidate.guard=step",
        )


def _require_head_known_ahead(config: Config) -> None:
    """Raise ConfigError for a head that no memory of mixtures can keep, or nothing can read."""
    head, setting = config.head, config.stream.setting
    if not head.is_fixed:
        return
    found, expected, remedy = f"head.kind {head.kind} under method mira", "", ""
    if head.kind == "text":
        expected = "head.kind prototype: a text tower would read all prompts anew for every image, "
        expected += "under the mixture that it recalls"
        remedy = "--set head.kind=prototype, or --set method=moram"
    elif setting == "dg":
        found += " with stream.setting dg"
        expected = "a setting whose tasks come one after another: prototypes know all of them ahead"
        remedy = "--set head.kind=lda"
    elif head.features != "own":
        found += f" with head.features {head.features}"
        expected = "own: prototypes are of frozen features, and nothing is solved or put beside"
        remedy = "--set head.features=own"
    if expected:
        raise ConfigError(found, expected=expected, remedy=remedy)


def _require_left_to_frozen(config: Config) -> None:
    """Raise ConfigError for images left to a frozen model that nothing reads."""
    memory, learn = config.memory, config.consolidate
    if memory.frozen == "none":
        return
    for name, found, known, why in (
        ("head.kind", config.head.kind, "prototype", "a head that knows frozen features"),
        ("memory.scope", memory.scope, "model", "one look for all blocks, which runs ahead"),
        ("memory.test_time", memory.test_time, "none", "no weights where there are none to move"),
        ("consolidate.epochs", learn.epochs, 0, "keys that do not learn through a mixture"),
        ("consolidate.value_lr", learn.value_lr, 0, "values that stay as they are"),
    ):
        if found != known:
            raise ConfigError(
                f"memory.frozen {memory.frozen} with {name} {found}",
                expected=why,
                remedy=f"--set {name}={known}, or --set memory.frozen=none",
            )


def _require_soft_choice(memory: MemorySettings) -> None:
    """Raise ConfigError for weights that steps at test time cannot move."""
    if memory.test_time == "none":
        return
    if memory.routing != "mixture":
        hard, soft = f"memory.routing {memory.routing}", "memory.routing=mixture"
    elif memory.separation == "max":
        hard, soft = "memory.separation max", "memory.separation=softmax"
    else:
        return
    raise ConfigError(
        f"memory.test_time {memory.test_time} under {hard}",
        expected="weights between none and all: of a hard choice nothing can be moved",
        remedy=f"--set memory.test_time=none, or --set {soft}",
    )


def _require_read(memory: MemorySettings, learn: ConsolidateSettings) -> None:
    """Raise ConfigError for a reading that does not go with what it reads."""
    if memory.read == "mixture":
        return
    needs: list[tuple[str, object, tuple[object, ...], str]] = [
        ("memory.routing", memory.routing, ("mixture",), "a mixture: a hard choice has one answer")
    ]
    if memory.read == "energy":
        needs += [
            (
                "memory.separation",
                memory.separation,
                ("softmax",),
                "softmax, whose mixture of the keys lowers an energy",
            ),
            (
                "memory.similarity",
                memory.similarity,
                SETTLES,
                "inner products or squared distances, whose steps lower an energy",
            ),
        ]
    else:
        needs += [
            ("memory.mix", memory.mix, ("delta",), "a sum of rank-1 pieces, each with its weight"),
            ("memory.frozen", memory.frozen, ("none",), "weights that learn"),
        ]
    for name, found, known, why in needs:
        if found not in known:
            raise ConfigError(
                f"memory.read {memory.read} with {name} {found}",
                expected=why,
                remedy=f"--set {name}={known[0]}, or --set memory.read=mixture",
            )
    if memory.read == "decoder" and not learn.epochs:
        raise ConfigError(
            "memory.read decoder with consolidate.epochs 0",
            expected="epochs in which it learns: until then it adds nothing to the mixture",
            remedy="--set consolidate.epochs=4, or --set memory.read=mixture",
        )


def _require_index(memory: MemorySettings) -> None:
    """Raise ConfigError for an index that nothing would be searched in, or nothing can make."""
    if memory.index == "exact":
        return
    needs: list[tuple[str, object, bool, str, str]] = [
        (
            "memory.separation",
            memory.separation,
            memory.routing != "mixture" or memory.separation in ("topk", "max"),
            "topk or max, or a routing: any other reads all keys",
            "topk",
        ),
        (
            "memory.similarity",
            memory.similarity,
            memory.routing != "mixture" or memory.similarity in SEARCHED,
            f"{', '.join(SEARCHED[:-1])} or {SEARCHED[-1]}, which keys are searched by",
            SEARCHED[1],
        ),
        (
            "memory.keys_of",
            memory.keys_of,
            memory.keys_of == "task",
            "task: one key for each adapter",
            "task",
        ),
        (
            "memory.key_norm",
            memory.key_norm,
            memory.key_norm == "none",
            "none: keys that are asked as they are stored",
            "none",
        ),
    ]
    for name, found, fits, expected, known in needs:
        if not fits:
            raise ConfigError(
                f"memory.index {memory.index} with {name} {found}",
                expected=expected,
                remedy=f"--set {name}={known}, or --set memory.index=exact",
            )
    if find_spec("usearch") is None:
        raise ConfigError(
            f"memory.index {memory.index} needs the package usearch, which is not installed",
            remedy="pip install 'memtool[usearch]', or --set memory.index=exact",
        )


def _require_look_at_images(config: Config) -> None:
    """Raise ConfigError for a look that images do not have, or that could move."""
    memory, beside = config.memory, config.head.beside
    places = ",".join(memory.places)
    if {*memory.places} & {"tokens", "prefix"}:
        raise ConfigError(
            f"memory.look_at {places} on a stream of images",
            expected="some of block:N, blocks, final",
            remedy="--set memory.look_at=final",
        )
    if memory.scope == "block" and memory.look_at_block is None:
        raise ConfigError(
            f"memory.look_at {places} under memory.scope block of images",
            expected="one look for all blocks: every block looks at its own input there",
            remedy="--set memory.scope=model",
        )
    if (memory.look_under != "frozen" or beside == "first") and config.consolidate.value_lr > 0:
        named = "head.features " + config.head.features
        raise ConfigError(
            (named if beside == "first" else f"memory.look_under {memory.look_under}")
            + f" with consolidate.value_lr {config.consolidate.value_lr:g}",
            expected="a first adapter that never changes: all that is counted is seen under it",
            remedy="--set consolidate.value_lr=0",
        )
    if beside and config.head.kind in ("grown", "shared"):
        raise ConfigError(
            f"head.features {config.head.features} with head.kind {config.head.kind}",
            expected="a head in closed form: one that is trained with an adapter reads its "
            "features alone",
            remedy="--set head.kind=lda",
        )


def _require_closed_form(config: Config) -> None:
    """What a memory of prompts can be made with."""
    memory, learn = config.memory, config.consolidate
    for name, found, known in (
        ("memory.mix", memory.mix, ("delta",)),
        ("memory.query", memory.query, ("identity",)),
        ("memory.keys_of", memory.keys_of, ("task",)),
        ("memory.routing", memory.routing, ("mixture", "lda")),
        ("memory.frozen", memory.frozen, ("none",)),
        ("memory.read", memory.read, ("mixture",)),
        ("memory.index", memory.index, ("exact",)),
        ("memory.similarity", memory.similarity, ("scaled-dot", "dot")),
        ("memory.separation", memory.separation, POSTERIORS),
        ("consolidate.keys", learn.keys, ("closed-form",)),
        ("memory.test_time", memory.test_time, ("none",)),
        ("consolidate.value_lr", learn.value_lr, (0,)),
        ("memory.key_bias", memory.key_bias, (True,)),
        ("memory.key_norm", memory.key_norm, ("none",)),
        ("memory.centre", memory.centre, ("none",)),
        ("memory.blocks", memory.blocks, (None,)),
        ("memory.query_norm", memory.query_norm, ("layer", "none")),
        ("consolidate.first_epochs", learn.first_epochs, (None,)),
        ("consolidate.weight_decay", learn.weight_decay, (0,)),
    ):
        _require_one_of(name, found, known, "texts")
    if learn.epochs and not learn.lr:
        raise ConfigError(
            f"consolidate.epochs {learn.epochs} with consolidate.lr 0 on a stream of texts",
            expected="a learning rate: keys are all that learns",
            remedy="--set consolidate.epochs=0",
        )
    _require_place_of_keys(memory)
    _require_look_under(config)


def _require_look_under(config: Config) -> None:
    """Raise ConfigError for a look under adapters where nothing runs ahead, of images or texts."""
    memory = config.memory
    if memory.look_under == "frozen":
        return
    if memory.scope != "model":
        raise ConfigError(
            f"memory.look_under {memory.look_under} under memory.scope {memory.scope}",
            expected="one look for all blocks, which runs ahead",
            remedy="--set memory.scope=model",
        )
    if memory.places == ("tokens",):
        raise ConfigError(
            f"memory.look_under {memory.look_under} with memory.look_at tokens",
            expected="a place that a model runs for: tokens are the same under any adapter",
            remedy="--set memory.look_under=frozen",
        )


def _require_place_of_keys(memory: MemorySettings) -> None:
    """Raise ConfigError for a look that a memory of this scope cannot take."""
    places = {*memory.places}
    expected, fits, remedy = {
        "model": ("final, blocks, block:N or tokens", "prefix" not in places, "blocks,tokens"),
        "block": (
            "blocks, which is the input of each block, perhaps tokens or final",
            "blocks" in places and places <= {"blocks", "tokens", "final"},
            "blocks",
        ),
        "token": (
            "prefix, the mean of a block's input over the tokens so far, or blocks, the last alone",
            places in ({"prefix"}, {"blocks"}),
            "prefix",
        ),
    }[memory.scope]
    if not fits:
        raise ConfigError(
            f"memory.look_at {','.join(memory.places)} under memory.scope {memory.scope}",
            expected=expected,
            remedy=f"--set memory.look_at={remedy}",
        )


def _require_one_of(name: str, found: object, known: tuple[object, ...], reads: str) -> None:
    """Raise ConfigError for a value of a setting that streams of this kind cannot have."""
    if found not in known:
        raise ConfigError(
            f"{name} {found} on a stream of {reads}",
            expected=" or ".join(map(str, known)),
            remedy=f"--set {name}={known[0]}",
        )


ABOUT = About(appends=True, collects=True, require=_require)
