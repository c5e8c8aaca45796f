"""Paired measurements: what is compared runs side by side, so that a busy machine slows both."""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def progress(message: str) -> None:
    """One line to stderr."""
    print(message, file=sys.stderr, flush=True)


def devices() -> dict[str, str]:
    """The devices of this machine that models run on: what `--device` takes, and what each is."""
    found = {"cpu": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        found["mps"] = "Metal"
    return found


def settle() -> None:
    """Wait until a GPU has done what was queued; at once where none is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: device, processor, threads, versions."""
    return {
        "device": device,
        "device_name": devices()[device],
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    inner: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of every candidate, in `repeats` rounds that run each of them once.

    The order turns by one from round to round, so that nobody always runs first. A time is the mean
    of `inner` calls in a row, after one of `before`, which is not timed; what they queued on a GPU
    is waited for. One round before the first is not counted.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for repeat in range(-1, repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                call = candidates[name]
                if before is not None:
                    before()
                settle()
                begin = time.perf_counter()
                for _ in range(inner):
                    call()
                settle()
                elapsed = (time.perf_counter() - begin) / inner
                if repeat >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Median and quartiles of seconds[over] / seconds[under], round by round."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    ratios = [one / other for one, other in pairs]
    if len(ratios) == 1:
        return {"median": ratios[0], "lower_quartile": ratios[0], "upper_quartile": ratios[0]}
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def case(
    name: str,
    seconds: Mapping[str, list[float]],
    over: str,
    under: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One figure of a report: the median ratio `over` / `under` against its limit, if any."""
    spread = ratio(seconds, over, under)
    value = spread["median"]
    passed = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    limits = ((sign, limit) for sign, limit in (("<=", at_most), (">=", at_least)))
    progress(
        f"{name}: {over} / {under} = {value:.3f} "
        f"({spread['lower_quartile']:.3f} to {spread['upper_quartile']:.3f})"
    )
    return {
        "name": name,
        "what": f"{over} / {under}",
        "value": value,
        "limit": next((f"{sign} {limit}" for sign, limit in limits if limit is not None), None),
        "passed": passed,
        "quartiles": [spread["lower_quartile"], spread["upper_quartile"]],
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "repeats": len(seconds[over]),
        **more,
    }


def figure(
    name: str, what: str, found: float, at_most: float | None, **more: Any
) -> dict[str, Any]:
    """One figure of a report that is no ratio of times, against its limit where it has one."""
    progress(f"{name}: {what} = {found:.4g}")
    return {
        "name": name,
        "what": what,
        "value": found,
        "limit": None if at_most is None else f"<= {at_most:g}",
        "passed": at_most is None or found <= at_most,
        **more,
    }
