"""What a metric's name says of its unit."""

from __future__ import annotations

import re

_RATIO = re.compile(r"(^|_)(over|of_its_own|efficiency|ratio|share|speedup|fraction|error)(_|$)")
_RATE = re.compile(r"(?:^|_)([a-z]+)_per_(cpu_s|[a-z]+)(?:_|$)")
_LAST = re.compile(r"_(ms|us|s|seconds|kib|mib|gib)$")
_PLAIN = re.compile(r"_(ms|us|s|seconds|kib|mib|gib)(?:_|$)")
_WRITTEN = {"us": "µs", "seconds": "s", "kib": "KiB", "mib": "MiB", "gib": "GiB", "cpu_s": "CPU s"}
RATIO = "1"
"""The unit of a ratio, which has none."""


def unit_of(metric: str) -> str | None:
    """`ms`, `tokens/s`, "1" for a ratio; None where the name does not say.

    Names read as `overhead_ms_p99` or `cpu_ms_per_turn_manager`: a unit, and then what it is of.
    """
    if is_ratio(metric):
        return RATIO
    if rate := _RATE.search(metric):
        return "/".join(_WRITTEN.get(part, part) for part in rate.groups())
    if plain := _PLAIN.search(metric):
        return _WRITTEN.get(plain[1], plain[1])
    return None


def is_ratio(metric: str) -> bool:
    """Whether it is a quotient of two things of one run, which another machine may leave as it is.

    `tokens_over_trl` is one; `turn_over_method_us` is microseconds, as its end says.
    """
    return _RATIO.search(metric) is not None and _LAST.search(metric) is None
