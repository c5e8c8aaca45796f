"""Everything that can be set, as pydantic models: what all methods share, and the whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from memtool import registry
from memtool.errors import ConfigError
from memtool.paths import at_home, for_others
from memtool.registry import Named
from memtool.sections import SECTIONS, MemorySettings, Settings, model_of, sections_of
from memtool_stores import limits
from memtool_stores.limits import Limits

Setting = Literal["dil", "til", "cil", "vil", "dg", "dgcl", "mtl", "mts", "xtail", "trace"]
AT_ONCE: tuple[Setting, ...] = ("dg", "mtl")
"""Settings whose tasks are learned together, in no order."""
HOLDS_OUT: tuple[Setting, ...] = ("dg", "dgcl")
"""Settings that are tested on a domain that nothing is learned from."""
BY_DOMAIN: tuple[Setting, ...] = ("dil", "dg", "dgcl", "xtail")
"""Settings of which every task is a domain."""
HeadKind = Literal["lda", "ridge", "rp-ridge", "ncm", "grown", "shared", "prototype", "text"]
HeadFeatures = Literal[
    "own", "recalled", "own+frozen", "own+first", "recalled+frozen", "recalled+first"
]
Crop = Literal["centre", "squash", "pad"]
Augment = Literal["none", "flip", "flip-crop", "crop"]


Seed = Annotated[int, Field(ge=0, le=10**15)]
"""What generators of all libraries take, times a thousand and a task's number."""


TextMetric = Literal[
    "first-character",
    "number",
    "exact-match",
    "rouge-l",
    "edit-similarity",
    "sari",
    "trace-choice",
    "trace-number",
    "trace-code",
    "trace-sari",
]
"""How an answer is scored; see `memtool.evaluation.text`."""


class BackboneSettings(Settings):
    """The frozen model."""

    name: str = Field(
        "nano",
        description="nano, timm:<model name>, open_clip:<model name>, open_clip_image:<model name> "
        "or hf:<id or path>",
    )
    weights: Path | Literal["random"] | None = Field(
        None,
        description="a local safetensors file; random: drawn, always alike, for trials without "
        "any file; none: by name",
    )
    image_size: Annotated[int, Field(ge=8, le=8192)] = Field(
        32, description="pixels a side of the input"
    )
    targets: tuple[str, ...] = Field(("q", "v"), description="adapted linear maps of every block")
    quantise: Literal["4bit"] | None = Field(
        None,
        description="language models: weights of linear layers in four bits (bitsandbytes)",
    )


