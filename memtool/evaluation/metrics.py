"""The metrics, each a pure function of the accuracy matrix or of its own few inputs.

a[i, j] is the score on task j after learning task i: float64 (T+1, T), rows 0..T, columns 1..T in
the formulas below (0..T-1 in numpy). Row 0 is before any training. NaN means not measured.

The field's code gives one name to different formulas, so every metric has an id of its own. A
metric that is not defined for a matrix (one task only, a cell that was not measured) is an
`UndefinedMetricError` with the reason, never a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, DataError, MismatchError, did_you_mean

Matrix = npt.NDArray[np.float64]
Direction = Literal["higher", "lower"]


class UndefinedMetricError(DataError):
    """The matrix does not hold what the metric needs; the message is the reason."""

    code: ClassVar[str] = "undefined-metric"


def _tasks(a: Matrix, at_least: int = 1) -> int:
    """T of a matrix (T+1, T)."""
    if a.ndim != 2 or a.shape[0] != a.shape[1] + 1 or a.shape[1] < 1:
        raise MismatchError(
            f"an accuracy matrix of shape {a.shape}",
            expected="(T+1, T): a row before any training, then one row after each of T tasks",
        )
    if a.shape[1] < at_least:
        raise UndefinedMetricError(f"needs at least {at_least} tasks, there is {a.shape[1]}")
    return a.shape[1]


def _measured(scores: Matrix, what: str) -> Matrix:
    """The scores, all of which must have been measured."""
    if np.isnan(scores).any():
        raise UndefinedMetricError(f"not measured: {what}")
    return scores


def _final(a: Matrix) -> Matrix:
    return _measured(a[_tasks(a)], "all tasks after the last task")


def _learned(a: Matrix) -> Matrix:
    """a[j, j], the score on each task just after it was learned: (T,)."""
    return _measured(np.diagonal(a[1:]), "every task just after it was learned")


def seen_accuracy(a: Matrix) -> Matrix:
    """Mean score over the tasks seen so far, after each task: (T,), NaN where not measured."""
    return np.array([a[i, :i].mean() for i in range(1, _tasks(a) + 1)])


def final_average(a: Matrix) -> float:
    """faa: (1/T) Σ_j a[T, j]."""
    return float(_final(a).mean())


def average_incremental(a: Matrix) -> float:
    """Mean over i of mean_{j≤i} a[i, j]."""
    return float(_measured(seen_accuracy(a), "all seen tasks after each task").mean())


def forgetting_max(a: Matrix) -> float:
    """Mean over j < T of max_{j≤i≤T} a[i, j] − a[T, j] (mammoth, PILOT).

    The maximum begins at i = j: those toolkits measure a task only once it was learned, and the
    value must not depend on whether the upper triangle was measured too.
    """
    tasks = _tasks(a, at_least=2)
    what = "every task from when it was learned on"
    best = np.array([_measured(a[j + 1 :, j], what).max() for j in range(tasks - 1)])
    return float((best - a[tasks, :-1]).mean())


def forgetting_first(a: Matrix) -> float:
    """Mean over j < T of a[j, j] − a[T, j] (Avalanche)."""
    _tasks(a, at_least=2)
    return float((_learned(a) - _final(a))[:-1].mean())


def forgetting_step(a: Matrix) -> float:
    """Mean over i ≥ 2 of mean_{j<i} (a[i−1, j] − a[i, j]) (CODA-Prompt)."""
    tasks = _tasks(a, at_least=2)
    steps = np.array([(a[i - 1, : i - 1] - a[i, : i - 1]).mean() for i in range(2, tasks + 1)])
    return float(_measured(steps, "all seen tasks after each task").mean())


def loss_forgetting(losses: Matrix) -> float:
    """Mean over j < T of l[T, j] − l[j, j], of a matrix of losses: how much they rose since."""
    _tasks(losses, at_least=2)
    return float((_final(losses) - _learned(losses))[:-1].mean())


def bwt_gem(a: Matrix) -> float:
    """(1/(T−1)) Σ_{j<T} (a[T, j] − a[j, j]) (GEM)."""
    return -forgetting_first(a)


def bwt_trace(a: Matrix) -> float:
    """(1/T) Σ_j min(a[T, j] − a[j, j], 0), signed; published tables print its absolute value."""
    _tasks(a, at_least=2)
    return float(np.minimum(_final(a) - _learned(a), 0.0).mean())


def fwt(a: Matrix) -> float:
    """(1/(T−1)) Σ_{j>1} (a[j−1, j] − a[0, j]) (GEM)."""
    _tasks(a, at_least=2)
    before = _measured(a[0, 1:], "the tasks before any training (row 0)")
    ahead = _measured(np.diagonal(a[1:], offset=1), "every task just before it was learned")
    return float((ahead - before).mean())


def transfer_xtail(a: Matrix) -> float:
    """Mean over j ≥ 2 of the mean of a[i, j] over 1 ≤ i < j; zeros are scores like any other."""
    tasks = _tasks(a, at_least=2)
    means = np.array([a[1 : j + 1, j].mean() for j in range(1, tasks)])
    return float(_measured(means, "every task before it was learned").mean())


def average_xtail(a: Matrix) -> float:
    """Mean of all a[i, j], i ≥ 1."""
    _tasks(a)
    return float(_measured(a[1:], "all tasks after each task").mean())


def recall_drop(faa_exact: float, faa_recalled: float) -> float:
    """FAA with the exact adapters less FAA with those recalled from the memory."""
    return faa_exact - faa_recalled


def task_accuracy(inferred: npt.ArrayLike, true: npt.ArrayLike) -> float:
    """Share of samples whose task was inferred right; both (samples,), of the same ids."""
    first, second = np.asarray(inferred), np.asarray(true)
    if first.shape != second.shape or first.ndim != 1:
        raise MismatchError(
            f"inferred tasks of shape {first.shape}, true tasks of shape {second.shape}",
            expected="two arrays of shape (samples,)",
        )
    if first.size == 0:
        raise UndefinedMetricError("needs at least one sample")
    return float((first == second).mean())


def coefficient_drift(now: npt.ArrayLike, then: npt.ArrayLike) -> float:
    """‖a_now − a_then‖ / ‖a_then‖ of the same inputs and adapters; both (samples, ...)."""
    after = np.asarray(now, dtype=np.float64)
    before = np.asarray(then, dtype=np.float64)
    if after.shape != before.shape:
        raise MismatchError(
            f"coefficients of shape {after.shape} now, {before.shape} then",
            expected="two arrays of the same shape",
        )
    norm = float(np.linalg.norm(before))
    if norm == 0:
        raise UndefinedMetricError("all coefficients were zero: a relative change needs a norm")
    return float(np.linalg.norm(after - before)) / norm


def floor_met(met: npt.ArrayLike) -> float:
    """Number of samples with one True or more: (samples, memories), whether a floor was met."""
    found = np.asarray(met, dtype=bool)
    if found.ndim != 2:
        raise MismatchError(f"floors of shape {found.shape}", expected="(samples, memories)")
    return float(found.any(axis=1).sum())


def mean_share(shares: npt.ArrayLike) -> float:
    """Mean of shares (samples,) of one."""
    found = np.asarray(shares, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise MismatchError(f"shares of shape {found.shape}", expected="(samples,), at least one")
    return float(found.mean())


def length_ratio(now: npt.ArrayLike, then: npt.ArrayLike) -> float:
    """‖now‖ / ‖then‖ of the same inputs; both (samples, ...)."""
    norm = float(np.linalg.norm(np.asarray(then, dtype=np.float64)))
    if norm == 0:
        raise UndefinedMetricError("everything was zero: a ratio of lengths needs a length")
    return float(np.linalg.norm(np.asarray(now, dtype=np.float64))) / norm


def reuse(shares: npt.ArrayLike) -> float:
    """Mean over tasks i ≥ 2 of Σ_{j<i} shares[i, j]: weight of inputs of task i on atoms of j."""
    weights = np.asarray(shares, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise MismatchError(f"shares of shape {weights.shape}", expected="(tasks, tasks)")
    if len(weights) < 2:
        raise UndefinedMetricError("needs at least 2 tasks")
    return float(np.tril(weights, -1).sum(axis=1)[1:].mean())


def recall_error(recalled: npt.ArrayLike, exact: npt.ArrayLike) -> Matrix:
    """‖θ̂ − θ‖ / ‖θ‖ of every adapter: values (adapters, numel) twice, errors (adapters,)."""
    estimate = np.asarray(recalled, dtype=np.float64)
    value = np.asarray(exact, dtype=np.float64)
    if estimate.shape != value.shape or value.ndim != 2:
        raise MismatchError(
            f"recalled values of shape {estimate.shape}, exact ones of shape {value.shape}",
            expected="two arrays of shape (adapters, numel)",
        )
    norm = np.linalg.norm(value, axis=1)
    if (norm == 0).any():
        raise UndefinedMetricError(
            f"adapter {int(np.argmin(norm))} is all zeros: a relative error needs a norm"
        )
    error: Matrix = np.linalg.norm(estimate - value, axis=1) / norm
    return error


def dg_heldout(validation: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean over held-out domains of the target accuracy of the selected model (DomainBed).

    Both (domains, candidates): `validation` on the training domains selects the candidate of each
    held-out domain (the first of equals), `target` is its accuracy on that domain. The target
    never takes part in the selection.
    """
    selector = np.asarray(validation, dtype=np.float64)
    scores = np.asarray(target, dtype=np.float64)
    if selector.shape != scores.shape or scores.ndim != 2 or scores.size == 0:
        raise MismatchError(
            f"validation of shape {selector.shape}, target of shape {scores.shape}",
            expected="two arrays of shape (domains, candidates)",
        )
    _measured(selector, "every candidate on the validation data")
    chosen = scores[np.arange(len(scores)), selector.argmax(axis=1)]
    return float(_measured(chosen, "every selected candidate on its target").mean())


