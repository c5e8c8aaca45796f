"""The sections of methods: those of the methods that ship, and of other people's.

A section of a method is there only where the method is chosen. Those that ship are `SECTIONS`; a
class of other people says `Settings`, a subclass of the one here, and its section has the name of
the method.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
)

from memtool import registry
from memtool.errors import ConfigError

Separation = Annotated[str, registry.Named("separations")]

_WRITTEN = {"kl": "kl-from-key", "reverse-kl": "kl-from-query"}
"""How two similarities are written down; their plain names once meant each other."""

Similarity = Annotated[
    Literal[
        "dot",
        "scaled-dot",
        "cosine",
        "centred-cosine",
        "euclidean",
        "manhattan",
        "scaled-error",
        "kl",
        "reverse-kl",
        "js",
    ],
    BeforeValidator(lambda name: next((k for k, v in _WRITTEN.items() if v == name), name)),
    PlainSerializer(lambda name: _WRITTEN.get(name, name), return_type=str, when_used="json"),
]
SHARES = ("softmax", "topk", "sparsemax", "entmax", "max")
"""Separations whose weights are shares of one."""
SEARCHED = ("dot", "scaled-dot", "cosine", "centred-cosine", "euclidean")
"""Similarities that rank keys as inner products do, by which keys are searched."""
SETTLES = ("scaled-dot", "dot", "euclidean")
"""Similarities under which `memory.read` energy lowers an energy."""

Mix = Literal["delta", "params"]
Routing = Literal["mixture", "lda", "prototype"]
Protect = Literal["freeze", "dual-gpm", "none"]
LookUnder = Literal["frozen", "first-adapter", "both"]
Recaller = Literal["hopfield", "hopfield-published", "bayes-pcn", "bayes-pcn-published"]


def as_meant(name: Any) -> Any:
    """The similarity that a stored name means, as it is written down today.

    Until 0.1 `kl` was what Millidge et al. call the reverse divergence, and the other way round.
    """
    then = {"kl": _WRITTEN["reverse-kl"], "reverse-kl": _WRITTEN["kl"]}
    return then.get(name, name) if isinstance(name, str) else name


_PLACE = re.compile(r"final|tokens|blocks|prefix|block:(0|[1-9][0-9]{0,3})")


def _number_or_places(value: Any) -> Any:
    """The number of a single block, however it was written; else places, each by its name."""
    many = list(value) if isinstance(value, list | tuple) else [value]
    named = tuple(f"block:{int(one)}" if str(one).isdigit() else one for one in many)
    if not named or not all(isinstance(one, str) and _PLACE.fullmatch(one) for one in named):
        raise ValueError("the number of a block, or some of block:N, blocks, final, tokens, prefix")
    alone = len(named) == 1 and named[0].startswith("block:")
    return int(named[0][6:]) if alone else named


LookAt = Annotated[int | tuple[str, ...], BeforeValidator(_number_or_places)]


def _norm_as_named(value: Any) -> Any:
    """The norm that a switch meant, which this was before there were three."""
    switched = {"true": "layer", "false": "none"}
    return switched.get(str(value).lower(), value) if isinstance(value, bool | str) else value


QueryNorm = Annotated[Literal["none", "layer", "block"], BeforeValidator(_norm_as_named)]


def _all_or_blocks(value: Any) -> Any:
    """None for "all"; else the numbers of blocks, ascending, each once."""
    if value is None or value in ("all", ("all",), ["all"]):
        return None
    many = value if isinstance(value, list | tuple) else [value]
    if not many or not all(re.fullmatch(r"0|[1-9][0-9]{0,3}", str(one)) for one in many):
        raise ValueError("all, or numbers of blocks, as 1,2,3")
    return tuple(sorted({int(one) for one in many}))


MemoryBlocks = Annotated[tuple[int, ...] | None, BeforeValidator(_all_or_blocks)]


class Settings(BaseModel):
    """Frozen; an unknown key is an error, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    later: ClassVar[tuple[str, ...]] = ()
    """Settings that came after others."""

    def decides(self) -> Any:
        """What of them decides a training: JSON. Later ones count where they are not the default.

        So what was trained before them is still found.
        """
        whole = self.model_dump(mode="json")
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                del whole[name]
        return whole


