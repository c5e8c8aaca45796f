"""Layers of other people's models that take a mixture, although nothing hands it to them.

What a model of transformers is given beside its inputs reaches its attention only, and one of timm
takes nothing beside. So a model owns one `Call`, which each of its blocks and adapted layers was
given when it was built: a pass puts into it what is recalled, and takes it out when it ends,
however it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtool.adapters.convolution import Patches, Window
from memtool.adapters.layout import Site
from memtool.adapters.linear import Adapted, for_autocast
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall


class Reached(Exception):
    """The input (b, n, dim) of the block that a pass was to end at."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Call:
    """What one pass recalls, and the mixture of the block that is running.

    One pass at a time: another thread waits for its turn. `checkpoints` says that blocks are
    computed again for backward instead of kept. A pass ends by `Reached` at the block `until`.
    """

    def __init__(self) -> None:
        self.recall: Recall | None = None
        self.mixture: Mixture | None = None
        self.running = False
        self.checkpoints = False
        self.until: int | None = None
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model is in no pass, and waits for nobody."""
        return {"checkpoints": self.checkpoints}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.checkpoints = state["checkpoints"]

    def under(self, recall: Recall | None, run: Callable[[], Any], until: int | None = None) -> Any:
        """What `run` gives while its blocks recall this. Raises RuntimeError within a pass."""
        with self._alone():
            if self.running:
                raise RuntimeError("a model was asked anew while it runs")
            self.recall, self.running, self.until = recall, True, until
            try:
                return run()
            finally:
                self.recall, self.running, self.until = None, False, None

    def mixed(self, mixture: Mixture | None, run: Callable[[], Any]) -> Any:
        """What a block gives while its layers add this mixture."""
        with self._alone():
            before, self.mixture = self.mixture, mixture
            try:
                return run()
            finally:
                self.mixture = before

    def _alone(self) -> Any:
        # A compiled pass cannot wait: who compiles a model runs it in one thread.
        return nullcontext() if torch.compiler.is_compiling() else self._turn


class CalledBlock(nn.Module):
    """Stands where block `number` of a model stood; `sites` are its adapted layers by target.

    `seen` says how its input is handed to a recall, as tokens.
    """

    def __init__(
        self,
        layer: nn.Module,
        number: int,
        call: Call,
        sites: Mapping[str, Site],
        seen: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.number = number
        self._call = call
        self._sites = dict(sites)
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        """What the model asks of its blocks, as the kind of attention."""
        return _of_inner(self, name, "layer")

    def forward(self, hidden: Tensor, *args: Any, **given: Any) -> Any:
        """As the block, with what is recalled for its input (b, n, dim)."""
        call = self._call
        mixture = None
        if call.recall is not None or call.until == self.number:
            tokens = hidden if self._seen is None else self._seen(hidden)
            if call.until == self.number:
                raise Reached(tokens)
            mixture = None if call.recall is None else call.recall(self.number, tokens)
        if call.checkpoints and torch.is_grad_enabled():
            # The mixture goes along, as backward computes the block when no pass runs any more.
            run = partial(self._run, mixture)
            return checkpoint(run, hidden, *args, use_reentrant=False, **given)
        return self._run(mixture, hidden, *args, **given)

    def _run(self, mixture: Mixture | None, *args: Any, **given: Any) -> Any:
        return self._call.mixed(mixture, lambda: self.layer(*args, **given))

    def site(self, number: int, target: str) -> Site:
        """Where a target lies in this block, which is block `number`."""
        del number
        return self._sites[target]


class CalledLinear(Adapted):
    """Stands where a linear layer of any kind stood: its output, plus what the mixture adds."""

    def __init__(self, linear: nn.Module, name: str, call: Call) -> None:
        super().__init__()
        self.linear = linear
        self.name = name
        self._call = call

    def __getattr__(self, name: str) -> Any:
        """What the model asks of the layer, as its weight."""
        return _of_inner(self, name, "linear")

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, n, in_features) to (b, n, out_features).

        A batch may be folded into windows, sample after sample.
        """
        mixture = self._call.mixture
        if mixture is None:
            frozen: Tensor = self.linear(x)
            return frozen
        x = for_autocast(x)
        return mixture.over(len(x), self.name).add_to(self.linear(x), x, self.name)


class CalledConv(Adapted):
    """Stands where a convolution stood: its output, plus what the mixture adds.

    With `pads` the image is padded as TensorFlow's SAME before, whatever its size.
    """

    def __init__(self, conv: nn.Module, name: str, call: Call, window: Window, *, pads: bool):
        super().__init__()
        self.conv = conv
        self.name = name
        self.window = window
        self._pads = pads
        self._call = call

    def __getattr__(self, name: str) -> Any:
        """What the model asks of the layer, as its weight."""
        return _of_inner(self, name, "conv")

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) to (b, out_channels, h', w')."""
        mixture = self._call.mixture
        if mixture is None:
            frozen: Tensor = self.conv(x)
            return frozen
        x = for_autocast(x)
        mixture = mixture.over(len(x), self.name)
        return mixture.add_to_map(self.conv(x), self._padded(x), self.name, self.window)

    def tokens(self, x: Tensor) -> Tensor:
        """The patches (b, n, channels · kernel) of an input (b, channels, h, w)."""
        return Patches(self._padded(x), self.window).tokens()

    def _padded(self, x: Tensor) -> Tensor:
        if not self._pads:
            return x
        from timm.layers import pad_same  # as timm's own convolution, which this one stands for

        padded: Tensor = pad_same(x, self.window.kernel, self.window.stride)
        return padded


def _of_inner(module: nn.Module, name: str, inner: str) -> Any:
    """An attribute of a module, or of the one that it stands for."""
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        if name == inner:
            raise
        return getattr(nn.Module.__getattr__(module, inner), name)
