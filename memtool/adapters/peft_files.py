"""Adapter directories of the `peft` library, out and in.

A PEFT directory holds `adapter_model.safetensors`, with `base_model.model.<module>.lora_A.weight`
(R, d_in) and `.lora_B.weight` (d_out, R) for every adapted module, and `adapter_config.json`; the
module computes W x + (alpha / R) · B A x.

PEFT adapts whole linear layers only. The slices q and v of a fused qkv, each of rank r, become one
module of rank R = 2 r: A stacked, B block-structured, alpha doubled so that alpha / R stays alpha /
r. That loses nothing, and reading finds the blocks again. A LoRA that peft trained on the whole
fused layer has no such blocks: it is read as one site, the whole module.

Of a convolution A is (R, channels, height, width) and B (d_out, R / groups, 1, 1): the matrices of
a value in another shape.

A value has one rank and one scaling. Modules of smaller rank are padded with zeros, which is exact.
Where modules differ in alpha / R, the scaling of most of them is taken and the ratio multiplied
into B of the others, which rounds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memtool.adapters.layout import MOST_PADDING, Layout, Site, sites_in_block_order
from memtool.adapters.peft_config import CONFIG_NAME, check_plain_lora, config_text, scalings
from memtool.adapters.peft_tensors import (
    DTYPES,
    WEIGHTS_NAME,
    Array,
    Module,
    Note,
    adapted_modules,
    block_structured,
    called_by_peft,
    header_bytes,
    note_in,
    parsed_header,
    place_of,
    sites_by_module,
    tensor_name,
)
from memtool.atomic import write_atomic
from memtool.errors import (
    AlreadyExistsError,
    DataError,
    MismatchError,
    NotFoundError,
)
from memtool.outside import parsed_json, read_file
from memtool.tensor_bytes import load_arrays, narrowed, widened
from memtool_stores.printable import shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A PEFT directory as a flat value, with all that is needed to write the same file again.

    numbers   (numel,), in the order of `layout`; float32, or float64 where the file has that
    scaling   what B A x is multiplied with; alpha is scaling · rank
    header    the JSON header of the safetensors file, byte for byte
    sha256    of the safetensors file, hexadecimal
    config    the bytes of `adapter_config.json`
    """

    numbers: Array
    layout: Layout
    scaling: float
    header: bytes
    sha256: str
    config: bytes

    @property
    def value(self) -> Tensor:
        """The numbers as a tensor (numel,), which shares their memory."""
        import torch

        return torch.from_numpy(self.numbers)

    @property
    def alpha(self) -> float:
        """The numerator of the scaling alpha / rank."""
        return self.scaling * self.layout.rank

    @property
    def base_model(self) -> str | None:
        """The model the adapter was made for, where the file says so."""
        name = parsed_json(self.config, CONFIG_NAME).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def revision(self) -> str | None:
        """Of the model it was made for, where the file says another than the main one."""
        name = parsed_json(self.config, CONFIG_NAME).get("revision")
        return name if isinstance(name, str) and name not in ("", "main") else None

    @property
    def extra(self) -> Mapping[str, Any]:
        """What `write_peft` was given as extra; empty for a file written by others."""
        note = note_in(parsed_json(self.header, _HEADER), WEIGHTS_NAME)
        return note.extra if note else {}


