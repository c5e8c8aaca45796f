"""Adapter directories of the `peft` library, out and in.

A PEFT directory holds `adapter_model.safetensors`, with `base_model.model.<module>.lora_A.weight`
(R, d_in) and `.lora_B.weight` (d_out, R) for every adapted module, and `adapter_config.json`; the
module computes W x + (alpha / R) · B A x.

PEFT adapts whole linear layers only. The slices q and v of a fused qkv, each of rank r, become one
module of rank R = 2 r: A stacked, B block-structured, alpha doubled so that alpha / R stays alpha /
r. That loses nothing, and reading finds the blocks again. A LoRA that peft trained on the whole
fused layer has no such blocks: it is read as one site, the whole module.

A value has one rank and one scaling. Modules of smaller rank are padded with zeros, which is exact.
Where modules differ in alpha / R, the scaling of most of them is taken and the ratio multiplied
into B of the others, which rounds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from memtool.adapters.layout import Layout, Site, sites_in_block_order
from memtool.atomic import write_atomic
from memtool.errors import (
    AlreadyThereError,
    CorruptError,
    DataError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# What these say does not change what a stored LoRA computes, or is told by its tensors.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_UNDERSTOOD = frozenset(
    {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
)
# Other ways to begin (pissa, olora, corda, loftq, ...) change the base weights as well.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A PEFT directory as a flat value, with all that is needed to write the same file again.

    value     (numel,), in the order of `layout`; float32, or float64 where the file has that
    scaling   what B A x is multiplied with; alpha is scaling · rank
    header    the JSON header of the safetensors file, byte for byte
    sha256    of the safetensors file, hexadecimal
    config    the bytes of `adapter_config.json`
    """

    value: Tensor
    layout: Layout
    scaling: float
    header: bytes
    sha256: str
    config: bytes

    @property
    def alpha(self) -> float:
        """The numerator of the scaling alpha / rank."""
        return self.scaling * self.layout.rank

    @property
    def base_model(self) -> str | None:
        """The model the adapter was made for, where the file says so."""
        name = _parsed(self.config, CONFIG_NAME).get("base_model_name_or_path")
        return name if isinstance(name, str) else None

    @property
    def extra(self) -> Mapping[str, Any]:
        """What `write_peft` was given as extra; empty for a file written by others."""
        note = _note(_parsed(self.header, f"the header of {WEIGHTS_NAME}"), Path(WEIGHTS_NAME))
        return note.extra if note else {}


@dataclass(frozen=True)
class _Note:
    """What `write_peft` leaves in the metadata: the layout, which zeros in B would hide."""

    sites: tuple[str, ...]
    rank: int
    alpha: float
    extra: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Module:
    """One adapted module of a file: its tensors, and the sites that they hold, one per group."""

    name: str
    a: Tensor
    b: Tensor
    sites: tuple[Site, ...]

    @property
    def rank(self) -> int:
        """Rank of each group."""
        return self.a.shape[0] // len(self.sites)