def of_unseen(scores: Sequence[float | None]) -> dict[str, float]:
    """What follows from the scores on a domain that nothing is learned from, by metric id.

    `scores` are before any task and after each of them, None where not measured.
    """
    after = [score for score in scores[1:] if score is not None]
    last = scores[-1] if len(scores) > 1 else None
    found = {} if last is None else {"dgcl.heldout": float(last)}
    if after and len(after) == len(scores) - 1:
        found["dgcl.average"] = float(sum(after) / len(after))
    return found


@dataclass(frozen=True)
class Metric:
    """A metric under its id.

    `direction` says which way is better; `of_matrix` whether `function` takes the accuracy matrix
    alone; `unit` is "fraction" or "points" (shown times 100), "ratio", "nats" or "samples" (shown
    as is).
    """

    id: str
    function: Callable[..., Any]
    direction: Direction
    description: str
    of_matrix: bool = True
    unit: Literal["fraction", "points", "ratio", "nats", "samples"] = "fraction"


METRICS: dict[str, Metric] = {
    metric.id: metric
    for metric in (
        Metric("faa", final_average, "higher", "final average accuracy over all tasks"),
        Metric(
            "average_incremental",
            average_incremental,
            "higher",
            "mean over steps of the accuracy on the tasks seen so far",
        ),
        Metric(
            "forgetting.max",
            forgetting_max,
            "lower",
            "best accuracy since learned, less the final one (mammoth, PILOT)",
        ),
        Metric(
            "forgetting.first",
            forgetting_first,
            "lower",
            "accuracy just after learning, less the final one (Avalanche)",
        ),
        Metric(
            "forgetting.step",
            forgetting_step,
            "lower",
            "mean loss of accuracy from one step to the next (CODA-Prompt)",
        ),
        Metric(
            "bwt.gem",
            bwt_gem,
            "higher",
            "final accuracy less that just after learning, without the last task (GEM)",
        ),
        Metric(
            "bwt.trace",
            bwt_trace,
            "higher",
            "the same over all tasks, losses only, signed (TRACE code)",
        ),
        Metric("fwt", fwt, "higher", "accuracy just before learning, less zero-shot (GEM)"),
        Metric(
            "transfer.xtail", transfer_xtail, "higher", "accuracy on tasks not yet learned (X-TAIL)"
        ),
        Metric(
            "average.xtail",
            average_xtail,
            "higher",
            "accuracy over all steps and all tasks (X-TAIL)",
        ),
        Metric("last.xtail", final_average, "higher", "accuracy after the last task (X-TAIL)"),
        Metric("op.trace", final_average, "higher", "overall performance after the last (TRACE)"),
        Metric(
            "recall_drop",
            recall_drop,
            "lower",
            "faa lost by recalling adapters instead of loading them",
            of_matrix=False,
            unit="points",
        ),
        Metric(
            "task_accuracy",
            task_accuracy,
            "higher",
            "share of samples whose task was inferred right",
            of_matrix=False,
        ),
        Metric(
            "recall_error",
            recall_error,
            "lower",
            "relative error of a recalled adapter",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "coefficient_drift",
            coefficient_drift,
            "lower",
            "relative change of earlier tasks' coefficients since they were learned",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "new_coefficients",
            coefficient_drift,
            "lower",
            "coefficients that later adapters get on earlier tasks' inputs, relative to their own",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "floored",
            floor_met,
            "lower",
            "samples whose scores nearly cancelled, so that s / Σ s was held back by its floor",
            of_matrix=False,
            unit="samples",
        ),
        Metric(
            "left_out",
            mean_share,
            "lower",
            "share of adapters that separation topk leaves out, of the softmax of all",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "missed",
            mean_share,
            "lower",
            "share of the adapters with the highest keys that the index of keys did not find",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "atom_norm",
            length_ratio,
            "higher",
            "length of what earlier tasks' atoms add now, over that just after they were learned",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "atom_drift",
            coefficient_drift,
            "lower",
            "relative change of what earlier tasks' atoms add since they were learned",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "atom_reuse",
            reuse,
            "higher",
            "gate weight of inputs of later tasks on the atoms of earlier ones",
            of_matrix=False,
            unit="ratio",
        ),
        Metric(
            "loss.final",
            final_average,
            "lower",
            "mean over tasks of the loss after the last, nats per answer token (TRACE)",
            of_matrix=False,
            unit="nats",
        ),
        Metric(
            "loss.forgetting",
            loss_forgetting,
            "lower",
            "loss after the last task, less that just after learning, without the last task",
            of_matrix=False,
            unit="nats",
        ),
        Metric(
            "dg.validation",
            final_average,
            "higher",
            "accuracy on the source domains' validation images",
            of_matrix=False,
        ),
        Metric(
            "dg.heldout",
            dg_heldout,
            "higher",
            "accuracy on held-out domains, selected by training-domain validation (DomainBed)",
            of_matrix=False,
        ),
        Metric(
            "dgcl.heldout",
            final_average,
            "higher",
            "accuracy on the domain never learned from, after the last of the others",
            of_matrix=False,
        ),
        Metric(
            "dgcl.average",
            final_average,
            "higher",
            "mean over steps of the accuracy on the domain never learned from",
            of_matrix=False,
        ),
        Metric(
            "dgcl.seen",
            final_average,
            "higher",
            "mean over held-out domains of the final average accuracy on the others",
            of_matrix=False,
        ),
        Metric(
            "reject.coverage",
            final_average,
            "higher",
            "share of held-back images that get a label from predict --reject, when at most 5 % of "
            "all may get a wrong one",
            of_matrix=False,
        ),
        Metric(
            "reject.accuracy",
            final_average,
            "higher",
            "share of the labels that predict --reject gives to held-back images that is right",
            of_matrix=False,
        ),
    )
}


