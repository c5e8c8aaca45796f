"""A device that is not there: its tensors have shapes and types and no numbers; the CPU is real.

    with FakeDevice("cuda") as device:
        model = device.take(model)
        model(images)
    device.doubles, device.waits

Tensors of the device are torch's FakeTensors: two devices in one operation, and a shape or a
decision that depends on a number there (`nonzero`, `unique`, `bool`, `.item()`), raise. What stays
on the CPU is computed as ever. A copy to the CPU has any numbers, and is
counted: the CPU waits for it.

Backward works for "meta" only, as torch's engine would ask the driver of any other device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, Self, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


class FakeDevice(TorchDispatchMode):
    """Inside, tensors of a device of this type exist without numbers.

    `doubles` counts float64 that met the device, `waits` the copies for which one of both sides
    waits, `sent` those to the device that nothing waits for: each by the place in memtool.
    """

    def __init__(self, kind: str, allowed: Mapping[str, Any] | None = None) -> None:
        """`allowed` are the places that may look at a number there, and what they find."""
        super().__init__()
        self.device = torch.device(kind) if kind == "meta" else torch.device(kind, 0)
        self.doubles: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.in_steps: Counter[str] = Counter()
        self.steps = 0
        self._before: Counter[str] | None = None
        self._allowed = allowed or {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()
        self._draws = torch.Generator().manual_seed(0)

    def __enter__(self) -> Self:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        autocast, generator = torch.autocast, torch.Generator

        def own_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            # There is none of the meta device, and of others only where their driver is.
            return autocast(device_type, *args, **kwargs) if device_type == "cpu" else nullcontext()

        def own_generator(device: Any = "cpu") -> torch.Generator:
            # A generator is of a driver, too; without numbers nothing is drawn.
            del device
            return generator("cpu")

        patch.setattr(torch, "autocast", own_autocast)
        patch.setattr(torch, "Generator", own_generator)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(nn.Module, "_apply", _moved)
        self._stack.enter_context(self._fake)  # with it on the stack torch asks for no driver
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def take(self, module: Module) -> Module:
        """A module on the device; what is counted begins anew."""
        moved = module.to(self.device)
        self.waits.clear()
        return moved

    def step_begins(self, first: bool) -> None:
        """Count what a training waited for since its step before began in `in_steps`."""
        if not first and self._before is not None:
            self.in_steps += self.waits - self._before
            self.steps += 1
        self._before = self.waits.copy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to = kwargs.get("device")
        leaves = to is not None and torch.device(to).type != "cpu"
        if not leaves and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in _LOOKS and _place() in self._allowed:
            self.waits[_place()] += 1
            return self._allowed[_place()]
        # A generator of the CPU stands for that of the device.
        found = func(*args, **{name: part for name, part in kwargs.items() if name != "generator"})
        if func.overloadpacket in _COPIES:
            self._copied(func, args, kwargs, found)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        for tensor in (*given, *made):
            if tensor.dtype == torch.float64 and tensor.device.type != "cpu":
                self.doubles[_place()] += 1
        if isinstance(found, FakeTensor) and found.device.type == "cpu":
            with unset_fake_temporarily():
                return self._drawn(found)
        return found

    def _drawn(self, like: Tensor) -> Tensor:
        """What stands for numbers of the device on the CPU: about a half, zero or true."""
        if not like.dtype.is_floating_point:
            return torch.full(like.shape, like.dtype == torch.bool, dtype=like.dtype)
        return (0.5 + 0.1 * torch.rand(like.shape, generator=self._draws)).to(like.dtype)

    def _copied(self, func: Any, args: Any, kwargs: Any, made: Tensor) -> None:
        """Count a copy between the devices."""
        onto = func.overloadpacket is torch.ops.aten.copy_
        source, target = args[1 if onto else 0].device.type, made.device.type
        if source == target:
            return
        names = [argument.name for argument in func._schema.arguments]
        queued = dict(zip(names, args, strict=False), **kwargs).get("non_blocking")
        (self.sent if queued else self.waits)[_place()] += 1


_LOOKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.is_nonzero)
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)


def _moved(module: Any, function: Any, recurse: bool = True) -> Any:
    """What `Module.to` does, in plain words: a tensor that moves is replaced."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        there = None if parameter is None else function(parameter.detach())
        if parameter is not None and there.device != parameter.device:
            module._parameters[name] = nn.Parameter(there, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def _place() -> str:
    """The innermost function of memtool that runs: `engine.predict`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("memtool."):
            function = frame.f_code.co_qualname.partition(".<locals>")[0]
            return f"{name.removeprefix('memtool.')}.{function}"
        frame = frame.f_back
    return "outside of memtool"
