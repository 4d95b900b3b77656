"""What preparing the prompt of a session's turn costs, late in it and early: history must not be rendered again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from transformers import AutoTokenizer

from raygym.api.call import Call
from raygym.api.history import KnownHistories
from raygym.api.sessions import Session, SessionStore
from raygym.chat import ChatRenderer
from raygym.models import resolve_policy
from raygym.types import Generation, Message

EARLY, LATE = 10, 100
_SESSIONS = 20
News = Callable[[int, int], str]
"""What the environment says in a session's turn, by the numbers of both."""


def turn_prompts(model: str, repetitions: int = 3) -> dict[str, list[float]]:
    """`render_turn_100_over_10` and both in microseconds, where the environment says what it never said before.

    What it says again is not rendered again, so that only looking the history up is left: `..._said_before_us`.

    Args:
        model: a policy, whose template renders.
        repetitions: of all of it.
    """
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(resolve_policy(model)))
    samples: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        early_s, late_s = _costs_s(renderer, lambda session, turn, of=repetition: f"Not {of}, {session} or {turn}.")
        samples.setdefault("render_turn_100_over_10", []).append(late_s / early_s)
        samples.setdefault("render_turn_10_us", []).append(early_s * 1e6)
        samples.setdefault("render_turn_100_us", []).append(late_s * 1e6)
        _, again_s = _costs_s(renderer, lambda _, __: "Higher. Try again.")
        samples.setdefault("render_turn_100_said_before_us", []).append(again_s * 1e6)
    return samples


def _costs_s(renderer: ChatRenderer, news: News) -> tuple[float, float]:
    """Medians over sessions, of the early and the late turn."""
    store, known = SessionStore("benchmark"), KnownHistories()
    found = [_session_s(renderer, store.create("train", {}), store, known, partial(news, n)) for n in range(_SESSIONS)]
    return median(each[EARLY] for each in found), median(each[LATE] for each in found)


def _session_s(
    renderer: ChatRenderer, session: Session, store: SessionStore, known: KnownHistories, news: Callable[[int], str]
) -> dict[int, float]:
    """Of each turn of one session."""
    messages: list[Message] = [{"role": "user", "content": "Guess my number from 1 to 20."}]
    costs_s: dict[int, float] = {}
    for turn in range(1, LATE + 1):
        call = Call("chat", known, session=session, store=store)
        history = copy.deepcopy(messages)  # every request is parsed anew, over HTTP
        started = time.perf_counter()
        call.chat_prompt(history, lambda: renderer, partial(renderer.render_initial, history))
        costs_s[turn] = time.perf_counter() - started
        ids = np.asarray([40, 41, 2], np.int32)
        call.replace(Generation(ids, np.zeros(3, np.float32), np.zeros(3, np.int32), "stop"))
        answer = {"role": "assistant", "content": f"answer {turn}"}
        call.finish(answer)
        messages += [answer, {"role": "user", "content": news(turn)}]
    return costs_s
