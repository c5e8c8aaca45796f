"""Where the memory goes when a language model of some size learns atoms, without its weights.

The model is built from its configuration on torch's meta device, where tensors have shapes but no
numbers, and its own forward pass runs there: what autograd would keep for backward is counted,
without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memtool.backbones.called import CalledLinear
from memtool.backbones.causal_lm import CausalLM, context_of, limits_of, model_source
from memtool.backbones.quantised import PACKED_BYTES, can_be_packed
from memtool.errors import ConfigError, NotFoundError
from memtool.memories.rank1 import AtomBank, AtomGate, Rank1Memory
from memtool.settings import BackboneSettings, TextSettings

LENGTHS = (64, 128)
"""Tokens of the two samples from which linear and quadratic parts are told apart."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of the parts.

    parameters    how many numbers the frozen model has
    weights       the frozen model
    atoms         the atoms of all tasks, float32
    learning      gradients and two moments of AdamW for the atoms of the newest task, float32
    per_token     kept for backward for each token of a batch, but for the next two
    per_pair      the same for each pair of tokens of a sample: attention that is not fused
    logits        of each answer token, and their gradients
    cache         keys and values of each token while an answer is generated
    limits        the most tokens of a prompt, and of an answer
    begin         the first block that has adapters
    """

    parameters: int
    weights: int
    atoms: int
    learning: int
    per_token: int
    per_pair: int
    logits: int
    cache: int
    limits: tuple[int, int] = (0, 0)
    begin: int = 0

    def training(self, batch: int, tokens: int, answer_tokens: int, *, fused: bool = True) -> int:
        """Bytes of a step with `batch` samples of so many tokens, of which some are the answer."""
        pairs = 0 if fused else self.per_pair * tokens * tokens
        each = self.per_token * tokens + pairs + self.logits * answer_tokens
        return self.weights + self.atoms + self.learning + batch * each

    def generation(self, batch: int, tokens: int) -> int:
        """Bytes of generating for `batch` samples of so many tokens, the answers included."""
        return self.weights + self.atoms + batch * tokens * self.cache


def footprint(
    config: Any,
    *,
    targets: Sequence[str] = ("q", "k", "v", "o"),
    rank: int = 8,
    tasks: int = 8,
    gate: AtomGate | None = None,
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
    begin: int = 0,
) -> Footprint:
    """The footprint of a transformers configuration, with weights of `dtype`.

    With `packed` those of linear layers are in four bits. `tasks` tasks of `rank` atoms lie at
    every site of `targets`, and those of the last one learn; adapters of as many numbers are
    counted from the block `begin` on. Raises ConfigError for a model that cannot be adapted, for
    too few tasks, and for a gate with a norm of every task, which looks at numbers that are not
    there.
    """
    from transformers import AutoModelForCausalLM

    gate = AtomGate(topk=max(rank, 2)) if gate is None else gate
    if gate.score_norm != "bank" or gate.scaled_threshold:
        raise ConfigError("a footprint under another norm than bank", expected="score_norm bank")
    if tasks < 1:
        raise ConfigError(f"a footprint of {tasks} tasks", expected="at least one")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    text = TextSettings(prompt_tokens=1, answer_tokens=1)  # no text is read
    lm = CausalLM(model, None, config.model_type, text)
    sites = [site for site in lm.sites(targets) if site.block >= begin]
    bank = _bank(lm, targets, rank, tasks)
    numbers = sum(site.in_features + site.out_features for site in sites) * rank
    kept = [_kept_for_backward(lm, bank.train(), gate, length) for length in LENGTHS]
    (n, m), (of_n, of_m) = LENGTHS, kept
    pair = (of_m / m - of_n / n) / (m - n)
    weights = {id(parameter): parameter for parameter in lm.parameters()}.values()
    (key, *_) = lm.sites(("k",))
    size = torch.empty(0, dtype=dtype).element_size()
    return Footprint(
        parameters=sum(parameter.numel() for parameter in weights),
        weights=sum(parameter.numel() * parameter.element_size() for parameter in weights)
        - (_saved_by_packing(lm, size) if packed else 0),
        atoms=4 * numbers * tasks,
        learning=3 * 4 * numbers,
        per_token=round(of_n / n - pair * n),
        per_pair=round(pair),
        logits=config.vocab_size * (size + 2 * 4),
        cache=2 * lm.depth * key.out_features * size,
        begin=begin,
    )


def footprint_of(
    settings: BackboneSettings,
    *,
    rank: int,
    tasks: int,
    gate: AtomGate,
    text: TextSettings,
    dtype: torch.dtype = torch.bfloat16,
    adapted_from: Callable[[int], int] | None = None,
) -> Footprint:
    """The footprint of the model that settings name; only its config.json is read.

    Adapters begin in the block that `adapted_from` says, of a model of so many; None: in the first.
    Raises ConfigError and NotFoundError as `create_causal_lm`, and as `footprint`.
    """
    from transformers import AutoConfig

    source = model_source(settings)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise NotFoundError(
            f"no configuration of a model at {source!r}: {error}", expected="a config.json"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{source!r} is no causal language model: {error}") from error
    tower = config.get_text_config()  # of a model of images and text; else the model
    limits = limits_of(settings.name, context_of(tower), text)
    found = footprint(
        tower,
        targets=settings.targets,
        rank=rank,
        tasks=tasks,
        gate=gate,
        dtype=dtype,
        packed=settings.quantise is not None,
        begin=0 if adapted_from is None else adapted_from(tower.num_hidden_layers),
    )
    if tower is not config:
        found = _with_rest(found, config, dtype)
    return replace(found, limits=limits)


def _with_rest(found: Footprint, config: Any, dtype: torch.dtype) -> Footprint:
    """A footprint of a language tower, with all that a model of images and text has beside it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        tower = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=dtype)
    more = whole.num_parameters() - tower.num_parameters()
    return replace(
        found,
        parameters=found.parameters + more,
        weights=found.weights + more * torch.empty(0, dtype=dtype).element_size(),
    )


