"""What a memory recalls for a query alone, and the adapter that it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from memtool.adapters.layout import Layout
from memtool.adapters.peft_files import write_peft
from memtool.adapters.stock import side_by_side
from memtool.errors import ConfigError, MismatchError
from memtool.methods.export import new_folders
from memtool.methods.mira.recall import MemoryModel
from memtool.methods.mira.state import MemoryState, Snapshot
from memtool.workspace import Workspace


def require_whole(state: MemoryState) -> None:
    """Raise ConfigError for a memory that does not recall adapters whole."""
    if state.memory.read == "decoder":
        raise ConfigError(
            "--out under memory.read decoder: what is recalled is no mixture of whole adapters",
            expected="one weight for all ranks of an adapter",
            remedy="memtool export --model FILE, which writes the whole memory as a program",
        )


def recalled_adapter(
    directory: Path, work: Workspace, snapshot: Snapshot, coefficients: Tensor
) -> Path:
    """Write the mixture of fixed coefficients (memories, t) as one PEFT adapter.

    Under delta it is the stack of all ranks, B scaled by its coefficient: rank t · r and equal to
    the mixture. Under params A and B are mixed, and the rank stays r. Raises ConfigError where a
    decoder weighs every rank of an adapter for each sample.
    """
    state, model, _ = snapshot.consolidated()
    require_whole(state)
    values = snapshot.values_of(snapshot.records)
    scaling, rank, count = values.scaling, values.layout.rank, len(values)
    tensors = values.layout.unflatten(values.flat())
    stacked = model.mix == "delta"
    layout = Layout(values.layout.sites, rank * count if stacked else rank)
    mixed: dict[str, Tensor] = {}
    for site in layout.sites:
        weights = _weights(model, coefficients, site.block).cpu().float()
        of_a, of_b = f"{site.name}.lora_A", f"{site.name}.lora_B"
        a, b = tensors[of_a], tensors[of_b]
        if stacked:
            mixed[of_a], mixed[of_b] = side_by_side(a, b, weights * scaling, site.groups)
        else:
            mixed[of_a] = torch.einsum("t,trd->rd", weights, a)
            mixed[of_b] = torch.einsum("t,tor->or", weights * scaling, b)
    with new_folders(directory) as (building,):
        # The scaling is in B already, so alpha / r is 1.
        write_peft(
            building,
            layout.flatten(mixed),
            layout,
            alpha=float(layout.rank),
            base_model=work.backbone.name,
        )
    return directory


def _weights(model: MemoryModel, coefficients: Tensor, block: int) -> Tensor:
    """The coefficients (t,) of a block: of its memory, of the one for all, or equal parts."""
    if model.settings.blocks is not None and block not in model.memory.blocks:
        count = coefficients.shape[1]
        return torch.full((count,), 1 / count)
    alone = model.settings.scope == "model"
    return coefficients[0 if alone else model.memory.blocks.index(block)]


def coefficients_for(model: MemoryModel, asked: Tensor, where: Path) -> Tensor:
    """Coefficients (memories, t) for a query (d,) of all memories, or (memories, d).

    Raises MismatchError, with the file that it came from, for one of another shape.
    """
    memories, dim = len(model.memory.blocks), model.memory[model.memory.blocks[0]].query.dim
    if asked.ndim == 1:
        asked = asked.expand(memories, -1)
    if tuple(asked.shape) != (memories, dim):
        raise MismatchError(
            f"{where}: query of shape {tuple(asked.shape)}",
            expected=f"({dim},) or ({memories}, {dim})",
        )
    rows = []
    for block, one in zip(model.memory.blocks, asked, strict=True):
        memory = model.memory[block]
        rows.append(memory.answer(memory.query.whole(one.to(memory.keys).unsqueeze(0)))[0])
    return torch.stack(rows).detach().cpu()
