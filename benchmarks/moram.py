"""Atoms in one linear layer 768→768: time and saved activations against frozen layer and LoRA.

1,576 tokens (8 images of 197), float32, tasks of 16 atoms, 16 kept for each token. The bank holds
16, 160, 800 and 8,000 atoms, of which the last 16 learn; every score is exact, but where a case
says bf16. Every ratio is over the frozen layer in the same round; plain LoRA of rank 16 stands
beside it. Forward and backward give the frozen layer the gradient of its input, LoRA and atoms also
those of what learns.

The limit of evaluation is 1.15 and 1.35 for the two small banks, then 1.2 times the products of the
layer and of all scores. That of forward and backward is 1.25 times all products that are counted:
`products`.

Saved activations are the bytes that autograd keeps for every token between forward and backward,
the input included, against the same gate written with tensors over all atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import case, environment, figure, interleaved, progress, ratio
from memtool.adapters.atoms import (
    WORTH,
    AtomBank,
    AtomGate,
    ModuleAtoms,
    Owners,
    activations,
    add_atoms,
)
from memtool.adapters.layout import Site

BATCH, TOKENS, WIDTH, RANK = 8, 197, 768, 16
COUNTS = (16, 160, 800, 8000)
SAVED = 800
"""Atoms of which the saved activations are measured."""

SITE = Site(0, "fc", "", WIDTH, WIDTH, 0, WIDTH)
GATE = AtomGate(topk=RANK, temperature=0.01, threshold=0.2)
ROUGH = replace(GATE, scores="bf16")
SOFT = replace(GATE, temperature=1.0)
"""Under it every atom that is kept has a weight above zero."""


def run(repeats: int, sizes: tuple[int, ...] = COUNTS, device: str = "cpu") -> dict[str, Any]:
    """All cases; `sizes` are numbers of atoms."""
    cases: list[dict[str, Any]] = []
    for count in sizes:
        cases += timed(count, 3 * repeats, device)
        cases += roughly(count, 3 * repeats, device)
    cases.append(saved(SAVED, device))
    return {
        "benchmark": "moram",
        "environment": environment(device),
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def products(count: int) -> float:
    """Multiply-adds of forward and backward with so many atoms, over those of the frozen layer.

    In rows of 768 numbers for every token; k are kept, or all take part where k is not much less:

        forward     d + n + k                       the layer, all scores, the kept values
        backward    d + k + 16 + 16                 of x, of the kept factors, values and keys
                    + min(2 n, d + d n / N + k + 16)    of x through the norm
    """
    kept = RANK if count > 2 * RANK else count
    gram = WIDTH + WIDTH * count / (BATCH * TOKENS) + kept + RANK
    atoms = count + 2 * kept + 2 * RANK + min(2 * count, gram)
    return 1 + atoms / (2 * WIDTH)


def limits(count: int) -> tuple[float, float]:
    """Those of evaluation and of forward + backward with so many atoms, over the frozen layer."""
    evaluation = {16: 1.15, 160: 1.35}.get(count, 1.2 * (1 + count / WIDTH))
    return round(evaluation, 2), round(1.25 * products(count), 2)


class Layer:
    """A frozen layer, one LoRA, and a bank of which the last task learns."""

    def __init__(self, count: int, device: str | torch.device = "cpu") -> None:
        generator = torch.Generator().manual_seed(count)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.weight, self.bias = randn(WIDTH, WIDTH) / WIDTH**0.5, randn(WIDTH)
        self.x = randn(BATCH, TOKENS, WIDTH).requires_grad_()
        self.gradient = randn(BATCH, TOKENS, WIDTH)
        self.a = (randn(RANK, WIDTH) / WIDTH**0.5).requires_grad_()
        self.b = (randn(WIDTH, RANK) * 0.02).requires_grad_()
        self.bank = AtomBank(
            (randn(count, WIDTH) / WIDTH**0.5).requires_grad_(),
            (randn(count, WIDTH) * 0.02).requires_grad_(),
            torch.ones(count).to(device),
            (owner := torch.arange(count) // RANK).to(device),
            fresh=RANK,
            owners=replace(known := Owners.of(owner), tasks=known.tasks.to(device)),
        )
        self.stored = ModuleAtoms((SITE,), (replace(self.bank, fresh=0),))

    def frozen(self) -> Tensor:
        """W x + b."""
        return F.linear(self.x, self.weight, self.bias)

    def lora(self) -> Tensor:
        """W x + b + B A x."""
        return self.frozen() + F.linear(F.linear(self.x, self.a), self.b)

    def atoms(self, gate: AtomGate = GATE) -> Tensor:
        """The frozen layer with the atoms that every token chooses."""
        atoms = ModuleAtoms((SITE,), (self.bank,))
        return add_atoms(self.frozen(), self.x, atoms, gate, training=torch.is_grad_enabled())

    def rough(self) -> Tensor:
        """As `atoms` in evaluation, where none learns, with the scores of all in bfloat16."""
        return add_atoms(self.frozen(), self.x, self.stored, ROUGH)

    def others(self) -> float:
        """Share of the tokens that keep other atoms by scores in bfloat16 than by exact ones."""
        (bank,) = self.stored.banks
        kept = [
            activations(self.x, bank, gate, training=True) > 0
            for gate in (SOFT, replace(SOFT, scores="bf16"))
        ]
        return float((kept[0] != kept[1]).any(dim=-1).float().mean())

    def wide(self) -> Tensor:
        """The same with tensors over all atoms, as one would write it first; no threshold."""
        z = F.linear(self.x, self.bank.keys)
        scores = z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        best, places = scores.topk(GATE.topk, dim=-1)
        weights = (best / GATE.temperature).softmax(dim=-1)
        gate = torch.zeros_like(z).scatter(-1, places, weights)
        return self.frozen() + (gate * z) @ self.bank.values

    def evaluate(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        """A call of `forward` without gradients."""

        def call() -> object:
            with torch.inference_mode():
                return forward()

        return call

    def train(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        """A call of `forward` and its backward pass."""
        leaves = (self.x, self.a, self.b, self.bank.keys, self.bank.values)

        def call() -> object:
            for leaf in leaves:
                leaf.grad = None
            forward().backward(self.gradient)
            return None

        return call


def timed(count: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Evaluation, and forward + backward, with a bank of `count` atoms."""
    layer = Layer(count, device)
    with torch.inference_mode():
        # Without the threshold, which no random key of 800 reaches.
        ours, wide = layer.atoms(replace(GATE, threshold=-1.0)), layer.wide()
        relative = float((ours - wide).norm() / (wide - layer.frozen()).norm())
    if not relative < 1e-3:
        raise AssertionError(f"the outputs differ by {relative:.2g} of what the atoms add")
    cases: list[dict[str, Any]] = []
    forwards = {"frozen": layer.frozen, "lora": layer.lora, "atoms": layer.atoms}
    ways = (("evaluation", layer.evaluate), ("forward + backward", layer.train))
    for (what, way), limit in zip(ways, limits(count), strict=True):
        progress(f"{what}, {count} atoms")
        seconds = interleaved({name: way(call) for name, call in forwards.items()}, repeats)
        name = f"{what}, {count} atoms, {RANK} kept"
        lora = ratio(seconds, "lora", "frozen")
        more = {"lora / frozen": lora, "relative_difference": relative}
        cases.append(case(name, seconds, "atoms", "frozen", at_most=limit, **more))
        progress(f"{name}: lora / frozen = {lora['median']:.3f}")
    return cases


