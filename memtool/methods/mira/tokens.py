"""The weights of single tokens: every block of the running pass is asked as tokens come.

There is no look ahead: a block's keys meet its own input, which is that of the adapted model, at
prompt tokens and at generated ones alike; or the mean of it so far (`memory.look_at` prefix). What
they were solved from are states of the frozen model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.devices import in_float32
from memtool.learning.looks import SoFar, directions
from memtool.memories.separation import SeparationFunction
from memtool.methods.mira.ask import added_up, joined
from memtool.methods.routed.memory import Routing, Way, spread_over


class TokenRouting(Routing):
    """Adapters (t), and keys of every block that every token meets.

    `keys` (blocks, k, dim + 1) are those of all tasks, `rows` (k,) the task of each, an index.
    """

    keys: Tensor
    rows: Tensor

    def __init__(
        self, made: Routing, separate: SeparationFunction, dim: int, *, prefix: bool = False
    ) -> None:
        """`made` has the adapters and keys (blocks, m, d + 1) of every task, for blocks of `dim`.

        With `prefix` a token sees the mean of all so far. Where states are narrowed to d, the keys
        are widened instead, once.
        """
        rule, look, memories = made._rule, made.look, made.memories
        owners = made.owners.tolist()
        super().__init__(made.values, owners, made.kept, rule, made.name, look, memories)
        keys, rows = joined([one["key"] for one in self.kept])
        if keys.shape[-1] <= dim:
            wide = directions(dim, keys.shape[-1] - 1, keys.device)
            keys = torch.cat([keys[..., :-1] @ wide.T, keys[..., -1:]], dim=-1)
        self.register_buffer("keys", keys)
        self.register_buffer("rows", rows)
        self._separate = separate
        self._prefix = prefix
        self.steady = not prefix

    def of_tokens(self, block: int, hidden: Tensor) -> Tensor:
        """The weights (..., adapters) of tokens for which a block has (..., dim) to see."""
        with torch.autocast(hidden.device.type, enabled=False):
            wide = in_float32(hidden)
            keys = self.keys[block].to(wide.dtype)
            seen = F.layer_norm(wide, wide.shape[-1:])
            shares = self._separate(seen @ keys[:, :-1].T + keys[:, -1])
            return spread_over(added_up(shares, self.rows, len(self._names)), self.owners)

    def recalled(self, lm: CausalLM, prompts: Tensor, way: Way | None = None) -> Recall:
        """What prompts and their answers recall, token by token; nothing runs before."""
        del lm
        return self._recall(prompts, None, way)

    def asked(self, lm: CausalLM, prompts: Tensor) -> tuple[Recall, Callable[[], Tensor]]:
        """As `Routing.asked`; the weights (b, blocks, adapters) are means over the tokens."""
        del lm
        seen: dict[int, Tensor] = {}
        real = (prompts != PAD).float()[:, None, :, None]

        def told() -> Tensor:
            return (_of_blocks(seen) * real).sum(dim=2) / real.sum(dim=2)

        return self._recall(prompts, seen), told

    @torch.no_grad()
    def by_token(self, lm: CausalLM, prompts: Tensor) -> Tensor:
        """The weights (b, blocks, n, adapters) of the tokens of prompts (b, n), as they pass."""
        seen: dict[int, Tensor] = {}
        lm.hidden(prompts, self._recall(prompts, seen))
        return _of_blocks(seen)

    @torch.no_grad()
    def weighed(self, lm: CausalLM, prompts: Tensor) -> Tensor:
        """The mean weights (b, blocks, adapters) of the tokens of prompts; padding is none."""
        recall, told = self.asked(lm, prompts)
        lm.hidden(prompts, recall)
        return told()

    def _recall(
        self, prompts: Tensor, seen: dict[int, Tensor] | None, way: Way | None = None
    ) -> Recall:
        """What tokens recall in one run; in `seen` the weights of every block at the prompts."""
        values, so_far = self.values, SoFar(prompts) if self._prefix else None
        if not isinstance(values, AdapterValues):  # any token may ask for any of them
            values = values.take(range(len(values)), prompts.device)

        def recall(block: int, hidden: Tensor) -> Mixture | None:
            here = values.block(block)
            if here is None and seen is None:
                return None
            weights = self.of_tokens(block, hidden if so_far is None else so_far(block, hidden))
            weights = weights if way is None else way(weights)
            if seen is not None:
                seen.setdefault(block, weights)
            return None if here is None else Mixture.weighted(here, weights, "delta")

        return recall


def _of_blocks(seen: Mapping[int, Tensor]) -> Tensor:
    """What was seen in every block, (b, blocks, n, adapters)."""
    return torch.stack([seen[block] for block in range(len(seen))], dim=1)
