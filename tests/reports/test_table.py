"""Tables: what stands in the cells, what is bold, and how they fit a terminal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from memtool.errors import NotFoundError
from memtool.evaluation.summary import summarise
from memtool.reports.table import (
    Grid,
    drift_grid,
    methods_grid,
    metrics_grid,
    negative_grid,
    percent,
    plain_text,
    seconds_text,
    show,
    steps_grid,
    tasks_grid,
)
from tests.reports.sample import TASKS, held_out_record, of_flags, record, without_negative


def printed(grid: Grid, *, terminal: bool, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    show(grid, console)
    return out.getvalue()


def test_numbers_as_text() -> None:
    assert percent(0.83549) == "83.5"
    assert percent(-0.0001) == "0.0"
    assert percent(float("nan")) == "-"
    assert [seconds_text(x) for x in (123.44, 9.96, 0.02412, 0)] == ["123.4", "10.0", "0.0241", "0"]


def test_methods_by_tasks() -> None:
    grid = methods_grid([record()])
    assert grid.header[:2] == ("", "upright %")
    assert grid.header[-3:] == ("final average %", "forgetting (max) %", "time s")
    memory = record().row("memory")
    assert grid.rows[0][0] == "MIRA memory"
    assert grid.rows[0][6] == percent(memory.metrics["faa"])
    assert grid.rows[-1][0] == "oracle adapter (upper bound)"
    assert grid.rows[-1][-2] == "-"
    assert grid.rules == (1, 5)


def _flags(right: int, of: int) -> list[int]:
    return [1] * right + [0] * (of - right)


def test_bold_is_what_holds_against_the_next_row() -> None:
    grid = methods_grid(
        [
            of_flags(
                {
                    "memory": [_flags(90, 100), _flags(71, 100)],
                    "first": [_flags(60, 100), _flags(70, 100)],
                    "second": [_flags(50, 100), _flags(70, 100)],
                }
            )
        ]
    )
    # On task b one sample of 100 is between the two best: that may be luck.
    assert grid.header[:4] == ("", "a %", "b %", "final average %")
    assert grid.bold == {(0, 1), (0, 3)}
    assert grid.notes == ()
    text = plain_text(grid)
    assert "90.0*" in text
    assert "71.0*" not in text
    assert "* better than the next row on the same test samples" in text
    tasks = tasks_grid([of_flags({"memory": [_flags(9, 10)] * 2, "other": [_flags(1, 10)] * 2})])
    assert tasks.bold == {(0, 1), (1, 1), (2, 1)}


def test_bold_is_never_an_upper_bound_and_never_alone() -> None:
    whole = of_flags({"memory": [_flags(40, 100)] * 2, "bound": [_flags(90, 100)] * 2})
    memory, bound = whole.metrics.rows
    rows = (memory, bound.model_copy(update={"kind": "upper bound"}))
    above = whole.model_copy(update={"metrics": whole.metrics.model_copy(update={"rows": rows})})
    assert methods_grid([above]).bold == frozenset()
    assert methods_grid([whole]).bold == {(1, 1), (1, 2), (1, 3)}


def test_nothing_is_bold_where_samples_are_not_known() -> None:
    grid = methods_grid([record()])
    assert grid.bold == frozenset()
    assert grid.notes[-1].startswith("No row is bold")


def test_captions_say_how_many_samples() -> None:
    assert "; n = 1,800)" in methods_grid([record()]).title
    fewer = record(1)
    tasks = tuple(task.model_copy(update={"test_samples": 300}) for task in fewer.run.tasks)
    fewer = fewer.model_copy(update={"run": fewer.run.model_copy(update={"tasks": tasks})})
    assert "; n = 1,500 to 1,800; 2 seeds" in methods_grid([record(), fewer]).title


def test_baselines_above_the_method_are_named() -> None:
    assert len(methods_grid([record()]).notes) == 1
    note, _ = methods_grid([record(method_level=0.83)]).notes
    assert note.startswith("Not below MIRA memory (82.4 %): routing by LDA 88.0 %, uniform mixture")


def test_replay_and_readings_of_the_memory_are_not_ranked() -> None:
    rows = {"memory": 80, "er": 99, "routed": 90, "second": 40}
    flags = {id: [_flags(right, 100)] * 2 for id, right in rows.items()}
    grid = methods_grid([of_flags(flags)])
    assert {row for row, _ in grid.bold} == {0}
    assert grid.rows[1][0] == "er ‡"  # by its id, as of records that do not say it
    assert grid.notes == ("‡ keeps samples of earlier tasks, which no other row may: not ranked.",)


def test_an_upper_bound_below_the_method_is_none() -> None:
    names = [methods_grid([record(method_level=level)]).rows[-1][0] for level in (0.93, 0.99)]
    assert names == ["oracle adapter (upper bound)", "oracle adapter (reference)"]


def test_seeds_give_mean_and_spread() -> None:
    grid = methods_grid([record(seed) for seed in range(3)])
    assert "3 seeds" in grid.title
    assert grid.rows[0][6] == "91.2 ± 1.1"


def test_many_tasks_leave_the_averages() -> None:
    grid = methods_grid([record(tasks=tuple(f"t{i}" for i in range(20)))])
    assert grid.header == ("", "final average %", "forgetting (max) %", "time s")


def test_accuracy_after_each_task() -> None:
    grid = steps_grid([record()])
    assert [row[0] for row in grid.rows] == [
        "before any",
        *(f"{i} {task}" for i, task in enumerate(TASKS, start=1)),
    ]
    assert grid.rows[-1][-1] == percent(record().row("memory").metrics["faa"])
    assert len(steps_grid([record()], "oracle").rows) == 1
    with pytest.raises(NotFoundError, match="frozen"):
        steps_grid([record()], "frozn")


def test_tasks_have_numbers_when_the_order_follows_the_seed() -> None:
    grid = steps_grid([record(0), record(1, tasks=TASKS[::-1])])
    assert grid.header[1] == "task 1 %"


def test_metrics_and_why_some_are_missing() -> None:
    grid = metrics_grid([record()])
    assert [row[0] for row in grid.rows] == [row[0] for row in methods_grid([record()]).rows]
    assert grid.header[1] == "faa % ↑"
    assert "forgetting.max % ↓" in grid.header
    assert "task_accuracy % ↑" in grid.header
    assert not any("op.trace" in name for name in grid.header)
    assert grid.rows[-1][grid.header.index("forgetting.max % ↓")] == "-"
    (note,) = grid.notes  # one sentence for all that is missing
    assert note.startswith("- where a row does not define it:")
    assert "fwt" in note


def test_plain_text_is_aligned() -> None:
    text = printed(methods_grid([record()]), terminal=False, width=40)
    assert text == plain_text(methods_grid([record()]))
    lines = text.splitlines()
    assert "92.4" in lines[2]
    assert lines[1].index("time s") + len("time s") == lines[2].index("12.2") + len("12.2")
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_terminal_of_any_width_shows_every_number(width: int) -> None:
    grid = methods_grid([record(seed) for seed in range(3)])
    text = printed(grid, terminal=True, width=width)
    assert max(map(len, text.splitlines())) <= width
    for row in grid.rows:
        for cell in row[1:]:
            assert cell in text
    assert text.count(grid.title[:30]) == 1


def test_labels_are_never_markup() -> None:
    grid = Grid("t", ("", "[red]a %"), (("[bold]x[/bold]", "1.0"),))
    assert "[bold]x[/bold]" in printed(grid, terminal=True)
    assert "[bold]x[/bold]" in printed(grid, terminal=False)


def test_tasks_by_leading_methods_with_intervals() -> None:
    records = [record(seed) for seed in range(3)]
    grid = tasks_grid(records)
    assert grid.header == (
        "task",
        "MIRA memory",
        "uniform mixture",
        "routing by LDA",
        "oracle adapter (upper bound)",
    )
    assert [row[0] for row in grid.rows] == [*TASKS, "final average"]
    scores = [one.row("memory").accuracy[-1][0] or 0.0 for one in records]
    expected = summarise(scores)
    assert expected.low is not None
    assert expected.high is not None
    interval = f"({percent(expected.low)} to {percent(expected.high)})"
    assert grid.rows[0][1] == f"{percent(expected.mean)} {interval}"
    assert grid.rules == (5,)
    assert "95 % t-interval" in grid.title
    assert "the table of methods has all" in grid.notes[0]


def test_intervals_of_few_seeds_end_at_0_and_100_percent() -> None:
    bounds = []
    for level in (0.985, 0.02):
        grid = tasks_grid([record(seed, method_level=level) for seed in (0, 2)])
        cells = [cell.split("(")[1].rstrip(")") for row in grid.rows for cell in row[1:]]
        bounds += [float(bound) for cell in cells for bound in cell.split(" to ")]
    assert (min(bounds), max(bounds)) == (0.0, 100.0)
    assert "2 seeds: mean (95 % t-interval over the seeds)" in grid.title
    one = tasks_grid([record()])
    assert "interval" not in one.title
    assert not any("(" in cell for row in one.rows for cell in row[1:])


def test_held_out_domains_have_names_of_their_own() -> None:
    grid = methods_grid([held_out_record()])
    assert grid.title.startswith("Accuracy on each held-out domain (MIRA, dg")
    assert grid.header[-2:] == ("blurred %", "dg.heldout %")
    memory = held_out_record().row("memory")
    assert grid.rows[0][-1] == percent(memory.metrics["dg.heldout"])
    tasks = tasks_grid([held_out_record(seed) for seed in range(2)])
    assert tasks.header[0] == "held-out domain"
    assert tasks.rows[-1][0] == "dg.heldout"
    metrics = metrics_grid([held_out_record()])
    assert metrics.header == ("", "dg.heldout % ↑")
    assert metrics.notes == ()
    steps = steps_grid([held_out_record()])
    assert len(steps.rows) == 1
    assert steps.header[-1] == "dg.heldout %"


def test_one_held_out_domain_is_its_own_mean() -> None:
    whole = held_out_record()
    rows = tuple(
        row.model_copy(update={"metrics": {"faa": row.metrics["faa"]}})
        for row in whole.metrics.rows
    )
    alone = whole.model_copy(update={"metrics": whole.metrics.model_copy(update={"rows": rows})})
    grid = methods_grid([alone])
    assert grid.rows[0][-1] == percent(rows[0].metrics["faa"])


def test_what_negative_coefficients_carry() -> None:
    assert negative_grid([record()]) is None
    records = [without_negative(record(seed), loss=0.02) for seed in range(3)]
    grid = negative_grid(records)
    assert grid is not None
    # The same loss in every seed: the difference is paired, so its interval has no width.
    assert {row[3] for row in grid.rows} == {"+2.0 (+2.0 to +2.0)"}
    assert grid.rows[-1][0] == "final average"
    memory = np.mean([one.row("memory").metrics["faa"] for one in records])
    frozen = np.mean([one.row("frozen").metrics["faa"] for one in records])
    (note,) = grid.notes
    assert f"carry +2.0 of them ({round(2 / (memory - frozen))} %)" in note
    one = negative_grid([without_negative(record(), loss=0.0)])
    assert one is not None
    assert {row[3] for row in one.rows} == {"0.0"}


def test_negative_coefficients_without_a_gain() -> None:
    grid = negative_grid([without_negative(record(method_level=0.5))])
    assert grid is not None
    assert grid.notes == ()


def test_drift_of_coefficients() -> None:
    assert drift_grid([record()]) is None
    grid = drift_grid([without_negative(record())])
    assert grid is not None
    assert grid.header == ("", "coefficient_drift ↓", "new_coefficients ↓")
    assert grid.rows == (("MIRA memory", "0.0123", "0.2"),)