def write_peft(
    directory: Path,
    value: Tensor,
    layout: Layout,
    *,
    alpha: float,
    base_model: str,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a value (numel,) as a directory that `peft` loads; returns the directory.

    `alpha` belongs to the layout's rank: the scaling is alpha / rank. `extra` (JSON) goes into the
    metadata of the safetensors file, which peft ignores. `read_peft` gives back the same value, bit
    for bit. Raises MismatchError for a value that does not fit, DataError for one that is not
    finite, AlreadyThereError, and MemtoolError when the file system refuses.
    """
    if value.ndim != 1 or value.dtype not in _DTYPES.values():
        raise MismatchError(
            f"a value of shape {tuple(value.shape)} and type {value.dtype}",
            expected="one flat vector of floats",
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise MismatchError(f"alpha of {alpha}", expected="a positive number")
    if not bool(value.isfinite().all()):
        raise DataError("an adapter with numbers that are not finite (NaN or infinity)")
    parts = layout.unflatten(value.detach().cpu())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, sites in _sites_by_module(layout.sites).items():
        ranks[module] = layout.rank * len(sites)
        a = torch.cat([parts[f"{site.name}.lora_A"] for site in sites])
        b = _block_structured(sites, [parts[f"{site.name}.lora_B"] for site in sites])
        tensors[_tensor_name(module, "A")], tensors[_tensor_name(module, "B")] = a, b
    names = [site.name for site in layout.sites]
    note = {"alpha": alpha, "extra": dict(extra or {}), "rank": layout.rank, "sites": names}
    metadata = {"format": "pt", "memtool": json.dumps(note, sort_keys=True)}
    config = _config(ranks, alpha / layout.rank, base_model)
    return _write(directory, _file(_header(tensors, metadata), tensors), config.encode(), overwrite)


def read_peft(directory: Path, layout_sites: Sequence[Site]) -> PeftAdapter:
    """Read a directory that `write_peft` or `peft` wrote, for a backbone with the given sites.

    `layout_sites` are all sites that the backbone offers; those that the file adapts, in the same
    order, make the layout. Raises NotFoundError for a missing file, CorruptError for one that is
    not what peft writes, MismatchError for an adapter of another backbone or one that is more than
    a plain LoRA (DoRA, biases, saved modules, convolutions, other methods), and DataError for
    numbers that are not finite.
    """
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    config_bytes = _read(config_path)
    config = _parsed(config_bytes, str(config_path))
    data = _read(weights_path)
    _check_plain_lora(config, config_path)
    try:
        tensors = load(data)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptError(f"{weights_path} is not a safetensors file: {error}") from error
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    note = _note(_parsed(header, f"the header of {weights_path}"), weights_path)
    modules = _modules(tensors, layout_sites, note, weights_path)
    scalings = _scalings(config, {m.name: m.a.shape[0] for m in modules}, config_path)
    scaling = _common(scalings.values(), note)

    rank = max(module.rank for module in modules)
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    parts: dict[str, Tensor] = {}
    for module in modules:
        ratio = _ratio(scalings[module.name], scaling)
        own = module.rank
        for group, site in enumerate(module.sites):
            ranks = slice(group * own, (group + 1) * own)
            rows = slice(site.first_row, site.first_row + site.out_features)
            a = module.a.new_zeros((rank, site.in_features), dtype=dtype)
            b = module.b.new_zeros((site.out_features, rank), dtype=dtype)
            a[:own] = module.a[ranks]
            b[:, :own] = _scaled(module.b[rows, ranks].to(dtype), ratio)
            parts[f"{site.name}.lora_A"], parts[f"{site.name}.lora_B"] = a, b
    found = {site.name: site for module in modules for site in module.sites}
    layout = Layout(_in_order(found, layout_sites, note), rank)
    return PeftAdapter(
        layout.flatten(parts),
        layout,
        scaling,
        header,
        hashlib.sha256(data).hexdigest(),
        config_bytes,
    )


def restore_peft(directory: Path, adapter: PeftAdapter, *, overwrite: bool = False) -> Path:
    """Write an adapter as the directory it was read from; returns the directory.

    The configuration is the same byte for byte; the tensors are `restored_file`. Errors as for
    `write_peft`.
    """
    return _write(directory, restored_file(adapter), adapter.config, overwrite)


def restored_file(adapter: PeftAdapter) -> bytes:
    """The safetensors file that an adapter was read from, made again from its value.

    It is the same byte for byte, except for B of modules whose own scaling was folded into the
    value (that rounds), and for numbers that the value was rounded to: `adapter.sha256` tells.
    """
    path = Path(WEIGHTS_NAME)
    entries = _parsed(adapter.header, f"the header of {path}")
    parts = adapter.layout.unflatten(adapter.value.detach().cpu())
    grouped = _sites_by_module(adapter.layout.sites)
    ranks = {module: _shape(entries, module, "A", path)[0] for module in grouped}
    config = _parsed(adapter.config, CONFIG_NAME)
    scalings = _scalings(config, ranks, path)
    tensors: dict[str, Tensor] = {}
    for module, sites in grouped.items():
        own = ranks[module] // len(sites)
        ratio = 1.0 / _ratio(scalings[module], adapter.scaling)
        a = torch.cat([parts[f"{site.name}.lora_A"][:own] for site in sites])
        b = [_scaled(parts[f"{site.name}.lora_B"][:, :own], ratio) for site in sites]
        for part, tensor in (("A", a), ("B", _block_structured(sites, b))):
            name = _tensor_name(module, part)
            if tuple(tensor.shape) != _shape(entries, module, part, path):
                raise MismatchError(
                    f"{name} has shape {tuple(tensor.shape)}",
                    expected=f"{_shape(entries, module, part, path)} as the header says",
                )
            tensors[name] = tensor.to(_DTYPES[entries[name]["dtype"]])
    return _file(adapter.header, tensors)


# Writing


def _tensor_name(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def _sites_by_module(sites: Sequence[Site]) -> dict[str, tuple[Site, ...]]:
    """The sites of every module, ascending by row. Raises MismatchError when they overlap."""
    modules: dict[str, list[Site]] = {}
    for site in sites:
        modules.setdefault(site.module, []).append(site)
    for module, members in modules.items():
        members.sort(key=lambda site: site.first_row)
        for before, after in pairwise(members):
            if before.first_row + before.out_features > after.first_row:
                raise MismatchError(
                    f"{before.name} and {after.name} adapt the same rows of {module}",
                    expected="the whole layer, or slices of it that do not overlap",
                )
    return {module: tuple(members) for module, members in modules.items()}


def _block_structured(sites: Sequence[Site], parts: Sequence[Tensor]) -> Tensor:
    """B (module_rows, groups · r) with the B of every site in its own rows and ranks."""
    rank = parts[0].shape[1]
    whole = parts[0].new_zeros(sites[0].module_rows, rank * len(sites))
    for group, (site, part) in enumerate(zip(sites, parts, strict=True)):
        rows = slice(site.first_row, site.first_row + site.out_features)
        whole[rows, group * rank : (group + 1) * rank] = part
    return whole


def _config(ranks: Mapping[str, int], scaling: float, base_model: str) -> str:
    """`adapter_config.json`, sorted and indented as peft writes it."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Patterns are regular expressions: without the anchor, the name of a text tower's layer would
    # match the layer of a vision tower that ends in the same name.
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != usual}
    return json.dumps(
        {
            "alpha_pattern": {module: _number(scaling * r) for module, r in others.items()},
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": _number(scaling * usual),
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": usual,
            "rank_pattern": others,
            "target_modules": sorted(ranks),
            "task_type": None,
            "use_dora": False,
            "use_rslora": False,
        },
        indent=2,
        sort_keys=True,
    )


