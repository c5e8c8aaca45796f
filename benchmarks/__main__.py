"""`python -m benchmarks NAME [--repeats N] [--threads N] [--json]`; no name: the list.

`--sizes 100,1000` gives the numbers of adapters to a benchmark that measures more than one;
`--full` measures what takes an hour, too; `--pilot PATH` a checkout of other people's code to one
that holds ours beside it; `--device cuda` the device to one that runs models there. Limits are
those of a CPU.
The result of a benchmark has `passed`, and `cases` with `name`, `value`, `limit`, `passed`. JSON
or a table goes to stdout, progress to stderr. Exit code 1: a limit was missed; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any


def benchmarks() -> dict[str, str]:
    """Name and first docstring line of every module here that has a `run`; imports nothing."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    return found


def sizes(text: str) -> tuple[int, ...]:
    """Positive numbers with commas between them."""
    found = tuple(int(number) for number in text.split(","))
    if min(found) < 1:
        raise ValueError(text)
    return found


def main(arguments: list[str]) -> int:
    """Run one benchmark or list all; the exit code."""
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(known), help="none: list them")
    parser.add_argument("--repeats", type=int, default=9, help="paired repetitions (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--sizes", type=sizes, help="numbers of adapters or atoms: 100,1000")
    parser.add_argument(
        "--full", action="store_true", default=None, help="also 100,000 adapters (scale only)"
    )
    parser.add_argument("--pilot", type=Path, help="a checkout of LAMDA-PILOT (rivals only)")
    parser.add_argument("--device", help="where models run: cpu (default), cuda or mps")
    parser.add_argument("--json", action="store_true", help="the whole result as JSON on stdout")
    given = parser.parse_args(arguments)
    if min(given.repeats, given.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    if given.name is None:
        if given.json:
            print(json.dumps(known, indent=2))
        else:
            for name, title in known.items():
                print(f"{name:16} {title}")
        return 0
    import torch

    # One thread by default: with more, a core that is busy elsewhere holds up every small kernel.
    torch.set_num_threads(given.threads)
    from benchmarks.timing import devices

    if given.device is not None and given.device not in devices():
        there = ", ".join(devices())
        parser.error(f"no device {given.device} on this machine, where torch sees: {there}")
    run = importlib.import_module(f"benchmarks.{given.name}").run
    named = {key: vars(given)[key] for key in ("sizes", "full", "pilot", "device")}
    options = {name: value for name, value in named.items() if value is not None}
    taken = inspect.signature(run).parameters
    if strange := options.keys() - taken.keys():
        parser.error(f"{given.name} takes no --{min(strange)}")
    required = {name for name, one in taken.items() if one.default is one.empty} - {"repeats"}
    if missing := required - options.keys():
        parser.error(f"{given.name} needs --{min(missing)}")
    result: dict[str, Any] = run(given.repeats, **options)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        for case in result["cases"]:
            verdict = "met" if case["passed"] else "MISSED"
            limit = "" if case["limit"] is None else f"  limit {case['limit']}  {verdict}"
            spread = ""
            if "quartiles" in case:
                low, high = case["quartiles"]
                spread = f"({low:.3f} to {high:.3f})"
            print(f"{case['name']:56} {case['value']:8.3f} {spread:20}{limit}".rstrip())
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
