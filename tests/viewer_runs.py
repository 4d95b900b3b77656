"""Simulated runs for the viewer: folders as a run leaves them, made without one. What they say is invented."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raygym.run_files import trajectory_record
from raygym.types import EpisodeStatus, Message, Sampling, Task, Trajectory, Turn

_SPECIAL = ["<|im_start|>", "<|im_end|>"]
_TOOLS = "raygym/Orders (simulated)"
_GUESS = "raygym/NumberGuess (simulated)"
_CITIES = ["Lisbon", "Kraków", "São Paulo", "Nairobi", "Osaka", "Montréal"]
_TEXTS = [
    "You help customers of a shop. Look orders up before you answer. Where is my order? I ordered a lamp to",
    "Let me look that up. The order is on its way and arrives on Tuesday, so I will tell the customer.",
    'find_order {"city": "Lisbon", "days": 3} {"status": "on its way", "arrives": "Tuesday", "items": 2}',
    "I am thinking of a number from 1 to 20. Guess it. Higher. Lower. Correct! Answer with the number only.",
]


def tokenizer() -> Tokenizer:
    """A byte-level one of 600 tokens, learned from a few lines: pieces of words, as real ones have."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(_TEXTS * 3, trainer)
    return made


@dataclass
class SimulatedRun:
    """A run of invented episodes, written step by step."""

    path: Path
    steps: int = 12
    groups: int = 3
    group_size: int = 4
    seed: int = 0
    learner_logprobs: bool = True
    tokenizer: Tokenizer = field(default_factory=tokenizer)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        (self.path / "trajectories").mkdir(parents=True, exist_ok=True)
        checkpoint = self.path / "checkpoints" / "step_000001"
        checkpoint.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(checkpoint / "tokenizer.json"))
        config = f"name: {self.path.name}\nsteps: {self.steps}\npolicy:\n  model: simulated\n  engine: simulated\n"
        (self.path / "config.yaml").write_text(config, encoding="utf-8")

    def write(self, steps: int | None = None) -> None:
        """The first steps of the run, with validations, failures, an event and an alarm."""
        self.validation(0)
        for step in range(1, (steps or self.steps) + 1):
            self.step(step)
        self.event("lost", "EnvRunner 2", "the node is gone")
        self.event("recovered", "EnvRunner 2", "the node is gone", 14.2)
        alarm = self.path / "alarms" / "step_000004_gradient_spike"
        alarm.mkdir(parents=True)
        told = {
            "step": 4,
            "alarm": "gradient_spike",
            "action": "warn",
            "reason": "the norm was 31.2, 12 times the median",
        }
        (alarm / "alarm.json").write_text(json.dumps(told), encoding="utf-8")

    def step(self, step: int, **more: Any) -> list[dict[str, Any]]:
        """One more step: its row, its trajectories, what was dropped."""
        records = [
            self.record(step, group, episode, **more)
            for group in range(self.groups)
            for episode in range(self.group_size)
        ]
        self.append(f"trajectories/step_{step:06d}.jsonl", *records)
        rewards = [record["reward"] for record in records]
        validates = step % 4 == 0
        drawn = self._random
        row: dict[str, Any] = {
            "step": step,
            "reward/mean": float(np.mean(rewards)),
            "reward/std": float(np.std(rewards)),
            "episodes/completed": len(records),
            "episodes/turns_mean": float(np.mean([len(record["turns"]) for record in records])),
            "groups/dropped": int(step % 5 == 0),
            "tokens/generated": 52_000 + drawn.randint(-4000, 4000) + 600 * step,
            "policy/version": step - 1,
            "policy/staleness_max": drawn.choice([0, 1, 1, 2]),
            "policy/entropy": 1.4 * math.exp(-step / 30) + drawn.uniform(0, 0.06),
            "policy/logprob_abs_diff": drawn.uniform(0.001, 0.004),
            "policy/kl": drawn.uniform(0, 0.01),
            "grad/norm": drawn.uniform(0.4, 0.9),
            "lr": 1e-6,
            "loss": drawn.uniform(-0.05, 0.05),
            "learn/tokens_per_s": drawn.uniform(19_000, 22_000),
            "time/generate_s": 9 + drawn.uniform(0, 2),
            "time/learn_s": 4 + drawn.uniform(0, 0.5),
            "time/validate_wait_s": drawn.uniform(0, 1) if validates else 0.0,
            "time/sync_s": 0.8 + drawn.uniform(0, 0.1),
            "sync/checksum": "00ff",
        }
        row["time/step_s"] = sum(row[f"time/{part}_s"] for part in ("generate", "learn", "validate_wait", "sync"))
        for env in sorted({record["env"] for record in records}):
            row[f"reward/mean/{env}"] = float(np.mean([record["reward"] for record in records if record["env"] == env]))
        if drawn.random() < 0.6:
            row["episodes/failed/env_timeout"] = drawn.randint(1, 3)
        if drawn.random() < 0.3:
            row["episodes/failed/engine_lost"] = drawn.randint(1, 2)
        if validates:
            row["val/reward"] = self.validation(step)
        self.append("metrics.jsonl", row)
        if step % 5 == 0:
            cause = "env_timeout: the environment has not answered for 30 s; tried 3 times"
            dropped = {"step": step, "task": 9000 + step, "env": _TOOLS, "group_id": f"train-{9000 + step}"}
            self.append("ledger.jsonl", {**dropped, "trained": False, "cause": cause})
        return records

    def validation(self, step: int) -> float:
        """The trajectories of one validation; returns their mean reward."""
        records = [self.record(step, task, 0, split="validation") for task in range(4)]
        self.append(f"trajectories/validation_{step:06d}.jsonl", *records)
        reward = float(np.mean([record["reward"] for record in records]))
        if step == 0:
            self.append("metrics.jsonl", {"step": 0, "val/reward": reward, "val/failed": 0})
        return reward

    def event(self, what: str, name: str, cause: str, recovery_s: float | None = None) -> None:
        """A line of events.jsonl."""
        time = "2026-01-05T10:00:00.000+00:00"
        told = {"time": time, "kind": "env_runner", "name": name, "what": what, "cause": cause}
        self.append("events.jsonl", {**told, "recovery_s": recovery_s})

    def finish(self) -> None:
        """What a run writes last."""
        (self.path / "summary.json").write_text(json.dumps({"name": self.path.name}), encoding="utf-8")

    def append(self, name: str, *records: dict[str, Any]) -> None:
        """Lines to one of its files."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    def record(
        self,
        step: int,
        group: int,
        episode: int,
        *,
        split: str = "train",
        messages: list[Message] | None = None,
    ) -> dict[str, Any]:
        """One trajectory's line: `messages`, or an invented conversation."""
        drawn = self._random
        better = drawn.random() < 0.25 + 0.6 * step / self.steps
        index = (step * self.groups if split == "train" else 0) + group
        env = _GUESS if group % 3 == 2 else _TOOLS
        conversation = messages or (_guess(better, drawn) if env == _GUESS else _orders(better, index, episode, drawn))
        reward = (1.0 if better else round(drawn.choice([0.0, 0.0, 0.25, -0.5]), 2)) if messages is None else 1.0
        trajectory = self._trajectory(
            conversation, Task(index, env, 1000 + index, split), f"{split}-{index}", episode, reward, step, better
        )
        record = trajectory_record(trajectory)
        if self.learner_logprobs and split == "train":
            record["learner_logprobs"] = [
                round(logprob + drawn.gauss(0, 0.004 if drawn.random() < 0.97 else 0.4), 6) if trained else None
                for logprob, trained in zip(record["logprobs"], record["loss_mask"], strict=True)
            ]
        return record

    def _trajectory(
        self, messages: list[Message], task: Task, group_id: str, episode: int, reward: float, step: int, ended: bool
    ) -> Trajectory:
        ids: list[int] = []
        mask: list[bool] = []
        turns: list[Turn] = []
        drifts = episode == 1
        for number, message in enumerate(messages):
            header, text = f"<|im_start|>{message['role']}\n", str(message.get("content") or "")
            for call in message.get("tool_calls", []):
                text += f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
            opening = self._encode(header)
            if message["role"] != "assistant":
                new = [*opening, *self._encode(f"{text}<|im_end|>\n")]
                ids, mask = ids + new, mask + [False] * len(new)
                continue
            ids, mask = ids + opening, mask + [False] * len(opening)
            written = self._encode(text)
            if drifts and not turns:
                written = self._split_one(written)
            written.append(self.tokenizer.token_to_id("<|im_end|>"))
            last = all(later["role"] != "assistant" for later in messages[number + 1 :])
            times = round(self._random.lognormvariate(-0.3, 0.5), 3), round(self._random.lognormvariate(-1.5, 0.6), 3)
            turns.append(Turn(len(ids), len(ids) + len(written), reward if last else 0.0, "stop", *times))
            ids, mask = ids + written, mask + [True] * len(written)
            after = self._encode("\n")
            ids, mask = ids + after, mask + [False] * len(after)
        trained = np.array(mask)
        surprise = [-min(12.0, self._random.expovariate(2.2) ** 2) for _ in ids]
        newer = len(ids) // 2
        versions = [max(0, step - 1 - (index < newer and episode % 2 == 0)) for index in range(len(ids))]
        return Trajectory(
            task,
            group_id,
            episode,
            0,
            EpisodeStatus.TERMINATED if ended or episode % 3 else EpisodeStatus.TRUNCATED,
            np.array(ids, np.int32),
            trained,
            np.where(trained, surprise, 0).astype(np.float32),
            np.where(trained, versions, -1).astype(np.int32),
            tuple(turns),
            reward,
            tuple(messages),
            Sampling(1.0, 256),
            drifted=drifts,
            metrics={"lookups": float(len(turns))},
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _split_one(self, ids: list[int]) -> list[int]:
        """The same text, with one token given as its single bytes: what a policy may sample."""
        longest = max(range(len(ids)), key=lambda at: len(self.tokenizer.id_to_token(ids[at])))
        single = [self.tokenizer.token_to_id(letter) for letter in self.tokenizer.id_to_token(ids[longest])]
        return [*ids[:longest], *single, *ids[longest + 1 :]]


def _orders(better: bool, index: int, episode: int, drawn: random.Random) -> list[Message]:
    city = _CITIES[index % len(_CITIES)]
    call = {"name": "find_order", "arguments": json.dumps({"city": city, "days": 3 + episode}, ensure_ascii=False)}
    found = {"status": "on its way", "arrives": "Tuesday", "items": drawn.randint(1, 4)}
    answer = (
        f"Your lamp is on its way to {city} and arrives on Tuesday."
        if better
        else f"I could not find an order to {city}. Please ask again later."
    )
    return [
        {"role": "system", "content": "You help customers of a shop. Look orders up before you answer."},
        {"role": "user", "content": f"Where is my order? I ordered a lamp to {city}."},
        {
            "role": "assistant",
            "content": "Let me look that up.",
            "tool_calls": [{"id": f"call{episode}", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": f"call{episode}", "name": "find_order", "content": json.dumps(found)},
        {"role": "assistant", "content": answer},
    ]


def _guess(better: bool, drawn: random.Random) -> list[Message]:
    secret, messages = (
        drawn.randint(1, 20),
        [{"role": "user", "content": "I think of a number from 1 to 20. Guess it."}],
    )
    low, high = 1, 20
    for _ in range(4):
        guess = (low + high) // 2 if better else drawn.randint(1, 20)
        messages.append({"role": "assistant", "content": str(guess)})
        if guess == secret:
            return [*messages, {"role": "user", "content": "Correct!"}]
        low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
        messages.append({"role": "user", "content": "Higher." if guess < secret else "Lower."})
    return messages


def large_lines(record: dict[str, Any], of_bytes: int) -> Iterator[bytes]:
    """Lines of one trajectory again and again, groups of four, until they are so many bytes."""
    template = json.dumps({**record, "group_id": "train-@GROUP", "episode": "@EPISODE"}).encode()
    template = template.replace(b'"@EPISODE"', b"@EPISODE") + b"\n"
    written = number = 0
    while written < of_bytes:
        line = template.replace(b"@GROUP", b"%d" % (number // 4)).replace(b"@EPISODE", b"%d" % (number % 4))
        yield line
        written, number = written + len(line), number + 1
