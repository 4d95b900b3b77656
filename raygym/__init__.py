"""raygym: reinforcement learning of language-model agents on a Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygym.config import ConfigError, RunConfig
    from raygym.env import ChatEnv, EnvError
    from raygym.errors import RaygymError, RunFailed
    from raygym.python_api import make, rollout, train
    from raygym.results import Rollout, Run
    from raygym.tool_env import End, ToolEnv, ToolError, tool
    from raygym.types import Trajectory

__all__ = [
    "ChatEnv", "ConfigError", "End", "EnvError", "RaygymError", "Rollout", "Run", "RunConfig", "RunFailed", "ToolEnv",
    "ToolError", "Trajectory", "__version__", "make", "rollout", "tool", "train",
]  # fmt: skip
__version__ = "0.1.0"

_WHERE = {
    "raygym.config": ("ConfigError", "RunConfig"),
    "raygym.env": ("ChatEnv", "EnvError"),
    "raygym.errors": ("RaygymError", "RunFailed"),
    "raygym.python_api": ("make", "rollout", "train"),
    "raygym.results": ("Rollout", "Run"),
    "raygym.tool_env": ("End", "ToolEnv", "ToolError", "tool"),
    "raygym.types": ("Trajectory",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    # Gymnasium and pydantic take half a second to import, and `raygym --help` needs none of them.
    if name not in _MODULES:
        raise AttributeError(f"module 'raygym' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
