"""Memories with keys of their own: each block looks at its input and mixes its adapters.

The memory of MIRA. A block's query q meets the block's keys K (t, d_k); the scores are their
similarity, the coefficients their separation: a = separation(similarity(g(h), K)). An adapter may
have several keys, one for every kind of input that needs it; their coefficients add up. A
memory may be read otherwise: by a query that settles first (`hopfield.settled`), or with a decoder
that tells the ranks of an adapter apart (`decoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memtool.devices import at_hand, sent
from memtool.errors import MismatchError
from memtool.memories.decoder import RankDecoder
from memtool.memories.hopfield import settled
from memtool.memories.novelty import LIMIT, Reaches
from memtool.memories.query import QueryModule
from memtool.memories.search import LEAST_KEYS, SEARCHED, KeySearch, Search, Searcher
from memtool.memories.separation import SeparationFunction, largest_shares, separation
from memtool.memories.similarity import SimilarityFunction, over_memories, similarity
from memtool.sections import MemorySettings


class Answer(NamedTuple):
    """What a memory recalls for a batch.

    coefficients (batch, t); near (n,) adapters outside of which they are zero, ascending, or None:
    perhaps nowhere; added (batch, places, t, rank) by the decoder to every rank, or None.
    """

    coefficients: Tensor
    near: Tensor | None
    added: Tensor | None


class BlockMemory(nn.Module):
    """The memory of one block; its `keys` and its query module are what it learns.

    keys (t, m · d_k): m keys of every adapter, one after another; `several` says whether m is more
    than one. With `topk` only so
    many adapters keep their coefficients, shares of one, scaled to sum to one again. `most` says
    that the separation gives all but so many of the highest scores, and those equal to them, no
    coefficient: then of many keys only the nearest are scored, which `searched_by` finds:
    exactly, or in an index that may miss one. `uncut` gives the
    shares of all of which only the largest are kept. With `reaches`
    an input whose novelty is above `LIMIT` has no coefficient: it is left to the frozen model.
    `normed` divides every entry of the keys by its norm over all of them, at every look.
    Before its coefficients are read a query takes so many `steps` toward the mixture of the keys,
    by `rate`; its constant stays. That mixture is by `settles`, which is its separation where none
    is given. A `decoder` may be put beside the keys.
    """

    decoder: RankDecoder | None
    searched_by: Searcher

    def __init__(
        self,
        keys: Tensor,
        query: QueryModule,
        similarity: SimilarityFunction,
        separation: SeparationFunction,
        topk: int | None = None,
        reaches: Reaches | None = None,
        *,
        most: int | None = None,
        uncut: SeparationFunction | None = None,
        normed: bool = False,
        steps: int = 0,
        rate: float = 1.0,
        settles: SeparationFunction | None = None,
    ) -> None:
        """Keys (t, m · d_k) are copied. Raises MismatchError when they do not fit the queries."""
        super().__init__()
        if keys.ndim != 2 or not keys.numel() or keys.shape[1] % query.width:
            raise MismatchError(
                f"keys of shape {tuple(keys.shape)}",
                expected=f"(adapters, {query.width}), with at least one adapter, or a multiple of "
                f"{query.width}",
            )
        self.keys = nn.Parameter(keys.detach().clone())
        self.query = query
        self.several = keys.shape[1] != query.width
        self.similarity = similarity
        self.separation = separation
        self.topk = topk
        self.most = most
        self.uncut = uncut
        self.reaches = reaches
        self.normed = normed
        self.steps = steps
        self.rate = rate
        self.settles = separation if settles is None else settles
        self.decoder = None
        self.searched_by = KeySearch
        self._searched: tuple[object, Search] | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether few adapters have a coefficient for an input, and the others teach it nothing."""
        return self.most is not None or self.topk is not None

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores (batch, t · m) of hidden states (batch, tokens, dim)."""
        return self._similar(self.query(hidden))

    def coefficients(self, hidden: Tensor) -> Tensor:
        """Coefficients (batch, t) of hidden states (batch, tokens, dim)."""
        return self.answer(self.query(hidden))

    def read(self, hidden: Tensor) -> Answer:
        """What hidden states (batch, tokens, dim) recall."""
        query = self.query
        queries = query(hidden)
        added = None if self.decoder is None else self.decoder(queries[:, : query.dim])
        coefficients, near = self._recalled(self.settled(queries))
        return Answer(coefficients, near, added)

    def answer(self, queries: Tensor) -> Tensor:
        """Coefficients (batch, t) of queries (batch, d_k)."""
        return self._recalled(self.settled(queries))[0]

    def left_out(self, queries: Tensor) -> Tensor | None:
        """The share (batch,) of the softmax of all that a cut leaves out, of queries (batch, d_k).

        None where nothing is left out.
        """
        if self.uncut is None:
            return None
        settled = self.settled(queries)
        shares = self._by_adapter(self.uncut(self._similar(settled)))
        return 1 - (shares * (self._recalled(settled)[0] != 0)).sum(dim=1)

    def missed(self, queries: Tensor) -> Tensor | None:
        """The share (batch,) of what has a coefficient under all scores that a search did not find.

        Of queries (batch, d_k). None where keys are searched exactly.
        """
        if self.searched_by is KeySearch:
            return None
        settled = self.settled(queries)
        known = self.separation(self._similar(settled)) != 0
        found = self._separated(settled)[0] != 0
        return (known & ~found).sum(dim=1) / known.sum(dim=1)

    def _by_adapter(self, shares: Tensor) -> Tensor:
        """Shares (batch, t · m) of keys added up by adapter (batch, t)."""
        if not self.several:
            return shares
        return shares.unflatten(1, (len(self.keys), -1)).sum(dim=-1)

    def _near(self, queries: Tensor) -> Tensor | None:
        """What `Search.near` gives for queries; None: all are scored, or they are not searched."""
        if self.most is None or self.normed or self.several or self.similarity not in SEARCHED:
            return None
        keys = self.keys
        if (
            len(keys) < LEAST_KEYS
            or (keys.requires_grad and torch.is_grad_enabled())  # they change at every step
            or not at_hand(keys)  # the product of a device is fast enough
            or {keys.dtype, queries.dtype} != {torch.float32}
        ):
            return None
        state = (keys.data_ptr(), None if keys.is_inference() else keys._version)
        if self._searched is None or self._searched[0] != state:
            constant = self.query.bias
            self._searched = (state, self.searched_by(keys, self.similarity, constant=constant))
        near = self._searched[1].near(queries, self.most)
        return near if len(near) else None

    def _separated(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shares (batch, t · m) of keys, and the keys (n,) that are near, as `Answer.near`."""
        near = self._near(queries)
        if near is None:
            return self.separation(self._similar(queries)), None
        whole = queries.new_zeros(len(queries), len(self.keys))
        if near.ndim == 1:
            some = self.separation(self.similarity(queries, self.asked_keys[near]))
            return whole.index_copy(1, near, some), near
        # Each by its own: what an input recalls does not depend on the others of its batch.
        union, place = near.unique(return_inverse=True)
        scores = self.similarity(queries, self.asked_keys[union]).gather(1, place)
        return whole.scatter(1, near, self.separation(scores)), union

    def _recalled(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Coefficients (batch, t) of queries that settled, and the adapters that are near."""
        shares, near = self._separated(queries)
        shares = self._by_adapter(shares)
        if self.topk is not None:
            shares = largest_shares(shares, self.topk)
        if self.reaches is not None:
            far = self.reaches(queries[None, :, : self.query.dim]) > LIMIT
            shares = shares.masked_fill(sent(far, shares.device).unsqueeze(1), 0.0)
        return shares, near

    def settled(self, queries: Tensor) -> Tensor:
        """Queries (batch, d_k) after the steps of this memory; without any as they are."""
        if not self.steps:
            return queries
        dim = self.query.dim
        keys = self.asked_keys[:, :dim]

        def score(bare: Tensor) -> Tensor:
            return self._similar(self.query.whole(bare))

        bare = settled(queries[:, :dim], keys, score, self.settles, self.steps, self.rate)
        return self.query.whole(bare)

    def _similar(self, queries: Tensor) -> Tensor:
        return self.similarity(queries, self.asked_keys)

    @property
    def asked_keys(self) -> Tensor:
        """Keys (t · m, width) as they are asked: those of one adapter after another."""
        keys = self.keys.reshape(-1, self.query.width) if self.several else self.keys
        return over_memories(keys) if self.normed else keys

    def forward(self, hidden: Tensor) -> Tensor:
        """As `coefficients`."""
        return self.coefficients(hidden)


class KeyedMemory(nn.Module):
    """One `BlockMemory` for each of the given blocks of a backbone."""

    def __init__(self, blocks: Sequence[int], memories: Sequence[BlockMemory]) -> None:
        """Raises MismatchError when blocks repeat, or are not one for each memory."""
        super().__init__()
        if len(set(blocks)) != len(memories) or len(blocks) != len(memories) or not memories:
            raise MismatchError(
                f"{len(memories)} block memories for blocks {list(blocks)}",
                expected="one for each block",
            )
        self.blocks = tuple(blocks)
        self.memories = nn.ModuleList(memories)
        self._of_block = dict(zip(self.blocks, memories, strict=True))

    @classmethod
    def from_settings(
        cls,
        settings: MemorySettings,
        blocks: Sequence[int],
        dim: int,
        keys: Tensor,
        *,
        prefix_tokens: int = 1,
        norms: Sequence[nn.LayerNorm] = (),
        generator: torch.Generator | None = None,
    ) -> KeyedMemory:
        """A memory over keys (len(blocks), t, m · (dim + 1)) of blocks that are `dim` wide.

        Without `memory.key_bias` keys are `dim` wide. `norms` are the first norms of the blocks,
        for `memory.query_norm` block. `generator` draws the first weights of mlp query modules.
        Routing "lda" and "prototype" have a similarity and a separation of their own: the highest
        key takes all. Where adapters have several keys, separation "topk" keeps adapters, after
        their keys were added up. Raises MismatchError for keys or norms of other blocks.
        """
        if settings.query_norm == "block" and len(norms) != len(blocks):
            raise MismatchError(
                f"{len(norms)} first norms of {len(blocks)} blocks",
                expected="one for each, under memory.query_norm block",
            )
        if keys.ndim != 3 or len(keys) != len(blocks):
            raise MismatchError(
                f"keys of shape {tuple(keys.shape)} for {len(blocks)} blocks",
                expected=f"({len(blocks)}, adapters, {dim + settings.key_bias})",
            )
        each: list[bool | nn.LayerNorm] = [settings.query_norm == "layer"] * len(blocks)
        if settings.query_norm == "block":
            each = [*norms]
        cut, uncut = None, None
        match settings.routing:
            case "mixture":
                score, name = similarity(settings.similarity), settings.separation
                if name == "topk":
                    uncut = separation("softmax", beta=settings.beta)
                if name == "topk" and settings.keys_of == "class":
                    name, cut = "softmax", settings.topk
            case "lda":
                score, name = similarity("scaled-dot"), "max"
            case "prototype":
                score, name = similarity("euclidean"), "max"
        separate = separation(name, beta=settings.beta, topk=settings.topk)
        return cls(
            blocks,
            [
                BlockMemory(
                    block_keys,
                    QueryModule(
                        settings.query,
                        dim,
                        settings.token,
                        norm=norm,
                        prefix_tokens=prefix_tokens,
                        bias=settings.key_bias,
                        centred=settings.centre != "none",
                        generator=generator,
                    ),
                    score,
                    separate,
                    cut,
                    most=settings.most,
                    uncut=uncut,
                    normed=settings.key_norm == "memories",
                    steps=settings.read_steps if settings.read == "energy" else 0,
                    rate=settings.read_rate,
                )
                for block_keys, norm in zip(keys, each, strict=True)
            ],
        )

    def __getitem__(self, block: int) -> BlockMemory:
        """The memory of a block of the backbone. Raises MismatchError for a block without one."""
        memory = self._of_block.get(block)
        if memory is None:
            raise MismatchError(
                f"block {block} has no memory", expected=f"one of {list(self.blocks)}"
            )
        return memory

    def coefficients(self, block: int, hidden: Tensor) -> Tensor:
        """Coefficients (batch, t) of a block for its input (batch, tokens, dim)."""
        return self[block].coefficients(hidden)

    def read(self, block: int, hidden: Tensor) -> Answer:
        """As `BlockMemory.read`, of a block for its input (batch, tokens, dim)."""
        return self[block].read(hidden)

    def scores(self, block: int, hidden: Tensor) -> Tensor:
        """Scores (batch, t · m) of a block for its input (batch, tokens, dim)."""
        return self[block].scores(hidden)

    def keys(self) -> Tensor:
        """A copy of all keys (len(blocks), t, m · d_k), detached."""
        return torch.stack([self[block].keys.detach() for block in self.blocks])

    def set_keys(self, keys: Tensor) -> None:
        """Replace all keys by (len(blocks), t, m · d_k), of the shape that they have."""
        with torch.no_grad():
            for block, here in zip(self.blocks, keys, strict=True):
                self[block].keys.copy_(here)


def centre_of(memory: KeyedMemory) -> Tensor | None:
    """What is taken from the queries of every block (len(blocks), dim), or None."""
    found = [memory[block].query.centre for block in memory.blocks]
    parts = [one for one in found if one is not None]
    return torch.stack(parts) if parts else None


def set_centre(memory: KeyedMemory, centre: Tensor) -> None:
    """Take `centre` (len(blocks), dim) from queries; of memories that were made for it."""
    for block, here in zip(memory.blocks, centre, strict=True):
        kept = memory[block].query.centre
        if kept is None:
            raise MismatchError(
                f"a centre for block {block}, whose queries are not centred",
                expected="memory.centre first-task",
            )
        kept.copy_(here)
