"""Everything that can be set, as pydantic models, and where each value comes from.

Precedence, highest first: command line, MEMTOOL_* variables, --config file, memtool.yaml in the
working directory, the user's file, the preset, the defaults here (`resolve`). A setting has a
dotted key, `adapter.rank`; as a variable it is MEMTOOL_ADAPTER__RANK.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from memtool.errors import ConfigError, NotFoundError, did_you_mean
from memtool.yaml_file import Node, read_yaml
from memtool_stores import limits
from memtool_stores.limits import Limits
from memtool_stores.printable import printable, shown
from memtool_stores.redacted import redacted

Separation = Literal[
    "softmax",
    "affine",
    "identity",
    "relu",
    "tanh",
    "topk",
    "max",
    "power",
    "sparsemax",
    "entmax",
]
Similarity = Literal[
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
]
Mix = Literal["delta", "params"]
Setting = Literal["dil", "til", "cil", "dg", "mts", "xtail", "trace"]
HeadKind = Literal["lda", "ridge", "ncm", "grown", "shared", "prototype", "text"]
Routing = Literal["mixture", "lda", "prototype"]
Augment = Literal["none", "flip-crop"]
Protect = Literal["freeze", "dual-gpm", "none"]
MethodName = Literal["mira", "moram", "modulation"]
Recaller = Literal["hopfield", "hopfield-published", "bayes-pcn", "bayes-pcn-published"]


Baseline = Literal[
    "all",
    "none",
    "zero-shot",
    "in-context",
    "frozen",
    "fine-tune",
    "sequential",
    "ewc",
    "lwf",
    "o-lora",
    "inf-lora",
    "moe-lora",
    "joint",
    "erm",
]


class Settings(BaseModel):
    """Frozen; an unknown key is an error, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, le=10**15)]
"""What generators of all libraries take, times a thousand and a task's number."""


class BackboneSettings(Settings):
    """The frozen model."""

    name: str = Field("nano", description="nano, or timm:<model name>")
    weights: Path | None = Field(None, description="a local safetensors file; none: by name")
    image_size: Annotated[int, Field(ge=8, le=8192)] = Field(
        32, description="pixels a side of the input"
    )
    targets: tuple[str, ...] = Field(("q", "v"), description="adapted linear maps of every block")


class StreamSettings(Settings):
    """The data and how it is cut into tasks."""

    source: str = Field("digits", description="a description's name or path, or a folder")
    setting: Setting = Field("dil", description="how the data is cut into tasks")
    order: tuple[str, ...] | None = Field(None, description="order of domains or classes")
    classes_per_task: Annotated[int, Field(ge=1)] = Field(2, description="for cil, til and mts")
    splits: Annotated[int, Field(ge=1)] | None = Field(
        None, description="number of tasks, instead of classes_per_task"
    )
    train_per_task: Annotated[int, Field(ge=1)] | None = Field(
        None, description="at most so many training images a task"
    )
    test_per_task: Annotated[int, Field(ge=1)] | None = Field(
        None, description="at most so many test images a task"
    )
    shots: Annotated[int, Field(ge=1)] | None = Field(
        None, description="at most so many training images a class"
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the training images held out for validation"
    )
    held_out: str | None = Field(
        None, description="for dg: the domain that nothing is learned from; none: each in turn"
    )
    seed: Seed = Field(0, description="fixes splits, subsets and transformations")


class AdapterSettings(Settings):
    """The shape of an adapter and where its training starts."""

    rank: Annotated[int, Field(ge=1)] = Field(4, description="rank of every adapted map")
    alpha: Annotated[float, Field(gt=0)] = Field(8.0, description="BA is scaled by alpha / rank")
    per_task: Annotated[int, Field(ge=1)] = Field(1, description="adapters per task (J)")
    warm_start: Literal["previous", "mean", "none"] = Field(
        "none", description="where training starts: the adapter before, the mean of all, or zero"
    )
    residual: bool = Field(
        False, description="train on top of the mixture that the memory recalls, not alone"
    )


