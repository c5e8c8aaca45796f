"""Query modules: what a block looks at to decide which adapters it recalls.

The g of MIRA: the block's input, pooled over tokens, normalised, through the identity, a linear
map or a small network.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from memtool.devices import in_float32, without_autocast
from memtool.errors import ConfigError, MismatchError, did_you_mean

QueryKind = Literal["identity", "linear", "mlp", "plain-mlp"]
QueryToken = Literal["class", "mean"]


def pooled(hidden: Tensor, token: str, prefix_tokens: int, *, norm: bool) -> Tensor:
    """Hidden states (batch, tokens, dim) as one vector each (batch, dim), float32 or better.

    `token`, `prefix_tokens` and `norm` as in `QueryModule`.
    """
    if token == "class":
        one = in_float32(hidden[:, 0])
    else:
        one = in_float32(hidden[:, prefix_tokens:]).mean(dim=1)
    return F.layer_norm(one, one.shape[-1:]) if norm else one


def require_token(token: str, prefix_tokens: int) -> None:
    """Raise ConfigError for a class token of a model that has no token before its patches."""
    if token == "class" and prefix_tokens < 1:
        raise ConfigError(
            "memory.token class on a backbone without class token",
            expected="mean: of its places, or of its patches",
            remedy="--set memory.token=mean",
        )


def numbers_of(kind: QueryKind, dim: int) -> int:
    """How many numbers a query module of queries (dim,) learns."""
    layers = {"identity": 0, "linear": 1, "mlp": 2, "plain-mlp": 2}[kind]
    return layers * dim * (dim + 1)


class QueryModule(nn.Module):
    """Hidden states (batch, tokens, dim) → queries (batch, dim + 1), or (batch, dim) without bias.

    What was pooled and normalised elsewhere, (batch, dim), is taken as it is.

    kind    "identity"; "linear", q ← W q + b from W = I, b = 0; "mlp", q ← q + V gelu(U q + c) + e
            from V = 0, e = 0: these three are the same function at the start. "plain-mlp",
            q ← V gelu(U q + c) + e, all drawn as linear layers are (the DG form of MIRA's authors).
    token   "class", the first token, or "mean", the mean of the tokens after the first
            `prefix_tokens` (class and register tokens).
    norm    layer-normalise the pooled token, without learned gain; or a layer norm, whose gain and
            bias are copied: every token goes through it before they are pooled.
    bias    append the constant 1, so that the last entry of a key is its bias.
    centred take `centre` (dim,), a buffer that begins at zero, from what g is given.

    Queries are float32 or better, also under autocast; `width` are their entries, and so those of
    a key. `generator` draws what is random of g.
    """

    def __init__(
        self,
        kind: str,
        dim: int,
        token: str = "class",
        *,
        norm: bool | nn.LayerNorm = True,
        prefix_tokens: int = 1,
        bias: bool = True,
        centred: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Raises ConfigError for an unknown kind or token, or a class token that is not there."""
        super().__init__()
        if token not in get_args(QueryToken):
            raise ConfigError(
                f"unknown query token {token!r}",
                expected=did_you_mean(token, get_args(QueryToken)),
            )
        require_token(token, prefix_tokens)
        self.kind = kind
        self.dim = dim
        self.token = token
        self.norm = norm is True
        self.prefix_tokens = prefix_tokens
        self.bias = bias
        self.width = dim + 1 if bias else dim
        self.centre: Tensor | None
        self.register_buffer("centre", torch.zeros(dim) if centred else None)
        # Of the backbone and no state of the memory: copies that move with it and are not saved.
        self.first_gain: Tensor | None
        self.first_bias: Tensor | None
        self.first_eps = 0.0
        gain, shift = None, None
        if isinstance(norm, nn.LayerNorm):
            gain, shift, self.first_eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("first_gain", _copied(gain), persistent=False)
        self.register_buffer("first_bias", _copied(shift), persistent=False)
        self._first = isinstance(norm, nn.LayerNorm)
        self.g: nn.Module
        match kind:
            case "identity":
                self.g = nn.Identity()
            case "linear":
                self.g = _linear(torch.eye(dim))
            case "mlp":
                hidden = torch.empty(dim, dim)
                nn.init.kaiming_uniform_(hidden, a=math.sqrt(5), generator=generator)
                self.g = _Residual(
                    nn.Sequential(_linear(hidden), nn.GELU(), _linear(torch.zeros(dim, dim)))
                )
            case "plain-mlp":
                self.g = nn.Sequential(_drawn(dim, generator), nn.GELU(), _drawn(dim, generator))
            case _:
                raise ConfigError(
                    f"unknown query module {kind!r}",
                    expected=did_you_mean(kind, get_args(QueryKind)),
                )

    def bare(self, hidden: Tensor) -> Tensor:
        """Queries (batch, dim) of hidden states (batch, tokens, dim), without the constant.

        Or of what was pooled elsewhere, (batch, dim). Raises MismatchError for another shape.
        """
        if hidden.ndim not in (2, 3) or hidden.shape[-1] != self.dim:
            raise MismatchError(
                f"hidden states of shape {tuple(hidden.shape)}",
                expected=f"(batch, tokens, {self.dim}), or (batch, {self.dim}) pooled before",
            )
        seen = self._before(hidden)
        if self.centre is not None:
            seen = seen - self.centre.to(seen.dtype)
        if self.kind == "identity":
            return seen
        with without_autocast(hidden):
            query: Tensor = self.g(seen)
            return query

    def _before(self, hidden: Tensor) -> Tensor:
        """What g is given (batch, dim) before it is centred; arguments as of `bare`."""
        if hidden.ndim == 2:
            return in_float32(hidden)
        if self._first:
            hidden = in_float32(hidden)
            affine = (self.first_gain, self.first_bias)
            gain, shift = (None if part is None else part.to(hidden.dtype) for part in affine)
            hidden = F.layer_norm(hidden, hidden.shape[-1:], gain, shift, self.first_eps)
        return pooled(hidden, self.token, self.prefix_tokens, norm=self.norm)

    def of_every_token(self, hidden: Tensor) -> Tensor:
        """Queries (batch · tokens, width) as if every token of (batch, tokens, dim) were asked."""
        alone = hidden.flatten(0, 1).unsqueeze(1)
        if self.token == "mean":  # the mean of one token behind as many prefix tokens as there are
            alone = alone.expand(-1, self.prefix_tokens + 1, -1)
        return self.forward(alone)

    def forward(self, hidden: Tensor) -> Tensor:
        """Queries (batch, width) of hidden states (batch, tokens, dim), or of pooled ones."""
        return self.whole(self.bare(hidden))

    def whole(self, bare: Tensor) -> Tensor:
        """Queries (batch, width) of those without the constant, (batch, dim)."""
        return F.pad(bare, (0, 1), value=1.0) if self.bias else bare


class _Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.inner(x)
        return result


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _drawn(dim: int, generator: torch.Generator | None) -> nn.Linear:
    """A square linear layer as torch draws one: weight and bias uniform within 1 / √dim."""
    layer = skip_init(nn.Linear, dim, dim)
    bound = 1 / math.sqrt(dim)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def _linear(weight: Tensor) -> nn.Linear:
    """A square linear layer of the given weight and zero bias; draws no random numbers."""
    layer = skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer
