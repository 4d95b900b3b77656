"""Write configs/grafana/raygym.json: Grafana's dashboard of a run, on the metrics that `logging.ray_metrics` exports.

.venv/bin/python tools/grafana_dashboard.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "configs" / "grafana" / "raygym.json"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RUN = '{run=~"$run"}'
# Grafana's grid.
_COLUMNS, _HEIGHT = 24, 8
# Counters move once a step, so a rate needs a window with several steps in it.
_WINDOW = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    lines: tuple[tuple[str, str], ...]
    """Expression and legend of each."""
    unit: str = "short"
    width: int = 8
    help: str = ""
    stacked: bool = False
    stat: bool = False


def _gauge(name: str) -> str:
    return f"ray_raygym_{name}{_RUN}"


def _rate(name: str, *by: str) -> str:
    return f"sum by ({', '.join(('run', *by))}) (rate(ray_raygym_{name}{_RUN}{_WINDOW}))"


def _quantile(share: float, name: str) -> str:
    return f"histogram_quantile({share}, sum by (run, le) (rate(ray_raygym_{name}_bucket{_RUN}{_WINDOW})))"


_ROWS: tuple[tuple[str, tuple[_Panel, ...]], ...] = (
    ("Now", (
        _Panel("Step", ((_gauge("step"), "{{run}}"),), width=4, stat=True),
        _Panel("Reward", ((_gauge("reward_mean"), "{{run}}"),), width=4, stat=True),
        _Panel("Validation", ((_gauge("validation_reward"), "{{run}}"),), width=4, stat=True),
        _Panel("Staleness", ((_gauge("policy_staleness_max"), "{{run}}"),), width=4, stat=True,
               help="Weight versions between sampling and training, at most."),
        _Panel("Generated", ((_rate("tokens_generated_total"), "{{run}}"),), "suffix: tok/s", 4, stat=True),
        _Panel("Alarms", ((f"sum by (run) ({_gauge('alarm')})", "{{run}}"),), width=4, stat=True),
    )),
    ("Learning", (
        _Panel("Reward", (
            (_gauge("reward_mean"), "{{run}} training"), (_gauge("validation_reward"), "{{run}} validation"),
        )),
        _Panel("Reward by environment", ((_gauge("env_reward_mean"), "{{env}}"),)),
        _Panel("Entropy and KL", ((_gauge("policy_entropy"), "entropy"), (_gauge("policy_kl"), "KL"))),
        _Panel("Gradient's norm", ((_gauge("grad_norm"), "{{run}}"),)),
        _Panel("Clipped tokens", ((_gauge("policy_clip_fraction"), "{{run}}"),), "percentunit"),
        _Panel("Logprobs, learner to engine", ((_gauge("policy_logprob_abs_diff"), "{{run}}"),), "sci",
               help="Above 1e-3 the learner computes something else than the engine."),
    )),
    ("Speed", (
        _Panel("Time of a step", ((_gauge("part_seconds").replace("}", ',part=~"generate|learn|sync|checkpoint|'
                                                                'validate_wait"}'), "{{part}}"),), "s", stacked=True),
        _Panel("Duration of a step", (
            (_quantile(0.5, "step_duration_seconds"), "median"), (_quantile(0.95, "step_duration_seconds"), "95 %"),
        ), "s"),
        _Panel("Tokens", (
            (_rate("tokens_generated_total"), "generated"), (_rate("tokens_trained_total"), "trained"),
            (_gauge("learn_tokens_per_second"), "while learning"),
        ), "suffix: tok/s"),
        _Panel("Weight updates", ((_gauge("sync_gib_per_second"), "{{run}}"),), "suffix: GiB/s"),
        _Panel("Environments' steps", ((_gauge("env_step_seconds"), "{{env}}"),), "s"),
        _Panel("Episodes at once", ((_gauge("concurrency"), "{{run}}"),)),
    )),
    ("Health", (
        _Panel("Failed attempts by kind", ((_rate("episodes_failed_total", "kind"), "{{kind}}"),), "suffix: /s",
               stacked=True),
        _Panel("Lost parts by kind", (
            (f"sum by (run, part) (increase(ray_raygym_part_restarts_total{_RUN}{_WINDOW}))", "{{part}}"),
        )),
        _Panel("Alarms", ((_gauge("alarm"), "{{alarm}}"),)),
        _Panel("Fenced replicas", ((_gauge("sync_fenced"), "{{run}}"),)),
        _Panel("Manager's lag (99 %)", ((_gauge("manager_loop_lag_ms"), "{{run}}"),), "ms"),
        _Panel("Drift", ((_gauge("tokens_drift_rate"), "{{run}}"),), "percentunit",
               help="Share of episodes whose text would be tokenized otherwise than the policy wrote it."),
    )),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in _ROWS:
        panels.append(
            {
                "type": "row",
                "id": len(panels) + 1,
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        x, y = 0, y + 1
        height = 4 if row[0].stat else _HEIGHT
        for panel in row:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + height
            place = {"h": height, "w": panel.width, "x": x, "y": y}
            panels.append(_panel(panel, len(panels) + 1, place))
            x += panel.width
        y += height
    return {
        "uid": "raygym",
        "title": "raygym",
        "description": "Training runs of raygym, from Ray's metrics.",
        "tags": ["raygym", "ray"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "annotations": {"list": []},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": panels,
    }


def _panel(panel: _Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {"lineWidth": 2, "fillOpacity": 40 if panel.stacked else 0, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "stat" if panel.stat else "timeseries",
        "id": number,
        "title": panel.title,
        **({"description": panel.help} if panel.help else {}),
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {} if panel.stat else custom}, "overrides": []},
        "options": _STAT if panel.stat else _LINES,
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.lines)
        ],
    }


_STAT = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "none",
         "graphMode": "area", "textMode": "auto", "justifyMode": "auto", "orientation": "auto", "wideLayout": True,
         "showPercentChange": False, "percentChangeColorMode": "standard"}  # fmt: skip
_LINES = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
          "tooltip": {"mode": "multi", "sort": "desc"}}  # fmt: skip


def _datasource_variable() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1}


def _run_variable() -> dict[str, Any]:
    return {
        "type": "query",
        "name": "run",
        "label": "Run",
        "datasource": _SOURCE,
        "query": "label_values(ray_raygym_step, run)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def main() -> None:
    """Write the file."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
