"""The best and the worst episodes of a run's last steps, and how one is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raygym.message_turns import turn_of
from raygym.report.newest import newest, records
from raygym.report.odd_values import finite, or_noted
from raygym.run_reading import trajectory_files

_SHOWN = 3
_LAST_SHARE = 0.1
"""Of the steps: what the policy does by now, not what it did at first."""
_MOST_BYTES = 256 << 20
"""Of trajectories that are looked through, which takes some seconds."""
_MOST_CHARACTERS, _KEPT_HEAD, _KEPT_TAIL = 2400, 1600, 500
_MOST_MESSAGES, _FIRST_MESSAGES = 30, 6


@dataclass(frozen=True, slots=True)
class Said:
    """One message."""

    role: str
    text: str
    note: str
    """Of a turn: its reward, tokens and time; else empty."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode as it is shown."""

    step: int
    env: str
    task: int
    reward: float
    facts: str
    messages: tuple[Said, ...]


@dataclass(frozen=True, slots=True)
class Extremes:
    """Episodes of different tasks, and where they were looked for."""

    best: tuple[Episode, ...]
    worst: tuple[Episode, ...]
    where: str
    """Such as `steps 91 to 100`; also whether not all of them was read."""


def extremes(run: Path, damaged: Callable[[str], None], most_bytes: int = _MOST_BYTES) -> Extremes:
    """Read the last steps' trajectories one at a time; without any, those of the last validation, or of a rollout.

    Args:
        run: the folder.
        damaged: is told of what cannot be shown.
        most_bytes: no more than the newest so many are read.
    """
    files, where = trajectory_files(run, "step"), ""
    if files:
        first = files[-1][0] - max(1, round(_LAST_SHARE * files[-1][0])) + 1
        files = [(step, path) for step, path in files if step >= first]
    elif files := trajectory_files(run, "validation")[-1:]:
        where = f"the validation after step {files[0][0]}"
    else:
        files, where = [(0, run / "trajectories.jsonl")], "the rollout"
    parts = newest(files, run, most_bytes)
    if not where:
        where = f"steps {parts[-1].step} to {parts[0].step}" if len(parts) > 1 else f"step {parts[0].step}"
    if len(parts) < len(files) or parts[-1].skipped:
        where += f", the last {most_bytes / 2**20:.4g} MiB of trajectories"
    best, worst = _Kept(1.0), _Kept(-1.0)
    for part in parts:
        for record in records(part, run, damaged):
            if not _is_trajectory(record):
                damaged(f"{part.path}: a line is no trajectory as raygym writes it")
                continue
            best.see(part.step, record)
            worst.see(part.step, record)
    return Extremes(best.shown(damaged), worst.shown(damaged), where)


class _Kept:
    """Few records, one a task: the highest of `sign` x reward, the latest among equals."""

    def __init__(self, sign: float) -> None:
        self._sign = sign
        self._kept: dict[tuple[str, int], tuple[tuple[float, int], int, Mapping[str, Any]]] = {}

    def see(self, step: int, record: Mapping[str, Any]) -> None:
        key, rank = (record["env"], record["task"]), (self._sign * record["reward"], step)
        least = min(self._kept, key=lambda kept: self._kept[kept][0], default=None)
        if key in self._kept:
            least = key
        elif len(self._kept) < _SHOWN:
            least = None
        if least is not None:
            if rank <= self._kept[least][0]:
                return
            del self._kept[least]
        # Of a long episode the tokens are most of it, and nobody reads them here.
        self._kept[key] = (rank, step, {**record, "token_ids": (), "logprobs": (), "weight_versions": ()})

    def shown(self, damaged: Callable[[str], None]) -> tuple[Episode, ...]:
        ranked = sorted(self._kept.values(), key=lambda kept: kept[0], reverse=True)
        made = (
            or_noted(
                damaged, f"step {step}", f"an episode of task {record['task']}", partial(_episode, step, record), None
            )
            for _, step, record in ranked
        )
        return tuple(episode for episode in made if episode is not None)


def _episode(step: int, record: Mapping[str, Any]) -> Episode:
    turns = record["turns"]
    tokens = sum(turn["end"] - turn["start"] for turn in turns)
    facts = [f"{len(turns)} turn{'s' * (len(turns) != 1)}", f"{tokens} tokens", record["status"]]
    facts += [f"attempt {record['attempt'] + 1}"] if record["attempt"] else []
    facts += ["rendering drifted"] if record["drifted"] else []
    components = record.get("reward_components") or {}
    facts += [f"{name} {value:.3g}" for name, value in components.items()]
    said = _messages(record["messages"], turns)
    return Episode(step, record["env"], record["task"], record["reward"], ", ".join(facts), said)


def _messages(messages: Sequence[Mapping[str, Any]], turns: Sequence[Mapping[str, Any]]) -> tuple[Said, ...]:
    said = []
    for message, turn in zip(messages, turn_of(messages, len(turns)), strict=True):
        note = _note(turns[turn]) if turn is not None and message.get("role") == "assistant" else ""
        said.append(Said(str(message.get("role", "?")), clipped(_text(message)), note))
    if len(said) <= _MOST_MESSAGES:
        return tuple(said)
    left_out = len(said) - _MOST_MESSAGES
    gap = Said("", f"… {left_out} messages are left out …", "")
    return (*said[:_FIRST_MESSAGES], gap, *said[_FIRST_MESSAGES + left_out :])


def _note(turn: Mapping[str, Any]) -> str:
    parts = [f"reward {turn['reward']:.3g}", f"{turn['end'] - turn['start']} tokens", f"{turn['generate_s']:.1f} s"]
    return ", ".join(parts + (["cut off by the token limit"] if turn["finish_reason"] == "length" else []))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = [message["reasoning_content"]] if isinstance(message.get("reasoning_content"), str) else []
    if isinstance(content, str):
        parts.append(content)
    elif isinstance(content, list):
        parts += [str(p["text"]) if isinstance(p, dict) and "text" in p else json.dumps(p) for p in content]
    elif content is not None:
        parts.append(json.dumps(content))
    calls = message.get("tool_calls") or []
    parts += [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return "\n".join(parts)


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        return f"→ {function if isinstance(function, str) else json.dumps(function)}()"
    arguments = function.get("arguments", "")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f"→ {function.get('name')}({written})"


def clipped(text: str) -> str:
    """The beginning and the end of what is too long to read."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    left_out = len(text) - _KEPT_HEAD - _KEPT_TAIL
    return f"{text[:_KEPT_HEAD]}\n… {left_out:,} characters are left out …\n{text[-_KEPT_TAIL:]}"


def _is_trajectory(record: Mapping[str, Any]) -> bool:
    kinds: dict[str, Any] = {"env": str, "task": int, "turns": list, "messages": list, "status": str, "attempt": int}
    kinds |= {"drifted": bool}
    components = record.get("reward_components") or {}
    return (
        all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        and finite(record.get("reward")) is not None
        and isinstance(components, dict)
        and all(finite(value) is not None for value in components.values())
        and all(isinstance(message, dict) for message in record["messages"])
        and all(isinstance(turn, dict) and _is_turn(turn) for turn in record["turns"])
    )


def _is_turn(turn: Mapping[str, Any]) -> bool:
    kinds: dict[str, Any] = {"start": int, "end": int, "finish_reason": str}
    numbers = ("reward", "generate_s")
    return all(isinstance(turn.get(key), kind) for key, kind in kinds.items()) and all(
        finite(turn.get(key)) is not None for key in numbers
    )
