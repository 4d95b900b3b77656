"""`envs[].nemo_gym`: which of NeMo Gym's own config files make an environment, and how its episodes are driven."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ENV_ID = "nemo_gym"
"""The `envs[].id` of an environment that has a section `nemo_gym`."""


class NemoGymError(ValueError):
    """NeMo Gym cannot be used as configured. The text begins with the key below `envs[].nemo_gym`."""


class NemoGymMissing(NemoGymError):
    """Something that a run needs is not on this machine: NeMo Gym itself, or a dataset."""


class NemoGymConfig(BaseModel):
    """One environment made of NeMo Gym's servers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    config_paths: Annotated[list[str], Field(min_length=1)]
    """NeMo Gym's own YAML files, absolute, or relative to the current directory or to its installed package. Where none
    of them is of `responses_api_models`, its `vllm_model_for_training.yaml` is added."""
    mode: Literal["resources", "agent"] = "resources"
    """`resources`: raygym drives a resources server itself. `agent`: NeMo Gym's own agent drives the episode, and calls
    the policy over HTTP."""
    server: str = ""
    """The resources server or agent for rows that name none (`agent_ref`); needed where the config has several."""
    dataset: str = "example"
    """A JSONL file of rows, or the name of one of the config's own `datasets` (example, train, ...)."""
    validation_dataset: str = ""
    """The same for the split `validation`; empty: the rows of `dataset`."""
    overrides: dict[str, Any] = {}
    """Merged over NeMo Gym's config; keys may be dotted paths."""
    interpreter: str = ""
    """A Python with nemo-gym installed; empty: the one that `make nemo-gym` prepares."""
    startup_timeout_s: Annotated[float, Field(gt=0)] = 180
    """Seconds for all servers to be up, at the start and after a restart."""