class TrainSettings(Settings):
    """Stage 1: training the adapters of a task."""

    epochs: Annotated[int, Field(ge=1)] = Field(4, description="passes over the task's images")
    iterations: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps a task, instead of epochs; the last epoch is finished"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(50, description="images a step")
    lr: Annotated[float, Field(gt=0)] = Field(1e-2, description="highest learning rate")
    final_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate at the end")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="of AdamW")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.15, description="share of the steps")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of AdamW: decay of the means of gradients and of their squares"
    )
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="largest norm of the gradient")
    augment: Augment = Field("none", description="of the training images")

    def epochs_for(self, samples: int, tasks: int = 1) -> int:
        """Epochs over so many samples of `tasks` tasks: by `iterations` where that is set."""
        if self.iterations is None:
            return self.epochs
        return math.ceil(tasks * self.iterations / math.ceil(samples / self.batch_size))


class MemorySettings(Settings):
    """How a query becomes coefficients, and coefficients a mixture."""

    similarity: Similarity = Field("scaled-dot", description="of a query to a key")
    separation: Separation = Field("softmax", description="from similarities to coefficients")
    beta: Annotated[float, Field(gt=0)] = Field(1.0, description="inverse temperature of softmax")
    topk: Annotated[int, Field(ge=1)] = Field(2, description="kept by separation topk")
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
    query: Literal["identity", "linear", "mlp"] = Field("identity", description="query module")
    query_norm: bool = Field(True, description="layer-normalise the query")
    scope: Literal["block", "model"] = Field(
        "model", description="a memory in every block, or one look at the frozen model for all"
    )
    look_at: Annotated[int, Field(ge=0)] = Field(
        2, description="for scope model: the block whose input the query looks at"
    )


class ConsolidateSettings(Settings):
    """Stage 2: the memory learns its keys."""

    keys: Literal["closed-form", "mean-query", "random"] = Field(
        "closed-form", description="where the keys start"
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
    epochs: Annotated[int, Field(ge=0)] = Field(0, description="of key learning; 0: none")
    lr: Annotated[float, Field(gt=0)] = Field(0.05, description="learning rate of the keys")
    module_lr: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="learning rate of query modules and of a shared head"
    )
    value_lr: Annotated[float, Field(ge=0)] = Field(
        0.0, description="learning rate of the new adapters' values; 0: they stay as they are"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(50, description="images a step")


class HeadSettings(Settings):
    """The classifier on the features."""

    @field_validator("kind", mode="before")
    @classmethod
    def _renamed(cls, kind: Any) -> Any:
        # What "grown" was called before 0.3; memories and files on disk may still say so.
        return "grown" if kind == "linear" else kind

    kind: HeadKind = Field(
        "lda",
        description="closed form (lda, ridge, ncm), grown: trained with the adapters, class by "
        "class; shared: one that learns on through every consolidation; known for all classes in "
        "advance (xtail): prototype, of frozen features; text, of a text tower",
    )
    scope: Literal["shared", "task"] = Field(
        "task", description="one head for all tasks, or each task's own, recalled with its adapter"
    )
    features: Literal["own", "recalled"] = Field(
        "own",
        description="closed form: solved on features under the task's own adapters, or under what "
        "the memory recalls",
    )
    ridge: Annotated[float, Field(gt=0)] = Field(1e-2, description="ridge, relative to the trace")
    scale: Annotated[float, Field(gt=0)] = Field(
        30.0, description="prototype: logits are cosines times this"
    )
    rivals: Literal["task", "seen"] = Field(
        "task",
        description="prototype: what images are told apart from while their task is learned: the "
        "classes of the task, or of all tasks so far",
    )


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
        10, description="mts: passes over all tasks of the task predictor"
    )
    predictor_lr: Annotated[float, Field(gt=0)] = Field(
        2e-3, description="mts: highest learning rate of the task predictor"
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


class PastSettings(Settings):
    """What earlier tasks' inputs take of the room of later ones: InfLoRA, free keys of MoRAM."""

    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.97,
        description="share of the energy of the first task's inputs that later tasks keep clear "
        "of, rising to 1 at the last; less leaves them more room",
    )


class TextSettings(Settings):
    """Streams of texts (setting trace)."""

    prompt_tokens: Annotated[int, Field(ge=1)] = Field(1024, description="most tokens of a prompt")
    answer_tokens: Annotated[int, Field(ge=1)] = Field(
        512, description="most tokens of an answer, the end of text included"
    )
    long_prompts: Literal["cut", "refuse"] = Field(
        "cut", description="a prompt that is too long keeps its end, or is an error"
    )
    generate: bool = Field(
        False, description="score generated answers by the metric of their task, beside the loss"
    )
    epochs: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="passes over each task in turn, instead of train.epochs"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the inputs that adapters do not see in training"
    )
    shots: Annotated[int, Field(ge=1)] = Field(
        4, description="examples from the training set before a prompt (baseline in-context)"
    )