def metric(id: str) -> Metric:
    """The metric of an id; ConfigError when there is none."""
    if id not in METRICS:
        raise ConfigError(f"unknown metric {id!r}", expected=did_you_mean(id, METRICS))
    return METRICS[id]


def _chosen(ids: Iterable[str] | None) -> list[Metric]:
    if ids is None:
        return [m for m in METRICS.values() if m.of_matrix]
    chosen = [metric(id) for id in ids]
    for m in chosen:
        if not m.of_matrix:
            raise ConfigError(
                f"metric {m.id!r} does not follow from the accuracy matrix",
                remedy=f"call metrics.{m.function.__name__} with its own inputs",
            )
    return chosen


def compute(a: npt.ArrayLike, ids: Iterable[str] | None = None) -> dict[str, float]:
    """The metrics that are defined for the matrix, by id; `ids` None means all of the matrix.

    What is not in the answer is not defined: `undefined` gives the reasons. ConfigError for an
    unknown id.
    """
    scores = np.asarray(a, dtype=np.float64)
    values: dict[str, float] = {}
    for m in _chosen(ids):
        try:
            values[m.id] = m.function(scores)
        except UndefinedMetricError:
            continue
    return values


def undefined(a: npt.ArrayLike) -> dict[str, str]:
    """The reasons why the metrics that `compute` leaves out are not defined, by id."""
    scores = np.asarray(a, dtype=np.float64)
    reasons: dict[str, str] = {}
    for m in _chosen(None):
        try:
            m.function(scores)
        except UndefinedMetricError as error:
            reasons[m.id] = error.message
    return reasons
