"""What of a model can be adapted, found by letting it run: its blocks, and the layers in them.

Nothing of a model's code is read. Two passes, over one image and over two, show

    a block    runs once in a pass, and its first argument is a tensor of the batch: tokens
               (b, n, d), or a map, with channels first or last
    a layer    lies in a block and is called with a tensor of the batch, or of the batch folded
               into windows, sample after sample: (b · w, ...)

A layer whose weights something else multiplies with is never called, one of a table (of relative
positions, say) has no batch, and one that stacks windows before samples mixes these up: none of
them takes what a sample recalls for itself, and each is left out by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memtool.adapters.convolution import Window
from memtool.adapters.layout import SLICES, Site

Channels = Literal["first", "last"]

_FUSED = frozenset(
    {
        "timm.layers.attention.Attention",
        "timm.models.vision_transformer.Attention",
        "timm.models.beit.Attention",
        "timm.models.eva.EvaAttention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.swin_transformer_v2.WindowAttention",
        "timm.models.hiera.MaskUnitAttention",
    }
)
"""Attention whose layer `qkv` has q, k and v in this order, each a third of its rows."""

_OTHER_NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "query": "q",
    "key": "k",
    "value": "v",
}
"""How others call the projections of attention."""

_PLAIN_LINEAR = ("torch.nn.modules.linear.Linear", "timm.layers.linear.Linear")
_PLAIN_CONV = ("torch.nn.modules.conv.Conv2d",)
_SAME_CONV = ("timm.layers.conv2d_same.Conv2dSame",)


@dataclass(frozen=True)
class Reading:
    """How a model reads images, which its library knows and no pass shows.

    `features` gives the pooled features (b, dim) that a model sees in pixels (b, 3, size, size).
    `candidates` are names of modules that may be blocks. A map whose axes do not tell has its
    channels first, or last where `channels_last`. `made_for` is the size, pixels a side, that it
    was made for, and so many `prefix_tokens` come before patches.
    """

    features: Callable[[nn.Module, Tensor], Tensor]
    candidates: Sequence[str] = ()
    channels_last: bool = False
    made_for: int | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Block:
    """A block of a model: its name there, the width of its input, and how that lies."""

    name: str
    dim: int
    axes: int
    channels: Channels
    tokens: int


@dataclass(frozen=True)
class Layer:
    """A layer that can be adapted: its name, its block, its sites by target, a kernel's window."""

    name: str
    block: int
    sites: Mapping[str, Site]
    window: Window | None
    pads: bool


@dataclass(frozen=True)
class Survey:
    """What was found: blocks in the order in which they run, and the layers of all.

    `dim` is the width of the features, `left_out` says of layers in blocks why they are none.
    """

    dim: int
    blocks: tuple[Block, ...]
    layers: tuple[Layer, ...]
    targets: tuple[str, ...]
    left_out: Mapping[str, str]

    def sites_in(self, block: int, target: str) -> tuple[Site, ...]:
        """The sites of a target in a block."""
        return tuple(
            layer.sites[target]
            for layer in self.layers
            if layer.block == block and target in layer.sites
        )


@dataclass
class _Run:
    """What the passes showed."""

    calls: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    mixed: set[str] = field(default_factory=set)