class StreamSettings(Settings):
    """The data and how it is cut into tasks."""

    source: str = Field("digits", description="a description's name or path, or a folder")
    setting: Setting = Field("dil", description="how the data is cut into tasks")
    order: tuple[str, ...] | None = Field(None, description="order of domains or classes")
    classes_per_task: Annotated[int, Field(ge=1)] = Field(
        2, description="for cil, til, mts and vil; and for mtl where nothing has domains"
    )
    splits: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="number of tasks, instead of classes_per_task; for vil in every domain, for "
        "mtl instead of a task a domain",
    )
    class_order: Literal["drawn", "given"] = Field(
        "drawn",
        description="where tasks are groups of classes and no order names these: grouped as the "
        "seed draws them, or as the data names them",
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
    validation: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="held back from training for validation: a share of every class (texts: of "
        "every task), or from 1 on so many samples a task",
    )
    split: Literal["test", "validation"] = Field(
        "test", description="what is measured: test samples, or those held back for validation"
    )
    held_out: str | None = Field(
        None,
        description="for dg and dgcl: the domain that nothing is learned from; none: each in turn",
    )
    crop: Crop = Field(
        "centre",
        description="how a picture becomes square: centre, its largest middle square; squash, all "
        "of it, its sides stretched; pad, all of it between bars of black",
    )
    skip_broken: bool = Field(
        False, description="leave pictures out that cannot be read, and say which; else an error"
    )
    metric: TextMetric = Field(
        "exact-match", description="for a file of lines: how answers are scored"
    )
    alike: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="how like the first task the last one is made; 1: the first once more"
    )
    alike_by: Literal["copies", "others", "looks"] = Field(
        "copies",
        description="how: copies, that share of its images gives way to the first task's; others, "
        "to images that the first task leaves for it; looks, every image is blended with one of "
        "its class",
    )
    seed: Seed = Field(0, description="fixes splits, subsets and transformations")
    test_seed: Seed | None = Field(
        None, description="fixes which samples are for testing; none: as stream.seed"
    )

    @field_validator("validation")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("a share below 1, or a whole number of samples a task")
        return value

    @property
    def names_texts(self) -> bool:
        """Whether the source is one of texts: nobody named one where it is the default of images.

        So it is of a collection of adapters, which brings no texts.
        """
        return self.setting == "trace" and self.source != "digits"


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
    differ_by: Literal["start", "bootstrap"] = Field(
        "bootstrap",
        description="how the adapters of a task differ (J above 1): by their random start and the "
        "order of images alone, or also by a bootstrap sample",
    )
    draw: Literal["normal", "kaiming"] = Field(
        "normal",
        description="how A starts: N(0, 1 / inputs), or uniform within 1 / sqrt(inputs) (Kaiming, "
        "a = sqrt 5)",
    )

    blocks: Literal["all", "from-look"] = Field(
        "all",
        description="blocks that have adapters: all; or those whose input the memory looks at last "
        "(memory.look_at), and all behind it, so that what it looks at runs once",
    )

    later: ClassVar[tuple[str, ...]] = ("differ_by", "draw", "blocks")


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
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="the rate after the warm-up: falling to final_lr, or as it is"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest norm of the gradient; none: any"
    )
    augment: Augment = Field(
        "none",
        description="of the training images: flip, mirrored by chance; flip-crop, and shifted by "
        "an eighth at most; crop, a piece of 90 to 100 % of the area",
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="at least so many steps a task: where it has few samples there are more epochs "
        "than train.epochs",
    )
    mixup: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="of images: every one is mixed with another of its batch, and the loss with "
        "it, in a share drawn from Beta(mixup, mixup); 0: none",
    )
    mixup_of: Literal["any", "class"] = Field(
        "any", description="mixup: with any other image of the batch, or with one of its class"
    )
    stop_at: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="of a task's adapters: no further epoch once the training accuracy of the last "
        "one was above this share; none: train.epochs",
    )
    average: Literal["none", "half", "ema"] = Field(
        "none",
        description="what training ends with: the parameters of its last step; their mean over the "
        "steps of its second half; or their exponential mean over a tenth of it",
    )

    later: ClassVar[tuple[str, ...]] = (
        "schedule",
        "steps",
        "mixup",
        "average",
        "mixup_of",
        "stop_at",
    )

    def epochs_for(self, samples: int, tasks: int = 1, epochs: int | None = None) -> int:
        """Epochs over so many samples of `tasks` tasks: `epochs` or more, or by `iterations`.

        `epochs`: none for those that are set. `iterations` are as many steps as they say, `steps`
        the fewest.
        """
        steps_an_epoch = max(1, math.ceil(samples / self.batch_size))
        if self.iterations is not None and epochs is None:
            return math.ceil(tasks * self.iterations / steps_an_epoch)
        fewest = math.ceil(tasks * self.steps / steps_an_epoch) if self.steps else 0
        return max(self.epochs if epochs is None else epochs, fewest)


