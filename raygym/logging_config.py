"""The section `logging` of the run config: what is written beside metrics.jsonl, and who else gets its numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raygym.config_section import NonNegativeFloat, Section


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'raygym[wandb]'`. The key comes from WANDB_API_KEY or `wandb login`."""

    project: Annotated[str, Field(min_length=1)] = "raygym"
    entity: str = ""
    """Team or user; empty: the key's own."""
    group: str = ""
    tags: list[str] = Field(default_factory=list)
    mode: Literal["auto", "online", "offline"] = "auto"
    """`offline`: into `runs/<name>/wandb`, for `wandb sync` later. `auto`: what WANDB_MODE says, else online."""


class MlflowConfig(Section):
    """MLflow; needs `pip install 'raygym[mlflow]'`."""

    tracking_uri: str = ""
    """A server or a database; empty: MLFLOW_TRACKING_URI, else `sqlite:///<runs_dir>/mlflow.db`."""
    experiment: Annotated[str, Field(min_length=1)] = "raygym"


class LoggingConfig(Section):
    """What is written beside metrics.jsonl, and who else gets its numbers."""

    tensorboard: bool = True
    trajectories: bool = True
    learner_logprobs: bool = True
    """Beside what the engine says of each trained token, what the learner computed: as wide as the engine's again."""
    disk_wait_s: NonNegativeFloat = 300
    """On a full disk, how long a line waits for room before the run ends. A checkpoint that finds none is left out."""
    wandb: WandbConfig | None = None
    """Where there is such a section, be it `{}`. A tracker that fails is told once, and the run goes on."""
    mlflow: MlflowConfig | None = None
    ray_metrics: bool = True
    """Ray's own metrics, `ray_raygym_*`, which Prometheus reads on each node and configs/grafana shows."""
    opentelemetry: bool | None = None
    """A span for each episode and turn, to where OTEL_EXPORTER_OTLP_ENDPOINT says. null: if such a variable is set."""
