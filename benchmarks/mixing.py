"""Adapters in the forward pass: a memory over ViT-B/16, and mixtures against PEFT's layers.

Four questions, the first three with a limit:

 * What does a memory of 20 adapters (rank 8 on q and v of all 12 blocks, coefficients per block and
   sample from the class token) add to the eval forward of ViT-B/16 in bf16, batch 32?
 * How much faster than PEFT's Arrow layer is a weighted mixture for every token, routing included?
 * How much faster than PEFT's `adapter_names` batch is a hard choice for every sample, on q and v?
 * What does a top-k mixture take by torch's grouped matrix product, over what runs by itself?

In all but the first the frozen product is not timed, as it is the same for both: each side gets
the frozen output ready and adds the adapters' part, in bf16. The outputs of the second and third
are compared first, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn

from benchmarks.timing import case, environment, figure, interleaved, progress, ratio
from memtool.adapters.layout import Layout, Site
from memtool.adapters.mixing import Mix, Mixture, add_grouped_mm, told_kernels
from memtool.adapters.picks import Picks
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.vit import VitBackbone

BATCH, TOKENS, WIDTH, RANK = 32, 197, 768, 8

Layer = Callable[[Tensor, Tensor], Tensor]
"""(x (b, n, d), frozen output y) to y with the adapters' part; y may be overwritten."""


def run(repeats: int, device: str = "cpu") -> dict[str, Any]:
    """All cases; the model's forward passes take seconds each, a layer's milliseconds."""
    with torch.inference_mode():
        parts = (over_the_backbone, against_arrow, against_names, in_groups)
        cases = [found for part in parts for found in part(repeats, device)]
    return {
        "benchmark": "mixing",
        "environment": environment(device),
        "passed": all(found["passed"] for found in cases),
        "cases": cases,
    }


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def over_the_backbone(repeats: int, device: str) -> list[dict[str, Any]]:
    """ViT-B/16 with a memory, over the same without."""
    progress("ViT-B/16, bf16, batch 32, 20 adapters of rank 8 on q and v of 12 blocks")
    vit = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
    backbone = VitBackbone(vit, "timm:vit_base_patch16_224", mean=(0.5,) * 3, std=(0.5,) * 3)
    backbone.to(device, torch.bfloat16)
    adapters = 20
    layout = Layout(backbone.sites(("q", "v")), RANK)
    flat = randn(adapters, layout.numel, seed=1, dtype=torch.bfloat16) * 0.02
    values = AdapterValues.from_flat(flat, layout, 1.0).to(device)
    keys = randn(backbone.depth, adapters, WIDTH, seed=2, dtype=torch.bfloat16, device=device)
    pixels = randn(BATCH, 3, 224, 224, seed=3, dtype=torch.bfloat16, device=device)

    def memory(mix: Mix) -> Recall:
        def recall(block: int, hidden: Tensor) -> Mixture | None:
            found = values.block(block)
            if found is None:
                return None
            query = F.layer_norm(hidden[:, 0].float(), (WIDTH,))
            scores = query @ keys[block].float().t() / WIDTH**0.5
            return Mixture.weighted(found, scores.softmax(dim=-1), mix)

        return recall

    seconds = interleaved(
        {
            "frozen": lambda: backbone.features(pixels),
            "params": lambda: backbone.features(pixels, memory("params")),
            "delta": lambda: backbone.features(pixels, memory("delta")),
        },
        repeats,
    )
    return [
        case("ViT-B/16 with memory, params", seconds, "params", "frozen", at_most=1.03),
        case("ViT-B/16 with memory, delta", seconds, "delta", "frozen", at_most=1.12),
    ]


def difference(ours: Tensor, peer: Tensor) -> float:
    """Their distance relative to the peer's length; refuses float32 outputs that differ."""
    relative = float((ours - peer).norm() / peer.norm())
    if not relative < 1e-5:
        raise AssertionError(f"the outputs differ by {relative:.2g} of their length")
    return relative


