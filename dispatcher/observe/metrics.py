"""A scrape: the catalogue's metrics by the standard client, collected anew for each."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dispatcher.engine.histogram import Histogram
from dispatcher.observe.catalogue import METRICS, PREFIX, Spec, Value
from dispatcher.observe.figures import Figures

FIRST_US, LAST_US = 8, 29  # the buckets that are shown, as powers of two: 256 µs to 9 minutes
FIRST_SIZE, LAST_SIZE = 0, 14  # 0, 1, 3, 7 … 16,383


class Exposition(Collector):
    """The table as families, for one scrape."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for spec in METRICS:
            value = spec.value(self._figures)
            if value is not None:
                yield family(spec, value)


def family(spec: Spec, value: Value) -> Metric:
    name = PREFIX + spec.name
    if isinstance(value, Histogram):
        return _histogram(spec, name, value)
    labels = None if spec.label is None else [spec.label]
    made = (CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily)(name, spec.help, labels=labels)
    if isinstance(value, Mapping):
        for at, one in value.items():
            made.add_metric([at], one)
    else:
        assert value is not None
        made.add_metric([], value)
    return made


def _histogram(spec: Spec, name: str, histogram: Histogram) -> Metric:
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


def render(figures: Figures) -> bytes:
    """Return the scrape, in the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Exposition(figures))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
