"""What every value of one store has in common: the backbone and the flat layout of its adapters.

A store refuses anything from another space: `Space.check` names every difference.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memtool_stores import limits
from memtool_stores.errors import NotFoundError, SchemaError, SpaceMismatchError
from memtool_stores.jsonvalues import items, mapping, member, number, text, whole
from memtool_stores.printable import printable, shown
from memtool_stores.tensorfile import MOST_AXES, read_adapter_config, read_header_of

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element of every dtype that a value can have."""


SHOWN = 10
"""Differences that an error names."""


@dataclass(frozen=True)
class Segment:
    """One tensor of the flat value: its name, shape, and offset in elements.

    Raises:
        SchemaError: no tensor can be so: a name that cannot be printed, an axis of no length.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    def __post_init__(self) -> None:
        what = f"segment {shown(text(self.name, 'the name of a segment'))}"
        if len(self.shape) > MOST_AXES:
            raise SchemaError(f"{what} has {len(self.shape)} axes", expected=f"at most {MOST_AXES}")
        for length in self.shape:
            whole(length, f"an axis of {what}", least=1)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The order of the numbers of one adapter.

    `segments` follow each other without a gap; `dtype` is float32, float16 or bfloat16; `alpha`
    over `rank` is the scaling of an adapter that names none; `targets` are the adapted modules.

    Raises:
        SchemaError: no such adapter can be: it has no rank, a segment without numbers or a name
            that another one has, or takes more than `limits.array_bytes`.
    """

    segments: tuple[Segment, ...]
    dtype: str
    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SchemaError(
                f"layout dtype {shown(self.dtype)}", expected=f"one of {', '.join(DTYPES)}"
            )
        if not self.segments:
            raise SchemaError("a layout without segments", expected="at least one segment")
        whole(self.rank, "the rank of the layout", least=1)
        number(self.alpha, "the alpha of the layout")
        for target in self.targets:
            text(target, "a target of the layout")
        names = set()
        offset = 0
        for segment in self.segments:
            if segment.name in names:
                raise SchemaError(
                    f"segment {segment.name!r} is in the layout twice", expected="one of each name"
                )
            names.add(segment.name)
            if segment.offset != offset:
                raise SchemaError(
                    f"segment {segment.name!r} begins at element {segment.offset}",
                    expected=f"{offset}, where the segment before it ends",
                )
            offset += segment.numel
        limits.require("array_bytes", self.nbytes, "a value of this layout")

    @property
    def numel(self) -> int:
        """Length of the flat value in elements."""
        return self.segments[-1].offset + self.segments[-1].numel

    @property
    def nbytes(self) -> int:
        """Length of the flat value in bytes."""
        return self.numel * DTYPES[self.dtype]

    def segment(self, name: str) -> Segment:
        """The segment of that name.

        Raises:
            NotFoundError: there is none.
        """
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise NotFoundError(f"no segment {name!r} in the layout of this store")