class MemorySettings(Settings):
    """How a query becomes coefficients, and coefficients a mixture."""

    similarity: Similarity = Field("scaled-dot", description="of a query to a key")
    separation: Separation = Field("softmax", description="from similarities to coefficients")
    beta: Annotated[float, Field(gt=0)] = Field(1.0, description="inverse temperature of softmax")
    topk: Annotated[int, Field(ge=1)] = Field(
        2, description="adapters kept by separation topk; a memory of fewer keeps all"
    )
    index: Literal["exact", "usearch"] = Field(
        "exact",
        description="of images, under separation topk or max or a routing: how the nearest of many "
        "keys are searched on the CPU: exactly, or in an index of usearch (extra usearch), which "
        "may miss one",
    )
    routing: Routing = Field(
        "mixture",
        description="mixture: as the separation says; lda, prototype: the adapters of one task, "
        "by discriminant keys or the nearest mean query",
    )
    keys_of: Literal["task", "class"] = Field(
        "task",
        description="what an adapter has a key for: its task, or each class of its task (the "
        "coefficients of its keys add up)",
    )
    mix: Mix = Field("delta", description="sum of the products BA, or product of the sums")
    token: Literal["class", "mean"] = Field("mean", description="token that the query looks at")
    query: Literal["identity", "linear", "mlp", "plain-mlp"] = Field(
        "identity",
        description="query module; all but plain-mlp, which is drawn at random, start as the "
        "identity",
    )
    query_norm: QueryNorm = Field(
        "layer",
        description="what the query is normalised by: nothing; a layer norm without gain; or the "
        "block's own first norm, with its gain and bias (for scope block, of images)",
    )
    key_bias: bool = Field(
        True, description="of images: a key has one more entry, which meets a constant 1"
    )
    key_norm: Literal["none", "memories"] = Field(
        "none",
        description="of images: what keys are divided by at every look: nothing, or each entry by "
        "its norm over all keys of the block",
    )
    centre: Literal["none", "first-task"] = Field(
        "none",
        description="of images: what is taken from every query before the query module, keys and "
        "the bases of dual-gpm: nothing, or the mean query of what was learned first",
    )
    blocks: MemoryBlocks = Field(
        None,
        description="for scope block, of images: the blocks that have a memory, as 1,2,3; all: "
        "every adapted one. In the others all adapters mix in equal parts",
    )
    scope: Literal["block", "model", "token"] = Field(
        "model",
        description="a memory in every block, or one look at the frozen model for all; of texts "
        "also token: a memory in every block, asked by every token",
    )
    look_at: LookAt = Field(
        2,
        description="for scope model: where the query looks, several places side by side: N or "
        "block:N, the input of a block; blocks, that of every block; final, the features; of texts "
        "also tokens; under scope block of texts `blocks` is a block's own input, beside final and "
        "tokens; under scope token it is that at the token, or, as prefix, its mean over all "
        "tokens so far",
    )
    look_under: LookUnder = Field(
        "frozen",
        description="for scope model: what runs while the query looks: the frozen "
        "model, or the model under the adapters of the first task, which never change; or both",
    )
    clusters: Annotated[int, Field(ge=1)] = Field(
        1,
        description="of texts: clusters of the example prompts of an adapter, each with a key of "
        "its own (the weights of its keys add up)",
    )

    frozen: Literal["none", "novelty"] = Field(
        "none",
        description="for scope model, under a head that knows all classes in advance: what leaves "
        "an image to the frozen model: nothing, or a query that is unlike all that was learned",
    )

    test_time: Literal["none", "entropy"] = Field(
        "none",
        description="of images: what moves the weights of each image when it is read: nothing, or "
        "steps down the entropy of what the head then says, no label needed",
    )
    test_steps: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="test_time entropy: steps; each runs the model forward and backward"
    )
    test_lr: Annotated[float, Field(gt=0)] = Field(
        0.5,
        description="test_time entropy: length of a step, in the logarithms of weights that are "
        "shares of one, else in the weights",
    )

    read: Literal["mixture", "energy", "decoder"] = Field(
        "mixture",
        description="of images: how weights are read: mixture, by the query as it is; energy, by "
        "one that first settles among the keys; decoder, a small network from the query adds to "
        "the weight of every rank of every adapter, and learns with the keys",
    )
    read_steps: Annotated[int, Field(ge=0, le=100)] = Field(
        3, description="read energy: steps toward the softmax-weighted mean of the keys"
    )
    read_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="read energy: how far a step goes, of the way to that mean"
    )
    read_width: Annotated[int, Field(ge=1, le=65536)] | Literal["linear", "mlp"] = Field(
        "linear",
        description="read decoder: its hidden width; or as wide as leaves it no more learned "
        "numbers than a query module of this kind has, over the adapters of all tasks",
    )

    later: ClassVar[tuple[str, ...]] = (
        "index",
        "look_under",
        "frozen",
        "test_time",
        "test_steps",
        "test_lr",
        "key_bias",
        "key_norm",
        "centre",
        "blocks",
        "read",
        "read_steps",
        "read_rate",
        "read_width",
    )

    @property
    def most(self) -> int | None:
        """How many of the highest keys have a weight, beside those equal to them; None: any."""
        if self.routing != "mixture" or self.separation == "max":
            return 1
        by_class = self.keys_of == "class"  # whose weights add up before the largest are kept
        return self.topk if self.separation == "topk" and not by_class else None

    @property
    def look_at_block(self) -> int | None:
        """The block whose input is looked at, where it is a single place."""
        first, *others = self.places
        return int(first[6:]) if first.startswith("block:") and not others else None

    @property
    def places(self) -> tuple[str, ...]:
        """The places that are looked at, by name."""
        return (f"block:{self.look_at}",) if isinstance(self.look_at, int) else self.look_at

    def seen_at(self, depth: int) -> int | None:
        """The block of a model of so many at whose input all is seen, and nothing runs further.

        None where the look goes on to the features, needs no pass, runs under adapters, or every
        block has its own.
        """
        if self.scope != "model" or self.look_under != "frozen" or "final" in self.places:
            return None
        blocks = [int(place[6:]) for place in self.places if place.startswith("block:")]
        return max([*blocks, *[depth - 1] * ("blocks" in self.places)], default=None)


