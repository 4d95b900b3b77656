"""`run_episode`: one multi-turn episode of one environment against any `Generate`."""

from __future__ import annotations

import copy
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from raygym.chat import ChatRenderer, TemplateError
from raygym.config import EnvConfig, RolloutConfig
from raygym.engine import NO_LOGPROB
from raygym.env import StepResult, components_problem
from raygym.env_host import DeadlineMissed, Host, within
from raygym.tasks import turn_seed
from raygym.testing import chaos
from raygym.types import (
    EpisodeFailure,
    EpisodeStatus,
    FailureKind,
    Generation,
    Int32Array,
    Message,
    Sampling,
    Task,
    Trajectory,
    Turn,
)


class Generate(Protocol):
    """Whatever continues a prompt: a Serve handle, an engine in this process, a test's function."""

    def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Awaitable[Generation]:
        """Sample one continuation of exactly these IDs; `session_id` is the same in all turns of an episode."""


RendererFor = Callable[[Sequence[dict[str, Any]]], ChatRenderer]
"""The renderer for a set of OpenAI tool schemas. Raises TemplateError where the chat template cannot show them."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """What one episode may use."""

    max_turns: int
    max_tokens_per_turn: int
    max_model_len: int
    """Prompt and generation together, in tokens."""
    turn_timeout_s: float
    """Deadline of one generation."""
    step_timeout_s: float
    """Deadline of making and resetting the environment, and of each step."""
    episode_timeout_s: float
    """Deadline of the whole episode; counted against whoever was being waited for."""

    @classmethod
    def of(cls, config: RolloutConfig, max_model_len: int) -> EpisodeLimits:
        """Those of a run, on a policy with so long a context."""
        return cls(
            max_turns=config.max_turns,
            max_tokens_per_turn=config.max_tokens_per_turn,
            max_model_len=max_model_len,
            turn_timeout_s=config.turn_timeout_s,
            step_timeout_s=config.step_timeout_s,
            episode_timeout_s=config.episode_timeout_s,
        )

    def for_env(self, env: EnvConfig) -> EpisodeLimits:
        """These, with what the environment's config says instead."""
        return replace(
            self,
            max_turns=env.max_turns or self.max_turns,
            max_tokens_per_turn=env.max_tokens_per_turn or self.max_tokens_per_turn,
            step_timeout_s=env.step_timeout_s or self.step_timeout_s,
        )


async def run_episode(
    host: Host,
    task: Task,
    *,
    group_id: str,
    episode: int,
    attempt: int,
    renderer_for: RendererFor,
    generate: Generate,
    limits: EpisodeLimits,
    sampling: Sampling,
    run_seed: int,
    place: AbstractAsyncContextManager[None] | None = None,
    first_attempt: int = 0,
) -> Trajectory:
    """Play `task` on the host's environment, which is closed at the end whatever happens.

    Trouble with the environment or the engine does not raise: it comes back as a trajectory of status `failed` with its
    kind. Reaching `max_turns`, or a later turn whose prompt no longer fits, is `truncated` with the reward so far.

    Args:
        host: a fresh environment behind deadlines.
        task: what to play.
        group_id: the group of the episode.
        episode: 0..G-1 within the group.
        attempt: 0 for the first try.
        renderer_for: renders for the policy's tokenizer with the tools that the environment has after its reset.
        generate: the policy.
        limits: what the episode may use.
        sampling: how to sample each turn, with at most the smaller of its `max_tokens` and the limits'. Where its seed
            is None, every turn gets its own from `tasks.turn_seed`.
        run_seed: enters those seeds.
        place: held from the first prompt to the last reply. The environment is made and reset before it is taken, and
            closed after it is left, so that the engine waits for neither; the episode's deadline begins with it.
        first_attempt: the number of the first try, above 0 where RolloutManagers were lost. Seeds count from it, so
            that what has to be played again is sampled as it was.

    Raises:
        asyncio.CancelledError: the caller gave up; the environment has been closed.
    """
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, limits.max_tokens_per_turn))
    record = _Record()
    status, failure = EpisodeStatus.FAILED, None
    try:
        policy = _Policy(generate, sampling, f"{group_id}-{episode}-{attempt}", limits)
        seeds = [turn_seed(run_seed, task, episode, attempt - first_attempt, turn) for turn in range(limits.max_turns)]
        prompt = await _begin(record, host, renderer_for, task, limits)
        async with place or nullcontext():
            status = await _play(record, host, prompt, policy, limits, seeds)
    except EpisodeFailure as error:
        failure = error
    finally:
        await host.close()
    return Trajectory(
        task=task,
        group_id=group_id,
        episode=episode,
        attempt=attempt,
        status=status,
        token_ids=record.token_ids,
        loss_mask=record.loss_mask,
        logprobs=record.logprobs,
        weight_versions=record.weight_versions,
        turns=tuple(record.turns),
        reward=0.0 if failure else sum(turn.reward for turn in record.turns),
        messages=tuple(record.messages),
        sampling=sampling,
        drifted=record.renderer is not None
        and failure is None
        and record.renderer.drifted(record.messages, record.token_ids),
        failure=failure.kind if failure else None,
        failure_detail=failure.detail if failure else "",
        metrics=record.metrics,
        reward_components={} if failure else record.reward_components,
    )


