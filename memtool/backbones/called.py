"""Layers of transformers' own models that take a mixture, although nothing hands it to them.

What a model of transformers is given beside its inputs reaches its attention only. So a language
model owns one `Call`, which each of its blocks and adapted layers was given when it was built: a
pass puts into it what is recalled, and takes it out when it ends, however it ends.
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

from memtool.adapters.layout import Site
from memtool.adapters.linear import Adapted, for_autocast
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall


class Call:
    """What one pass recalls, and the mixture of the block that is running.

    One pass at a time: another thread waits for its turn. `checkpoints` says that blocks are
    computed again for backward instead of kept.
    """

    def __init__(self) -> None:
        self.recall: Recall | None = None
        self.mixture: Mixture | None = None
        self.running = False
        self.checkpoints = False
        self._turn = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model is in no pass, and waits for nobody."""
        return {"checkpoints": self.checkpoints}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.checkpoints = state["checkpoints"]

    def under(self, recall: Recall | None, run: Callable[[], Any]) -> Any:
        """What `run` gives while its blocks recall this. Raises RuntimeError within a pass."""
        with self._alone():
            if self.running:
                raise RuntimeError("a language model was asked anew while it runs")
            self.recall, self.running = recall, True
            try:
                return run()
            finally:
                self.recall, self.running = None, False

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
    """Stands where block `number` of a model stood; `sites` are its adapted layers by target."""

    def __init__(self, layer: nn.Module, number: int, call: Call, sites: Mapping[str, Site]):
        super().__init__()
        self.layer = layer
        self.number = number
        self._call = call
        self._sites = dict(sites)

    def __getattr__(self, name: str) -> Any:
        """What the model asks of its blocks, as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden: Tensor, *args: Any, **given: Any) -> Any:
        """As the block, with what is recalled for its input (b, n, dim)."""
        call = self._call
        mixture = None if call.recall is None else call.recall(self.number, hidden)
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

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, n, in_features) to (b, n, out_features)."""
        mixture = self._call.mixture
        if mixture is None:
            frozen: Tensor = self.linear(x)
            return frozen
        x = for_autocast(x)
        return mixture.add_to(self.linear(x), x, self.name)
