"""What every benchmark shares. `report` prints the line that a benchmark ends with.

Also imported by other Pythons than raygym's, such as TRL's, so nothing is imported here before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.calibration import calibrate
    from harness.reporting import report, report_skipped

__all__ = ["calibrate", "report", "report_skipped"]

_WHERE = {"calibrate": "harness.calibration", "report": "harness.reporting", "report_skipped": "harness.reporting"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return found