async def _begin(
    record: _Record, host: Host, renderer_for: RendererFor, task: Task, limits: EpisodeLimits
) -> Int32Array:
    record.messages += await host.reset(task, min(limits.step_timeout_s, limits.episode_timeout_s))
    record.renderer = _rendered(partial(renderer_for, host.tools))
    return _rendered(partial(record.renderer.render_initial, record.messages))


async def _play(
    record: _Record, host: Host, prompt: Int32Array, policy: _Policy, limits: EpisodeLimits, seeds: list[int]
) -> EpisodeStatus:
    renderer = record.renderer
    assert renderer is not None
    ends = time.monotonic() + limits.episode_timeout_s

    def at_most(timeout_s: float) -> float:
        return min(timeout_s, ends - time.monotonic())

    for turn, seed in enumerate(seeds):
        if len(prompt) + 1 > limits.max_model_len:
            if turn > 0:
                return EpisodeStatus.TRUNCATED
            raise EpisodeFailure(
                FailureKind.CONTEXT_OVERFLOW,
                f"the first prompt has {len(prompt)} tokens: no room is left in a context of {limits.max_model_len}",
            )
        asked = time.monotonic()
        generation = await policy(prompt, seed, at_most(limits.turn_timeout_s))
        answered = time.monotonic()
        action = renderer.assistant_message(generation.token_ids, f"c{turn:07d}")
        record.add_generation(prompt, generation, action)
        chaos.at("episode.step")
        step = await host.step(copy.deepcopy(action), at_most(limits.step_timeout_s))
        record.add_step(step, generation, answered - asked, time.monotonic() - answered)
        if step.terminated or step.truncated:
            return EpisodeStatus.TERMINATED if step.terminated else EpisodeStatus.TRUNCATED
        prompt = _rendered(partial(renderer.extend, record.token_ids, step.messages))
    return EpisodeStatus.TRUNCATED


def _rendered(render: Callable[[], T]) -> T:
    try:
        return render()
    except TemplateError as error:
        raise EpisodeFailure(FailureKind.ENV_ERROR, f"its messages or tools cannot be rendered: {error}") from error