def surveyed(model: nn.Module, reading: Reading, size: int) -> Survey:
    """Survey a model that reads images of `size` pixels a side.

    Where none of the candidates is a block, the outermost members of lists of like modules that
    are. A module with several names goes by the first of them. On the meta device nothing shows
    whether windows lie sample after sample: they are taken to. Raises what the model raises, and
    ValueError for one whose features are no vectors.
    """
    one, two = _Run(), _Run()
    within = _by_first_name(model, (*reading.candidates, *_listed(model)))
    inner = {
        f"{block}.{path}" if path else block: module
        for block, root in within.items()
        for path, module in root.named_modules()
        if _is_a_layer(module)
    }
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, size, size, generator=generator).to(first)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        with _watched(within, inner, one, partial(_keep, kept)):
            reading.features(model, pixels[:1])
        with _watched(within, inner, two, partial(_compare, kept, two)):
            features = reading.features(model, pixels)
    if features.ndim != 2 or len(features) != 2:
        raise ValueError(f"its features are of shape {tuple(features.shape)}")
    able = [name for name in two.order if name in within and _is_a_block(name, one, two)]
    chosen = [name for name in able if name in reading.candidates] or able
    outermost = _outermost({name: within[name] for name in chosen})
    blocks = [_block(name, two.inputs[name], last=reading.channels_last) for name in outermost]
    left_out: dict[str, str] = {}
    found: list[tuple[int, str, nn.Module]] = []
    for number, block in enumerate(blocks):
        for name, module in inner.items():
            if name == block.name or name.startswith(f"{block.name}."):
                why = _why_not(name, module, one, two)
                if why is None:
                    found.append((number, name, module))
                else:
                    left_out[name] = why
    layers, targets = _named(model, found, [block.name for block in blocks])
    return Survey(features.shape[1], tuple(blocks), layers, targets, left_out)


