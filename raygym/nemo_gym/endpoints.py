"""Where the servers of one environment listen: a small file that their supervisor writes and episodes read.

After a restart every server has a new port. So an episode that began before cannot reach a server that has forgotten it
and be given a reward for half of its actions: its calls fail, and it is tried again.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from raygym.types import EpisodeFailure, FailureKind
from raygym.whole_file import write_whole

_POLL_S = 0.1
# A supervisor notices a dead server within half a second.
_WITHDRAWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server that answers."""

    url: str
    gymnasium: bool
    """It speaks `/reset` and `/step` instead of `/seed_session`, tools and `/verify`."""
    closes: bool
    """It has `/close_session`."""


def write_endpoints(path: Path, endpoints: dict[str, Endpoint], problem: str = "") -> None:
    """Publish addresses, whole or not at all.

    Args:
        path: the file.
        endpoints: by server; empty while none can be reached.
        problem: why there are none and will be none; empty while they are being started.
    """
    text = json.dumps({"servers": {name: asdict(at) for name, at in endpoints.items()}, "problem": problem})
    write_whole(path, text)


def read_endpoints(path: Path) -> dict[str, Endpoint]:
    """The published addresses; empty while the servers are being started.

    Raises:
        EpisodeFailure: `env_lost`: nothing is published here, or the servers were given up.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EpisodeFailure(FailureKind.ENV_LOST, f"NeMo Gym's servers are not running: {error}") from error
    if content["problem"]:
        raise EpisodeFailure(FailureKind.ENV_LOST, f"NeMo Gym's servers are not running: {content['problem']}")
    return {name: Endpoint(**at) for name, at in content["servers"].items()}


async def find_endpoint(path: Path, server: str) -> Endpoint:
    """The address of `server`; waits while it is being started. The caller keeps the deadline."""
    while not (endpoints := read_endpoints(path)):
        await asyncio.sleep(_POLL_S)
    return endpoints[server]


async def wait_withdrawn(path: Path, server: str, url: str) -> None:
    """Wait until a server that could not be reached is no longer published, a second at most.

    Whoever tries again then waits for the new one, instead of using up its attempts on the old address.
    """
    for _ in range(int(_WITHDRAWN_S / _POLL_S)):
        if is_withdrawn(path, server, url):
            return
        await asyncio.sleep(_POLL_S)


def is_withdrawn(path: Path, server: str, url: str) -> bool:
    """Whether `url` is no longer published as the address of `server`."""
    try:
        endpoint = read_endpoints(path).get(server)
    except EpisodeFailure:
        return True
    return endpoint is None or endpoint.url != url