@dataclass(frozen=True, slots=True)
class _Policy:
    """`generate` with the episode's sampling, deadlines, and every trouble as an EpisodeFailure."""

    generate: Generate
    sampling: Sampling
    session_id: str
    limits: EpisodeLimits

    async def __call__(self, prompt: Int32Array, seed: int, timeout_s: float) -> Generation:
        sampling = replace(
            self.sampling,
            max_tokens=min(self.sampling.max_tokens, self.limits.max_model_len - len(prompt)),
            seed=seed if self.sampling.seed is None else self.sampling.seed,
        )
        try:
            generation = await within(self.generate(prompt, sampling, self.session_id), timeout_s)
        except EpisodeFailure:
            raise
        except DeadlineMissed as error:
            detail = f"the engine did not answer within {timeout_s:.3g} s"
            raise EpisodeFailure(FailureKind.ENGINE_TIMEOUT, detail) from error
        except TimeoutError as error:
            raise EpisodeFailure(FailureKind.ENGINE_TIMEOUT, f"generate timed out: {error}") from error
        except Exception as error:
            raise EpisodeFailure(FailureKind.ENGINE_ERROR, f"{type(error).__name__}: {error}") from error
        _check(generation)
        return generation


def _check(generation: Generation) -> None:
    if len(generation.token_ids) == 0:
        raise EpisodeFailure(FailureKind.ENGINE_ERROR, "the engine returned no tokens")
    if (generation.token_ids < 0).any():
        raise EpisodeFailure(FailureKind.ENGINE_ERROR, f"the engine returned token {int(generation.token_ids.min())}")
    bad = ~(np.isfinite(generation.logprobs) & (generation.logprobs > NO_LOGPROB))
    if bad.any():
        at = int(np.argmax(bad))
        raise EpisodeFailure(
            FailureKind.INVALID_LOGPROBS,
            f"{int(bad.sum())} of {len(bad)} logprobs are unusable, the first at token {at}: {generation.logprobs[at]}",
        )


class _Record:
    """What of the trajectory exists so far."""

    def __init__(self) -> None:
        self.renderer: ChatRenderer | None = None
        self.token_ids = np.empty(0, np.int32)
        self.loss_mask = np.empty(0, np.bool_)
        self.logprobs = np.empty(0, np.float32)
        self.weight_versions = np.empty(0, np.int32)
        self.turns: list[Turn] = []
        self.messages: list[Message] = []
        self.metrics: dict[str, float] = {}
        self.reward_components: dict[str, float] = {}

    def add_generation(self, prompt: Int32Array, generation: Generation, action: Message) -> None:
        """Tokens enter only once the policy has seen them: the prompt together with its continuation."""
        seen, known, new = len(prompt) - len(self.token_ids), len(self.token_ids), len(generation.token_ids)
        assert np.array_equal(prompt[:known], self.token_ids), "a prompt must begin with all tokens before it"
        self.token_ids = np.concatenate([prompt, generation.token_ids]).astype(np.int32, copy=False)
        self.loss_mask = np.concatenate([self.loss_mask, np.zeros(seen, np.bool_), np.ones(new, np.bool_)])
        self.logprobs = np.concatenate(
            [self.logprobs, np.zeros(seen, np.float32), generation.logprobs], dtype=np.float32
        )
        self.weight_versions = np.concatenate(
            [self.weight_versions, np.full(seen, -1, np.int32), generation.weight_versions], dtype=np.int32
        )
        self.messages.append(action)

    def add_step(self, step: StepResult, generation: Generation, generate_s: float, env_s: float) -> None:
        end = len(self.token_ids)
        start = end - len(generation.token_ids)
        self.turns.append(Turn(start, end, step.reward, generation.finish_reason, generate_s, env_s))
        self.messages += step.messages
        self.metrics = step.metrics
        for name, reward in step.reward_components.items():
            self.reward_components[name] = self.reward_components.get(name, 0.0) + reward
        total = sum(turn.reward for turn in self.turns)
        if self.reward_components and (problem := components_problem(self.reward_components, total)):
            detail = f'some steps tell info["rewards"] and others do not: by turn {len(self.turns)} there is {problem}'
            raise EpisodeFailure(FailureKind.ENV_ERROR, detail)
