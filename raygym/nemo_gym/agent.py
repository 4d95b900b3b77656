"""An episode that NeMo Gym's own agent plays: `POST /run`, and a trajectory out of what it answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raygym.chat import TemplateError
from raygym.env import EnvError
from raygym.env_host import DeadlineMissed, within
from raygym.episode import EpisodeLimits, RendererFor
from raygym.nemo_gym.client import GymClient, ServerRefused, excerpt
from raygym.nemo_gym.endpoints import find_endpoint
from raygym.nemo_gym.layout import MODELS
from raygym.nemo_gym.play import Play
from raygym.nemo_gym.responses import chat_messages, chat_tools, items_to_messages
from raygym.nemo_gym.rows import Row
from raygym.nemo_gym.trained_tokens import Tokens, read_tokens
from raygym.nemo_gym.verdict import Verdict, read_verdict
from raygym.types import (
    EpisodeFailure,
    EpisodeStatus,
    FailureKind,
    Message,
    Sampling,
    Task,
    Trajectory,
    Turn,
)


@dataclass(frozen=True, slots=True)
class _Played:
    status: EpisodeStatus
    tokens: Tokens
    verdict: Verdict
    messages: tuple[Message, ...]
    version: int
    drifted: bool
    seconds: float
    cut: bool
    """The last generation ended for want of room."""


async def run_agent_episode(
    play: Play,
    task: Task,
    *,
    group_id: str,
    episode: int,
    attempt: int,
    served_version: Callable[[], Awaitable[int]],
    renderer_for: RendererFor,
    limits: EpisodeLimits,
    sampling: Sampling,
) -> Trajectory:
    """Let the row's agent play `task`. The policy is called over HTTP by NeMo Gym's model server, not from here.

    Weight versions do not travel through NeMo Gym, so every token counts as made by the version that was served when
    the episode began: never newer than it is, as the staleness bound needs.

    Args:
        play: rows and servers.
        task: what to play.
        group_id: the group of the episode.
        episode: 0..G-1 within the group.
        attempt: 0 for the first try.
        served_version: the weight version that the policy serves now, the oldest where replicas differ.
        renderer_for: tells whether the history drifted.
        limits: the episode's deadline; its turns and tokens are the agent's and the server's business.
        sampling: temperature and tokens per turn, sent along with the row.

    Returns:
        A trajectory; failed with its kind where anything went wrong. Only the last turn has a reward, and the time of
        the whole run as its `env_s`, since the agent does not tell them apart.

    Raises:
        asyncio.CancelledError: the caller gave up; the agent's request has been closed.
    """
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, limits.max_tokens_per_turn))
    common: dict[str, Any] = {"task": task, "group_id": group_id, "episode": episode, "attempt": attempt}
    try:
        played = await within(_play(play, task, served_version, renderer_for, sampling), limits.episode_timeout_s)
    except Exception as error:  # whatever an agent's answer makes fail has a name, and the run goes on
        return _failed(_as_failure(error, limits), sampling, common)
    tokens = played.tokens
    return Trajectory(
        **common,
        status=played.status,
        token_ids=tokens.token_ids,
        loss_mask=tokens.loss_mask,
        logprobs=tokens.logprobs,
        weight_versions=np.where(tokens.loss_mask, played.version, -1).astype(np.int32),
        turns=_turns(played, sampling.max_tokens),
        reward=played.verdict.reward,
        messages=played.messages,
        sampling=sampling,
        drifted=played.drifted,
        metrics=played.verdict.metrics,
        reward_components=played.verdict.reward_components,
    )


def _turns(played: _Played, max_tokens: int) -> tuple[Turn, ...]:
    turns = []
    for start, end in played.tokens.spans:
        last = end == len(played.tokens.token_ids)
        # Of the turns before the last, the agent does not tell how they ended.
        cut = played.cut if last else end - start >= max_tokens
        reward, seconds = (played.verdict.reward, played.seconds) if last else (0.0, 0.0)
        turns.append(Turn(start, end, reward, "length" if cut else "stop", 0.0, seconds))
    return tuple(turns)


async def _play(
    play: Play,
    task: Task,
    served_version: Callable[[], Awaitable[int]],
    renderer_for: RendererFor,
    sampling: Sampling,
) -> _Played:
    row = play.row_of(task)
    name = play.target(row)
    published = Path(play.endpoints)
    endpoint = await find_endpoint(published, name)
    version = await served_version()
    client = GymClient(endpoint.url, name, published)
    started = time.monotonic()
    try:
        answer = await client.ask("run", with_sampling(row, sampling))
    except ServerRefused as refused:
        raise _refused(refused, play) from refused
    finally:
        await client.close()
    seconds = time.monotonic() - started
    response = answer.get("response")
    items = response.get("output") if isinstance(response, Mapping) else None
    if not isinstance(response, Mapping) or not isinstance(items, list):
        raise EnvError(f"{name} answered without a response and its output: {excerpt(str(answer))}")
    cut = (response.get("incomplete_details") or {}).get("reason") == "max_output_tokens"
    try:
        tokens = read_tokens(items)
    except EpisodeFailure as failure:
        if cut and failure.kind is FailureKind.MISSING_TOKEN_IDS:
            # How the model server passes on a 400 of the policy's: an empty answer that was "cut", and a reward of 0.
            detail = "the model server reports an answer without tokens: the prompt no longer fits the context length"
            raise EpisodeFailure(FailureKind.CONTEXT_OVERFLOW, detail) from failure
        raise
    verdict = read_verdict(answer, {*row.data, "response", "terminated", "truncated"})
    # The agent may have added to the input, such as the first observation; its answer repeats what it used.
    params = answer.get("responses_create_params") or row.data["responses_create_params"]
    messages = (*chat_messages(params), *items_to_messages(items))
    status = EpisodeStatus.TRUNCATED if cut or answer.get("truncated") else EpisodeStatus.TERMINATED
    return _Played(
        status, tokens, verdict, messages, version, _drifted(row, messages, tokens, renderer_for), seconds, cut
    )


def with_sampling(row: Row, sampling: Sampling) -> dict[str, Any]:
    """The row with the run's sampling, whatever it asked for itself: the policy is trained under that one."""
    params = {**row.data["responses_create_params"], "temperature": sampling.temperature, "top_p": 1.0}
    return {**row.data, "responses_create_params": {**params, "max_output_tokens": sampling.max_tokens}}