class HeadSettings(Settings):
    """The classifier on the features."""

    @field_validator("kind", mode="before")
    @classmethod
    def _renamed(cls, kind: Any) -> Any:
        # What "grown" was called before 0.3; memories and files on disk may still say so.
        return "grown" if kind == "linear" else kind

    kind: HeadKind = Field(
        "lda",
        description="closed form (lda, ridge, ncm; rp-ridge: ridge on a random projection), grown: "
        "trained with the adapters, class by class; shared: one that learns on through every "
        "consolidation; known for all classes in advance (xtail): prototype, of frozen features; "
        "text, of a text tower (moram)",
    )
    scope: Literal["shared", "task"] = Field(
        "task", description="one head for all tasks, or each task's own, recalled with its adapter"
    )
    features: HeadFeatures = Field(
        "own",
        description="closed form: solved on features under the task's own adapters, or under what "
        "the memory recalls; +frozen, +first: beside them, also when it is read, those of the "
        "frozen model, or under the adapters of the first task",
    )
    ridge: Annotated[float, Field(gt=0)] = Field(1e-2, description="ridge, relative to the trace")
    width: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        10_000,
        description="rp-ridge, ranpac: random features; memory grows with their square",
    )
    penalty: Literal["trace", "folds"] = Field(
        "trace",
        description="rp-ridge: the penalty is head.ridge relative to the trace, or what is best on "
        "one of five training images of every class",
    )
    scale: Annotated[float, Field(gt=0)] = Field(
        30.0, description="prototype: logits are cosines times this"
    )
    rivals: Literal["task", "seen"] = Field(
        "task",
        description="prototype: what images are told apart from while their task is learned: the "
        "classes of the task, or of all tasks so far",
    )
    texts: Literal["batch", "seen"] = Field(
        "batch",
        description="text: what a step tells apart: the classes of its batch, both ways; or, as "
        "published for MoRAM, images the classes of the task, and all texts so far the images",
    )

    bias: bool = Field(
        True, description="heads that are trained with the adapters, or learn on, have a bias"
    )

    later: ClassVar[tuple[str, ...]] = ("texts", "width", "penalty", "bias")

    @property
    def is_fixed(self) -> bool:
        """Whether it is known for all classes in advance, and never trained or solved."""
        return self.kind in ("prototype", "text")

    @property
    def resolved(self) -> bool:
        """Whether it is solved on the features that are recalled."""
        return self.features.startswith("recalled")

    @property
    def beside(self) -> str:
        """Whose features stand beside: "frozen", "first", or "" for none."""
        return self.features.partition("+")[2]


