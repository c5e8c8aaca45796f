"""What crosses between the CPU and a device, what is counted on the CPU alone, and what it can do.

A device works off what the CPU has queued; who reads one of its numbers waits for all of that. So
numbers of a step are read when the next one is queued (`Late`), batches go there from pinned
memory (`sent`), and what only saves work looks at numbers where they are (`at_hand`). What has to
be float64 is counted on the CPU (`exact`): Metal has no float64, and most GPUs are tens of times
slower in it. What half precision would spoil is `in_float32`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QUEUES = {"cuda"}
"""Types of devices that copy from and to pinned memory while the CPU goes on."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the CPU it is queued, where the device queues copies."""
    if tensor.device.type != "cpu" or device.type not in QUEUES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def at_hand(tensor: Tensor) -> bool:
    """Whether what is done may depend on the numbers of a tensor.

    On another device the CPU would wait for them; a graph that torch.compile or torch.export writes
    has none.
    """
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def exact(tensor: Tensor) -> Tensor:
    """A tensor of any device in float64, on the CPU, without its gradient."""
    return tensor.detach().cpu().double()


def in_float32(tensor: Tensor) -> Tensor:
    """A tensor in float32, or as it is where its type is wider."""
    if tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within it nothing on the device of a tensor is converted; free where nothing would be."""
    # The meta device, where only shapes are computed, knows none.
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


class Late:
    """Tensors of a device that are read later: what brings them to the CPU is queued now.

    From a device that queues no copies they come when they are read; on the CPU they are there.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """Any number of tensors of one device."""
        self._tensors = [tensor.detach() for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in self._tensors]
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Tensor]:
        """The tensors on the CPU, once they have come."""
        if self._event is None:
            return [tensor.cpu() for tensor in self._tensors]
        self._event.synchronize()
        return [tensor.clone() for tensor in self._tensors]  # pinned memory is for the next


def multiplies_groups(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies groups of rows each with a matrix of its own in one kernel there.

    Elsewhere `grouped_mm` is a loop over the groups, for which a device is waited for.
    """
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.version.hip is not None:
        return False
    return hasattr(torch.nn.functional, "grouped_mm") and _has_grouped_kernel(device)


@cache
def _has_grouped_kernel(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] in (9, 10)


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it that are faster than float32.

    Where the system is not Linux it is left to those who ask for bfloat16.
    """
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """What the CPU of a Linux can do; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return {
        flag
        for name, _, flags in lines
        if name.strip().lower() in ("flags", "features")
        for flag in flags.split()
    }