@dataclass(frozen=True)
class Backbone:
    """The frozen model that the adapters belong to; `sha256` is the hash of its tensors, in hex."""

    name: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class Space:
    """One backbone and one adapter layout: everything that must agree inside a store."""

    backbone: Backbone
    layout: Layout

    @property
    def numel(self) -> int:
        """Length of a value in elements."""
        return self.layout.numel

    def to_json(self) -> dict[str, Any]:
        """The space as plain JSON values; `from_json` gives an equal space back."""
        segments = [[s.name, list(s.shape)] for s in self.layout.segments]
        return {
            "backbone": asdict(self.backbone),
            "layout": {
                "segments": segments,
                "dtype": self.layout.dtype,
                "rank": self.layout.rank,
                "alpha": self.layout.alpha,
                "targets": list(self.layout.targets),
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Space:
        """The space of `to_json`.

        Raises:
            SchemaError: a part is missing or of the wrong kind.
        """
        what = "the space of this store"
        said = mapping(data, what)
        backbone = mapping(member(said, "backbone", what), "backbone")
        layout = mapping(member(said, "layout", what), "layout")
        named = []
        for pair in items(member(layout, "segments", "layout"), "the segments"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise SchemaError(f"a segment is {shown(pair)}", expected="[name, shape]")
            named.append((pair[0], tuple(items(pair[1], f"the shape of segment {shown(pair[0])}"))))
        targets = items(member(layout, "targets", "layout"), "the targets of the layout")
        return cls(
            Backbone(
                *(
                    text(member(backbone, part, "backbone"), f"the {part} of the backbone")
                    for part in ("name", "revision", "sha256")
                )
            ),
            Layout(
                _in_order(named),
                text(member(layout, "dtype", "layout"), "the dtype of the layout"),
                whole(member(layout, "rank", "layout"), "the rank of the layout"),
                number(member(layout, "alpha", "layout"), "the alpha of the layout"),
                tuple(text(target, "a target of the layout") for target in targets),
            ),
        )

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        *,
        backbone: Backbone,
        alpha: float | None = None,
        targets: tuple[str, ...] | None = None,
    ) -> Space:
        """The space that an adapter file belongs to: its tensors in the order of their bytes.

        Alpha and targets come from `adapter_config.json` in the same folder unless given; the rank
        from the first `lora_A` of the file.

        Raises:
            NotFoundError: no such file.
            SchemaError: not safetensors, mixed dtypes, no `lora_A`, or alpha is not known.
            StorageError: the file cannot be read.
        """
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(f"no adapter file {path}")
        header = read_header_of(path)
        ranks = [t.shape[0] for t in header.tensors if "lora_A" in t.name and t.shape]
        if not ranks:
            raise SchemaError(f"{path} has no tensor named lora_A", expected="a LoRA adapter")
        config = read_adapter_config(path.parent)
        where = str(path.parent / "adapter_config.json")
        alpha = config.get("lora_alpha") if alpha is None else alpha
        if alpha is None:
            raise SchemaError(f"the alpha of {path} is not known", remedy="give alpha=…")
        known = config.get("target_modules") or []
        modules = [known] if isinstance(known, str) else items(known, f"target_modules of {where}")
        for module in modules:
            text(module, f"a target module of {where}")
        return cls(
            backbone,
            Layout(
                _in_order([(t.name, t.shape) for t in header.tensors]),
                header.one_dtype(str(path)),
                int(ranks[0]),
                number(alpha, f"lora_alpha of {where}"),
                tuple(sorted(modules)) if targets is None else targets,
            ),
        )

    def check(self, other: Space) -> None:
        """Nothing, when `other` is the same space.

        Raises:
            SpaceMismatchError: names the differences, `SHOWN` at most.
        """
        compared: tuple[tuple[str, object, object, str], ...] = (
            ("backbone name", self.backbone.name, other.backbone.name, "--set backbone.name={}"),
            ("backbone revision", self.backbone.revision, other.backbone.revision, ""),
            (
                "backbone sha256",
                self.backbone.sha256,
                other.backbone.sha256,
                "--set backbone.weights=FILE, with the weights that the memory was made with",
            ),
            ("dtype", self.layout.dtype, other.layout.dtype, ""),
            ("rank", self.layout.rank, other.layout.rank, "--rank {}"),
            ("alpha", self.layout.alpha, other.layout.alpha, "--set adapter.alpha={}"),
            ("targets", self.layout.targets, other.layout.targets, "--set backbone.targets={}"),
            ("length of a value", self.numel, other.numel, ""),
        )
        unlike = [one for one in compared if one[1] != one[2]]
        differences = [
            f"{label}: {mine!r} here, {theirs!r} given" for label, mine, theirs, _ in unlike
        ]
        remedies = [
            remedy.format(printable(",".join(mine) if isinstance(mine, tuple) else str(mine)))
            for _, mine, _, remedy in unlike
            if remedy
        ]
        mine, theirs = ({s.name: s for s in x.layout.segments} for x in (self, other))
        differences += [f"segment {name!r}: only here" for name in mine.keys() - theirs.keys()]
        differences += [f"segment {name!r}: only given" for name in theirs.keys() - mine.keys()]
        differences += [
            f"segment {name!r}: {mine[name].shape} at {mine[name].offset} here, "
            f"{theirs[name].shape} at {theirs[name].offset} given"
            for name in mine
            if name in theirs and mine[name] != theirs[name]
        ]
        if differences:
            more = len(differences) - SHOWN
            shown = [*differences[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
            raise SpaceMismatchError(
                "this belongs to another space than the store: " + "; ".join(shown),
                remedy=f"{remedies[0]}, or another --store"
                if remedies
                else "use the backbone and adapter settings of the store, or make a new store",
            )


def _in_order(named: list[tuple[str, tuple[int, ...]]]) -> tuple[Segment, ...]:
    """Segments one after another."""
    segments: list[Segment] = []
    offset = 0
    for name, shape in named:
        segments.append(Segment(name, shape, offset))
        offset += segments[-1].numel
    return tuple(segments)