def write_peft(
    directory: Path,
    value: Tensor | Array,
    layout: Layout,
    *,
    alpha: float,
    base_model: str,
    transposed: bool = False,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a value (numel,) as a directory that `peft` loads; returns the directory.

    The value is a tensor of 16 to 64 bits, or such an array of numpy. `alpha` belongs to the
    layout's rank: the scaling is alpha / rank. `transposed` is that of the model. `extra`
    (JSON) goes into the metadata of the safetensors file, which peft ignores. `read_peft` gives
    back the same value, bit for bit. Raises MismatchError for a value that does not fit, DataError
    for one that is not finite,
    AlreadyExistsError, and MemtoolError when the file system refuses.
    """
    code, bits = _bits(value)
    if not (math.isfinite(alpha) and alpha > 0):
        raise MismatchError(f"alpha of {alpha}", expected="a positive number")
    if not np.isfinite(widened(bits) if code == "BF16" else bits).all():
        raise DataError("an adapter with numbers that are not finite (NaN or infinity)")
    parts = layout.unflatten(bits)
    arrays: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for module, sites in sites_by_module(layout.sites).items():
        ranks[module] = layout.rank * len(sites)
        a = np.concatenate([parts[f"{site.name}.lora_A"] for site in sites])
        b = block_structured(sites, [parts[f"{site.name}.lora_B"] for site in sites])
        shapes = sites[0].whole.shapes(ranks[module])
        for part, array, shape in zip("AB", (a, b), shapes, strict=True):
            arrays[tensor_name(module, part)] = array.reshape(shape)
    names = [site.name for site in layout.sites]
    note = {"alpha": alpha, "extra": dict(extra or {}), "rank": layout.rank, "sites": names}
    metadata = {"format": "pt", "memtool": json.dumps(note, sort_keys=True)}
    config = config_text(ranks, alpha / layout.rank, base_model, transposed=transposed)
    file = _file(header_bytes(arrays, code, metadata), arrays)
    return _write(directory, file, config.encode(), overwrite=overwrite)


def read_peft(directory: Path, layout_sites: Sequence[Site]) -> PeftAdapter:
    """Read a directory that `write_peft` or `peft` wrote, for a backbone with the given sites.

    `layout_sites` are all sites that the backbone offers; those that the file adapts, in the same
    order, make the layout. Raises NotFoundError for a missing file, CorruptError for one that is
    not what peft writes, MismatchError for an adapter of another backbone or one that is more than
    a plain LoRA (DoRA, biases, saved modules, other methods), DataError for numbers
    that are not finite and for what is no file, SchemaError for a file above the limits.
    """
    config = peft_file(directory, CONFIG_NAME)
    return parse_peft(peft_file(directory, WEIGHTS_NAME), config, layout_sites, str(directory))


def parse_peft(
    data: bytes, config_bytes: bytes, layout_sites: Sequence[Site], where: str
) -> PeftAdapter:
    """As `read_peft`, of the bytes of the two files; `where` is the folder that errors name."""
    config_path, weights_path = f"{where}/{CONFIG_NAME}", f"{where}/{WEIGHTS_NAME}"
    config = parsed_json(config_bytes, config_path)
    check_plain_lora(config, config_path)
    tensors = load_arrays(data, weights_path)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    note = note_in(parsed_json(header, f"the header of {weights_path}"), weights_path)
    modules = adapted_modules(tensors, layout_sites, note, weights_path)
    named = {m.name: (m.a.shape[0], m.tensor) for m in modules}
    found = _scalings(config, named, config_path)
    scaling = _common(found.values(), note)
    dtype = np.result_type(np.float32, *(tensor.numbers.dtype for tensor in tensors.values()))
    layout = _layout(modules, layout_sites, note, weights_path)
    parts: dict[str, Array] = {}
    for module in modules:
        ratio = _ratio(found[module.name], scaling)
        own = module.rank
        for group, site in enumerate(module.sites):
            ranks = slice(group * own, (group + 1) * own)
            rows = slice(site.first_row, site.first_row + site.out_features)
            a = np.zeros((layout.rank, site.in_features), dtype)
            b = np.zeros((site.out_features, layout.rank // site.groups), dtype)
            a[site.ranks(own, layout.rank)] = module.a[ranks]
            b[:, : own // site.groups] = _scaled(module.b[rows, ranks].astype(dtype), ratio)
            if not np.isfinite(b).all():
                raise DataError(
                    f"{config_path}: the scaling of {module.name} is {ratio:g} times that of the "
                    f"others, which its numbers cannot hold"
                )
            parts[f"{site.name}.lora_A"], parts[f"{site.name}.lora_B"] = a, b
    return PeftAdapter(
        layout.flatten(parts),
        layout,
        scaling,
        header,
        hashlib.sha256(data).hexdigest(),
        config_bytes,
    )


def restore_peft(directory: Path, adapter: PeftAdapter) -> Path:
    """Write an adapter as the directory it was read from; returns the directory.

    The configuration is the same byte for byte; the tensors are `restored_file`. Errors as for
    `write_peft`.
    """
    return _write(directory, restored_file(adapter), adapter.config, overwrite=False)


def restored_file(adapter: PeftAdapter) -> bytes:
    """The safetensors file that an adapter was read from, made again from its value.

    It is the same byte for byte, except for B of modules whose own scaling was folded into the
    value (that rounds), and for numbers that the value was rounded to: `adapter.sha256` tells.
    """
    entries = parsed_header(adapter.header, _HEADER)
    parts = adapter.layout.unflatten(adapter.numbers)
    grouped = sites_by_module(adapter.layout.sites)
    names = {place_of(name): name for name in entries}
    shapes = {module: [_shape(entries, names, module, part) for part in "AB"] for module in grouped}
    ranks = {module: a[0] for module, (a, _) in shapes.items()}
    named = {module: (rank, names[module, "A"]) for module, rank in ranks.items()}
    found = _scalings(parsed_json(adapter.config, CONFIG_NAME), named, CONFIG_NAME)
    arrays: dict[str, Array] = {}
    for module, sites in grouped.items():
        own = ranks[module] // len(sites)
        ratio = 1.0 / _ratio(found[module], adapter.scaling)
        rank, groups = adapter.layout.rank, sites[0].groups
        a = np.concatenate([parts[f"{site.name}.lora_A"][site.ranks(own, rank)] for site in sites])
        b = [_scaled(parts[f"{site.name}.lora_B"][:, : own // groups], ratio) for site in sites]
        made = (a, block_structured(sites, b))
        due = sites[0].whole.shapes(ranks[module])
        for part, array, shape, own_shape in zip("AB", made, shapes[module], due, strict=True):
            name = names[module, part]
            if own_shape != shape:
                raise MismatchError(
                    f"{name} has shape {own_shape}",
                    expected=f"{shape} as the header says",
                )
            arrays[name] = _rounded(array, entries[name]["dtype"])
    if more := sorted(entries.keys() - {*arrays, "__metadata__"}):
        raise MismatchError(f"{_HEADER} has {shown(more[0])}, which the value has not")
    return _file(adapter.header, arrays)


def _scalings(
    config: Mapping[str, Any], modules: Mapping[str, tuple[int, str]], where: str
) -> dict[str, float]:
    """What peft multiplies B A of every module with: module to its rank and the name of its A."""
    called = {module: called_by_peft(name) for module, (_, name) in modules.items()}
    ranks = {module: rank for module, (rank, _) in modules.items()}
    found = scalings(config, ranks, {module: name for module, (name, _) in called.items()}, where)
    # Of torch's attention peft merges out_proj twice at every pass, in training too (seen in 0.21).
    return {module: scaling * (1 + called[module][1]) for module, scaling in found.items()}


_HEADER = f"the header of {WEIGHTS_NAME}"


def _shape(
    entries: Mapping[str, Any], names: Mapping[Any, str], module: str, part: str
) -> tuple[int, ...]:
    if (module, part) not in names:
        raise MismatchError(
            f"{_HEADER} has no {tensor_name(module, part)}",
            expected="a header of the same layout",
        )
    return tuple(entries[names[module, part]]["shape"])


# Writing


_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}


def _bits(value: Tensor | Array) -> tuple[str, Array]:
    """The number format of a flat value, one of `DTYPES`, and its bits (numel,).

    Raises MismatchError for any other value.
    """
    dtypes = _NUMPY if isinstance(value, np.ndarray) else DTYPES
    word = value.dtype if isinstance(value, np.ndarray) else str(value.dtype)
    code = next((code for code, dtype in dtypes.items() if dtype == word), None)
    if value.ndim != 1 or code is None:
        raise MismatchError(
            f"a value of shape {tuple(value.shape)} and type {value.dtype}",
            expected="one flat vector of floats",
        )
    if isinstance(value, np.ndarray):
        return code, value
    if code != "BF16":
        return code, value.detach().cpu().numpy()
    import torch

    return code, value.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def _rounded(array: Array, code: str) -> Array:
    """The bits of finite numbers in a number format, rounded to the nearest."""
    if code == "F64":
        return array.astype(_NUMPY[code])
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
        return narrowed(array) if code == "BF16" else array.astype(_NUMPY[code])


def _file(header: bytes, arrays: Mapping[str, Array]) -> bytes:
    """A safetensors file; the arrays lie where the header says."""
    entries = parsed_json(header, _HEADER)
    chunks = [len(header).to_bytes(8, "little"), header]
    chunks += [
        arrays[name].tobytes()
        for name in sorted(arrays, key=lambda name: entries[name]["data_offsets"])
    ]
    return b"".join(chunks)


def _write(directory: Path, file: bytes, config: bytes, *, overwrite: bool) -> Path:
    """Both files, each whole or not at all."""
    weights_path, config_path = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    for path in (weights_path, config_path):
        if path.exists() and not overwrite:
            raise AlreadyExistsError(
                f"{path} is already there", remedy="another folder, or allow overwriting"
            )
    write_atomic(weights_path, file)
    write_atomic(config_path, config)
    return directory


# Reading


def peft_file(directory: Path, name: str) -> bytes:
    """The bytes of one file of a PEFT directory, `WEIGHTS_NAME` or `CONFIG_NAME`.

    Raises NotFoundError, which says so where the weights are a pickle; and as `read_file`.
    """
    try:
        return read_file(directory / name, "text_bytes" if name == CONFIG_NAME else "array_bytes")
    except NotFoundError as error:
        pickled = directory / "adapter_model.bin"
        raise NotFoundError(
            error.message,
            expected=f"a PEFT directory with {WEIGHTS_NAME} and {CONFIG_NAME}",
            remedy=(
                f"{pickled.name} is a pickle, which is not read: save with safe_serialization=True"
                if name == WEIGHTS_NAME and pickled.exists()
                else None
            ),
        ) from None


def _layout(
    modules: Sequence[Module], available: Sequence[Site], note: Note | None, where: str
) -> Layout:
    """The layout of one rank that holds the modules of a file, padded where theirs are smaller."""
    found = {site.name: site for module in modules for site in module.sites}
    layout = Layout(_in_order(found, available, note), max(module.rank for module in modules))
    there = sum(module.a.size + module.b.size for module in modules)
    if layout.numel > MOST_PADDING * there:
        raise MismatchError(
            f"{where} has {there:,} numbers in modules of rank {min(m.rank for m in modules)} to "
            f"{layout.rank}, which all of the largest rank would make {layout.numel:,}",
            expected=f"at most {MOST_PADDING} times as many",
            remedy="an adapter with modules of more even ranks",
        )
    return layout


def _common(scalings: Iterable[float], note: Note | None) -> float:
    """The scaling of most modules; that of the note where it is the same but for rounding."""
    scaling: float = Counter(scalings).most_common(1)[0][0]
    if note is not None and _ratio(note.alpha / note.rank, scaling) == 1.0:
        return note.alpha / note.rank
    return scaling


def _ratio(own: float, common: float) -> float:
    """The ratio own / common; exactly 1 where the rounding of alpha / R is all that differs."""
    return 1.0 if math.isclose(own, common, rel_tol=1e-12) else own / common


def _scaled(b: Array, ratio: float) -> Array:
    """B times a ratio, rounded once; bit for bit the same where the ratio is 1."""
    if ratio == 1.0:
        return b
    with np.errstate(over="ignore"):
        return (b.astype(np.float64) * ratio).astype(b.dtype)


def _in_order(
    found: Mapping[str, Site], available: Sequence[Site], note: Note | None
) -> tuple[Site, ...]:
    """The sites in the order they were written in, else in the order that the backbone gives."""
    if note is not None:
        return tuple(found[name] for name in note.sites)
    wanted = [name for site in available for name in (site.name, site.module) if name in found]
    return sites_in_block_order([found[name] for name in dict.fromkeys(wanted)])
