"""raygym: reinforcement learning of language-model agents on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygym.env import ChatEnv

__all__ = ["ChatEnv", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Gymnasium takes half a second to import, and `raygym --help` needs none of it.
    if name == "ChatEnv":
        from raygym.env import ChatEnv

        return ChatEnv
    raise AttributeError(f"module 'raygym' has no attribute {name!r}")