def _saved_by_packing(lm: CausalLM, size: int) -> int:
    """Bytes that linear layers have less in four bits than in numbers of `size` bytes."""
    weights: list[Tensor] = [
        one.linear.get_parameter("weight") for one in lm.modules() if isinstance(one, CalledLinear)
    ]
    numbers = sum(weight.numel() for weight in weights if can_be_packed(weight))
    return round(numbers * (size - PACKED_BYTES))


def _bank(lm: CausalLM, targets: Sequence[str], rank: int, tasks: int) -> Rank1Memory:
    """A bank on the meta device; only who owns an atom is real."""
    bank = Rank1Memory(lm.sites(targets))
    old = rank * (tasks - 1)
    numel = 0
    for site in bank.sites:
        numel += rank * (site.in_features + site.out_features)
        if old:
            owner = torch.arange(tasks - 1).repeat_interleave(rank)
            keys = torch.empty(old, site.in_features, device="meta")
            values = torch.empty(old, site.out_features, device="meta")
            scaling = torch.empty(old, device="meta")
            bank.append(site.name, AtomBank(keys, values, scaling, owner))
    bank.grow(torch.empty(numel, device="meta"), rank=rank, owner=tasks - 1)
    return bank


def _kept_for_backward(lm: CausalLM, bank: Rank1Memory, gate: AtomGate, length: int) -> int:
    """Bytes that autograd keeps of one sample, without what is there anyway."""
    there = {
        tensor.untyped_storage()._cdata
        for part in (lm, bank)
        for tensor in part.state_dict().values()
    }
    there |= {tensor.untyped_storage()._cdata for tensor in (*lm.buffers(), *bank.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = tensor
        return tensor

    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.hidden(tokens, bank.recall(gate))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