class EngineSettings(Settings):
    """Where and how tensors are computed."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="cuda, mps or cpu")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware has it"
    )
    compile: bool = Field(False, description="torch.compile the model")
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="CPU threads; none: 1 for nano, else all"
    )
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="steps of gradient accumulation")
    eval_batch_size: Annotated[int, Field(ge=1)] = Field(100, description="images a step")


class LimitSettings(Settings):
    """How large what comes from outside may be, before it is read at all."""

    header_bytes: Annotated[int, Field(ge=1)] = Field(
        Limits.header_bytes, description="header of a safetensors file"
    )
    text_bytes: Annotated[int, Field(ge=1)] = Field(
        Limits.text_bytes, description="a JSON file or a table as CSV"
    )
    yaml_bytes: Annotated[int, Field(ge=1)] = Field(
        Limits.yaml_bytes, description="a YAML file: a description, or settings"
    )
    array_bytes: Annotated[int, Field(ge=1)] = Field(
        Limits.array_bytes, description="keys, a blob, the tensors of a file"
    )
    bundle_files: Annotated[int, Field(ge=1)] = Field(
        Limits.bundle_files, description="files in a bundle"
    )
    data_files: Annotated[int, Field(ge=1)] = Field(
        Limits.data_files, description="files and folders below a folder of data"
    )
    image_bytes: Annotated[int, Field(ge=1)] = Field(
        Limits.image_bytes, description="an image as it is encoded"
    )
    image_pixels: Annotated[int, Field(ge=1)] = Field(
        Limits.image_pixels, description="an image decoded, width times height"
    )

    def put_in_force(self) -> None:
        """Make these the limits of this process."""
        limits.use(Limits(**self.model_dump()))


class Config(Settings):
    """One experiment."""

    method: MethodName = Field("mira", description="how the memory is read")
    store: str = Field("memory", description="path of the memory; to read, perhaps @VERSION")
    lock_timeout: Annotated[float, Field(ge=0, le=10**6)] = Field(
        30.0, description="seconds to wait for another process that writes to the memory"
    )
    runs: Path = Field(Path("runs"), description="folder of adapters, records and checkpoints")
    seed: tuple[Seed, ...] = Field((0,), min_length=1, description="one seed or several")
    baselines: tuple[Baseline, ...] = Field(
        ("all",),
        min_length=1,
        description="what `run` trains beside the memory, or none; erm is of dg",
    )
    backbone: BackboneSettings = BackboneSettings()
    stream: StreamSettings = StreamSettings()
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    memory: MemorySettings = MemorySettings()
    consolidate: ConsolidateSettings = ConsolidateSettings()
    head: HeadSettings = HeadSettings()
    modulation: ModulationSettings = ModulationSettings()
    moram: MoramSettings = MoramSettings()
    past: PastSettings = PastSettings()
    text: TextSettings = TextSettings()
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()

    @field_validator("runs")
    @classmethod
    def _runs_at_home(cls, runs: Path) -> Path:
        return at_home(runs)

    def recorded(self) -> dict[str, Any]:
        """The configuration as records and commits hold it: plain JSON, `~` for the user's folder.

        They are sent to others, so that no secret is in it; what reads a setting understands `~`.
        """
        tree: dict[str, Any] = _for_others(self.model_dump(mode="json"))
        return tree


@dataclass(frozen=True)
class Resolved:
    """A configuration, the preset below it, and for every dotted key where its value is from.

    An origin is "default", "preset <name>", "<file>:<line>", the name of a variable, "command line"
    or "the memory", below which there is no preset.
    """

    config: Config
    origin: dict[str, str]
    preset: str | None

    def without_effect(self, *, reads: Sequence[str] = ()) -> tuple[str, ...]:
        """Sentences on what was asked for in vain, as `READ_UNDER` says: one a setting.

        Asked for are settings of the command line and of variables; a file or preset may hold some
        for other methods. `reads` names the settings and sections of a verb that reads no others;
        a variable that is for other verbs is not asked for in vain then.
        """
        found = []
        for key, place in self.origin.items():
            if reads:
                if place == COMMAND_LINE and key.partition(".")[0] not in reads:
                    found.append(f"{key} has no effect here: nothing but the store is read")
            elif place == COMMAND_LINE or place.startswith("MEMTOOL_"):
                other = _not_read_under(self.config, key)
                if other is not None:
                    value = get(self.config, other)
                    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                    found.append(f"{key} has no effect under {other} {shown}")
        return tuple(found)


@dataclass(frozen=True)
class Preset:
    """A file of settings that ships with memtool; `launch` is the command in its first line."""

    name: str
    path: Path
    launch: str
    summary: str


_OF_CLASSES = ("cil", "til", "mts")
_OF_IMAGES = ("dil", "dg", "xtail", *_OF_CLASSES)

READ_UNDER: tuple[tuple[str, str, tuple[str | None, ...]], ...] = (
    ("memory", "method", ("mira",)),
    ("consolidate", "method", ("mira",)),
    ("moram", "method", ("moram",)),
    ("past", "method", ("mira", "moram")),
    ("modulation", "method", ("modulation",)),
    ("baselines", "method", ("mira", "moram")),
    ("baselines", "stream.setting", tuple(s for s in get_args(Setting) if s != "til")),
    ("text", "stream.setting", ("trace",)),
    ("backbone.image_size", "stream.setting", _OF_IMAGES),
    ("train.augment", "stream.setting", _OF_IMAGES),
    ("stream.shots", "stream.setting", _OF_IMAGES),
    ("stream.validation", "stream.setting", _OF_IMAGES),
    ("stream.held_out", "stream.setting", _OF_IMAGES),  # without dg it is an error
    ("stream.splits", "stream.setting", _OF_CLASSES),
    ("stream.classes_per_task", "stream.setting", _OF_CLASSES),
    ("stream.classes_per_task", "stream.splits", (None,)),
    ("train.epochs", "train.iterations", (None,)),
    ("train.epochs", "text.epochs", (None,)),
    ("memory.topk", "memory.separation", ("topk",)),
    ("memory.look_at", "memory.scope", ("model",)),
    ("consolidate.key_std", "consolidate.keys", ("random",)),
    ("consolidate.energy", "consolidate.protect", ("dual-gpm",)),
    ("head", "stream.setting", _OF_IMAGES),
    ("head.kind", "method", ("mira", "moram")),
    ("head.scope", "method", ("mira", "moram")),
    ("head.features", "method", ("mira",)),
    ("head.scale", "head.kind", ("prototype",)),
    ("head.rivals", "head.kind", ("prototype",)),
    ("moram.scaled_threshold", "moram.score_norm", ("bank",)),
    ("modulation.predictor_epochs", "stream.setting", ("mts",)),
    ("modulation.predictor_lr", "stream.setting", ("mts",)),
)
"""A setting, or all of a section, is read only where another one has one of these values."""

DEFAULT_PRESET = "digits-dil"
WORKING_FILE = "memtool.yaml"
COMMAND_LINE = "command line"
MEMORY = "the memory"
"""Origin of what a memory was made with."""
NOT_SETTINGS = frozenset({"MEMTOOL_DATA", "MEMTOOL_CACHE"})


def resolve(
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    ambient: bool = True,
    remembered: Mapping[str, Any] | None = None,
) -> Resolved:
    """The configuration in force, each value from the highest place that sets it.

    `overrides` are the values of the command line by dotted key. Text (there and in variables) is
    read by the type of the setting: "0,1,2" for several values, "none" for no value. Without
    `ambient`, only what the arguments name counts: no variables, working or user file.
    `remembered` are the settings that a memory was made with, by dotted key: they stand where
    nothing else was said, and a preset was not named.

    Raises ConfigError for an unknown key or a value that cannot be used, with its place;
    NotFoundError for a preset or a file that is not there.
    """
    cwd = Path.cwd() if cwd is None else cwd
    chosen = find_preset(preset or DEFAULT_PRESET)
    origin = dict.fromkeys(keys(), "default")
    values: dict[str, Any] = {}

    def put(layer: Mapping[str, tuple[Any, str]]) -> None:
        for key, (value, place) in layer.items():
            _require_text(key, value, place)
            values[key] = _as_field(key, value)
            origin[key] = place

    base = None if remembered and preset is None else chosen.name
    if base is None:
        put({key: (value, MEMORY) for key, value in (remembered or {}).items()})
    else:
        named = f"preset {chosen.name}"
        file_of_it = _read(chosen.path, chosen.path.name)
        put({key: (value, named) for key, (value, _) in file_of_it.items()})
    for path in (user_file(), cwd / WORKING_FILE):
        if ambient and os.path.exists(path):  # noqa: PTH110 - False where nobody may look
            put(_read(path, _shown(path, cwd)))
    if file is not None:
        put(_read(cwd / at_home(file), str(file)))
    if ambient:
        put(_from_environment(os.environ if environ is None else environ))
    for key in overrides or {}:
        _require_key(key, COMMAND_LINE)
    put({key: (value, COMMAND_LINE) for key, value in (overrides or {}).items()})
    return Resolved(_validated(values, origin), origin, base)


def user_file() -> Path:
    """The user's own settings, in the folder that the operating system has for them."""
    return platformdirs.user_config_path("memtool") / "config.yaml"