class TextSettings(Settings):
    """Streams of texts (setting trace)."""

    prompt_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="most tokens of a prompt; none: 1024 (4096 of a model that sees pictures), or "
        "three quarters of a shorter context",
    )
    answer_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="most tokens of an answer, the end of text included; none: 512, or what a "
        "shorter context leaves",
    )
    long_prompts: Literal["cut", "refuse"] = Field(
        "cut", description="a prompt that is too long keeps its end, or is an error"
    )
    chat: bool = Field(
        False, description="a prompt is what a user says, in the chat template of the tokenizer"
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
    compile: Literal["graphs"] | bool = Field(
        False,
        description="torch.compile the model that learns; graphs: with CUDA graphs, for a small "
        "model whose kernels take less time than their start",
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="CPU threads; none: 1 for nano, else all"
    )
    accumulate: Annotated[int, Field(ge=1)] = Field(1, description="steps of gradient accumulation")
    eval_batch_size: Annotated[int, Field(ge=1)] = Field(100, description="images a step")
    tasks_at_once: Literal["auto", "processes", "one-pass"] = Field(
        "auto",
        description="how run --parallel-tasks trains several tasks: each in a process, or all in "
        "one pass; auto: in one pass where it can be on an accelerator or under a launcher, else "
        "in processes",
    )
    resident: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="of images, under separation topk or max or a routing: bytes of adapters on "
        "the device at a time, the others are read when they are used; none: all",
    )
    atom_scores: Literal["exact", "bf16"] = Field(
        "exact",
        description="moram, in evaluation under fp32: every score of a large bank exact, or all in "
        "bfloat16 and twice topk of them again, which may choose other atoms among near ones",
    )


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
    """One experiment: the settings of all methods, and as attributes the sections of its own."""

    model_config = ConfigDict(extra="allow")

    method: Annotated[str, Named("methods")] = Field(
        "mira", description="how the memory is read; another one as package.module:Class"
    )
    store: str = Field("memory", description="path of the memory; to read, perhaps @VERSION")
    lock_timeout: Annotated[float, Field(ge=0, le=10**6)] = Field(
        30.0, description="seconds to wait for another process that writes to the memory"
    )
    runs: Path = Field(Path("runs"), description="folder of adapters, records and checkpoints")
    seed: tuple[Seed, ...] = Field((0,), min_length=1, description="one seed or several")
    vary: Literal["start", "order", "all"] = Field(
        "start",
        description="what each seed of `run` changes: initialisation and batches; also the order "
        "of classes or tasks; also which samples are learned from",
    )
    orders: Literal["given", "bounds"] = Field(
        "given",
        description="of `run`: as configured; or the hardest, the median and the easiest order",
    )
    baselines: tuple[Annotated[str, Named("baselines", ("all", "none"))], ...] = Field(
        ("all",),
        min_length=1,
        description="what `run` trains beside the memory, or none; erm is of dg",
    )
    backbone: BackboneSettings = BackboneSettings()
    stream: StreamSettings = StreamSettings()
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    head: HeadSettings = HeadSettings()
    text: TextSettings = TextSettings()
    engine: EngineSettings = EngineSettings()
    limits: LimitSettings = LimitSettings()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A section of the method."""

    @model_validator(mode="before")
    @classmethod
    def _with_sections(cls, given: Any) -> Any:
        """The sections of the method, whole; one of another method is an error."""
        method = given.get("method", DEFAULT_METHOD) if isinstance(given, Mapping) else None
        if not isinstance(method, str) or not registry.known("methods", method):
            return given  # refused by the field
        parts = sections(method)
        told = {name: value for name, value in given.items() if name not in cls.model_fields}
        whole = model_of(tuple(parts.items())).model_validate(told)
        return {**given, **{name: getattr(whole, name) for name in parts}}

    @field_validator("runs")
    @classmethod
    def _runs_at_home(cls, runs: Path) -> Path:
        return at_home(runs)

    def adapted_from(self, depth: int) -> int:
        """The first block that may have adapters, of a model of so many; see `adapter.blocks`.

        Raises ConfigError where nothing looks at a block.
        """
        if self.adapter.blocks == "all":
            return 0
        memory = getattr(self, "memory", None)
        seen_at = memory.seen_at(depth) if isinstance(memory, MemorySettings) else None
        if seen_at is None:
            raise _no_look(self, memory)
        return seen_at

    def recorded(self) -> dict[str, Any]:
        """The configuration as records and commits hold it: plain JSON, `~` for the user's folder.

        They are sent to others, so that no secret is in it; what reads a setting understands `~`.
        """
        tree: dict[str, Any] = for_others(self.model_dump(mode="json"))
        return tree


def _no_look(config: Config, memory: object) -> ConfigError:
    """Adapters that would begin where nothing looks."""
    found, other = f"under method {config.method}", "method=mira"
    expected = "method mira, whose memory can look at a block"
    if isinstance(memory, MemorySettings):
        found, other = f"with memory.look_at {','.join(memory.places)}", "memory.look_at=2"
        expected = "the input of a block, or of several, behind which adapters begin"
        if memory.look_under != "frozen":
            found, other = f"with memory.look_under {memory.look_under}", "memory.look_under=frozen"
            expected = "a look at the frozen model: no adapter acts before it ends"
        if memory.scope != "model":
            found, other = f"under memory.scope {memory.scope}", "memory.scope=model"
            expected = "one look for all blocks"
    return ConfigError(
        f"adapter.blocks from-look {found}",
        expected=expected,
        remedy=f"--set adapter.blocks=all, or --set {other}",
    )


DEFAULT_METHOD: str = Config.model_fields["method"].default


def keys(method: str | None = None) -> dict[str, FieldInfo]:
    """Every setting of a method by dotted key, what all share first; of all that ship for None.

    Raises ConfigError for a method of other people that cannot be imported.
    """
    if method is None or method in SECTIONS:
        return _keys_here(method)
    return {**_walk(Config, ""), **_keys_of(sections(method))}


@functools.cache
def _keys_here(method: str | None) -> dict[str, FieldInfo]:
    found = _walk(Config, "")
    for name in SECTIONS if method is None else (method,):
        found |= _keys_of(SECTIONS[name])
    return found


def _keys_of(parts: Mapping[str, type[Settings]]) -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, section in parts.items():
        found |= _walk(section, f"{name}.")
    return found


def choices(key: str, method: str | None = None) -> tuple[str, ...]:
    """The words that a setting, or each of its values, can take; empty when it is not a choice.

    Names that other packages give are left out.
    """
    about = keys(method)[key]
    mark = named(about)
    if mark is not None:
        return mark.words
    annotation = about.annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    parts = get_args(annotation)
    if bool in parts:  # a switch, or words beside
        return ("false", "true", *(word for part in parts for word in get_args(part)))
    return parts if get_origin(annotation) is Literal else ()


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def sections(method: str) -> dict[str, type[Settings]]:
    """The sections of a method by name, as `sections_of`."""
    return sections_of(method, _is_taken)


def _is_taken(word: str) -> bool:
    """Whether a word stands for something else in a configuration than a section of a method."""
    return word in Config.model_fields or hasattr(Config, word)


def named(about: FieldInfo) -> Named | None:
    """The mark of a setting that is a name, or several, of the registry."""
    marks = list(about.metadata)
    for arm in get_args(about.annotation):
        marks += get_args(arm)
    return next((mark for mark in marks if isinstance(mark, Named)), None)


def _walk(model: type[BaseModel], prefix: str) -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, about in model.model_fields.items():
        section = about.annotation
        if isinstance(section, type) and issubclass(section, Settings):
            found |= _walk(section, f"{prefix}{name}.")
        else:
            found[prefix + name] = about
    return found


_OF_CLASSES = ("cil", "til", "mts", "vil", "mtl")
_OF_IMAGES = (*BY_DOMAIN, *_OF_CLASSES)

READ_UNDER: tuple[tuple[str, str, tuple[str | None, ...]], ...] = (
    ("baselines", "stream.setting", tuple(s for s in get_args(Setting) if s not in ("til", "mts"))),
    ("text", "stream.setting", ("trace",)),
    ("backbone.image_size", "stream.setting", _OF_IMAGES),
    ("train.augment", "stream.setting", _OF_IMAGES),
    ("train.steps", "train.iterations", (None,)),
    ("stream.shots", "stream.setting", _OF_IMAGES),
    ("stream.held_out", "stream.setting", _OF_IMAGES),  # without dg it is an error
    ("stream.splits", "stream.setting", _OF_CLASSES),
    ("stream.classes_per_task", "stream.setting", _OF_CLASSES),
    ("stream.class_order", "stream.setting", _OF_CLASSES),
    ("stream.classes_per_task", "stream.splits", (None,)),
    ("train.epochs", "train.iterations", (None,)),
    ("train.epochs", "text.epochs", (None,)),
    ("memory.topk", "memory.separation", ("topk",)),
    ("engine.resident", "stream.setting", _OF_IMAGES),
    ("engine.resident", "method", ("mira",)),
    ("engine.atom_scores", "method", ("moram",)),
    ("engine.atom_scores", "engine.precision", ("auto", "fp32")),
    ("engine.atom_scores", "moram.score_norm", ("bank",)),
    ("memory.test_steps", "memory.test_time", ("entropy",)),
    ("memory.test_lr", "memory.test_time", ("entropy",)),
    ("memory.blocks", "memory.scope", ("block",)),
    ("memory.read_steps", "memory.read", ("energy",)),
    ("memory.read_rate", "memory.read", ("energy",)),
    ("memory.read_width", "memory.read", ("decoder",)),
    ("adapter.draw", "stream.setting", _OF_IMAGES),
    ("train.mixup_of", "stream.setting", _OF_IMAGES),
    ("train.stop_at", "stream.setting", _OF_IMAGES),
    ("memory.centre", "stream.setting", _OF_IMAGES),
    ("memory.key_bias", "stream.setting", _OF_IMAGES),
    ("memory.key_norm", "stream.setting", _OF_IMAGES),
    ("memory.blocks", "stream.setting", _OF_IMAGES),
    ("consolidate.key_std", "consolidate.keys", ("random",)),
    ("consolidate.guard", "consolidate.protect", ("dual-gpm",)),
    ("head.bias", "head.kind", ("grown", "shared")),
    ("consolidate.fresh_head", "head.kind", ("shared",)),
    ("consolidate.head_lr", "head.kind", ("shared",)),
    ("consolidate.energy", "consolidate.protect", ("dual-gpm",)),
    ("head", "stream.setting", _OF_IMAGES),
    ("head.kind", "method", ("mira", "moram")),
    ("head.scope", "method", ("mira", "moram")),
    ("head.features", "method", ("mira",)),
    ("head.penalty", "head.kind", ("rp-ridge",)),
    ("head.scale", "head.kind", ("prototype",)),
    ("head.rivals", "head.kind", ("prototype",)),
    ("head.texts", "head.kind", ("text",)),
    ("train.final_lr", "train.schedule", ("cosine",)),
    ("moram.scaled_threshold", "moram.score_norm", ("bank",)),
    ("first_session", "stream.setting", ("dil", "cil", "vil", "dg", "dgcl")),
    ("modulation.predictor_epochs", "stream.setting", ("mts", "trace")),
    ("modulation.predictor_lr", "stream.setting", ("mts", "trace")),
)
"""A setting, or all of a section, is read only where another one has one of these values.

Of methods this says what those that ship read of what all share.
"""