class ConsolidateSettings(Settings):
    """Stage 2: the memory learns its keys."""

    keys: Literal["closed-form", "mean-query", "random", "uniform"] = Field(
        "closed-form",
        description="where the keys start; random: normal, uniform: between -1 and 1",
    )
    key_std: Annotated[float, Field(gt=0)] = Field(1.0, description="of random keys")
    protect: Protect = Field(
        "freeze",
        description="what learning may not change: the older keys, their scores on past queries "
        "(dual-gpm, which also starts new keys where past queries score zero), or nothing",
    )
    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.97, description="share of the past queries' energy that dual-gpm protects at first"
    )
    guard: Literal["step", "gradient"] = Field(
        "step",
        description="dual-gpm: step, what an optimiser's step moved inside the past is taken back; "
        "gradient, as in the code of MIRA's authors: gradients of keys and a shared head lose "
        "their part inside before AdamW, and the past is that of all tokens of one batch",
    )
    epochs: Annotated[int, Field(ge=0)] = Field(0, description="of key learning; 0: none")
    first_epochs: Annotated[int, Field(ge=0)] | None = Field(
        None, description="of the first consolidation; none: as many as of the others"
    )
    lr: Annotated[float, Field(ge=0)] = Field(
        0.05, description="learning rate of the keys; 0: they stay as they start"
    )
    module_lr: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="learning rate of query modules and of a shared head"
    )
    head_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of a shared head; none: as module_lr"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    fresh_head: bool = Field(
        False,
        description="a shared head begins the first consolidation at zero, not as it was trained "
        "with the adapters",
    )
    mixup: Annotated[float, Field(ge=0)] | None = Field(
        None, description="as train.mixup, of key learning; none: that of train"
    )
    value_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="learning rate of the new adapters' values; 0: they stay as they are"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(50, description="images a step")

    later: ClassVar[tuple[str, ...]] = (
        "guard",
        "first_epochs",
        "head_lr",
        "weight_decay",
        "fresh_head",
        "mixup",
    )

    def epochs_of(self, *, first: bool) -> int:
        """Epochs of key learning in the first consolidation, or in another."""
        return self.epochs if not first or self.first_epochs is None else self.first_epochs