def block_names(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of modules of a model: what `patterns` find at the beginning of its parameters'."""
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for name, _ in model.named_parameters():
        for pattern in patterns:
            match = re.match(pattern, name)
            if match and match.groups() and match[0] in modules:
                found[match[0]] = None
                break
    return [*found]


def _by_first_name(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    found: dict[nn.Module, str] = {}
    for name in names:
        found.setdefault(model.get_submodule(name), name)
    return {name: module for module, name in found.items()}


def _outermost(modules: Mapping[str, nn.Module]) -> list[str]:
    inside = {part for one in modules.values() for part in one.modules() if part is not one}
    return [name for name, module in modules.items() if module not in inside]


def _listed(model: nn.Module) -> list[str]:
    """The members of lists of like modules; the parts of a model that has no such lists."""
    found: list[str] = []
    for name, module in model.named_modules():
        members = [*module.named_children()]
        lists = isinstance(module, nn.ModuleList | nn.Sequential) and len(members) > 1
        if lists and name and len({type(member) for _, member in members}) == 1:
            found += [f"{name}.{member}" for member, _ in members]
    return found or [name for name, _ in model.named_children()]


def _is_a_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d | nn.Conv3d) or (
        "uantized" in type(module).__module__ and hasattr(module, "weight")
    )


@contextmanager
def _watched(
    blocks: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    run: _Run,
    look: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """A pass whose calls are counted in `run`; `look` sees what enters a layer."""

    def count(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        del module
        run.calls[name] = run.calls.get(name, 0) + 1
        if given and isinstance(given[0], Tensor):
            run.order.append(name)
            run.inputs[name] = tuple(given[0].shape)
            if name in layers:
                look(name, given[0])

    hooks = [
        module.register_forward_pre_hook(partial(count, name))
        for name, module in {**layers, **blocks}.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep(kept: dict[str, Tensor], name: str, x: Tensor) -> None:
    """What a single image folds into several rows."""
    if len(x) > 1 and not x.is_meta:
        kept[name] = x


def _compare(kept: Mapping[str, Tensor], run: _Run, name: str, x: Tensor) -> None:
    """Whether the rows of the first image come first, of two."""
    alone = kept.get(name)
    if alone is None or len(x) != 2 * len(alone):
        return
    own, other = x[: len(alone)], x[len(alone) :]
    # The image itself, but for rounding: far nearer than another image is.
    if not (own - alone).norm() <= 1e-2 * (other - alone).norm():
        run.mixed.add(name)


def _is_a_block(name: str, one: _Run, two: _Run) -> bool:
    alone, shape = one.inputs[name], two.inputs[name]
    return two.calls[name] == 1 and (alone[0], shape[0]) == (1, 2) and len(shape) in (3, 4)


def _block(name: str, shape: tuple[int, ...], *, last: bool) -> Block:
    """Images are square: so are the sides of a map, which tells its channels."""
    channels: Channels = "last"
    if len(shape) == 4:
        _, a, b, c = shape
        if b == c and (a != b or not last):
            channels = "first"
    dim = shape[1] if channels == "first" else shape[-1]
    return Block(name, dim, len(shape), channels, math.prod(shape[1:]) // dim)


def _why_not(name: str, module: nn.Module, one: _Run, two: _Run) -> str | None:
    """Why a layer cannot be adapted; None where it can."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, nn.Conv2d) and kind not in (*_PLAIN_CONV, *_SAME_CONV):
        return f"a {type(module).__name__}, which changes its weights as it runs"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"a {kind}"
    if isinstance(module, nn.Conv2d):
        if module.dilation != (1, 1) or module.padding_mode != "zeros":
            return "a convolution with dilation, or with padding other than zeros"
        if isinstance(module.padding, str) and kind not in _SAME_CONV:
            return f"a convolution with padding {module.padding!r}"
    elif kind not in _PLAIN_LINEAR and not kind.startswith("bitsandbytes."):
        return f"a {type(module).__name__}, which may be more than linear"
    if name not in two.inputs:
        return "never called: something else multiplies with its weights"
    rows, both = one.inputs[name][0], two.inputs[name][0]
    if both != 2 * rows:
        return "called with something that is of no image"
    if name in two.mixed:
        return "called with windows that are not stacked image after image"
    return None


def _named(
    model: nn.Module, found: Sequence[tuple[int, str, nn.Module]], blocks: Sequence[str]
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers with their sites, and the targets in the order in which they come."""
    paths = {name: _path(name, blocks[number], module) for number, name, module in found}
    short = _short({*paths.values()})
    layers: list[Layer] = []
    targets: dict[str, None] = {}
    for number, name, module in found:
        target, sites = short[paths[name]], dict[str, Site]()
        window, pads = None, False
        if isinstance(module, nn.Conv2d):
            window, pads = _window(module)
            wide = module.in_channels * math.prod(window.kernel)
            rows, kernel = module.out_channels, window.kernel
            sites[target] = Site(number, name, "", wide, rows, 0, rows, kernel, module.groups)
        elif isinstance(module, nn.Linear):
            wide, rows = module.in_features, module.out_features
            if name.endswith("attn.qkv") and _is_fused(model, name, rows):
                each = rows // 3
                for place, part in enumerate(SLICES):
                    sites[part] = Site(number, name, part, wide, each, place * each, rows)
            else:
                sites[target] = Site(number, name, "", wide, rows, 0, rows)
        layers.append(Layer(name, number, sites, window, pads))
        targets |= dict.fromkeys(sites)
    return tuple(layers), tuple(targets)


def _is_fused(model: nn.Module, name: str, rows: int) -> bool:
    kind = type(model.get_submodule(name.rpartition(".")[0]))
    return f"{kind.__module__}.{kind.__name__}" in _FUSED and rows % 3 == 0


def _window(conv: nn.Conv2d) -> tuple[Window, bool]:
    kernel, stride = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1])
    padding = conv.padding
    pads = f"{type(conv).__module__}.{type(conv).__name__}" in _SAME_CONV
    if pads or isinstance(padding, str):
        return Window(kernel, stride), pads
    return Window(kernel, stride, (padding[0], padding[1])), False


def _path(name: str, block: str, module: nn.Module) -> tuple[str, ...]:
    """The names on the way to a layer in its block, without numbers; of a block that is one, its
    kind.
    """
    parts = [part for part in name[len(block) + 1 :].split(".") if part and not part.isdigit()]
    parts = parts or ["conv" if isinstance(module, nn.Conv2d) else "linear"]
    return (*parts[:-1], _OTHER_NAMES.get(parts[-1], parts[-1]))


def _short(paths: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest end of every path that is no end of another, or all of it."""
    found: dict[tuple[str, ...], str] = {}
    for path in paths:
        for size in range(1, len(path) + 1):
            end = path[-size:]
            if sum(other[-size:] == end for other in paths) == 1:
                break
        found[path] = ".".join(end)
    return found
