"""Typed records of the verbs that have no result type in the library; `--json` prints them.

Every record names its schema and the version of it, so that a script knows how to read it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A piece of a record; made from the store's own objects by their attributes."""

    model_config = ConfigDict(frozen=True, from_attributes=True, populate_by_name=True)


class CliRecord(Part):
    """A record: what `schema` names, in the version of it that `schema_version` says."""

    schema_version: int = 1


class Plan(CliRecord):
    """What a verb would do, with --dry-run."""

    schema_: Literal["memtool.plan"] = Field("memtool.plan", alias="schema")
    verb: str
    store: str
    seeds: tuple[int, ...]
    plan: dict[str, Any]


class SweepPlan(CliRecord):
    """What a sweep would run, and which of its runs are done."""

    schema_: Literal["memtool.sweep-plan"] = Field("memtool.sweep-plan", alias="schema")
    folder: Path
    cells: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    done: tuple[str, ...]


class AblationPlan(CliRecord):
    """What an ablation would run, with --dry-run, as if nothing were on disk yet.

    `besides` are settings that every variant has other than they were configured: [was, now].
    """

    schema_: Literal["memtool.ablation-plan"] = Field("memtool.ablation-plan", alias="schema")
    ablation: str
    variants: tuple[str, ...]
    besides: dict[str, tuple[Any, Any]]
    seeds: tuple[int, ...]
    trainings: int
    steps: int
    seconds: float


class StudyPoint(Part):
    """What the runs of one point of a study take that are not done."""

    label: str
    runs: int
    left: int
    steps: int
    seconds: float
    bytes: int


class StudyPlan(CliRecord):
    """What a study would take, with --dry-run: of all points, and of each."""

    schema_: Literal["memtool.study-plan"] = Field("memtool.study-plan", alias="schema")
    study: str
    folder: Path
    seeds: tuple[int, ...]
    train_per_task: int | None
    test_per_task: int | None
    points: tuple[StudyPoint, ...]
    steps: int
    seconds: float
    bytes: int
    free_bytes: int


class RunLine(Part):
    """One run; `differs` has its values of the settings in which the listed runs differ."""

    place: str
    name: str | None
    note: str | None
    tags: tuple[str, ...]
    method: str
    setting: str
    data: str
    seed: int
    order: str | None
    created: datetime
    final_average: float | None
    loss: float | None
    differs: dict[str, Any]


class RunList(CliRecord):
    """Runs, the oldest first."""

    schema_: Literal["memtool.runs"] = Field("memtool.runs", alias="schema")
    runs: tuple[RunLine, ...]


class Version(Part):
    """One version of the memory."""

    id: str
    parent: str | None
    time: datetime
    message: str
    metadata: dict[str, Any]


class Adapter(Part):
    """One adapter in the memory."""

    id: str
    name: str
    task: Any
    domain: str | None
    classes: tuple[Any, ...]
    scaling: float
    sha256: str
    kind: str
    meta: dict[str, Any]


class Log(CliRecord):
    """Versions, newest first."""

    schema_: Literal["memtool.log"] = Field("memtool.log", alias="schema")
    store: str
    versions: tuple[Version, ...]


class Listing(CliRecord):
    """The adapters of one version that were asked for; `total` is how many fit."""

    schema_: Literal["memtool.ls"] = Field("memtool.ls", alias="schema")
    store: str
    version: str
    total: int
    adapters: tuple[Adapter, ...]


class Show(CliRecord):
    """One version: what was said of it and what is in it.

    `keys` is the shape (layers, adapters, width) of the keys, none before the first consolidation;
    `adapters_from` the first block that adapters change, as its layers are named.
    """

    schema_: Literal["memtool.show"] = Field("memtool.show", alias="schema")
    store: str
    version: Version
    backbone: str
    backbone_sha256: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    adapters_from: str | None = None
    numbers_per_adapter: int
    dtype: str
    adapters: tuple[Adapter, ...]
    keys: tuple[int, ...] | None
    blobs: tuple[str, ...]