def arrow_layers(count: int, dtype: torch.dtype, device: str) -> tuple[Layer, Layer]:
    """PEFT's own Arrow layer with every expert kept, and the same mixture here."""
    layout = Layout((Site(0, "fc", "", WIDTH, WIDTH, 0, WIDTH),), RANK)
    flat = randn(count, layout.numel, seed=4, dtype=dtype) * 0.05
    named = layout.unflatten(flat)
    names = [f"task_{i}" for i in range(count)]
    lora_a, lora_b = nn.ModuleDict(), nn.ModuleDict()
    for i, name in enumerate(names):
        a = nn.Linear(WIDTH, RANK, bias=False, dtype=dtype)
        b = nn.Linear(RANK, WIDTH, bias=False, dtype=dtype)
        a.weight.copy_(named["fc.lora_A"][i])
        b.weight.copy_(named["fc.lora_B"][i])
        lora_a[name], lora_b[name] = a, b
    config = ArrowConfig(top_k=count, router_temperature=1.0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    arrow = ArrowLoraLinearLayer(WIDTH, config)
    arrow.build_prototypes(lora_a, lora_b)
    for part in (arrow, lora_a, lora_b):
        part.to(device)
    prototypes = arrow.prototypes = arrow.prototypes.to(device)
    scaling, dropout = dict.fromkeys(names, 1.0), nn.Identity()
    block = AdapterValues.from_flat(flat, layout, 1.0).to(device).block(0)
    assert block is not None

    def peer(x: Tensor, y: Tensor) -> Tensor:
        added: Tensor = y + arrow(x, lora_a, lora_b, dropout, scaling)
        return added

    def ours(x: Tensor, y: Tensor) -> Tensor:
        # Arrow's routing: softmax of the absolute response to each expert's prototype.
        coefficients = (x @ prototypes.t()).abs().softmax(dim=-1)
        return Mixture.weighted(block, coefficients).add_to(y, x, "fc")

    return peer, ours


def against_arrow(repeats: int, device: str) -> list[dict[str, Any]]:
    """Weighted mixtures for every token, in bf16."""
    cases = []
    x = randn(BATCH, TOKENS, WIDTH, seed=5, dtype=torch.bfloat16, device=device)
    y = torch.zeros_like(x)
    for count in (5, 10, 20, 40):
        peer, ours = arrow_layers(count, torch.float32, device)
        few = randn(4, TOKENS, WIDTH, seed=5, device=device)
        relative = difference(ours(few, torch.zeros_like(few)), peer(few, torch.zeros_like(few)))
        peer, ours = arrow_layers(count, torch.bfloat16, device)
        calls = {"arrow": partial(peer, x, y), "memtool": partial(ours, x, y)}
        seconds = interleaved(calls, repeats)
        name = f"mixture of {count} experts for each of {BATCH * TOKENS} tokens"
        cases.append(
            case(name, seconds, "arrow", "memtool", at_least=3.0, relative_difference=relative)
        )
    return cases


class Ready(nn.Module):
    """A base layer whose output is known already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """The output, whatever the input."""
        del x
        return self.output


def queries_and_values() -> Layout:
    """LoRA on q and v of a fused projection."""
    return Layout(
        tuple(
            Site(0, "qkv", name, WIDTH, WIDTH, first, 3 * WIDTH)
            for name, first in (("q", 0), ("v", 2 * WIDTH))
        ),
        RANK,
    )


def named_layers(count: int, dtype: torch.dtype, device: str) -> tuple[Layer, Layer]:
    """LoRA on q and v: two PEFT layers with a name for every sample, and the same choice here.

    Models whose q, k and v are layers of their own are what PEFT adapts this way. The peer adds to
    outputs (2, b, n, d), ours to rows of the fused output (b, n, 3 d).
    """
    layout = queries_and_values()
    flat = randn(count, layout.numel, seed=4, dtype=dtype) * 0.05
    named = layout.unflatten(flat)
    names = [f"task_{i}" for i in range(count)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q", "v"])
    layers: list[PeftLinear] = []
    for site in layout.sites:
        base = nn.Linear(WIDTH, WIDTH)
        peft = PeftLinear(base, names[0], config=config, r=RANK, lora_alpha=RANK)
        for name in names[1:]:
            peft.update_layer(name, RANK, lora_alpha=RANK, config=config)
        peft.to(device, dtype).eval()
        for i, name in enumerate(names):
            peft.lora_A[name].weight.copy_(named[f"{site.name}.lora_A"][i])
            peft.lora_B[name].weight.copy_(named[f"{site.name}.lora_B"][i])
        layers.append(peft)
    index = torch.randint(count, (BATCH,), generator=torch.Generator().manual_seed(7))
    chosen = [names[i] for i in index.tolist()]
    index = index.to(device)
    block = AdapterValues.from_flat(flat, layout, 1.0).to(device).block(0)
    assert block is not None

    def peer(x: Tensor, y: Tensor) -> Tensor:
        for peft, output in zip(layers, y, strict=True):
            peft.base_layer = Ready(output)
            peft(x, adapter_names=chosen)
        return y

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return Mixture.chosen(block, index).add_to(y, x, "qkv")

    return peer, ours


def against_names(repeats: int, device: str) -> list[dict[str, Any]]:
    """A hard choice for every sample, in bf16, for short and for long sequences."""
    count = 50
    peer, ours = named_layers(count, torch.float32, device)
    x = randn(BATCH, TOKENS, WIDTH, seed=5, device=device)
    q, _, v = ours(x, x.new_zeros(*x.shape[:-1], 3 * WIDTH)).chunk(3, dim=-1)
    relative = difference(torch.stack([q, v]), peer(x, x.new_zeros(2, *x.shape)))
    peer, ours = named_layers(count, torch.bfloat16, device)
    cases = []
    for tokens in (17, TOKENS):
        x = randn(BATCH, tokens, WIDTH, seed=5, dtype=torch.bfloat16, device=device)
        calls = {
            "adapter_names": partial(peer, x, x.new_zeros(2, *x.shape)),
            "memtool": partial(ours, x, x.new_zeros(*x.shape[:-1], 3 * WIDTH)),
        }
        seconds = interleaved(calls, 3 * repeats, inner=3)
        name = f"choice of 1 in {count} adapters, {BATCH} samples of {tokens} tokens"
        cases.append(
            case(
                name,
                seconds,
                "adapter_names",
                "memtool",
                at_least=5.0,
                relative_difference=relative,
            )
        )
    return cases


def in_groups(repeats: int, device: str) -> list[dict[str, Any]]:
    """Top 4 of 50 adapters by a product of groups of rows, in bf16; no limit."""
    count, kept = 50, 4
    layout = queries_and_values()
    flat = randn(count, layout.numel, seed=4, dtype=torch.bfloat16) * 0.05
    block = AdapterValues.from_flat(flat, layout, 1.0).to(device).block(0)
    assert block is not None
    cases = []
    for batch, tokens in ((32, 1), (256, 1), (32, 17), (32, TOKENS)):
        generator = torch.Generator().manual_seed(7)
        index = torch.rand(batch, count, generator=generator).topk(kept).indices
        picks = Picks(index.to(device), index.unique().to(device))
        weights = randn(batch, kept, seed=8, device=device).softmax(dim=-1)
        x = randn(batch, tokens, WIDTH, seed=5, dtype=torch.bfloat16, device=device)
        y = x.new_zeros(*x.shape[:-1], 3 * WIDTH)
        mixture = Mixture.weighted(block, weights, "delta", picks)
        grouped = partial(add_grouped_mm, y, x, block.modules["qkv"], block.scaling, weights, picks)
        calls = {"grouped_mm": grouped, "memtool": partial(mixture.add_to, y, x, "qkv")}
        ran: set[str] = set()
        with told_kernels(ran):
            calls["memtool"]()
        spread = ratio(interleaved(calls, 3 * repeats, inner=3), "grouped_mm", "memtool")
        name = f"top {kept} of {count} adapters, {batch} samples of {tokens} tokens"
        quartiles = [spread["lower_quartile"], spread["upper_quartile"]]
        what = f"grouped_mm / {ran.pop()}"
        cases.append(figure(name, what, spread["median"], None, quartiles=quartiles))
    return cases
