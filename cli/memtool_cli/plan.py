"""--dry-run: what a verb would do, from the library's own plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memtool.settings import HOLDS_OUT
from memtool_cli.options import Call
from memtool_cli.output import Table, size
from memtool_cli.records import Plan

if TYPE_CHECKING:
    from memtool.evaluation.selection import Cell


def show_plan(
    call: Call,
    verb: str,
    cells: Sequence[Cell] = (),
    tuning_seed: int | None = None,
    *,
    task: str | None = None,
    parallel: tuple[int, Sequence[Sequence[int]] | None] = (1, None),
) -> None:
    """Print the plan of a verb: what is learned and measured, where it goes, and the tasks.

    With `task`, by number or name, of that one alone. With the cells that `run` chooses from, also
    what choosing costs. `parallel` says how many tasks are trained at once, and of passes the
    numbers of their tasks; processes have none.
    """
    from memtool.experiments.plan import plan, plan_of_selection

    facts = plan(call.config, seed=call.config.seed[0], verb=verb, task=task)
    if cells and tuning_seed is not None:
        others = len(facts["baselines"] or ())
        facts["select"] = plan_of_selection(call.config, cells, seed=tuning_seed, baselines=others)
    at_once, passes = parallel
    if at_once > 1:
        facts["parallel_tasks"], facts["passes"] = at_once, passes
    seeds = call.config.seed
    record = Plan(verb=verb, store=call.store_path, seeds=seeds, plan=facts)
    rows = [*_facts(facts), ("runs", facts["runs"]), ("seeds", ", ".join(map(str, seeds)))]
    tasks = Table(
        ("task", "name", "training", "test", "epochs", "steps"),
        [
            (number, name, *(count or "-" for count in counts))
            for number, name, *counts in zip(
                facts["numbers"],
                facts["tasks"],
                facts["train_samples"],
                facts["test_samples"],
                facts["epochs"],
                facts["steps"],
                strict=True,
            )
        ],
    )
    call.out.data(record, Table((), rows, title=f"{verb} would use"), tasks, ids=facts["tasks"])


_SCOPES = {"shared": ", one for all tasks", "task": ", one a task", None: ""}


_CROPS = {
    "centre": "the largest square in the middle of each",
    "squash": "all of each, its sides stretched",
    "pad": "all of each, between bars of black",
}


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of a plan above its tasks; what a method does not have has none."""
    setting = plan["setting"]
    if setting in HOLDS_OUT:
        setting += f", held out: {plan['held_out'] or 'every domain in turn'}"
    begin = plan["adapters_from"]
    behind = f" in block {begin} and those behind it" if begin else ""
    several = f" in {plan['memories']} memories" if plan["memories"] > 1 else " in all"
    rows = [
        ("method", plan["method"]),
        ("setting", setting),
        ("backbone", f"{plan['backbone']}, {plan['device']}, {plan['precision']}"),
    ]
    if plan["head"] is not None:
        takes = plan["head_bytes"]
        said = "" if takes is None else f"; {size(takes)} for its moments and to solve it"
        rows.append(("head", plan["head"] + _SCOPES[plan["head_scope"]] + said))
    if plan["crop"] is not None:
        rows.append(("pictures", f"made square: {_CROPS[plan['crop']]} (stream.crop)"))
    rows.append(("batch size", str(plan["batch_size"])))
    if "parallel_tasks" in plan:
        each = [", ".join(map(str, tasks)) for tasks in plan["passes"] or ()]
        how = f"in one pass: {'; then '.join(each)}" if each else "each in a process"
        count = min(plan["parallel_tasks"], len(plan["tasks"]))
        rows.append(("at once", f"{count} tasks, {how}"))
    if plan["consolidation_epochs"] is not None:
        epochs = plan["consolidation_epochs"]
        rows.append(("key learning", f"{epochs} epochs" if epochs else "none"))
    rows.append(
        (
            "a task adds",
            ("atoms" if plan["kind"] == "atoms" else f"{plan['adapters_per_task']} x adapter")
            + f" of rank {plan['rank']}{behind}, {plan['parameters_per_adapter']:,} numbers, "
            f"{size(plan['bytes_per_adapter'])}; {size(plan['bytes_in_all'])}{several}",
        )
    )
    if plan["joint_rank"] not in (None, plan["rank"]):
        count = plan["joint_rank"] // plan["rank"]
        rows.append(("joint LoRA", f"rank {plan['joint_rank']}: {count} times that of an adapter"))
    if (memory := plan["memory"]) is not None:
        tokens = memory["step_tokens"]
        rows += [
            (
                "memory",
                f"weights {size(memory['weights_bytes'])}, atoms {size(memory['atoms_bytes'])}, "
                f"gradients and moments {size(memory['learning_bytes'])}",
            ),
            (
                "at most",
                f"{size(memory['step_bytes'])} in a step of {memory['step_samples']} samples of "
                f"{tokens} tokens, {size(memory['generation_bytes'])} while "
                f"{memory['generation_samples']} of them are answered",
            ),
        ]
    if (cost := plan["cost"]) is not None:
        rows += _image_cost(cost) if "frozen" in cost else _cost(cost)
    if plan["baselines"] is not None:
        rows.append(("baselines", ", ".join(plan["baselines"]) or "none"))
    if plan["baseline_passes"]:
        each = [
            f"{name} {count['step']} in a step, {count['test']} in a test"
            for name, count in plan["baseline_passes"].items()
        ]
        rows.append(("passes over an image", "; ".join(each)))
    if (choice := plan.get("select")) is not None:
        rows += [
            (
                "chosen from",
                f"{len(choice['cells'])} cells on seed {choice['seed']}, "
                f"stream.validation {choice['validation']:g}: " + "; ".join(choice["cells"]),
            ),
            (
                "at most",
                f"{choice['trainings_at_most']} trainings, {choice['trainings_to_choose']} of them "
                f"to choose; about {choice['steps_at_most']:,} steps",
            ),
        ]
        if choice["failed"]:
            each = [f"{text}: {why}" for text, why in choice["failed"].items()]
            rows.append(("left out", "; ".join(each)))
    for name, takes in plan["commit"].items():
        new, state = size(takes["new_bytes"]), size(takes["state_bytes"])
        rows.append((f"a {name} commits", f"about {new} that is new and {state} of state"))
    there = "there already" if plan["store_exists"] else "new"
    rows.append(("store", f"{plan['store']} ({there})"))
    return rows


