"""What is measured while a memory is served, for Prometheus; all names begin with `memtool_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one app."""

    def __init__(self, queue: Callable[[], float]) -> None:
        """`queue()` is how many inputs wait."""
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "memtool_request_seconds",
            "Time from a request to its whole answer.",
            ("path", "status"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._sizes = Histogram(
            "memtool_batch_size",
            "Inputs that were run together.",
            buckets=SIZES,
            registry=self.registry,
        )
        self._weights = Counter(
            "memtool_adapter_use",
            "Inputs answered, by the share that each adapter had in them.",
            ("adapter",),
            registry=self.registry,
        )
        self._inputs = Counter("memtool_inputs", "Inputs answered.", registry=self.registry)
        self._told = Counter(
            "memtool_novelty_told",
            "Inputs of which the memory can tell whether they are unlike all that it learned.",
            registry=self.registry,
        )
        self._unlike = Counter(
            "memtool_unlike",
            "Of these, inputs that are unlike all that it learned.",
            registry=self.registry,
        )
        self._reloads = Counter(
            "memtool_reloads",
            "Versions taken up, and tries that failed.",
            ("result",),
            registry=self.registry,
        )
        self._version = Gauge(
            "memtool_version", "1 for the version served.", ("version",), registry=self.registry
        )
        waiting = Gauge("memtool_queue", "Inputs that wait.", registry=self.registry)
        waiting.set_function(queue)
        self._inputs_seen = self._unlike_seen = 0
        share = Gauge(
            "memtool_unlike_share",
            "Share of inputs unlike all that was learned, since the start.",
            registry=self.registry,
        )
        share.set_function(lambda: self._unlike_seen / max(self._inputs_seen, 1))

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; `path` is one of the routes, not what a client wrote."""
        self._seconds.labels(path, str(status)).observe(seconds)

    def batch(self, size: int) -> None:
        """So many inputs came together, however often the model runs for them."""
        self._sizes.observe(size)

    def answered(self, weights: Mapping[str, float], *, unlike: bool | None = None) -> None:
        """One input was answered by adapters with these weights."""
        self._inputs.inc()
        for adapter, weight in weights.items():
            if weight > 0:
                self._weights.labels(adapter).inc(weight)
        if unlike is not None:
            self._inputs_seen += 1
            self._unlike_seen += unlike
            self._told.inc()
            self._unlike.inc(unlike)

    def serves(self, version: str) -> None:
        """Another version is served from now on."""
        self._version.clear()
        self._version.labels(version).set(1)

    def reloaded(self, result: str) -> None:
        """A version was taken up ("ok"), or not ("failed")."""
        self._reloads.labels(result).inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


def side_by_side(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of several apps as one text: each sample has the label `replica`."""
    found: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            same = found.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                same.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Gathered(tuple(found.values())))
    return generate_latest(registry)


@dataclass(frozen=True, eq=False)
class _Gathered(Collector):
    metrics: tuple[Metric, ...]

    def collect(self) -> tuple[Metric, ...]:
        return self.metrics