class ModulationSettings(Settings):
    """Modulation: whole adapters recalled from an associative memory."""

    memory: tuple[Recaller, ...] = Field(
        ("hopfield", "bayes-pcn"),
        min_length=1,
        description="memories that adapters are recalled from; the first one serves retrieval",
    )
    key_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of an adapter's first numbers that are its key"
    )
    similarity: Similarity = Field("euclidean", description="hopfield: of two keys")
    separation: Separation = Field(
        "softmax", description="hopfield: from similarities to coefficients"
    )
    beta: Annotated[float, Field(gt=0)] | None = Field(
        None, description="hopfield: inverse temperature; none: from the gaps between the keys"
    )
    steps: Annotated[int, Field(ge=1)] = Field(1, description="hopfield: retrieval steps")
    hidden: Annotated[int, Field(ge=1)] = Field(
        256, description="bayes-pcn: hidden width, and so how many adapters it can hold"
    )
    predictor_epochs: Annotated[int, Field(ge=1)] = Field(
        10, description="mts, trace: passes over all tasks of the task predictor"
    )
    predictor_lr: Annotated[float, Field(gt=0)] = Field(
        2e-3, description="mts, trace: highest learning rate of the task predictor"
    )


class MoramSettings(Settings):
    """MoRAM: rank-1 atoms that every token chooses by its own response to their keys."""

    topk: Annotated[int, Field(ge=2)] | None = Field(
        None, description="atoms that a token keeps; none: as many as a task adds (the rank)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        0.01, description="of the softmax over the kept scores"
    )
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.2, description="score below which an atom adds nothing in evaluation; -1: all pass"
    )
    score_norm: Literal["bank", "task"] = Field(
        "bank",
        description="what a response is divided by: the norm over the whole bank, as published, "
        "or over the atoms of its task, under which old scores never change",
    )
    scaled_threshold: bool = Field(
        False, description="norm bank: divide the threshold by the root of the number of tasks"
    )
    selected_only: bool = Field(False, description="no gradient through atoms that are not kept")
    keys: Literal["random", "free"] = Field(
        "random",
        description="how keys begin: at random and learning, as published, or fixed at what a "
        "task's inputs have outside those of earlier tasks, so that these hardly answer to them",
    )
    frozen_scaling: Literal["kept", "one"] = Field(
        "kept",
        description="what an atom adds is scaled by once it is written: by alpha / r as while it "
        "learned, or by one, as in the published code for TRACE",
    )
    later: ClassVar[tuple[str, ...]] = ("frozen_scaling",)


class PastSettings(Settings):
    """What earlier tasks' inputs take of the room of later ones: InfLoRA, free keys of MoRAM."""

    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.97,
        description="share of the energy of the first task's inputs that later tasks keep clear "
        "of, rising to 1 at the last; less leaves them more room",
    )
    rule: Literal["energy", "squares"] = Field(
        "energy",
        description="what the share is of: the energy of the inputs, or the squares of the "
        "singular values of their covariance, as in the code of InfLoRA (with 0.95 or 0.98)",
    )

    def decides(self) -> Any:
        """The share alone, as it was before there was a rule."""
        return self.energy if self.rule == "energy" else [self.energy, self.rule]


