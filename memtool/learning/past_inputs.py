"""What entered the adapted maps so far, so that what is new can begin where it is not.

A row of A that is orthogonal to all inputs of earlier tasks answers them with zero: new adapters,
or atoms, with such keys hardly change what was learned before. Source: InfLoRA (Liang & Li 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Layout
from memtool.adapters.linear import Adapted
from memtool.devices import exact
from memtool.errors import ConfigError, CorruptError
from memtool.memories.dual_gpm import DualGPM, Rule, spaces_from_bytes, spaces_to_bytes


class PastInputs:
    """The space of the inputs that each adapted module of a layout had so far (DualGPM)."""

    def __init__(
        self,
        layout: Layout,
        energy: float,
        space: Mapping[str, DualGPM] | None = None,
        *,
        rule: Rule = "energy",
    ) -> None:
        """No past yet, but for the spaces of modules that are given.

        `energy` is the share of the first task's, by `rule`, that the past holds (`past.energy`,
        `past.rule`); it rises to 1 at the last.
        """
        self.layout = layout
        widths = {site.module: site.in_features for site in layout.sites}
        self.space = {module: DualGPM(width, energy, rule=rule) for module, width in widths.items()}
        self.space.update(space or {})

    @contextmanager
    def counted(
        self, model: nn.Module, rows: Callable[[Tensor], Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """Count what enters the adapted modules of a model: Σ x xᵀ (d, d) of each, float64.

        `rows` picks the tokens (n, d) that count from an input (batch, tokens, d).
        """
        moments: dict[str, Tensor] = {}

        def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, Adapted)
            x = rows(module.tokens(arguments[0].detach())).float()
            with torch.autocast(x.device.type, enabled=False):
                second = exact(x.mT @ x)
            moments[module.name] = moments.get(module.name, 0) + second

        adapted = [module for module in model.modules() if isinstance(module, Adapted)]
        hooks = [
            module.register_forward_pre_hook(count)
            for module in adapted
            if module.name in self.space
        ]
        try:
            yield moments
        finally:
            for hook in hooks:
                hook.remove()

    def free_branch(self, moments: Mapping[str, Tensor]) -> Tensor:
        """An adapter (1, numel) for inputs of these moments: A where the past is not, B zero."""
        layout = self.layout
        rows = {
            module: free_directions(self.space[module], second, layout.rank)
            for module, second in moments.items()
        }
        flat = torch.zeros(1, layout.numel)
        tensors = layout.unflatten(flat)  # views
        for site in layout.sites:
            tensors[f"{site.name}.lora_A"].copy_(rows[site.module])
        return flat

    def add(self, moments: Mapping[str, Tensor], progress: float) -> None:
        """Add inputs of these moments; `progress` is the share of the tasks before them."""
        for module, second in moments.items():
            self.space[module].update_moment(second, progress)

    def to_bytes(self) -> bytes:
        """As `spaces_to_bytes`, in float32."""
        return spaces_to_bytes(self.space, torch.float32)

    @classmethod
    def from_bytes(
        cls, data: bytes, layout: Layout, energy: float, where: str, *, rule: Rule = "energy"
    ) -> PastInputs:
        """What `to_bytes` wrote, for the same layout.

        Raises CorruptError for anything else, ConfigError where it kept another share of energy, or
        by another rule.
        """
        spaces = spaces_from_bytes(data, where)
        widths = {site.module: site.in_features for site in layout.sites}
        for module, space in spaces.items():
            if widths.get(module) != space.width:
                raise CorruptError(
                    f"{where} holds inputs of {module!r}, {space.width} wide",
                    expected="modules of the layout, as wide as they are",
                )
            if space.start != energy:
                raise ConfigError(
                    f"past.energy {energy:g} in a memory of free keys that keeps {space.start:g}",
                    expected="one share for all tasks",
                    remedy=f"--set past.energy={space.start:g}, or another --store",
                )
            if space.rule != rule:
                raise ConfigError(
                    f"past.rule {rule} in a memory of free keys that counts {space.rule}",
                    expected="one rule for all tasks",
                    remedy=f"--set past.rule={space.rule}, or another --store",
                )
        return cls(layout, energy, spaces, rule=rule)


def free_directions(space: DualGPM, second: Tensor, rank: int) -> Tensor:
    """The leading `rank` principal directions (rank, d) of inputs outside the past, float64.

    `second` (d, d) is the inputs' second moment. A row is zero where the inputs leave no free
    direction of any energy.
    """
    free = space.project(space.project(second).mT)
    energies, vectors = torch.linalg.eigh((free + free.mT) / 2)
    rows = vectors.flip(1).mT[:rank]
    present = energies.flip(0)[:rank] > 1e-10 * second.trace()
    return rows * present.unsqueeze(1)