class Diff(CliRecord):
    """What changed from version `a` to version `b`; rows of atoms are among the adapters.

    `pruned_atoms` counts, by name, the single atoms that were taken out.
    """

    schema_: Literal["memtool.diff"] = Field("memtool.diff", alias="schema")
    a: str
    b: str
    added: tuple[Adapter, ...]
    removed: tuple[Adapter, ...]
    changed: tuple[Adapter, ...]
    key_drift_degrees: dict[str, float]
    changed_blobs: tuple[str, ...]
    pruned_atoms: dict[str, int] = {}


class Tagged(CliRecord):
    """A name for a version."""

    schema_: Literal["memtool.tag"] = Field("memtool.tag", alias="schema")
    name: str
    version: str


class Untagged(CliRecord):
    """A tag or branch that was taken away."""

    schema_: Literal["memtool.untag"] = Field("memtool.untag", alias="schema")
    name: str
    version: str


class ForgetPlan(CliRecord):
    """What forget would take, and for a purge which tags and branches keep it."""

    schema_: Literal["memtool.forget-plan"] = Field("memtool.forget-plan", alias="schema")
    store: str
    adapters: tuple[str, ...]
    purge: bool
    holders: tuple[str, ...]
    versions: int


class Cloned(CliRecord):
    """A whole memory in another place."""

    schema_: Literal["memtool.clone"] = Field("memtool.clone", alias="schema")
    source: str
    target: str
    version: str
    adapters: int


class Pulled(CliRecord):
    """A memory of the hub in another place, and which branches and tags came with this pull.

    `deleted` are tags that the hub has and that were deleted here; they stay so.
    """

    schema_: Literal["memtool.pull"] = Field("memtool.pull", alias="schema")
    source: str
    target: str
    version: str
    adapters: int
    branches: tuple[str, ...]
    tags: tuple[str, ...]
    deleted: tuple[str, ...]


class Bundled(CliRecord):
    """A whole memory as one file."""

    schema_: Literal["memtool.bundle"] = Field("memtool.bundle", alias="schema")
    path: Path
    version: str
    adapters: int
    nbytes: int


class RolledBack(CliRecord):
    """The version that is HEAD now, and the branch that keeps what came after it."""

    schema_: Literal["memtool.rollback"] = Field("memtool.rollback", alias="schema")
    version: str
    before: str
    backup: str


class Damage(Part):
    """One thing that is not as it was written."""

    what: str
    name: str
    expected: str
    found: str


class Unchecked(Part):
    """One thing that the system would not let us read."""

    what: str
    name: str
    why: str


class Verified(CliRecord):
    """What was looked at, what was wrong, and what could not be looked at."""

    schema_version: int = 2
    schema_: Literal["memtool.verify"] = Field("memtool.verify", alias="schema")
    store: str
    level: str
    ok: bool
    versions: int
    rows: int
    blobs: int
    damages: tuple[Damage, ...]
    unchecked: tuple[Unchecked, ...]
    unfinished: tuple[str, ...]


class Collected(CliRecord):
    """What gc took away, or would with --dry-run."""

    schema_: Literal["memtool.gc"] = Field("memtool.gc", alias="schema")
    dry_run: bool
    expired: tuple[str, ...]
    freed_bytes: int
    deleted_files: int
    notes: tuple[str, ...] = ()
    leftovers: tuple[Path, ...] = ()


class BranchSchema(Part):
    """The tip of a branch, and the version that brought it to the newest schema, if one did."""

    branch: str
    version: str
    schema_from: int
    rows: int
    blobs: int
    committed: str | None


class Migrated(CliRecord):
    """What migrate did, or would with --dry-run; files and bytes are those of the whole store."""

    schema_: Literal["memtool.migrate"] = Field("memtool.migrate", alias="schema")
    store: str
    dry_run: bool
    schema_to: int
    files: int
    nbytes: int
    branches: tuple[BranchSchema, ...]


class Weight(Part):
    """How much an adapter counts for a prompt."""

    name: str
    weight: float


class Answer(Part):
    """What a memory says to a prompt; `weights` of the adapters that count, the largest first."""

    prompt: str
    text: str
    weights: tuple[Weight, ...]


