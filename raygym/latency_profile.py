"""How long one generation of a simulated engine takes, where that was measured: quantiles or samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def read_profile(value: Any) -> Any:
    """The mapping in a YAML or JSON file where `value` names one, else `value`.

    Raises:
        ValueError: there is no such file, or no mapping in it.
    """
    if not isinstance(value, str):
        return value
    try:
        data = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{value} cannot be read ({error.strerror}); expected a YAML file or a mapping") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{value} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{value}: expected a mapping of keys in it, found {type(data).__name__}")
    return data


class MeasuredLatency(BaseModel):
    """`policy.simulated.measured`: one of the two keys, inline or in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples_s: list[Seconds] = []
    """Times of generations; each is drawn equally often."""
    quantiles_s: dict[Share, Seconds] = {}
    """The time that so large a share of generations stays below, `{0: 0.1, 0.5: 0.4, 1: 3.0}`; linear in between."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, data: Any) -> Any:
        return read_profile(data)

    @field_validator("samples_s")
    @classmethod
    def _in_order(cls, samples: list[float]) -> list[float]:
        return sorted(samples)

    @field_validator("quantiles_s")
    @classmethod
    def _by_share(cls, quantiles: dict[float, float]) -> dict[float, float]:
        return dict(sorted(quantiles.items()))

    @model_validator(mode="after")
    def _one_distribution(self) -> MeasuredLatency:
        if bool(self.samples_s) == bool(self.quantiles_s):
            raise ValueError("expected either samples_s or quantiles_s, with at least one value in it")
        shares, times = list(self.quantiles_s), list(self.quantiles_s.values())
        if shares and (shares[0] != 0 or shares[-1] != 1):
            raise ValueError(f"quantiles_s: expected them from 0 to 1, found {shares[0]:g} to {shares[-1]:g}")
        if times != sorted(times):
            raise ValueError("quantiles_s: a larger share cannot stay below a smaller time")
        return self

    def at(self, share: float) -> float:
        """Seconds of the generation that this share of all is faster than, 0 to below 1."""
        if self.samples_s:
            return self.samples_s[int(share * len(self.samples_s))]
        return float(np.interp(share, list(self.quantiles_s), list(self.quantiles_s.values())))
