"""Dataset rows: JSONL files, each line a task of NeMo Gym's, checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raygym.nemo_gym.config import NemoGymError, NemoGymMissing
from raygym.nemo_gym.layout import AGENTS, RESOURCES, Layout
from raygym.nemo_gym.resolve import Resolved


@dataclass(frozen=True, slots=True)
class Source:
    """One JSONL file."""

    path: str
    agent: str = ""
    """The agent whose config lists the file: it plays the rows that name no `agent_ref`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One task."""

    data: Mapping[str, Any]
    """The row as it is in the file; nobody changes it."""
    agent: str
    """Name of the agent that it is for; empty where neither the row nor the config says."""
    where: str
    """File and line, for messages."""


def sources(resolved: Resolved, layout: Layout, dataset: str, key: str = "dataset") -> tuple[Source, ...]:
    """The files that `dataset` means: a path, or the name of datasets in NeMo Gym's config.

    Args:
        resolved: the config.
        layout: its servers.
        dataset: a path that ends in `.jsonl`, or a dataset's name or type.
        key: the config's key, for messages.

    Raises:
        NemoGymError: there is no such file or dataset.
    """
    if dataset.endswith(".jsonl"):
        return (Source(_existing(resolved, dataset, f"{key}: {dataset}")),)
    found: list[Source] = []
    known: set[str] = set()
    for server in layout.servers.values():
        for entry in server.settings.get("datasets") or ():
            known |= {str(entry.get("name")), str(entry.get("type"))}
            if dataset in (entry.get("name"), entry.get("type")) and layout.serves(server.name):
                path = _existing(resolved, entry["jsonl_fpath"], f"{key}: {dataset!r} of {server.name}", entry)
                found.append(Source(path, server.name if server.kind == AGENTS else layout.agent_of(server.name)))
    if dataset == "example":
        found += _shipped(resolved, layout, {layout.target(source.agent) for source in found if source.agent})
    if not found:
        raise NemoGymError(
            f"{key}: {dataset!r} is none of the config's datasets ({', '.join(sorted(known)) or 'it lists none'}); "
            "expected one of them or a path that ends in .jsonl"
        )
    return tuple(found)


@lru_cache(maxsize=16)
def load_rows(files: tuple[Source, ...]) -> tuple[Row, ...]:
    """All rows of these files, in order. Read once in a process.

    Raises:
        NemoGymError: a file cannot be read or has no rows, or a line is no row; the text names file and line.
    """
    rows = tuple(row for file in files for row in _read(file))
    if not rows:
        raise NemoGymError(f"dataset: {', '.join(file.path for file in files)} has no rows")
    return rows


def parse_row(line: str, where: str) -> dict[str, Any]:
    """One line as a row. Raises NemoGymError, which begins with `where`."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise NemoGymError(f"dataset: {where}: is not JSON ({error})") from error
    params = row.get("responses_create_params") if isinstance(row, dict) else None
    if not isinstance(params, dict):
        raise NemoGymError(f"dataset: {where}: expected an object with responses_create_params, an object itself")
    given = params.get("input")
    if not (isinstance(given, str) and given) and not (
        isinstance(given, list) and given and all(isinstance(item, dict) for item in given)
    ):
        raise NemoGymError(f"dataset: {where}: responses_create_params.input must be text or a list of messages")
    tools = params.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool.get("name") for tool in tools):
        raise NemoGymError(f"dataset: {where}: responses_create_params.tools must be a list of tools with a name each")
    agent = row.get("agent_ref")
    if agent is not None and not (isinstance(agent, dict) and isinstance(agent.get("name"), str)):
        raise NemoGymError(f'dataset: {where}: agent_ref is {agent!r}; expected {{"type": ..., "name": ...}}')
    return dict(row)


def _read(file: Source) -> list[Row]:
    rows = []
    try:
        with open(file.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file.path}, line {number}"
                    data = parse_row(line, where)
                    rows.append(Row(data, (data.get("agent_ref") or {}).get("name", file.agent), where))
    except (OSError, UnicodeDecodeError) as error:
        raise NemoGymError(f"dataset: {file.path} cannot be read ({error}); expected a JSONL file") from error
    return rows


def _shipped(resolved: Resolved, layout: Layout, covered: Collection[str]) -> list[Source]:
    """The example rows beside the code of resources servers whose agents list none."""
    found = []
    for server in layout.servers.values():
        path = server.folder(resolved.root) / "data" / "example.jsonl"
        agent = layout.agent_of(server.name)
        target = layout.target(agent) if agent else server.name
        if server.kind == RESOURCES and target not in covered and layout.serves(target) and path.is_file():
            found.append(Source(str(path), agent))
    return found


def _existing(resolved: Resolved, path: str, what: str, entry: Mapping[str, Any] | None = None) -> str:
    for candidate in (Path(path).expanduser(), resolved.root / path):
        if candidate.is_file():
            return str(candidate.absolute())
    hub = ((entry or {}).get("huggingface_identifier") or {}).get("repo_id")
    fetch = f"; NeMo Gym has it on the Hugging Face hub as {hub}: fetch it and give its path" if hub else ""
    raise NemoGymMissing(f"{what} is not there (looked in the current directory and in {resolved.root}){fetch}")
