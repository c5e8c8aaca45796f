"""`adapter_config.json` of a PEFT directory: what it says of scalings, and what it must not say."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from memtool.adapters.patterns import Pattern, compiled
from memtool.errors import CorruptError, MismatchError
from memtool_stores.printable import shown

CONFIG_NAME = "adapter_config.json"

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

MOST_PATTERNS = 10_000
"""Entries of `rank_pattern` or of `alpha_pattern`."""

MOST_PLACES = 1_000
"""Characters in all those of its patterns that are more than names."""

# What these say does not change what a stored LoRA computes, or is told by its tensors. Those that
# are regular expressions to peft are never matched against anything here.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
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


def check_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse whatever makes the adapter compute more than W x + scaling · B A x.

    Raises MismatchError that names the option.
    """
    if config.get("peft_type") != "LORA":
        raise MismatchError(
            f"{where}: an adapter of type {shown(config.get('peft_type'))}", expected="'LORA'"
        )
    if config.get("bias", "none") != "none":
        raise MismatchError(
            f"{where}: bias is {shown(config['bias'])}", expected="'none': biases are not stored"
        )
    beginning = config.get("init_lora_weights", True)
    if not isinstance(beginning, bool | str) or beginning not in _PLAIN_BEGINNINGS:
        raise MismatchError(
            f"{where}: init_lora_weights {shown(beginning)} changes the weights of the base model",
            remedy="convert it to a plain LoRA (peft: path_initial_model_for_weight_conversion)",
        )
    known = _WITHOUT_EFFECT | _UNDERSTOOD | {"bias", "init_lora_weights"}
    # An empty loftq_config says nothing; options that peft may add later are refused when set.
    used = sorted(name for name, setting in config.items() if setting and name not in known)
    if used:
        raise MismatchError(
            f"{where}: {used[0][:80]} is {shown(config[used[0]])}, which a plain LoRA cannot "
            "represent",
            expected="LoRA on linear layers, without DoRA, biases or saved modules",
        )


def scalings(
    config: Mapping[str, Any], ranks: Mapping[str, int], called: Mapping[str, str], where: str
) -> dict[str, float]:
    """The scaling alpha / R of every module, or alpha / √R under rslora, by the rules of peft.

    `ranks` are those that the tensors have, `called` what patterns know a module by. Raises
    CorruptError for settings of another type or another rank, MismatchError for a scaling that is
    no positive number of 32 bits, or a pattern that is not read.
    """
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise CorruptError(f"{where}: use_rslora is {shown(rslora)}", expected="true or false")
    ranks_of = _Setting(config, "r", "rank_pattern", where)
    alphas_of = _Setting(config, "lora_alpha", "alpha_pattern", where)
    found: dict[str, float] = {}
    for module, rank in ranks.items():
        stated = ranks_of(called[module])
        if stated != rank:
            raise CorruptError(
                f"{where} gives {module} rank {stated:g}", expected=f"{rank}, as its tensors have"
            )
        scaling = alphas_of(called[module]) / (math.sqrt(rank) if rslora else rank)
        if not _LEAST <= scaling <= _MOST:
            raise MismatchError(
                f"{where}: the scaling of {module} is {scaling:g}",
                expected="a number that 32 bits can hold",
            )
        found[module] = scaling
    return found


class _Setting:
    """A positive number for every module: that of the first pattern that matches, else one."""

    def __init__(self, config: Mapping[str, Any], name: str, pattern_name: str, where: str) -> None:
        self._given = config.get(name)
        self._name = f"{where}: {name}"
        patterns = config.get(pattern_name) or {}
        self._where = f"{where}: {pattern_name}"
        if not isinstance(patterns, dict):
            raise CorruptError(f"{self._where} is {shown(patterns)}", expected="a JSON object")
        if len(patterns) > MOST_PATTERNS:
            raise MismatchError(
                f"{self._where} has {len(patterns):,} entries", expected=f"at most {MOST_PATTERNS}"
            )
        self._patterns: list[tuple[Pattern, str, Any]] = [
            (compiled(pattern, self._where), pattern, value) for pattern, value in patterns.items()
        ]
        places = sum(len(one.accepts) for one, _, _ in self._patterns if not one.simple)
        if places > MOST_PLACES:
            raise MismatchError(
                f"{self._where} has patterns of {places:,} characters with repetitions and choices",
                expected=f"at most {MOST_PLACES:,} in all",
                remedy="write out the names of the layers",
            )

    def __call__(self, module: str) -> float:
        for pattern, text, value in self._patterns:
            if pattern.matches_end(module):
                return _positive(value, f"{self._where}[{shown(text)}]")
        return _positive(self._given, self._name)


def _positive(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CorruptError(f"{where} is {shown(value)}", expected="a number")
    if not 0 < value < 1e300:  # a longer integer is no float
        raise MismatchError(f"{where} is {shown(value)}", expected="a positive number")
    return float(value)


def config_text(
    ranks: Mapping[str, int], scaling: float, base_model: str, *, transposed: bool = False
) -> str:
    """The file for modules of these ranks and one scaling, sorted and indented as peft writes it.

    `transposed` says that the weights of these modules are (in, out): `fan_in_fan_out`.

    The patterns in it are regular expressions to peft, and names to us.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Without the anchor, the name of a text tower's layer would match the layer of a vision tower
    # that ends in the same name.
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != usual}
    return json.dumps(
        {
            "alpha_pattern": {module: _number(scaling * r) for module, r in others.items()},
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": transposed,
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
