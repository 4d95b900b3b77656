"""The best and the worst episodes of a run's last steps, and how one is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raygym.run_reading import json_lines, trajectory_files

_SHOWN = 3
_LAST_SHARE = 0.1
"""Of the steps: what the policy does by now, not what it did at first."""
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
    """Such as `steps 91 to 100`."""


def extremes(run: Path, damaged: Callable[[str], None]) -> Extremes:
    """Read the last steps' trajectories one at a time; without any, those of the last validation, or of a rollout."""
    files = trajectory_files(run, "step")
    if files:
        first = files[-1][0] - max(1, round(_LAST_SHARE * files[-1][0])) + 1
        files = [(step, path) for step, path in files if step >= first]
        where = f"steps {files[0][0]} to {files[-1][0]}" if len(files) > 1 else f"step {files[0][0]}"
    elif files := trajectory_files(run, "validation")[-1:]:
        where = f"the validation after step {files[0][0]}"
    else:
        files, where = [(0, run / "trajectories.jsonl")], "the rollout"
    best, worst = _Kept(1.0), _Kept(-1.0)
    for step, path in files:
        for record in json_lines(path, damaged, within=run):
            if not _is_trajectory(record):
                damaged(f"{path}: a line is no trajectory as raygym writes it")
                continue
            best.see(step, record)
            worst.see(step, record)
    return Extremes(best.shown(), worst.shown(), where)


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

    def shown(self) -> tuple[Episode, ...]:
        ranked = sorted(self._kept.values(), key=lambda kept: kept[0], reverse=True)
        return tuple(_episode(step, record) for _, step, record in ranked)


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


def _messages(messages: Iterable[Mapping[str, Any]], turns: list[Mapping[str, Any]]) -> tuple[Said, ...]:
    listed = list(messages)
    # What the policy said comes last: a prompt may have examples of its own, with the same role.
    own = [index for index, message in enumerate(listed) if message.get("role") == "assistant"][-len(turns) :]
    notes = {index: _note(turn) for index, turn in zip(own, turns, strict=False)} if turns else {}
    said = [Said(str(m.get("role", "?")), clipped(_text(m)), notes.get(i, "")) for i, m in enumerate(listed)]
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
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {"name": str(call)}
        arguments = function.get("arguments", "")
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        parts.append(f"→ {function.get('name')}({written})")
    return "\n".join(parts)


def clipped(text: str) -> str:
    """The beginning and the end of what is too long to read."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    left_out = len(text) - _KEPT_HEAD - _KEPT_TAIL
    return f"{text[:_KEPT_HEAD]}\n… {left_out:,} characters are left out …\n{text[-_KEPT_TAIL:]}"


def _is_trajectory(record: Mapping[str, Any]) -> bool:
    kinds: dict[str, Any] = {
        "env": str,
        "task": int,
        "reward": int | float,
        "turns": list,
        "messages": list,
        "status": str,
    }
    kinds |= {"attempt": int, "drifted": bool}
    turn: dict[str, Any] = {
        "start": int,
        "end": int,
        "reward": int | float,
        "generate_s": int | float,
        "finish_reason": str,
    }
    return (
        all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(message, dict) for message in record["messages"])
        and all(isinstance(t, dict) and all(isinstance(t.get(k), v) for k, v in turn.items()) for t in record["turns"])
    )