_ASKED = {
    "model": "a prompt, the same in all blocks",
    "block": "a prompt, others in every block",
    "token": "every token, others in every block",
}


def _image_cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """What the weights of a memory of images cost."""
    under = ((cost["frozen"], "frozen"), (cost["first_adapter"], "first adapter"))
    steps = cost["test_steps"]
    # The steps look once more, and see what the last of them came to.
    before = [f"{name} {share * (2 if steps else 1):.2g}" for share, name in under if share]
    moving = f", to move its weights {steps + 1} more, {steps} of them also backward"
    return [
        ("passes of an image", ", ".join([*before, "recalled 1"]) + (moving if steps else "")),
        ("keys", f"{size(cost['keys_bytes'])}, moments of queries {size(cost['queries_bytes'])}"),
        ("keys are", _search_by(cost)),
        ("read by", _read_by(cost)),
    ]


def _search_by(cost: dict[str, Any]) -> str:
    """How the nearest keys are found."""
    return {
        "none": "all scored",
        "exact": "searched exactly",
        "usearch": f"searched in an index of usearch, {size(cost['index_bytes'])}",
    }[cost["searched"]]


def _read_by(cost: dict[str, Any]) -> str:
    """How the weights are read, and what learns of it beside the adapters."""
    wide, reading, adapters = cost["read_width"], cost["read_numbers"], cost["adapter_numbers"]
    what = cost["read"] + ("" if wide is None else f", {wide} hidden units")
    return f"{what}: {reading:,} numbers, {reading / adapters:.3g} of those of the adapters"


def _cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """What the weights of a memory of prompts cost."""
    under = ((cost["passes"], "the frozen model"), (cost["first_adapter"], "the first adapter"))
    each = [f"{count} pass of {name} over it" for count, name in under if count]
    passes = " and ".join(each) or "no pass"
    added = cost["mixing"] + cost["asking"]
    return [
        (
            "weights of",
            f"{_ASKED[cost['scope']]}: {cost['weights']:,} for {cost['tokens']:,} tokens, "
            f"{passes} before the answer",
        ),
        (
            "keys",
            f"{size(cost['keys_bytes'])}; a token adds at most {added:,} multiply-adds "
            f"({cost['asking']:,} of them to ask) to the {cost['model']:,} of the model",
        ),
    ]
