"""Environments that do what environments should not, and a policy for them. Imported by the actors of the tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time

import numpy as np

from raygym.env import ChatEnv
from raygym.types import Generation


class Broken(ChatEnv):
    """Goes wrong in `where` (reset or step) as `how` says; else an episode of two turns with reward 1."""

    def __init__(self, how: str = "fine", where: str = "step", mark: str = "") -> None:
        self.how, self.where, self.mark, self.turns = how, where, mark, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.mark:
            with open(self.mark, "a") as file:
                file.write(f"{os.getpid()}\n")
        if self.where == "reset":
            self.go_wrong()
        return ("garbage",) if (self.how, self.where) == ("garbage", "reset") else ("Go.", {})

    def step(self, action):
        self.turns += 1
        if self.where == "step":
            self.go_wrong()
        if self.how == "garbage":
            return {"reward": "high"}
        return "On.", 0.5, self.turns == 2, False, {}

    def close(self):
        if self.how == "close":
            raise RuntimeError("closed twice or not at all")

    def go_wrong(self):
        match self.how:
            case "raise":
                raise RuntimeError("the dice are gone")
            case "hang":
                time.sleep(600)
            case "exit":
                os._exit(7)
            case "memory":
                held = []
                while True:
                    held.append(np.ones(32 << 20, np.uint8))
            case "child":
                subprocess.Popen(["sleep", "600"])


async def says_ten(prompt_token_ids, sampling, session_id):
    ids = np.asarray([20, 21, 2], np.int32)
    return Generation(ids, np.full(3, -0.5, np.float32), np.zeros(3, np.int32), "stop")


class SaysTenWhileOpen:
    """Holds its turns as long as there is no file `gate`, so that a test decides what still runs when it acts."""

    def __init__(self, gate: str) -> None:
        self._gate = gate

    async def __call__(self, prompt_token_ids, sampling, session_id):
        while not os.path.exists(self._gate):
            await asyncio.sleep(0.05)
        return await says_ten(prompt_token_ids, sampling, session_id)


async def says_ten_for_ever(prompt_token_ids, sampling, session_id):
    await asyncio.sleep(600)