def _number(alpha: float) -> float | int:
    """As an integer where it is one: peft declares alpha so."""
    return int(alpha) if alpha.is_integer() else alpha


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header, always the same for the same input, padded to whole 8 bytes."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _file(header: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; the tensors lie where the header says."""
    entries = _parsed(header, f"the header of {WEIGHTS_NAME}")
    chunks = [len(header).to_bytes(8, "little"), header]
    for name in sorted(tensors, key=lambda name: entries[name]["data_offsets"]):
        flat = tensors[name].contiguous().reshape(-1)
        chunks.append(flat.view(torch.uint8).numpy().tobytes())
    return b"".join(chunks)


def _write(directory: Path, file: bytes, config: bytes, overwrite: bool) -> Path:
    """Both files, each whole or not at all."""
    weights_path, config_path = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    for path in (weights_path, config_path):
        if path.exists() and not overwrite:
            raise AlreadyThereError(
                f"{path} is already there", remedy="another folder, or allow overwriting"
            )
    write_atomic(weights_path, file)
    write_atomic(config_path, config)
    return directory


# Reading


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pickled = path.with_name("adapter_model.bin")
        raise NotFoundError(
            f"no file {path}",
            expected=f"a PEFT directory with {WEIGHTS_NAME} and {CONFIG_NAME}",
            remedy=(
                f"{pickled.name} is a pickle, which is not read: save with safe_serialization=True"
                if path.name == WEIGHTS_NAME and pickled.exists()
                else None
            ),
        ) from None
    except OSError as error:
        raise MemtoolError(f"cannot read {path}: {error.strerror}") from error


