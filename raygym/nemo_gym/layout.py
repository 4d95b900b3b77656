"""What a resolved NeMo Gym config holds: servers, what they refer to, and which of them serves a row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.nemo_gym.config import NemoGymError
from raygym.nemo_gym.resolve import Resolved

RESOURCES, AGENTS, MODELS = "resources_servers", "responses_api_agents", "responses_api_models"
_KINDS = (RESOURCES, AGENTS, MODELS)


@dataclass(frozen=True, slots=True)
class Server:
    """One server instance of the config."""

    name: str
    kind: str
    """`resources_servers`, `responses_api_agents` or `responses_api_models`."""
    implementation: str
    """The folder below `kind` that holds its code."""
    settings: Mapping[str, Any]

    @property
    def references(self) -> list[str]:
        """Names of the servers that it calls."""
        return list(_references(self.settings))

    def folder(self, root: Path) -> Path:
        """Where its entry point is run."""
        return root / self.kind / self.implementation


@dataclass(frozen=True, slots=True)
class Layout:
    """The servers of one resolved config, and the mode in which they are used."""

    servers: Mapping[str, Server]
    mode: str
    default: str
    """The server for rows that name none; empty where the config has several and none was chosen."""

    def target(self, agent: str) -> str:
        """The server that an episode talks to: an agent in mode `agent`, else a resources server.

        Args:
            agent: the `agent_ref` of the row, or the agent whose dataset it is from; empty for none.

        Raises:
            NemoGymError: no such agent, or none is named and the config has several.
        """
        if not agent:
            if not self.default:
                names = ", ".join(self._candidates())
                raise NemoGymError(f"server: a row names no agent_ref, and the config has several: {names}; name one")
            return self.default
        found = self.servers.get(agent)
        if found is None or found.kind != AGENTS:
            agents = [server.name for server in self.servers.values() if server.kind == AGENTS]
            known = ", ".join(agents) or "none"
            raise NemoGymError(f"dataset: a row wants the agent {agent!r}; the config's agents: {known}")
        return found.name if self.mode == "agent" else self._resources_of(found)

    def serves(self, name: str) -> bool:
        """Whether rows of this agent or resources server are played, now that one server was chosen or is the only."""
        server = self.servers[name]
        if not self.default or name == self.default:
            return True
        try:
            return server.kind == AGENTS and self.target(name) == self.default
        except NemoGymError:
            return False

    def agent_of(self, resources: str) -> str:
        """The agent that uses a resources server; empty where there is not exactly one."""
        agents = [s.name for s in self.servers.values() if s.kind == AGENTS and resources in s.references]
        return agents[0] if len(agents) == 1 else ""

    def max_steps(self, target: str, agent: str) -> int | None:
        """Model calls that the agent of a row may make; None where the config sets no bound."""
        users = [s for s in self.servers.values() if s.kind == AGENTS and s.name in (agent or s.name, target)]
        bounds = {s.settings.get("max_steps") for s in users if target in (s.name, *s.references)}
        bound = bounds.pop() if len(bounds) == 1 else None
        return int(bound) if bound else None

    def needed(self, targets: Collection[str]) -> list[Server]:
        """These servers and all that they refer to, in the config's order."""
        wanted, queue = set[str](), list(targets)
        while queue:
            name = queue.pop()
            if name not in wanted and name in self.servers:
                wanted.add(name)
                queue += self.servers[name].references
        return [server for server in self.servers.values() if server.name in wanted]

    def _resources_of(self, agent: Server) -> str:
        names = [name for name in agent.references if name in self.servers and self.servers[name].kind == RESOURCES]
        if len(names) != 1:
            raise NemoGymError(
                f"mode: agent {agent.name!r} uses {len(names)} resources servers, so its rows cannot be played without "
                "it; use mode: agent"
            )
        return names[0]

    def _candidates(self) -> list[str]:
        kind = AGENTS if self.mode == "agent" else RESOURCES
        return [server.name for server in self.servers.values() if server.kind == kind]


def read_layout(resolved: Resolved, mode: str, chosen: str) -> Layout:
    """The layout of a resolved config.

    Args:
        resolved: what NeMo Gym made of its files.
        mode: `resources` or `agent`.
        chosen: `envs[].nemo_gym.server`.

    Raises:
        NemoGymError: the chosen server is not there, or the config has none of the kind that the mode needs.
    """
    servers = {name: server for name, entry in resolved.config.items() if (server := _server(name, entry))}
    layout = Layout(servers, mode, "")
    candidates = layout._candidates()
    if not candidates:
        kind = AGENTS if mode == "agent" else RESOURCES
        raise NemoGymError(f"config_paths: mode {mode} needs a server of {kind}, and the config has none")
    if chosen and chosen in servers and servers[chosen].kind == AGENTS:
        return Layout(servers, mode, layout.target(chosen))
    if chosen and chosen not in candidates:
        raise NemoGymError(f"server: {chosen!r} is not in the config; expected one of {', '.join(candidates)}")
    return Layout(servers, mode, chosen or (candidates[0] if len(candidates) == 1 else ""))


def _server(name: str, entry: Any) -> Server | None:
    if not isinstance(entry, Mapping):
        return None
    for kind in _KINDS:
        implementations = entry.get(kind)
        if isinstance(implementations, Mapping) and len(implementations) == 1:
            implementation, settings = next(iter(implementations.items()))
            if isinstance(settings, Mapping) and "entrypoint" in settings:
                return Server(name, kind, str(implementation), settings)
    return None


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if value.get("type") in _KINDS and isinstance(value.get("name"), str):
            yield value["name"]
            return
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