def _refused(refused: ServerRefused, play: Play) -> EpisodeFailure:
    kind = FailureKind.ENV_ERROR
    models = [server.name for server in play.layout.servers.values() if server.kind == MODELS]
    if refused.status in (400, 500) and "context length" in refused.body:
        kind = FailureKind.CONTEXT_OVERFLOW
    elif any(f"___{name} calling an inner server" in refused.body for name in models):
        kind = FailureKind.ENGINE_ERROR  # what a model server calls is the policy
    return EpisodeFailure(kind, str(refused))


def _drifted(row: Row, messages: tuple[Message, ...], tokens: Tokens, renderer_for: RendererFor) -> bool:
    try:
        renderer = renderer_for(chat_tools(row.data["responses_create_params"].get("tools")))
    except TemplateError:
        return True
    return renderer.drifted(messages, tokens.token_ids)


def _as_failure(error: Exception, limits: EpisodeLimits) -> EpisodeFailure:
    if isinstance(error, EpisodeFailure):
        return error
    if isinstance(error, DeadlineMissed):
        detail = f"the agent's run took longer than {limits.episode_timeout_s:.3g} s (rollout.episode_timeout_s)"
        return EpisodeFailure(FailureKind.ENV_TIMEOUT, detail)
    detail = str(error) if isinstance(error, EnvError) else f"{type(error).__name__}: {error}"
    return EpisodeFailure(FailureKind.ENV_ERROR, detail)


def _failed(failure: EpisodeFailure, sampling: Sampling, common: dict[str, Any]) -> Trajectory:
    return Trajectory(
        **common,
        status=EpisodeStatus.FAILED,
        token_ids=np.empty(0, np.int32),
        loss_mask=np.empty(0, np.bool_),
        logprobs=np.empty(0, np.float32),
        weight_versions=np.empty(0, np.int32),
        turns=(),
        reward=0.0,
        messages=(),
        sampling=sampling,
        failure=failure.kind,
        failure_detail=failure.detail,
    )
