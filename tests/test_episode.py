"""Episodes: exact tokens, how each kind of trouble ends, deadlines, and that environments are always closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import loaded
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.chat import ChatRenderer
from raygym.env import ChatEnv
from raygym.env_host import EnvHost
from raygym.episode import EpisodeLimits, Generate, run_episode
from raygym.types import (
    EpisodeFailure,
    EpisodeStatus,
    FailureKind,
    Generation,
    Int32Array,
    Sampling,
    Task,
    Trajectory,
)

END = 2
WARM = Sampling(temperature=0.7)
TASK = Task(4, "talk", seed=9, split="validation")


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(loaded.tokenizer("tiny"))


class Talk(ChatEnv):
    """Ends after `length` steps and notes what happened to it."""

    def __init__(self, length: int = 2) -> None:
        self.length = length
        self.steps = 0
        self.closed = 0
        self.threads: set[int] = set()
        self.reset_with: Any = None
        self.actions: list[Any] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.threads.add(threading.get_ident())
        self.reset_with = (seed, options)
        return "Go.", {}

    def step(self, action):
        self.threads.add(threading.get_ident())
        self.steps += 1
        self.actions.append(action)
        return f"Step {self.steps}.", 0.25, self.steps == self.length, False, {"metrics": {"steps": self.steps}}

    def close(self):
        self.threads.add(threading.get_ident())
        self.closed += 1


class Named(Talk):
    """Tells what the reward of each step, 0.25, consists of."""

    def __init__(self, rewards: list[dict[str, float]]) -> None:
        super().__init__(len(rewards))
        self.rewards = rewards

    def step(self, action):
        *result, info = super().step(action)
        return *result, {**info, "rewards": self.rewards[self.steps - 1]}


def generation(token_ids: list[int], version: int = 3, finish_reason: str = "stop") -> Generation:
    n = len(token_ids)
    return Generation(
        np.asarray(token_ids, np.int32),
        -np.arange(1, n + 1, dtype=np.float32),
        np.full(n, version, np.int32),
        finish_reason,
    )


class Scripted:
    """A `Generate` that says what it is told and remembers what it was asked."""

    def __init__(self, *replies: list[int]) -> None:
        self.replies = list(replies) or [[20, 21, END]]
        self.asked: list[tuple[list[int], Sampling, str]] = []

    async def __call__(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        self.asked.append((prompt_token_ids.tolist(), sampling, session_id))
        return generation(self.replies[min(len(self.asked), len(self.replies)) - 1])


async def episode(
    renderer: ChatRenderer,
    env: gymnasium.Env[Any, Any] | Callable[[], gymnasium.Env[Any, Any]],
    generate: Generate | None = None,
    sampling: Sampling = WARM,
    attempt: int = 0,
    first_attempt: int = 0,
    **limits: Any,
) -> Trajectory:
    defaults = {
        "max_turns": 4,
        "max_tokens_per_turn": 8,
        "max_model_len": 2048,
        "turn_timeout_s": 5.0,
        "step_timeout_s": 5.0,
        "episode_timeout_s": 20.0,
    }
    return await run_episode(
        EnvHost((lambda: env) if isinstance(env, gymnasium.Env) else env),
        TASK,
        group_id="g",
        episode=1,
        attempt=attempt,
        first_attempt=first_attempt,
        renderer_for=lambda tools: renderer,
        generate=generate or Scripted(),
        limits=EpisodeLimits(**{**defaults, **limits}),
        sampling=sampling,
        run_seed=5,
    )


def assert_exact(trajectory: Trajectory, policy: Scripted, renderer: ChatRenderer) -> None:
    """Invariants 1 and 2, against what the policy was really asked and answered."""
    ids = trajectory.token_ids.tolist()
    assert trajectory.token_ids.dtype == np.int32 and trajectory.logprobs.dtype == np.float32
    generated = np.zeros(len(ids), np.bool_)
    for turn, (prompt, _, _) in zip(trajectory.turns, policy.asked, strict=True):
        assert ids[: turn.start] == prompt
        generated[turn.start : turn.end] = True
        assert trajectory.logprobs[turn.start : turn.end].tolist() == [-i - 1 for i in range(turn.end - turn.start)]
    assert trajectory.loss_mask.tolist() == generated.tolist()
    assert (trajectory.logprobs[~generated] == 0).all() and (trajectory.weight_versions[~generated] == -1).all()
    assert (trajectory.weight_versions[generated] == 3).all()


class TestWholeEpisodes:
    async def test_terminated(self, renderer):
        env, policy = Talk(), Scripted([20, 21, END], [30, END])
        trajectory = await episode(renderer, env, policy)
        assert trajectory.status is EpisodeStatus.TERMINATED and trajectory.failure is None
        assert_exact(trajectory, policy, renderer)
        assert trajectory.reward == 0.5 and [turn.reward for turn in trajectory.turns] == [0.25, 0.25]
        assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "user", "assistant", "user"]
        assert trajectory.messages[1]["content"] == renderer.decode(np.asarray([20, 21]))
        assert env.actions[0] == trajectory.messages[1]
        assert trajectory.metrics == {"steps": 2.0} and not trajectory.drifted
        assert (trajectory.task, trajectory.group_id, trajectory.episode, trajectory.attempt) == (TASK, "g", 1, 0)
        assert env.reset_with == (9, {"split": "validation"}) and env.closed == 1

    async def test_what_rewards_consist_of_is_summed_over_the_steps(self, renderer):
        trajectory = await episode(renderer, Named([{"right": 0.25}, {"right": 0.5, "short": -0.25}]), Scripted())
        assert trajectory.reward_components == {"right": 0.75, "short": -0.25}

    async def test_an_episode_whose_reward_is_named_in_part_fails(self, renderer):
        trajectory = await episode(renderer, Named([{}, {"right": 0.25}]), Scripted())
        assert trajectory.failure is FailureKind.ENV_ERROR and trajectory.reward_components == {}
        assert "whose sum is 0.25, with a reward of 0.5" in trajectory.failure_detail

    async def test_environment_lives_in_one_thread_of_its_own(self, renderer):
        env = Talk()
        await episode(renderer, env)
        assert len(env.threads) == 1 and threading.get_ident() not in env.threads

    async def test_asynchronous_environment(self, renderer):
        class AsyncTalk(Talk):
            async def reset(self, *, seed=None, options=None):
                await asyncio.sleep(0)
                return Talk.reset(self, seed=seed, options=options)

            async def step(self, action):
                await asyncio.sleep(0)
                return Talk.step(self, action)

            async def close(self):
                Talk.close(self)

        env = AsyncTalk()
        trajectory = await episode(renderer, env)
        assert trajectory.status is EpisodeStatus.TERMINATED
        assert env.closed == 1 and env.threads == {threading.get_ident()}

    async def test_turn_limit_truncates_with_the_reward_so_far(self, renderer):
        trajectory = await episode(renderer, Talk(length=9), max_turns=3)
        assert (trajectory.status, trajectory.reward, len(trajectory.turns)) == (EpisodeStatus.TRUNCATED, 0.75, 3)

    async def test_environment_may_truncate(self, renderer):
        class Short(Talk):
            def step(self, action):
                return None, 0.5, False, True, {}

        assert (await episode(renderer, Short())).status is EpisodeStatus.TRUNCATED

    async def test_turns_have_seeds_of_their_own_and_repeat(self, renderer):
        first, again = Scripted(), Scripted()
        await episode(renderer, Talk(), first)
        await episode(renderer, Talk(), again)
        seeds = [sampling.seed for _, sampling, _ in first.asked]
        assert len(set(seeds)) == 2 and seeds == [sampling.seed for _, sampling, _ in again.asked]
        assert {(sampling.temperature, sampling.max_tokens) for _, sampling, _ in first.asked} == {(0.7, 8)}
        assert len({session for _, _, session in first.asked}) == 1

    async def test_seeds_do_not_tell_how_many_managers_were_lost(self, renderer):
        asked = {}
        for attempt, first_attempt in [(0, 0), (4, 4), (5, 4), (1, 0)]:
            policy = Scripted()
            await episode(renderer, Talk(), policy, attempt=attempt, first_attempt=first_attempt)
            asked[attempt] = [sampling.seed for _, sampling, _ in policy.asked]
            assert {session for _, _, session in policy.asked} == {f"g-1-{attempt}"}, "an attempt is still its own"
        assert asked[0] == asked[4] and asked[1] == asked[5]
        assert not set(asked[0]) & set(asked[1])

    async def test_given_seed_is_kept(self, renderer):
        policy = Scripted()
        await episode(renderer, Talk(), policy, Sampling(seed=77, max_tokens=3))
        assert {(sampling.seed, sampling.max_tokens) for _, sampling, _ in policy.asked} == {(77, 3)}

    async def test_drift_is_reported(self, renderer):
        # Byte 0xFF is no text by itself: re-rendering what was decoded cannot give it back.
        not_text = next(i for i in range(3, 259) if "\ufffd" in renderer.decode(np.asarray([i])))
        assert (await episode(renderer, Talk(), Scripted([not_text, END]))).drifted


@settings(max_examples=40, deadline=None)
@given(replies=st.lists(st.lists(st.integers(0, 258), min_size=1, max_size=8), min_size=1, max_size=4))
def test_tokens_are_exact_for_whatever_the_policy_says(renderer, replies):
    policy = Scripted(*replies)
    trajectory = asyncio.run(episode(renderer, Talk(length=len(replies)), policy))
    assert trajectory.status is EpisodeStatus.TERMINATED
    assert_exact(trajectory, policy, renderer)


class TestContext:
    async def test_first_prompt_too_long_fails(self, renderer):
        length = len(renderer.render_initial([{"role": "user", "content": "Go."}]))
        trajectory = await episode(renderer, Talk(), max_model_len=length)
        assert trajectory.failure is FailureKind.CONTEXT_OVERFLOW and str(length) in trajectory.failure_detail

    async def test_later_prompt_too_long_truncates_and_was_never_seen(self, renderer):
        length = len(renderer.render_initial([{"role": "user", "content": "Go."}]))
        policy = Scripted()
        trajectory = await episode(renderer, Talk(), policy, max_model_len=length + 5)
        assert (trajectory.status, trajectory.reward) == (EpisodeStatus.TRUNCATED, 0.25)
        assert len(trajectory.token_ids) == length + 3
        assert policy.asked[0][1].max_tokens == 5, "clamped to the room that is left"


class TestEnvTrouble:
    @pytest.mark.parametrize("method", ["reset", "step", "constructor"])
    @pytest.mark.parametrize("error", [ValueError("board"), TimeoutError("socket"), StopIteration(), SystemExit(3)])
    async def test_raising(self, renderer, method, error):
        class Bad(Talk):
            def __init__(self):
                super().__init__()
                if method == "constructor":
                    raise error

            def reset(self, **kwargs):
                if method == "reset":
                    raise error
                return super().reset(**kwargs)

            def step(self, action):
                raise error

        trajectory = await episode(renderer, Bad)
        assert trajectory.failure is FailureKind.ENV_ERROR and type(error).__name__ in trajectory.failure_detail
        assert trajectory.reward == 0.0

    @pytest.mark.parametrize("result", [None, ("x", float("nan"), True, False, {}), (3, 0.0, False, False, {})])
    async def test_garbage(self, renderer, result):
        env = Talk()
        env.step = lambda action: result
        trajectory = await episode(renderer, env)
        assert trajectory.failure is FailureKind.ENV_ERROR and env.closed == 1
        assert int(trajectory.loss_mask.sum()) == 3, "what was generated stays on the record"

    async def test_its_own_kind_is_kept(self, renderer):
        env = Talk()

        def step(action):
            raise EpisodeFailure(FailureKind.ENV_LOST, "server went away")

        env.step = step
        trajectory = await episode(renderer, env)
        assert (trajectory.failure, trajectory.failure_detail) == (FailureKind.ENV_LOST, "server went away")

    async def test_coroutine_that_cancels_itself(self, renderer):
        class Cancels(Talk):
            async def step(self, action):
                raise asyncio.CancelledError

        trajectory = await episode(renderer, Cancels())
        assert trajectory.failure is FailureKind.ENV_ERROR and "cancelled from inside" in trajectory.failure_detail

    async def test_hanging_step_times_out_and_is_closed_from_outside(self, renderer):
        released = threading.Event()

        class Hangs(Talk):
            def step(self, action):
                released.wait(60)

            def close(self):
                super().close()
                released.set()

        env = Hangs()
        started = time.monotonic()
        trajectory = await episode(renderer, env, step_timeout_s=1)
        assert time.monotonic() - started < 30
        assert trajectory.failure is FailureKind.ENV_TIMEOUT and "env.step" in trajectory.failure_detail
        assert env.closed == 1 and released.is_set()

    async def test_coroutine_that_ignores_its_cancellation_times_out(self, renderer):
        released = threading.Event()

        class Stubborn(Talk):
            async def step(self, action):
                ends = time.monotonic() + 30
                while not released.is_set() and time.monotonic() < ends:
                    try:
                        await asyncio.sleep(0.05)
                    except asyncio.CancelledError:
                        continue

        started = time.monotonic()
        trajectory = await episode(renderer, Stubborn(), step_timeout_s=0.1)
        released.set()
        assert trajectory.failure is FailureKind.ENV_TIMEOUT and time.monotonic() - started < 20

    async def test_constructor_that_hangs_is_closed_when_it_returns(self, renderer):
        released, env = threading.Event(), Talk()

        def make():
            released.wait(60)
            return env

        trajectory = await episode(renderer, make, step_timeout_s=0.1)
        assert trajectory.failure is FailureKind.ENV_TIMEOUT
        released.set()
        async with asyncio.timeout(60):
            while not env.closed:
                await asyncio.sleep(0.01)
        assert env.closed == 1

    async def test_trouble_while_closing_is_logged_only(self, renderer, caplog):
        env = Talk()

        def close():
            raise OSError("disk")

        env.close = close
        assert (await episode(renderer, env)).status is EpisodeStatus.TERMINATED
        assert "close() raised" in caplog.text

    async def test_close_that_hangs_is_left_alone(self, renderer, caplog, monkeypatch):
        monkeypatch.setattr("raygym.env_host._CLOSE_TIMEOUT_S", 0.1)
        env, released = Talk(), threading.Event()
        env.close = lambda: released.wait(60)
        assert (await episode(renderer, env)).status is EpisodeStatus.TERMINATED
        assert "still runs" in caplog.text
        released.set()

    async def test_message_that_the_template_cannot_render(self, tiny_without_tools):
        env = Talk()
        env.step = lambda action: ({"role": "tool", "content": "x"}, 0.0, False, False, {})
        trajectory = await episode(tiny_without_tools, env)
        assert trajectory.failure is FailureKind.ENV_ERROR and "cannot be rendered" in trajectory.failure_detail


@pytest.fixture
def tiny_without_tools() -> ChatRenderer:
    tokenizer = loaded.tokenizer("tiny")
    refuses = "{%- if messages[-1].role == 'tool' %}{{- raise_exception('no tools') }}{%- endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    return ChatRenderer(tokenizer)


class TestEngineTrouble:
    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (EpisodeFailure(FailureKind.ENGINE_LOST, "replica died"), FailureKind.ENGINE_LOST),
            (TimeoutError(), FailureKind.ENGINE_TIMEOUT),
            (RuntimeError("cuda"), FailureKind.ENGINE_ERROR),
        ],
    )
    async def test_raising(self, renderer, error, kind):
        async def generate(prompt_token_ids, sampling, session_id):
            raise error

        env = Talk()
        trajectory = await episode(renderer, env, generate)
        assert trajectory.failure is kind and env.closed == 1

    async def test_second_turn_fails_and_the_first_stays_on_the_record(self, renderer):
        async def generate(prompt_token_ids, sampling, session_id):
            if "Step 1." in renderer.decode(prompt_token_ids):
                raise RuntimeError("cuda")
            return generation([20, END])

        trajectory = await episode(renderer, Talk(), generate)
        assert trajectory.failure is FailureKind.ENGINE_ERROR and "cuda" in trajectory.failure_detail
        assert len(trajectory.turns) == 1 and trajectory.reward == 0.0

    @pytest.mark.parametrize("limit", ["turn_timeout_s", "episode_timeout_s"])
    async def test_silent(self, renderer, limit):
        async def generate(prompt_token_ids, sampling, session_id):
            await asyncio.sleep(30)

        trajectory = await episode(renderer, Talk(), generate, **{limit: 0.1})
        assert trajectory.failure is FailureKind.ENGINE_TIMEOUT

    @pytest.mark.parametrize("bad", [float("nan"), float("-inf"), -9999.0])
    async def test_unusable_logprobs(self, renderer, bad):
        async def generate(prompt_token_ids, sampling, session_id):
            answer = generation([20, 21, END])
            answer.logprobs[1] = bad
            return answer

        trajectory = await episode(renderer, Talk(), generate)
        assert trajectory.failure is FailureKind.INVALID_LOGPROBS and "token 1" in trajectory.failure_detail
        assert not trajectory.loss_mask.any()

    async def test_nothing_generated(self, renderer):
        async def generate(prompt_token_ids, sampling, session_id):
            return generation([])

        assert (await episode(renderer, Talk(), generate)).failure is FailureKind.ENGINE_ERROR


async def test_cancelling_closes_the_environment_and_propagates(renderer):
    env, asked = Talk(), asyncio.Event()
    cancelled = False

    async def generate(prompt_token_ids, sampling, session_id):
        nonlocal cancelled
        asked.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled = True
            raise

    running = asyncio.create_task(episode(renderer, env, generate))
    await asked.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert env.closed == 1 and cancelled


async def test_blocking_environments_do_not_block_each_other(renderer):
    together = threading.Barrier(32)

    class Blocks(Talk):
        def step(self, action):
            together.wait(60)  # for the steps of all the others
            return super().step(action)

    patient = {"step_timeout_s": 90, "episode_timeout_s": 100}
    trajectories = await asyncio.gather(*(episode(renderer, Blocks, **patient) for _ in range(32)))
    assert {t.status for t in trajectories} == {EpisodeStatus.TERMINATED}
