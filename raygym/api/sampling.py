"""The run's own sampling, enforced on calls that come over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raygym.api.errors import ApiError

# What leaves the distribution as the policy gives it; any other value changes what is sampled or its logprobs.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "min_tokens": (None, 0),
    "use_beam_search": (None, False),
    "ignore_eos": (None, False),
}


@dataclass(frozen=True, slots=True)
class SamplingProfile:
    """How calls of one stream (training, validation) are sampled."""

    temperature: float
    strict: bool = False
    """Refuse requests whose sampling differs, instead of serving them as they ask."""

    def apply(self, name: str, body: dict[str, Any]) -> None:
        """Fill in what the request leaves open; in strict mode refuse what differs.

        Raises:
            ApiError: 400, with the parameter's name and the run's value.
        """
        if body.get("temperature") is None:
            body["temperature"] = self.temperature
        if self.strict:
            self._check(name, body)

    def _check(self, name: str, body: Mapping[str, Any]) -> None:
        if body["temperature"] != self.temperature:
            raise _differs("temperature", body["temperature"], self.temperature, name)
        for key, allowed in _NEUTRAL.items():
            if key in body and body[key] not in allowed:
                raise _differs(key, body[key], allowed[-1], name)


def _differs(key: str, found: Any, expected: Any, profile: str) -> ApiError:
    return ApiError(
        400,
        f"{key}: {found!r} differs from the run's sampling, which is {expected!r} (profile {profile}, "
        "policy.strict_sampling); leave it out",
        key,
        "sampling_differs",
    )