def roughly(count: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Evaluation with scores in bfloat16, where a bank of `count` atoms is large enough.

    The limit is what all exact scores and the layer are in products: no exact way is below it.
    """
    if count < WORTH * RANK:
        return []
    layer = Layer(count, device)
    calls = {"frozen": layer.frozen, "atoms": layer.rough}
    seconds = interleaved({name: layer.evaluate(call) for name, call in calls.items()}, repeats)
    name, limit = f"evaluation, {count} atoms, scores in bf16", round(1 + count / WIDTH, 2)
    with torch.inference_mode():
        others = layer.others()
    return [
        case(name, seconds, "atoms", "frozen", at_most=limit),
        figure(f"{name}: tokens that keep other atoms", "share", others, 0.001),
    ]


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of different memory with a row for every token that autograd keeps for a call."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if BATCH * TOKENS in (tensor.shape[0], tensor.shape[:-1].numel()):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(kept.values())


def saved(count: int, device: str) -> dict[str, Any]:
    """Saved activations of the gate over those of the obvious form."""
    layer = Layer(count, device)
    ours, wide = kept_bytes(layer.atoms), kept_bytes(layer.wide)
    own = layer.x.untyped_storage().nbytes()
    value = ours / wide
    progress(f"saved activations, {count} atoms: {ours:,} of {wide:,} bytes")
    return {
        "name": f"saved activations, {count} atoms",
        "what": "atoms / wide",
        "value": value,
        "limit": "<= 0.25",
        "passed": value <= 0.25,
        "bytes": {"atoms": ours, "wide": wide, "input": own},
        "without_input": (ours - own) / (wide - own),
    }