def _parsed(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; CorruptError says `what` is none."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{what} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptError(f"{what} holds a {type(content).__name__}", expected="a JSON object")
    return content


def _check_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    """Refuse whatever makes the adapter compute more than W x + scaling · B A x."""
    if config.get("peft_type") != "LORA":
        raise MismatchError(
            f"{path}: an adapter of type {config.get('peft_type')!r}", expected="'LORA'"
        )
    if config.get("bias", "none") != "none":
        raise MismatchError(
            f"{path}: bias is {config['bias']!r}", expected="'none': biases are not stored"
        )
    beginning = config.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise MismatchError(
            f"{path}: init_lora_weights {beginning!r} changes the weights of the base model",
            remedy="convert it to a plain LoRA (peft: path_initial_model_for_weight_conversion)",
        )
    known = _WITHOUT_EFFECT | _UNDERSTOOD | {"bias", "init_lora_weights"}
    # An empty loftq_config says nothing; options that peft may add later are refused when set.
    used = sorted(name for name, setting in config.items() if setting and name not in known)
    if used:
        raise MismatchError(
            f"{path}: {used[0]} is {config[used[0]]!r}, which a plain LoRA cannot represent",
            expected="LoRA on linear layers, without DoRA, biases or saved modules",
        )


def _shape(entries: Mapping[str, Any], module: str, part: str, path: Path) -> tuple[int, ...]:
    name = _tensor_name(module, part)
    if name not in entries:
        raise MismatchError(
            f"{path}: the header has no {name}", expected="a header of the same layout"
        )
    return tuple(entries[name]["shape"])


def _note(entries: Mapping[str, Any], path: Path) -> _Note | None:
    """What `write_peft` left in the metadata; None for a file written by others."""
    text = (entries.get("__metadata__") or {}).get("memtool")
    if text is None:
        return None
    try:
        note = json.loads(text)
        return _Note(tuple(note["sites"]), int(note["rank"]), float(note["alpha"]), note["extra"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: the memtool metadata cannot be read: {error!r}") from error


def _modules(
    tensors: Mapping[str, Tensor], available: Sequence[Site], note: _Note | None, path: Path
) -> list[_Module]:
    """The adapted modules of a file, each with the sites that its B holds."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise MismatchError(
                f"{path} holds {name!r}, which is no part of a plain LoRA",
                expected="names base_model.model.<module>.lora_A.weight and .lora_B.weight",
            )
        if tensor.ndim != 2:
            raise MismatchError(
                f"{path}: {name} has shape {tuple(tensor.shape)}",
                expected="two axes: LoRA of linear layers, not of convolutions",
            )
        if tensor.dtype not in _DTYPES.values():
            raise MismatchError(
                f"{path}: {name} is of type {tensor.dtype}", expected="floats of 16 to 64 bits"
            )
        if not bool(tensor.isfinite().all()):
            raise DataError(f"{path}: {name} has numbers that are not finite (NaN or infinity)")
        parts.setdefault(match["module"], {})[match["part"]] = tensor
    if not parts:
        raise CorruptError(f"{path} holds no tensors", expected="at least one adapted layer")
    known = _sites_by_module([site for site in available if site.slice])
    whole = {site.module: site for site in available if not site.slice}
    modules: list[_Module] = []
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise CorruptError(f"{path}: {name} has lora_{next(iter(pair))} only")
        if name not in known and name not in whole:
            raise MismatchError(
                f"{path} adapts {name!r}, and the backbone has no such layer to adapt",
                expected=f"layers such as {', '.join(sorted({*known, *whole})[:4])}",
            )
        slices = known.get(name, ())
        site = whole.get(name) or _whole_module(slices[0])
        rank = pair["A"].shape[0]
        if rank < 1 or pair["A"].shape[1] != site.in_features:
            raise _misfit(path, name, "A", pair["A"], f"(rank, {site.in_features})")
        if pair["B"].shape != (site.module_rows, rank):
            raise _misfit(path, name, "B", pair["B"], str((site.module_rows, rank)))
        sites = _sites_held(name, pair["B"], slices, note, path) or (site,)
        modules.append(_Module(name, pair["A"], pair["B"], sites))
    if note is not None:
        held = {site.name for module in modules for site in module.sites}
        ranks = {module.rank for module in modules}
        if held != set(note.sites) or ranks != {note.rank}:
            raise CorruptError(
                f"{path}: the tensors are not what the metadata says",
                expected=f"rank {note.rank} on {', '.join(note.sites[:4])} ...",
            )
    return modules


def _misfit(path: Path, module: str, part: str, tensor: Tensor, expected: str) -> MismatchError:
    return MismatchError(
        f"{path}: lora_{part} of {module} has shape {tuple(tensor.shape)}",
        expected=f"{expected} on this backbone",
    )


def _whole_module(part: Site) -> Site:
    """The site of the whole module that a slice belongs to."""
    rows = part.module_rows
    return Site(part.block, part.module, "", part.in_features, rows, 0, rows)


def _sites_held(
    module: str, b: Tensor, slices: Sequence[Site], note: _Note | None, path: Path
) -> tuple[Site, ...]:
    """The slices that the groups of B's columns belong to, in row order; () for the whole module.

    The note says it; without one, B does: each column may touch the rows of one slice only, and
    the slices that are touched at all must own equal, consecutive groups of columns.
    """
    if note is not None:
        held = tuple(site for site in slices if site.name in note.sites)
        if held and not _has_blocks(b, held):
            raise CorruptError(
                f"{path}: B of {module} is not zero outside its slices, as the metadata says"
            )
        return held
    touched = tuple(
        site
        for site in slices
        if bool(b[site.first_row : site.first_row + site.out_features].any())
    )
    return touched if touched and _has_blocks(b, touched) else ()


def _has_blocks(b: Tensor, sites: Sequence[Site]) -> bool:
    """Whether B (module_rows, R) has one group of columns a site, and is +0 outside its rows."""
    if b.shape[1] % len(sites) != 0:
        return False
    rank = b.shape[1] // len(sites)
    outside = torch.ones_like(b, dtype=torch.bool)
    for group, site in enumerate(sites):
        rows = slice(site.first_row, site.first_row + site.out_features)
        outside[rows, group * rank : (group + 1) * rank] = False
    rest = b[outside]
    # A negative zero would come back as a positive one, and the file would not be the same.
    return not bool(rest.any()) and not bool(rest.signbit().any())


def _scalings(config: Mapping[str, Any], ranks: Mapping[str, int], path: Path) -> dict[str, float]:
    """The scaling alpha / R of every module, or alpha / √R under rslora, by the rules of peft."""
    scalings: dict[str, float] = {}
    for module, rank in ranks.items():
        stated = _setting(config, "r", "rank_pattern", module, path)
        if stated != rank:
            raise CorruptError(
                f"{path} gives {module} rank {stated:g}", expected=f"{rank}, as its tensors have"
            )
        alpha = _setting(config, "lora_alpha", "alpha_pattern", module, path)
        scalings[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scalings


def _setting(
    config: Mapping[str, Any], name: str, pattern_name: str, module: str, path: Path
) -> float:
    """A positive number of a module: that of the first pattern that matches, else the general."""
    chosen = config.get(name)
    patterns = config.get(pattern_name) or {}
    if not isinstance(patterns, dict):
        raise CorruptError(f"{path}: {pattern_name} is {patterns!r}", expected="a JSON object")
    for pattern, setting in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CorruptError(
                f"{path}: {pattern_name} has {pattern!r}, no regular expression: {error}"
            ) from error
        if matches:
            chosen = setting
            break
    if isinstance(chosen, bool) or not isinstance(chosen, int | float):
        raise CorruptError(f"{path}: {name} is {chosen!r}", expected="a number")
    if not (math.isfinite(chosen) and chosen > 0):
        raise MismatchError(f"{path}: {name} is {chosen!r}", expected="a positive number")
    return float(chosen)


def _common(scalings: Iterable[float], note: _Note | None) -> float:
    """The scaling of most modules; that of the note where it is the same but for rounding."""
    scaling: float = Counter(scalings).most_common(1)[0][0]
    if note is not None and _ratio(note.alpha / note.rank, scaling) == 1.0:
        return note.alpha / note.rank
    return scaling


def _ratio(own: float, common: float) -> float:
    """The ratio own / common; exactly 1 where the rounding of alpha / R is all that differs."""
    return 1.0 if math.isclose(own, common, rel_tol=1e-12) else own / common


def _scaled(b: Tensor, ratio: float) -> Tensor:
    """B times a ratio, rounded once; bit for bit the same where the ratio is 1."""
    return b if ratio == 1.0 else (b.double() * ratio).to(b.dtype)


def _in_order(
    found: Mapping[str, Site], available: Sequence[Site], note: _Note | None
) -> tuple[Site, ...]:
    """The sites in the order they were written in, else in the order that the backbone gives."""
    if note is not None:
        return tuple(found[name] for name in note.sites)
    wanted = [name for site in available for name in (site.name, site.module) if name in found]
    return sites_in_block_order([found[name] for name in dict.fromkeys(wanted)])