def presets() -> tuple[Preset, ...]:
    """The presets that ship with memtool, by name."""
    found = []
    for path in sorted((Path(__file__).parent / "presets").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        found.append(Preset(path.stem, path, comments[0], comments[1]))
    return tuple(found)


def find_preset(name: str) -> Preset:
    """A preset by name. Raises NotFoundError."""
    known = {preset.name: preset for preset in presets()}
    if name not in known:
        raise NotFoundError(
            f"no preset {name!r}",
            expected=did_you_mean(name, known),
            remedy="memtool config presets",
        )
    return known[name]


@functools.cache
def keys() -> dict[str, FieldInfo]:
    """Every setting by dotted key, in the order of the models."""
    return dict(_walk(Config, ""))


def choices(key: str) -> tuple[str, ...]:
    """The words that a setting, or each of its values, can take; empty when it is not a choice."""
    annotation = keys()[key].annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `resolve(file=...)` on it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_assignment(text: str) -> tuple[str, str]:
    """`"adapter.rank=8"` as key and text, for --set. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {shown(text)}", expected="KEY=VALUE, as --set adapter.rank=8")
    return key.strip(), value.strip()


def split_store(store: str) -> tuple[str, str]:
    """`"memory@HEAD~1"` as address and version; the version is HEAD when none is named.

    What is there as written is an address. Else it ends at the last `@` after the last `/`, so that
    `here@home/` and `user@host/memory` are addresses, too.
    """
    folder, slash, name = store.rpartition("/")
    if "@" not in name or _is_there(store):
        return store, "HEAD"
    name, _, version = name.rpartition("@")
    return folder + slash + name, version or "HEAD"


def _is_there(store: str) -> bool:
    """Whether there is anything at a path; at text that no path can be there is nothing."""
    try:
        return os.path.lexists(os.path.expanduser(store))  # noqa: PTH111 - any text
    except ValueError:
        return False


def store_beside(store: str, ending: str) -> str:
    """The setting for a memory beside that of `store`, with `ending` after its name."""
    beside = split_store(store)[0].rstrip("/") + ending
    return f"{beside}/" if "@" in beside.rpartition("/")[2] else beside


def _for_others(value: Any) -> Any:
    """Values of JSON, every text in them fit for a record."""
    match value:
        case str():
            return without_home(redacted(value))
        case list():
            return [_for_others(one) for one in value]
        case dict():
            return {key: _for_others(one) for key, one in value.items()}
    return value


def without_home(text: str) -> str:
    """Text for a record, with `~` for the user's folder: it may go to others."""
    home = os.path.expanduser("~")  # noqa: PTH111 - no error where there is none
    if len(home) < 2 or not home.startswith("/"):
        return text
    return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?=/|$|[\s'\":,@])", "~", text)


def expand(path: Path | str, environ: Mapping[str, str] | None = None) -> Path:
    """The path with `~` and every `${VARIABLE}` replaced.

    Raises ConfigError that names a variable that is not set, or a user whom nobody knows. What a
    variable holds is never said: it may be a secret.
    """
    environ = os.environ if environ is None else environ

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not environ.get(name):
            raise ConfigError(
                f"{printable(str(path))}: the variable {name} is not set",
                remedy=f"export {name}=FOLDER",
            )
        return environ[name]

    return at_home(Path(re.sub(r"\$\{(\w+)\}", value, str(path))))


def at_home(path: Path) -> Path:
    """The path with `~` replaced. Raises ConfigError where there is no such user."""
    try:
        return path.expanduser()
    except (RuntimeError, ValueError) as error:  # ValueError: a name with NUL
        raise ConfigError(
            f"{printable(str(path))}: there is no user {shown(path.parts[0][1:])}",
            expected="~ for your own home, or the name of a user of this machine",
            remedy="write the path out, or ./~ for a folder of that name",
        ) from error


def _not_read_under(config: Config, key: str) -> str | None:
    """The setting whose value makes a setting one that nothing reads, or None."""
    for name, other, values in READ_UNDER:
        named = key == name or key.startswith(f"{name}.")
        if named and get(config, other) not in values and not _not_read_under(config, other):
            return other
    return None


def _walk(model: type[BaseModel], prefix: str) -> list[tuple[str, FieldInfo]]:
    found = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Settings):
            found += _walk(section, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def _sections() -> set[str]:
    return {key.partition(".")[0] for key in keys() if "." in key}


def _read(path: Path, name: str) -> dict[str, tuple[Any, str]]:
    """The settings of a YAML file: dotted key to (value, "file:line")."""
    name = printable(name)
    tree = read_yaml(path, name, remedy=f"memtool init {name}")
    found: dict[str, tuple[Any, str]] = {}
    sections = _sections()

    def visit(node: Node, prefix: str) -> None:
        if node.value is None:
            return
        if not isinstance(node.value, dict):
            subject = f"{prefix[:-1]!r} is a section, not a value" if prefix else "no settings here"
            inside = [key for key in keys() if key.startswith(prefix)]
            raise ConfigError(
                f"{name}:{node.line}: {subject}",
                expected=f"lines `key: value`, with keys such as {', '.join(inside[:4])}",
            )
        for word, inner in node.value.items():
            key, place = f"{prefix}{word}", f"{name}:{inner.line}"
            if key in sections:
                visit(inner, f"{key}.")
                continue
            _require_key(key, place)
            if key in found:
                raise ConfigError(f"{place}: {key} is set twice, first at {found[key][1]}")
            found[key] = (inner.plain(), place)

    if tree is not None:
        visit(tree, "")
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    names = {_variable(key): key for key in keys()}
    found = {}
    for name in sorted(environ):
        if not name.startswith("MEMTOOL_") or name in NOT_SETTINGS:
            continue
        if name not in names:
            close = difflib.get_close_matches(name, [*names, *NOT_SETTINGS], n=1)
            raise ConfigError(
                f"{printable(name)}: no such setting",
                expected=f"did you mean {close[0]}?"
                if close
                else "MEMTOOL_ and a key of `memtool config show`, as MEMTOOL_ADAPTER__RANK",
                remedy=f"unset {printable(name)}",
            )
        found[names[name]] = (environ[name], name)
    return found


def _variable(key: str) -> str:
    return "MEMTOOL_" + key.replace(".", "__").upper()


def _require_key(key: str, place: str) -> None:
    if key in keys():
        return
    same_word = [known for known in keys() if known.rpartition(".")[2] == key]
    close = same_word or difflib.get_close_matches(key, keys(), n=1)
    section = key.partition(".")[0] + "."
    inside = [known for known in keys() if known.startswith(section)]
    if close:
        expected = "did you mean " + " or ".join(repr(known) for known in close) + "?"
    else:
        expected = (
            f"one of {', '.join(inside or dict.fromkeys(k.partition('.')[0] for k in keys()))}"
        )
    raise ConfigError(
        f"{place}: no setting {shown(key)}", expected=expected, remedy="memtool config show"
    )


def _require_text(key: str, value: Any, place: str) -> None:
    """Raise ConfigError for text that no path and no file of ours can hold."""
    for text in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
            raise ConfigError(
                f"{place}: {key} cannot be {shown(text)}", expected="text without NUL, in UTF-8"
            )


def _as_field(key: str, value: Any) -> Any:
    """Text and single values in the form of the field: several, or none."""
    annotation = keys()[key].annotation
    arms = get_args(annotation)
    if isinstance(value, str) and NoneType in arms and value.lower() in ("", "none", "null"):
        return None
    if any(get_origin(arm) is tuple for arm in (annotation, *arms)):
        if isinstance(value, str):
            return tuple(part.strip() for part in value.strip("[]").split(",") if part.strip())
        if value is not None and not isinstance(value, (list, tuple)):
            return (value,)
    return value


def _validated(values: Mapping[str, Any], origin: Mapping[str, str]) -> Config:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        key = next(k for n in (2, 1) if (k := ".".join(path[:n])) in keys())
        wanted = choices(key)
        raise ConfigError(
            f"{origin[key]}: {key} cannot be {shown(first['input'])}",
            expected=did_you_mean(str(first["input"]), wanted)
            if wanted
            else first["msg"].removeprefix("Input should be "),
        ) from error


def _shown(path: Path, cwd: Path) -> str:
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
