"""One `/metrics` for all replicas: their expositions merged, each sample told apart by a `replica` label."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


class _Merged(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def gauge(name: str, documentation: str, value: float) -> str:
    """The exposition of one gauge."""
    return generate_latest(_Merged([GaugeMetricFamily(name, documentation, value=value)])).decode()


def merged(expositions: Mapping[str, str], requests: Mapping[str, tuple[int, int]]) -> str:
    """The exposition of a whole deployment.

    Args:
        expositions: each replica's own exposition, by replica.
        requests: each replica's requests so far and requests running, by replica.

    Returns:
        Prometheus text. `raygym_replica_imbalance` is the most requests that a replica was given over the mean (1 is
        even), `raygym_prefix_cache_hit_ratio` the share of prompt tokens that were found in a KV cache.
    """
    families: dict[str, Metric] = {}
    hits = queries = 0.0
    for replica, text in expositions.items():
        for family in text_string_to_metric_families(text):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value, sample.timestamp)
                hits += sample.value if sample.name == HITS else 0
                queries += sample.value if sample.name == QUERIES else 0
    total = CounterMetricFamily("raygym_requests", "Requests that a replica was given.", labels=["replica"])
    running = GaugeMetricFamily("raygym_requests_running", "Requests that a replica is serving.", labels=["replica"])
    for replica, (given, now) in requests.items():
        total.add_metric([replica], given)
        running.add_metric([replica], now)
    counts = [given for given, _ in requests.values()]
    even = max(counts) / fmean(counts) if sum(counts) else 1.0
    imbalance = GaugeMetricFamily("raygym_replica_imbalance", "Most requests of a replica over the mean.", value=even)
    found = hits / queries if queries else 0.0
    ratio = GaugeMetricFamily(
        "raygym_prefix_cache_hit_ratio", "Share of prompt tokens found in a KV cache.", value=found
    )
    return generate_latest(_Merged([*families.values(), total, running, imbalance, ratio])).decode()
