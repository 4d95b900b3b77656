"""raygym: reinforcement learning of language-model agents on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygym.env import ChatEnv
    from raygym.tool_env import End, ToolEnv, ToolError, tool

__all__ = ["ChatEnv", "End", "ToolEnv", "ToolError", "__version__", "tool"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Gymnasium takes half a second to import, and `raygym --help` needs none of it.
    if name == "ChatEnv":
        from raygym.env import ChatEnv

        return ChatEnv
    if name in ("End", "ToolEnv", "ToolError", "tool"):
        from raygym import tool_env

        return getattr(tool_env, name)
    raise AttributeError(f"module 'raygym' has no attribute {name!r}")
