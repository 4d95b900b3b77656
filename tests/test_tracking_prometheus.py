"""What Prometheus gets of a row, and that Grafana's dashboard is one and asks for nothing else."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from table_engine import TableEngine
from test_run_files import collected

from raygym.batch import train_sequences
from raygym.config import LearnerConfig
from raygym.method_config import MethodConfig
from raygym.metrics import learn_metrics, rollout_metrics, sync_metrics, validation_metrics
from raygym.run_row import Row
from raygym.tracking.prometheus import FAMILIES, Readings
from raygym.update import PolicyUpdate
from raygym.weights import Published

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "configs/grafana/raygym.json"
ROW: Row = {
    "reward/mean": 0.5, "reward/mean/a": 0.25, "reward/mean/b/c": 0.75, "val/reward": 0.125, "grad/norm": math.inf,
    "episodes/failed/env_error": 4, "episodes/completed": 16, "tokens/generated": 300, "time/step_s": 3.0,
    "time/generate_s": 2.0, "env/b/c/step_s": 0.1, "alarms/gradient_spike": 1.0, "supervision/replica_restarts": 2.0,
    "sync/checksum": "abc",
}  # fmt: skip


def told(readings: Readings, step: int, row: Row) -> dict[tuple[str, str], float]:
    return {(reading.family.name, reading.label): reading.value for reading in readings.of(step, row)}


def test_a_row_becomes_readings_with_labels() -> None:
    readings = Readings()
    assert told(readings, 7, ROW) == {
        ("raygym_step", ""): 7,
        ("raygym_reward_mean", ""): 0.5,
        ("raygym_env_reward_mean", "a"): 0.25,
        ("raygym_env_reward_mean", "b/c"): 0.75,
        ("raygym_validation_reward", ""): 0.125,
        ("raygym_part_seconds", "step"): 3.0,
        ("raygym_part_seconds", "generate"): 2.0,
        ("raygym_env_step_seconds", "b/c"): 0.1,
        ("raygym_alarm", "gradient_spike"): 1,
        ("raygym_steps_total", ""): 1,
        ("raygym_episodes_completed_total", ""): 16,
        ("raygym_episodes_failed_total", "env_error"): 4,
        ("raygym_tokens_generated_total", ""): 300,
        ("raygym_part_restarts_total", "replica"): 2,
        ("raygym_step_duration_seconds", ""): 3.0,
    }
    assert told(readings, 8, {})["raygym_alarm", "gradient_spike"] == 0, "what has ended is set back"


def test_every_family_is_made_of_something_that_a_run_tells() -> None:
    stats = PolicyUpdate(LearnerConfig(), TableEngine(), 1.0).run(
        train_sequences(collected().groups, MethodConfig().resolved())
    )
    published = Published(3, "sum", 2**31, broadcast_s=0.5, apply_s=1.0)
    row = rollout_metrics(collected(), 4) | learn_metrics(stats) | sync_metrics(published)
    row |= validation_metrics(collected()) | {f"time/{part}_s": 1.0 for part in ("step", "generate", "learn", "sync")}
    row |= {"alarms/gradient_spike": 1.0, "supervision/replica_restarts": 1.0}
    made = {reading.family for reading in Readings().of(1, row)}
    assert {family.name for family in FAMILIES} == {family.name for family in made}
    assert all(family.name.endswith("_total") == (family.kind == "counter") for family in FAMILIES)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grafana_dashboard", ROOT / "tools/grafana_dashboard.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def test_the_dashboard_is_what_its_tool_writes(generator: ModuleType, dashboard: dict[str, Any]) -> None:
    assert dashboard == generator.dashboard(), "run tools/grafana_dashboard.py"


def test_the_dashboard_is_one_of_grafanas(dashboard: dict[str, Any]) -> None:
    """Read into Grafana's own types and written again, nothing of it is lost or changed."""
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert list(differences(dashboard, read, "")) == []
    wrong = {**dashboard, "panels": [{**panel, "colour": "red"} for panel in dashboard["panels"]]}
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(wrong)))
    assert next(iter(differences(wrong, read, ""))).endswith(".colour"), "what Grafana does not know would be found"


def differences(wanted: Any, found: Any, path: str) -> Iterator[str]:
    """Where `found` lacks what `wanted` has; defaults that came in are none."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            yield from differences(value, found.get(key), f"{path}.{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, value in enumerate(wanted):
            yield from differences(value, found[index], f"{path}[{index}]")
    elif wanted != found:
        yield path


def test_panels_have_their_places(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def selectors(expression: Any) -> Iterator[str]:
    """The metrics that a parsed expression of PromQL asks for."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression.name
    for name in ("expr", "vector_selector", "lhs", "rhs", "args"):
        child = getattr(expression, name, None)
        for part in child if isinstance(child, list) else [child]:
            if part is not None:
                yield from selectors(part)


def test_every_expression_is_promql_and_asks_for_what_is_exported(dashboard: dict[str, Any]) -> None:
    exported = {name for family in FAMILIES for name in family.exported}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 20
    for text in expressions:
        parsed = promql_parser.parse(text.replace("$__rate_interval", "5m").replace("$run", ".*"))
        asked = set(selectors(parsed))
        assert asked and asked <= exported, text
    assert "ray_raygym_step" in exported, "which the variable asks for"


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ray_exports_them_under_these_names(ray_cluster: None) -> None:
    ray = importlib.import_module("ray")
    metrics = importlib.import_module("raygym.actors.ray_metrics").RayMetrics("a run")
    metrics.log(7, {**ROW, "time/sync_s": 0.2})
    metrics.log(8, {**ROW, "time/sync_s": 0.2, "episodes/failed/env_error": 0})
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]  # tests before this one had others
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    set_here = {reading.family for reading in Readings().of(7, {**ROW, "time/sync_s": 0.2})}
    expected = {name for family in set_here for name in family.exported}
    deadline, lines = time.monotonic() + 100, dict[str, str]()
    # Ray may have exported in the middle of what was set.
    while not (expected <= set(lines) and lines["ray_raygym_step"].endswith(" 8.0")):
        assert time.monotonic() < deadline, lines
        time.sleep(0.5)
        with urllib.request.urlopen(address, timeout=60) as answer:
            text = answer.read().decode()
        lines = {line.split("{")[0]: line for line in text.splitlines() if line.startswith("ray_raygym_")}
    assert set(lines) == expected
    failed = lines["ray_raygym_episodes_failed_total"]
    assert 'run="a run"' in failed and 'kind="env_error"' in failed and failed.endswith(" 4.0")
