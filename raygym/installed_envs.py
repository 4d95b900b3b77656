"""Environments of other installed packages: entry points of the group `raygym.envs`, a name to `module:Class` each.

[project.entry-points."raygym.envs"]
"acme/Maze-v0" = "acme.maze:Maze"
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "raygym.envs"


def installed_env_ids() -> list[str]:
    """The names that installed packages give to their environments."""
    return sorted(_by_name(tuple(sys.path)))


def installed_env(name: str) -> Callable[..., Any] | None:
    """The class that an installed package offers under `name`, or None.

    Raises:
        ImportError: it cannot be loaded, or two packages offer different ones.
    """
    offered = _by_name(tuple(sys.path)).get(name, [])
    if not offered:
        return None
    if len({point.value for point in offered}) > 1:
        # Sorted: a folder's entries have no order.
        offers = " and ".join(sorted(f"{point.value} of {_package(point)}" for point in offered))
        raise ImportError(f"it is offered more than once, as {offers}; name one as module:Class")
    try:
        return offered[0].load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the package {_package(offered[0])} offers it as {offered[0].value}, which cannot be loaded: {error}"
        ) from error


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unnamed package"


@lru_cache(maxsize=4)
def _by_name(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    # Reading every package's metadata takes tens of milliseconds, and each episode makes an environment.
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found
