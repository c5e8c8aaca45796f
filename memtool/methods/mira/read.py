"""How a memory is read: as a mixture, by a query that settles first, or with a decoder beside.

    mixture   the weights of the query as it is, a_t for every rank of adapter t
    energy    ξ ← (1 − η) ξ + η Σ_t a_t k_t for some steps, then the weights of ξ; it learns nothing
              of its own, and no step is the mixture
    decoder   a_t + G(q)_ptk for rank k of adapter t in block p (`memtool.memories.decoder`)

A decoder learns with the keys, through the recalled mixture, and grows with the adapters: what was
there stays, and new rows begin at zero. Under `consolidate.protect` freeze its hidden layer and the
rows of older adapters stay bit for bit; the rows of new adapters answer to old inputs, too, as new
keys do. Under dual-gpm nothing moves in the span of what past tasks gave it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError, CorruptError
from memtool.memories import query
from memtool.memories.decoder import RankDecoder, layer_of, numbers_of, width_for
from memtool.memories.keyed import KeyedMemory
from memtool.sections import MemorySettings
from memtool.tensor_bytes import read_tensors

DECODERS = "decoders"
"""The blob of the decoders of all memories: `inner`, `inner_bias`, `outer` and `outer_bias`."""

_WHERE = f"blob {DECODERS!r}"


# Sizes -------------------------------------------------------------------------------------------


def decoder_width(settings: MemorySettings, dim: int, rows: int) -> int:
    """The hidden width of a decoder of queries (dim,) with so many rows, as the settings say.

    Raises ConfigError where even one hidden unit is more than the query module that it is measured
    by.
    """
    if isinstance(settings.read_width, int):
        return settings.read_width
    most = query.numbers_of(settings.read_width, dim)
    width = width_for(most, dim, rows)
    if not width:
        raise ConfigError(
            f"memory.read_width {settings.read_width}: a decoder of one hidden unit over {rows} "
            f"ranks learns {numbers_of(1, dim, rows):,} numbers",
            expected=f"at most {most:,}, those of such a query module of {dim} wide queries",
            remedy="--set memory.read_width=8",
        )
    return width


def read_numbers(settings: MemorySettings, dim: int, *, memories: int, rows: int) -> int:
    """How many numbers learn beside the keys: of query modules, and of decoders of so many rows."""
    each = query.numbers_of(settings.query, dim)
    if settings.read == "decoder":
        each += numbers_of(decoder_width(settings, dim, rows), dim, rows)
    return memories * each


# Decoders ----------------------------------------------------------------------------------------


def places_of(settings: MemorySettings, values: AdapterValues) -> int:
    """How many blocks a decoder adapts: its own, or all that are adapted."""
    return 1 if settings.scope == "block" else len(values.layout.blocks)


def add_decoders(
    memory: KeyedMemory,
    settings: MemorySettings,
    values: AdapterValues,
    *,
    before: KeyedMemory | None,
    adapters: int,
    generator: torch.Generator,
) -> None:
    """Put a decoder beside the keys of every block: that of `before`, grown, or a new one.

    `adapters` are those of all tasks of the stream, which say how wide a new one may be. Raises
    ConfigError for adapters of another rank, or in other blocks, than the decoder in memory is of.
    """
    places, rank, count = places_of(settings, values), values.layout.rank, len(values)
    for block in memory.blocks:
        known = before[block].decoder if before is not None else None
        here = memory[block]
        if known is None:
            dim, most = here.query.dim, max(adapters, count)
            width = decoder_width(settings, dim, most * places * rank)
            here.decoder = RankDecoder.fresh(
                dim, width, places=places, adapters=count, rank=rank, generator=generator
            )
            continue
        if (known.places, known.rank) != (places, rank):
            raise ConfigError(
                f"memory.read decoder over adapters of rank {rank} in {places} blocks, and the "
                f"decoder in memory is of rank {known.rank} in {known.places}",
                expected="adapters of one shape: a decoder has a number for every rank of each",
                remedy="--set memory.read=mixture with another --store",
            )
        here.decoder = known.grown(count).to(here.keys.device)


def decoders_bytes(memory: KeyedMemory) -> bytes | None:
    """The decoders of a memory as a blob; None where it has none."""
    found = [memory[block].decoder for block in memory.blocks]
    decoders = [one for one in found if one is not None]
    if not decoders:
        return None
    each = (decoders[0].adapters, decoders[0].rows_each)
    outer = [one.outer for one in decoders]
    return _bytes(
        inner=[one.inner.weight for one in decoders],
        inner_bias=[one.inner.bias for one in decoders],
        outer=[one.weight.unflatten(0, each) for one in outer],
        outer_bias=[one.bias.unflatten(0, each) for one in outer],
    )


def load_decoders(
    memory: KeyedMemory, settings: MemorySettings, values: AdapterValues, data: bytes
) -> None:
    """Put the decoders of a blob beside the keys. Raises CorruptError where they do not fit."""
    parts = _parts(data)
    places, rank = places_of(settings, values), values.layout.rank
    dim = memory[memory.blocks[0]].query.dim
    memories, adapters, rows, _ = parts["outer"].shape
    found = (memories, parts["inner"].shape[-1], adapters, rows)
    expected = (len(memory.blocks), dim, len(values), places * rank)
    if found != expected or not parts["inner"].shape[1]:
        raise CorruptError(
            f"{_WHERE} holds {memories} decoders of {found[1]} wide queries, {adapters} adapters "
            f"and {rows} rows of each",
            expected="{}, {}, {} and {}, as the memory beside it".format(*expected),
        )
    for place, block in enumerate(memory.blocks):
        memory[block].decoder = RankDecoder(
            layer_of(parts["inner"][place].float(), parts["inner_bias"][place].float()),
            layer_of(
                parts["outer"][place].flatten(0, 1).float(),
                parts["outer_bias"][place].flatten().float(),
            ),
            places=places,
            rank=rank,
        )


def decoders_without(data: bytes, indices: Sequence[int]) -> bytes:
    """The blob for the adapters at these indices alone: their rows stay bit for bit.

    Raises CorruptError for anything but decoders of as many adapters.
    """
    parts = _parts(data)
    if max(indices) >= parts["outer"].shape[1]:
        raise CorruptError(
            f"{_WHERE} holds decoders of {parts['outer'].shape[1]} adapters",
            expected=f"more than {max(indices)}, as the keys",
        )
    picked = list(indices)
    changed = {name: [*parts[name][:, picked]] for name in ("outer", "outer_bias")}
    return _bytes(inner=[*parts["inner"]], inner_bias=[*parts["inner_bias"]], **changed)


def _bytes(**parts: Sequence[Tensor]) -> bytes:
    stacked = {name: torch.stack([*each]).detach().cpu() for name, each in parts.items()}
    return save({name: each.contiguous() for name, each in stacked.items()})


def _parts(data: bytes) -> dict[str, Tensor]:
    """U, c, V and e of all memories l, for adapters t of m rows each."""
    return read_tensors(
        data, _WHERE, inner="l h d", inner_bias="l h", outer="l t m h", outer_bias="l t m"
    )