class Generated(CliRecord):
    """Answers to prompts."""

    schema_: Literal["memtool.generate"] = Field("memtool.generate", alias="schema")
    version: str
    answers: tuple[Answer, ...]


class Serving(CliRecord):
    """A memory that answers at an address from now on."""

    schema_: Literal["memtool.serve"] = Field("memtool.serve", alias="schema")
    version: str
    memory: str
    url: str


class Exported(CliRecord):
    """Adapters written as PEFT directories."""

    schema_: Literal["memtool.export"] = Field("memtool.export", alias="schema")
    version: str
    directories: tuple[Path, ...]


class ExportedModel(CliRecord):
    """The attached model written as a file of torch.export."""

    schema_: Literal["memtool.export-model"] = Field("memtool.export-model", alias="schema")
    path: Path
    version: str
    nbytes: int
    input: tuple[str | int, ...]
    outputs: dict[str, tuple[str | int, ...]]
    classes: int


class Pushed(CliRecord):
    """A memory that was published."""

    schema_: Literal["memtool.push"] = Field("memtool.push", alias="schema")
    repository: str
    url: str
    commit: str
    version: str
    adapters: tuple[str, ...]
    files: int
    nbytes: int
    results: int
    private: bool
    unchanged: bool


class Written(CliRecord):
    """A file that was written."""

    schema_: Literal["memtool.file"] = Field("memtool.file", alias="schema")
    path: Path


class Setting(Part):
    """One setting in force and where it is from."""

    key: str
    value: Any
    origin: str


class Settings(CliRecord):
    """All settings in force."""

    schema_: Literal["memtool.config"] = Field("memtool.config", alias="schema")
    preset: str
    settings: tuple[Setting, ...]


class Preset(Part):
    """Settings that ship with memtool, and the command that runs them."""

    name: str
    summary: str
    launch: str


class Presets(CliRecord):
    """All presets."""

    schema_: Literal["memtool.presets"] = Field("memtool.presets", alias="schema")
    presets: tuple[Preset, ...]


class BackboneRow(Part):
    """A model as a backbone; of what was not built, only the name.

    `widths` are those of the inputs of its blocks, `dim` that of its features.
    """

    name: str
    parameters: int | None = None
    image_size: int | None = None
    blocks: int | None = None
    widths: tuple[int, ...] = ()
    dim: int | None = None
    targets: tuple[str, ...] = ()
    problem: str | None = None


class Backbones(CliRecord):
    """Models that can be backbones."""

    schema_: Literal["memtool.backbones"] = Field("memtool.backbones", alias="schema")
    backbones: tuple[BackboneRow, ...]


class Check(Part):
    """One thing that doctor looked at."""

    name: str
    ok: bool
    found: str
    remedy: str | None = None


class Diagnosis(CliRecord):
    """Everything that doctor looked at."""

    schema_: Literal["memtool.doctor"] = Field("memtool.doctor", alias="schema")
    ok: bool
    checks: tuple[Check, ...]


class Pretrained(CliRecord):
    """Weights of the embedded backbone."""

    schema_: Literal["memtool.pretrain"] = Field("memtool.pretrain", alias="schema")
    path: Path
    sha256: str
    parameters: int
    steps: int
    seed: int
    seconds: float


class Predicted(CliRecord):
    """What came of the pictures that were predicted; the rows are in `out`, or were printed.

    `predicted` have a label, `abstained` none, `broken` could not be read. `coverage` is the share
    of those that could be read which has a label: whose best class is at least `odds` times as
    probable as the next.
    """

    schema_: Literal["memtool.predict"] = Field("memtool.predict", alias="schema")
    version: str
    files: int
    predicted: int
    abstained: int
    unlike: int
    broken: int
    coverage: float | None = None
    odds: float | None = None
    seconds: float
    out: Path | None = None


class PredictedPrompts(CliRecord):
    """What came of the prompts that were answered; the rows are in `out`, or were printed."""

    schema_: Literal["memtool.predict-prompts"] = Field("memtool.predict-prompts", alias="schema")
    version: str
    prompts: int
    unlike: int
    seconds: float
    out: Path | None = None
