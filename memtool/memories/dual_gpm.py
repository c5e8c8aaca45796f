"""DualGPM: an orthonormal basis of what a linear map has seen, so that learning leaves it alone.

A map y = W x keeps its answers to past inputs x as long as W only moves orthogonally to them. The
memory of the past is a basis of the span of the past inputs, or of its complement, whichever has
fewer columns. Source: the DualGPM of the InfLoRA line of work (Liang & Li, 2023 and 2024), written
from its definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from memtool.devices import exact
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError
from memtool.tensor_bytes import load_tensors

Kind = Literal["remove", "retain"]
Rule = Literal["energy", "squares"]
"""What a share is of: the energy of the inputs, or the squares of their second moment's singular
values, as the code of InfLoRA has it (Liang & Li 2024)."""


class DualGPM:
    """The past of one linear map with inputs of `width` numbers; float64 on the CPU.

    `basis` (width, m) is orthonormal with m ≤ width / 2. Of kind "remove" it spans the past, of
    kind "retain" the directions that are still free.
    """

    def __init__(
        self,
        width: int,
        start: float = 0.97,
        *,
        rule: Rule = "energy",
        kind: Kind = "remove",
        basis: Tensor | None = None,
    ) -> None:
        """Everything is free, unless the past is given by `kind` and `basis`.

        `start` is the share ε₀, by `rule`, that the past keeps at the first task; it rises
        linearly to 1 at the last one. Raises ConfigError for a share outside (0, 1].
        """
        if not 0 < start <= 1:
            raise ConfigError(f"share of energy {start}", expected="more than 0, at most 1")
        self.width = width
        self.start = start
        self.rule: Rule = rule
        self.kind: Kind = kind
        self.basis = torch.zeros(width, 0, dtype=torch.float64) if basis is None else basis

    @property
    def kept(self) -> int:
        """Number of directions that belong to the past."""
        columns = self.basis.shape[1]
        return columns if self.kind == "remove" else self.width - columns

    def share(self, progress: float) -> float:
        """The share ε of energy to keep at `progress`, from 0 (before any task) to 1 (the last)."""
        return self.start + (1 - self.start) * min(max(progress, 0.0), 1.0)

    def update(self, inputs: Tensor, progress: float) -> None:
        """Add the inputs (n, width) of a task to the past; see `update_moment`."""
        if inputs.ndim != 2 or inputs.shape[1] != self.width:
            raise MismatchError(
                f"inputs of shape {tuple(inputs.shape)}", expected=f"(n, {self.width})"
            )
        inputs = exact(inputs)
        self.update_moment(inputs.mT @ inputs, progress)

    def update_moment(self, second: Tensor, progress: float) -> None:
        """Add a task whose inputs have the second moment Σ x xᵀ (width, width) to the past.

        Of the task's energy Σ |x|², at least the share ε(progress) lies in the past afterwards:
        what is there already counts, and the strongest free directions are added until it is
        reached. The eigenvalues of the second moment are the squared singular values of the
        inputs, so no input has to be kept.

        By the rule "squares" the same is said of the squares of the singular values of the second
        moment C: of |C|², and of |(I − P) C|² for what is free. The first task then stays below
        the share, with one direction at least. Raises DataError for numbers that are not finite.
        """
        second = exact(second)
        if second.shape != (self.width, self.width):
            raise MismatchError(
                f"second moment of shape {tuple(second.shape)}",
                expected=f"({self.width}, {self.width})",
            )
        if not bool(second.isfinite().all()):
            raise DataError("inputs that are not finite (NaN or infinity)")
        total = float(second.trace())
        if total <= 0:
            return  # inputs that are all zero need no protection
        count = self._by_energy if self.rule == "energy" else self._by_squares
        added, vectors = count(second, self.share(progress))
        added = min(added, self.width - self.kept)
        if added:
            self._take(vectors[:, :added])

    def _by_energy(self, second: Tensor, share: float) -> tuple[int, Tensor]:
        """How many of the free directions, the strongest first, are to be added; and these."""
        total = float(second.trace())
        # A sum of many eigenvalues is right to a few roundings only.
        missing = (1 - share) * total
        values, vectors = torch.linalg.eigh(self._free_moment(second))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        left = values.sum() - torch.cat([values.new_zeros(1), values.cumsum(0)])
        enough = left <= missing + 1e-12 * total
        return int(enough.int().argmax()) if bool(enough.any()) else self.width, vectors

    def _by_squares(self, second: Tensor, share: float) -> tuple[int, Tensor]:
        """The same by the squares of singular values."""
        vectors, values, _ = torch.linalg.svd(self.project(second.mT).mT)
        total = float(second.square().sum())
        kept = 1 - (float(values.square().sum()) - values.square().cumsum(0)) / total
        if not self.kept:
            return max(1, int((kept < share).sum())), vectors
        before = torch.cat([kept.new_tensor([1 - float(values.square().sum()) / total]), kept])
        return int((before[:-1] < share).sum()), vectors

    def project(self, vectors: Tensor) -> Tensor:
        """The part of vectors (..., width) that the past does not see; same dtype and device."""
        if vectors.shape[-1] != self.width:
            raise MismatchError(
                f"vectors of shape {tuple(vectors.shape)}", expected=f"(..., {self.width})"
            )
        basis = self.basis.to(vectors.device)
        exact = vectors.double()
        inside = (exact @ basis) @ basis.mT
        return (exact - inside if self.kind == "remove" else inside).to(vectors.dtype)

    def _free_moment(self, second: Tensor) -> Tensor:
        """The second moment of the inputs' free parts (I − P) x, symmetric to the last bit."""
        inside = self.project(self.project(second).mT)
        return (inside + inside.mT) / 2

    def _take(self, directions: Tensor) -> None:
        """Move orthonormal free directions (width, k) to the past; then keep the smaller side."""
        past = self.basis if self.kind == "remove" else _complement(self.basis)
        past = torch.linalg.qr(torch.cat([past, directions], dim=1)).Q
        if past.shape[1] <= self.width / 2:
            self.kind, self.basis = "remove", past
        else:
            self.kind, self.basis = "retain", _complement(past)


