"""What stands in front of the tokens of an image in one forward pass: learned prompts.

Of a batch of b images under p prompts of width d, in two forms:

    tokens      (b, p, d)               before the input of the first block, through all blocks
    attended    block: (b, 2, p, d)     keys and values that the attention of a block sees before
                                        its own

        attention = softmax(q [P_k; k]ᵀ / √d_head) [P_v; v]

Keys and values stand beside what the frozen projections (and norms of keys) make, head after head
as their rows are, and are projected by nothing themselves. Sources: prompt tuning, Lester et al.
2021, of Vision Transformers Jia et al. 2022; prefix tuning, Li & Liang 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from memtool.errors import MismatchError


@dataclass(frozen=True, eq=False)
class Prefix:
    """Prompts of one batch; see above for the shapes. Nothing of either form changes nothing.

    Features are pooled as the model does, without the prompt tokens.
    """

    tokens: Tensor | None = None
    attended: Mapping[int, Tensor] = field(default_factory=dict)

    def check(self, batch: int, dim: int, depth: int) -> None:
        """Raise MismatchError for what does not fit a batch of a model so wide and deep."""
        tokens = self.tokens
        if tokens is not None and (
            tokens.ndim != 3 or (len(tokens), tokens.shape[2]) != (batch, dim)
        ):
            raise MismatchError(
                f"prompt tokens of shape {tuple(tokens.shape)}", expected=f"({batch}, p, {dim})"
            )
        for block, given in self.attended.items():
            if not 0 <= block < depth:
                raise MismatchError(
                    f"keys and values for block {block}",
                    expected=f"a block from 0 to {depth - 1}",
                )
            if given.ndim != 4 or (*given.shape[:2], given.shape[3]) != (batch, 2, dim):
                raise MismatchError(
                    f"block {block}: keys and values of shape {tuple(given.shape)}",
                    expected=f"({batch}, 2, p, {dim})",
                )
