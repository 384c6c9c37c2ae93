"""A scrape: the catalogue's metrics by the standard client, collected anew for each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dispatcher.engine.histogram import Histogram
from dispatcher.observe.catalogue import METRICS, PREFIX, WEB_METRICS, Spec, Value
from dispatcher.observe.figures import Process, ProcessFigures, Subject, take_figures

F = TypeVar("F", bound=ProcessFigures)

FIRST_US, LAST_US = 8, 29  # the buckets that are shown, as powers of two: 256 µs to 9 minutes
FIRST_SIZE, LAST_SIZE = 0, 14  # 0, 1, 3, 7 … 16,383


class Exposition(Collector):
    """A table's values as families, for one scrape."""

    def __init__(self, values: Sequence[tuple[Spec[Any], Value]]) -> None:
        self._values = values

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for spec, value in self._values:
            if value is not None:
                yield family(spec, value)


def family(spec: Spec[Any], value: Value) -> Metric:
    name = PREFIX + spec.name
    if isinstance(value, Histogram):
        return _histogram(spec, name, value)
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    made = kind(name, spec.help, labels=spec.labels or None)
    if isinstance(value, Mapping):
        for at, one in value.items():
            made.add_metric([at] if isinstance(at, str) else at, one)
    else:
        assert value is not None
        made.add_metric([], value)
    return made


def _histogram(spec: Spec[Any], name: str, histogram: Histogram) -> Metric:
    first, last, unit = (FIRST_US, LAST_US, 1e-6) if spec.kind == "seconds" else (FIRST_SIZE, LAST_SIZE, 1)
    seen = 0
    buckets = []
    for n, count in enumerate(histogram.counts):
        seen += count
        if first <= n <= last:  # bucket n ends before 2ⁿ; of a time, that microsecond makes no difference
            bound = 2**n * unit if spec.kind == "seconds" else 2**n - 1
            buckets.append((f"{bound:.6g}", seen))
    buckets.append(("+Inf", seen))
    made = HistogramMetricFamily(name, spec.help)
    made.add_metric([], buckets, sum_value=histogram.total * unit)
    return made


async def scrape(subject: Subject) -> bytes:
    """Return the metrics of a process that delivers, in the text format."""
    return render(METRICS, await take_figures(subject))


async def scrape_web(process: Process) -> bytes:
    """Return those of panel and API alone."""
    return render(WEB_METRICS, ProcessFigures(process))


def render(specs: Sequence[Spec[F]], figures: F) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Exposition([(spec, spec.value(figures)) for spec in specs]))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