def spaces_to_bytes(spaces: Mapping[str, DualGPM], dtype: torch.dtype = torch.float64) -> bytes:
    """As a safetensors file: a basis by kind, first share (squared by that rule) and name."""
    mark = {"energy": "", "squares": "^2"}
    return save(
        {
            f"{space.kind} {space.start!r}{mark[space.rule]} {name}": space.basis.to(
                dtype
            ).contiguous()
            for name, space in spaces.items()
        }
    )


def spaces_from_bytes(data: bytes, where: str) -> dict[str, DualGPM]:
    """What `spaces_to_bytes` wrote; `where` names it in errors. Raises CorruptError otherwise."""
    spaces = {}
    for about, basis in load_tensors(data, where).items():
        try:
            kind, start, name = about.split(" ", 2)
            if kind not in ("remove", "retain") or basis.ndim != 2 or bool(basis.isnan().any()):
                raise ValueError(f"tensor {about!r} of shape {tuple(basis.shape)}")
            side: Kind = "remove" if kind == "remove" else "retain"
            rule: Rule = "squares" if start.endswith("^2") else "energy"
            share = float(start.removesuffix("^2"))
            spaces[name] = DualGPM(len(basis), share, rule=rule, kind=side, basis=basis.double())
        except (ValueError, ConfigError, MismatchError) as error:
            raise CorruptError(f"{where} holds no bases of the past: {error}") from error
    return spaces


def _complement(basis: Tensor) -> Tensor:
    """An orthonormal basis (width, width − m) of what is orthogonal to a basis (width, m)."""
    width, columns = basis.shape
    if columns == 0:
        return torch.eye(width, dtype=basis.dtype)
    return torch.linalg.qr(basis, mode="complete").Q[:, columns:].contiguous()
