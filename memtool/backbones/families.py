"""Where the linear layers of a block lie, in the decoders of transformers that can be adapted.

Several targets may be rows of one fused layer; `q`, `k`, `v` then lie in that order, and so do
`gate` and `up`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from memtool.adapters.layout import Site
from memtool.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """`blocks`: where they are in a model. `layers`: the path of each target within a block.

    `transposed` says that the weights of these layers are (in, out).
    """

    blocks: str
    layers: Mapping[str, str]
    transposed: bool = False


_LLAMA = Family(
    "model.layers",
    {
        **{target: f"self_attn.{target}_proj" for target in ("q", "k", "v", "o")},
        **{target: f"mlp.{target}_proj" for target in ("gate", "up", "down")},
    },
)
_PHI3 = Family(
    "model.layers",
    {
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        "o": "self_attn.o_proj",
        **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
        "down": "mlp.down_proj",
    },
)
_GPT2 = Family(
    "transformer.h",
    {
        **dict.fromkeys(("q", "k", "v"), "attn.c_attn"),
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    transposed=True,
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA
    ),
    "phi3": _PHI3,
    "gpt2": _GPT2,
}
"""By the `model_type` of a configuration."""


def family_of(model: Any, name: str) -> Family:
    """The family of a model. Raises ConfigError for one that is none of `FAMILIES`."""
    found = FAMILIES.get(str(getattr(model.config, "model_type", "")))
    ours = type(model).__module__.startswith("transformers.")
    if found is None or not ours or not hasattr(model, "lm_head"):
        raise ConfigError(
            f"backbone {name} is a {type(model).__name__}, which memtool cannot adapt",
            expected=f"a causal language model of one of {', '.join(FAMILIES)}",
        )
    return found


def sites_of_block(family: Family, block: nn.Module, config: Any, number: int) -> dict[str, Site]:
    """The site of every target of a block. Raises ConfigError for a layer that is not there."""
    found: dict[str, Site] = {}
    for target, path in family.layers.items():
        name = f"{family.blocks}.{number}.{path}"
        try:
            wide, rows = _shape(block.get_submodule(path))
        except AttributeError as error:
            raise ConfigError(
                f"the model has no linear layer {name}", expected="a decoder as published"
            ) from error
        fused = [one for one, where in family.layers.items() if where == path]
        if len(fused) == 1:
            found[target] = Site(number, name, "", wide, rows, 0, rows)
            continue
        sizes = _sizes(fused, rows, config)
        first = sum(sizes[one] for one in fused[: fused.index(target)])
        found[target] = Site(number, name, target, wide, sizes[target], first, rows)
    return found


def _sizes(fused: list[str], rows: int, config: Any) -> dict[str, int]:
    """Rows of every target of a fused layer: as many, but for keys and values that heads share."""
    if "k" not in fused:
        return dict.fromkeys(fused, rows // len(fused))
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    each = rows // (heads + 2 * shared)
    return {"q": heads * each, "k": shared * each, "v": shared * each}


def _shape(linear: Any) -> tuple[int, int]:
    """Width of the input and of the output of a linear layer, or of GPT-2's transposed one.

    Raises AttributeError for a module of another kind.
    """
    if hasattr(linear, "nf"):
        return int(linear.nx), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)
