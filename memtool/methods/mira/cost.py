"""What a memory adds to a model, counted before anything is learned."""

from __future__ import annotations

from dataclasses import dataclass

from memtool.adapters.layout import Layout
from memtool.backbones.causal_lm import model_source
from memtool.backbones.interface import Backbone
from memtool.learning.looks import PART_WIDE, PromptLook, is_seen_before
from memtool.memories.index import index_bytes
from memtool.methods.mira.indexed import Searched, searched
from memtool.methods.mira.keys import are_drawn
from memtool.methods.mira.look import passes_of, width_of
from memtool.methods.mira.read import decoder_width, read_numbers
from memtool.methods.mira.recall import memory_blocks
from memtool.methods.pieces import rows_bytes
from memtool.settings import Config
from memtool.streams.task import Stream


@dataclass(frozen=True)
class ImageCost:
    """What an image costs beside the pass under what it recalls, in passes of the whole model.

    `frozen` without any adapter, `first_adapter` under that of the first task. `keys_bytes` and
    `queries_bytes`, the moments that keys are solved from, are those of all tasks in the store.
    `test_steps` are steps at test time, each a pass forward and back under what it recalls.
    `sums_bytes` are those of what the queries of all tasks add up to, where keys go by it.
    `read_numbers` learn beside values: keys, query modules and decoders, of the adapters of all
    tasks, which have `adapter_numbers`; a decoder has a hidden layer `read_width` wide, else None.
    `searched` says how the keys of all tasks are, `none`: all are scored; `index_bytes` are those
    of the files of an index.
    """

    scope: str
    frozen: float
    first_adapter: float
    keys_bytes: int
    queries_bytes: int
    sums_bytes: int
    test_steps: int
    read: str
    read_width: int | None
    read_numbers: int
    adapter_numbers: int
    searched: Searched
    index_bytes: int


def image_cost(config: Config, stream: Stream, backbone: Backbone, layout: Layout) -> ImageCost:
    """The cost of a memory of all tasks of a stream, of adapters of a layout."""
    memory, blocks = config.memory, len(layout.blocks)
    passes = passes_of(memory, config.head, backbone.depth, layout.blocks[0])
    asked = memory_blocks(memory, backbone, layout.blocks)
    width, memories = width_of(memory, backbone, asked), len(asked)
    by_class = memory.keys_of == "class"
    counted = [len(task.classes) if by_class else 1 for task in stream.tasks]
    rows = len(stream.tasks) * config.adapter.per_task * max(counted)
    in_turn = config.stream.setting == "dg" and config.stream.held_out is None
    adapters = (len(stream.tasks) - in_turn) * config.adapter.per_task  # of one memory
    ranks = adapters * layout.rank * (1 if memory.scope == "block" else blocks)
    beside = read_numbers(memory, width, memories=memories, rows=ranks)
    means = memories * sum(count * width for count in counted)
    second = memories * width**2
    drawn = are_drawn(config.consolidate, memory)
    keyed = width + memory.key_bias
    search = searched(memory, adapters, backbone.device)
    return ImageCost(
        scope=memory.scope,
        frozen=passes.get("frozen", 0.0),
        first_adapter=passes.get("first", 0.0),
        keys_bytes=4 * memories * rows * keyed,
        queries_bytes=8 * (means + len(counted) * second),
        sums_bytes=0 if drawn else rows_bytes(8 * means) + 8 * second,
        test_steps=0 if memory.test_time == "none" else memory.test_steps,
        read=memory.read,
        read_width=decoder_width(memory, width, ranks) if memory.read == "decoder" else None,
        read_numbers=memories * adapters * max(counted) * keyed + beside,
        adapter_numbers=adapters * layout.numel,
        searched=search,
        index_bytes=memories * index_bytes(adapters, keyed) if search == "usearch" else 0,
    )


@dataclass(frozen=True)
class Cost:
    """Of a memory of prompts: `passes` of the frozen model over a prompt, before it is answered.

    `first_adapter` are those under the adapters of the first task.
    `weights` of a prompt of `tokens` tokens. `keys_bytes` in the store, where every task has as
    many clusters as it may. Multiply-adds of a token: `mixing` with all adapters at once, `asking`
    where every token does, and of the `model` itself.
    """

    scope: str
    passes: int
    first_adapter: int
    tokens: int
    weights: int
    keys_bytes: int
    mixing: int
    asking: int
    model: int


def cost_of(config: Config, *, tasks: int, numbers: int, parameters: int, tokens: int) -> Cost:
    """The cost of adapters of so many `numbers`, one for each of `tasks`.

    `parameters` are those of the model, of which only config.json is read; `tokens` those of a
    prompt. An adapter has as many numbers as multiply-adds of a token. Raises ConfigError for a
    look at a block that the model does not have.
    """
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(model_source(config.backbone), trust_remote_code=False)
    depth, dim, memory = found.num_hidden_layers, found.hidden_size, config.memory
    apart = memory.scope != "model"
    look = PromptLook.of(memory)
    look.blocks(depth)
    width = look.width_of(depth, dim, found.vocab_size)
    memories = depth if apart else 1
    if apart:
        width -= (depth - 1) * min(PART_WIDE, dim)  # what the other blocks see
    adapters, keys = tasks * config.adapter.per_task, tasks * memory.clusters
    by_token = memory.scope == "token"
    later = is_seen_before(config.adapted_from(depth), look.seen_at(depth))
    runs = look.runs and not by_token and not later
    return Cost(
        scope=memory.scope,
        passes=int(runs and "frozen" in look.passes),
        first_adapter=int(runs and "first" in look.passes),
        tokens=tokens,
        weights=memories * adapters * (tokens if by_token else 1),
        keys_bytes=4 * memories * adapters * memory.clusters * (width + 1),
        mixing=adapters * numbers,
        asking=depth * keys * (dim + 1) if by_token else 0,
        model=parameters,
    )