class FirstSessionSettings(Settings):
    """Baselines that learn on the first task alone: ranpac, aper, fsa."""

    epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="passes over the first task's images; none: those of every adapter"
    )


class ReplaySettings(Settings):
    """What the baselines keep that replay samples of earlier tasks: er, der++."""

    buffer: Annotated[int, Field(ge=0)] = Field(
        200, description="samples of all earlier tasks together; 0: none"
    )


OF_BASELINES: Mapping[str, type[Settings]] = {
    "past": PastSettings,
    "first_session": FirstSessionSettings,
    "replay": ReplaySettings,
}
"""The sections that baselines read, which other people's methods are measured against, too."""

SECTIONS: Mapping[str, Mapping[str, type[Settings]]] = {
    "mira": {"memory": MemorySettings, "consolidate": ConsolidateSettings, **OF_BASELINES},
    "moram": {"moram": MoramSettings, **OF_BASELINES},
    "modulation": {"modulation": ModulationSettings, **OF_BASELINES},
}
"""The sections of every method that ships, by method."""


def sections_of(method: str, taken: Callable[[str], bool]) -> dict[str, type[Settings]]:
    """The sections of a method by name. One that does not ship is imported.

    Its own `Settings`, those of a method that ships where it extends one, and what baselines read.
    `taken` says of a word whether it cannot be a section. Raises ConfigError for a method that
    cannot be found, or whose settings cannot be a section.
    """
    if method in SECTIONS:
        return dict(SECTIONS[method])
    found = registry.find("methods", method)
    sections = dict(OF_BASELINES)
    for name, where in registry.SHIPPED["methods"].items():
        module, _, attribute = where.partition(":")
        ours = getattr(sys.modules.get(module), attribute, None)
        if ours is not None and issubclass(found, ours):
            sections = {**SECTIONS[name], **sections}
    own = getattr(found, "Settings", None)
    if own is not None and own not in sections.values():
        section = _section_name(method, found)
        if taken(section) or owners_of(section):
            raise ConfigError(
                f"method {method}: its section {section!r} would be another one of memtool",
                expected=f"another {found.__name__}.name",
            )
        sections[section] = _require_settings(method, own)
    return sections


def owners_of(section: str) -> list[str]:
    """The methods that ship which have a section."""
    return [method for method, sections in SECTIONS.items() if section in sections]


@cache
def model_of(sections: tuple[tuple[str, type[Settings]], ...]) -> type[Settings]:
    """A model of these sections alone, by name, each with its defaults."""
    fields: dict[str, Any] = {name: (model, model()) for name, model in sections}
    return create_model("Sections", __base__=Settings, **fields)


def _section_name(method: str, found: type) -> str:
    """What the section of another's method is called: as the method, with _ for -."""
    name = getattr(found, "name", None)
    section = name.replace("-", "_") if isinstance(name, str) else ""
    if not section.isidentifier() or section.startswith("_"):
        raise ConfigError(
            f"method {method}: {found.__name__}.name is {name!r}",
            expected="a word that names the section of its settings, as nearest-mean",
        )
    return section


def _require_settings(method: str, own: Any) -> type[Settings]:
    """Raise ConfigError unless settings of another's method can be a section."""
    if not (isinstance(own, type) and issubclass(own, Settings)):
        raise ConfigError(
            f"method {method}: its Settings are no model of settings",
            expected="a subclass of memtool.Settings",
        )
    for name, field in own.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        if any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            raise ConfigError(
                f"method {method}: its setting {name} is a section of a section",
                expected="values: text, numbers, several of them, or none",
            )
    try:
        own()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"method {method}: its setting {'.'.join(map(str, first['loc']))}: {first['msg']}",
            expected="a default that can be used for every setting",
        ) from error
    return own
