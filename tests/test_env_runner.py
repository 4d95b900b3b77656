"""The EnvRunner: as a plain class with an injected policy, and as an actor in front of a Serve deployment."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray
from ray import serve
from ray.exceptions import RayTaskError, TaskCancelledError, WorkerCrashedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from raygym.actors import concurrency_loop
from raygym.actors.concurrency_loop import ConcurrencyLoop
from raygym.actors.env_runner import EnvRunner, start_env_runner
from raygym.actors.rollout_manager import start_manager
from raygym.actors.serve_failures import engine_failure
from raygym.actors.turn_exchange import TurnExchange
from raygym.concurrency import AdaptiveConcurrency
from raygym.config import EnvConfig, RolloutConfig
from raygym.env import ChatEnv, EnvError
from raygym.episode import EpisodeLimits
from raygym.models import resolve_policy
from raygym.turn_server import TurnAddress, TurnServer
from raygym.types import (
    EngineLoad,
    EpisodeFailure,
    EpisodeStatus,
    FailureKind,
    Generation,
    Int32Array,
    Sampling,
    Task,
    Trajectory,
)

pytestmark = [pytest.mark.ray]
END = 2
SAMPLING = Sampling(temperature=1.0, max_tokens=8)
LIMITS = EpisodeLimits(
    max_turns=4,
    max_tokens_per_turn=8,
    max_model_len=2048,
    turn_timeout_s=30,
    step_timeout_s=10,
    episode_timeout_s=60,
)
TURN_TIMEOUT_S = 10.0
"""Of the actor's turns: longer than one in which nothing goes wrong may take, and short enough to be waited for."""
TESTS = Path(__file__).parent
IMPORTS_THIS_MODULE = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}}
APP, DEPLOYMENT = "env-runner-test", "FakePolicy"
SUMS = EnvConfig(id="raygym/Arithmetic-v0", name="sums", kwargs={"ops": ["add"]})
GUESS = EnvConfig(id="raygym/NumberGuess-v0", name="guess")


class Tooled(ChatEnv):
    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Look.", {}

    def step(self, action):
        return None, 1.0, True, False, {}


class SlowToOpenAndClose(ChatEnv):
    """Notes what happens, and when told waits in `reset` and `close`."""

    seen: ClassVar[list[str]] = []
    may_reset = threading.Event()
    may_close = threading.Event()
    seed: int | None = None

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        assert self.may_reset.wait(60)
        self.seen.append(f"reset {seed}")
        return f"Task {seed}.", {}

    def step(self, action):
        self.seen.append(f"step {self.seed}")
        return None, 1.0, True, False, {}

    def close(self):
        if self.seed is not None:
            assert self.may_close.wait(60)
            self.seen.append(f"close {self.seed}")


class Crashes(ChatEnv):
    """Takes its whole process with it, as a segmentation fault would."""

    def reset(self, *, seed=None, options=None):
        os._exit(1)


def answer(text: str) -> Generation:
    """`text` in `tiny`'s vocabulary, where digits sit in a row."""
    ids = np.asarray([*_bytes(text), END], np.int32)
    return Generation(ids, np.full(len(ids), -0.5, np.float32), np.zeros(len(ids), np.int32), "stop")


@cache  # loading the tokenizer holds up the event loop that turns are timed on
def _bytes(text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_policy("tiny")).encode(text, add_special_tokens=False)


async def says_ten(prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
    return answer("10")


def runner(*envs: EnvConfig, generate: Any = says_ten, limits: EpisodeLimits = LIMITS) -> EnvRunner:
    return EnvRunner(envs, str(resolve_policy("tiny")), limits, run_seed=0, generate=generate)


class TestPlainClass:
    async def test_runs_the_environment_that_the_task_names(self):
        both = runner(SUMS, GUESS)
        sums = await both.run_episode(Task(0, "sums", 1), "g0", 0, 0, SAMPLING)
        guess = await both.run_episode(Task(1, "guess", 1), "g1", 2, 1, SAMPLING)
        assert sums.status is EpisodeStatus.TERMINATED and sums.reward in (0.2, 1.0)
        assert guess.status is EpisodeStatus.TERMINATED and guess.metrics["format"] == 1.0
        assert (guess.group_id, guess.episode, guess.attempt) == ("g1", 2, 1)

    async def test_unknown_environment(self):
        with pytest.raises(EnvError, match=r"'chess'.*sums"):
            await runner(SUMS).run_episode(Task(0, "chess", 1), "g", 0, 0, SAMPLING)

    def test_wrong_environment_is_found_at_the_start(self):
        with pytest.raises(EnvError, match=r"envs\[\]\.id"):
            runner(EnvConfig(id="raygym/Nope-v0"))
        with pytest.raises(EnvError, match=r"envs\[\]\.kwargs"):
            runner(EnvConfig(id="raygym/NumberGuess-v0", kwargs={"heigh": 3}))

    async def test_ping_counts_running_episodes(self):
        go = asyncio.Event()

        async def waits(prompt_token_ids, sampling, session_id):
            await go.wait()
            return answer("10")

        host = runner(SUMS, generate=waits)
        episodes = [asyncio.create_task(host.run_episode(Task(0, "sums", 1), "g", i, 0, SAMPLING)) for i in range(3)]
        await asyncio.sleep(0.2)
        assert await host.running() == 3
        go.set()
        await asyncio.gather(*episodes)
        assert await host.running() == 0

    async def test_a_place_is_held_only_while_the_policy_is_asked(self, monkeypatch):
        # The first one closes until it may, however long the rest takes.
        monkeypatch.setattr("raygym.env_host._CLOSE_TIMEOUT_S", 60.0)
        asked: list[str] = []
        go = asyncio.Event()

        async def waits(prompt_token_ids, sampling, session_id):
            asked.append(session_id)
            await go.wait()
            return answer("10")

        config = EnvConfig(id=f"{__name__}:SlowToOpenAndClose", name="slow")
        seen, may_reset, may_close = (getattr(SlowToOpenAndClose, n) for n in ("seen", "may_reset", "may_close"))
        host = runner(config, generate=waits)

        def play(index: int) -> asyncio.Task[Trajectory]:
            return asyncio.create_task(host.run_episode(Task(index, "slow", index), f"g{index}", 0, 0, SAMPLING, 1))

        async def until(done: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not done():
                    await asyncio.sleep(0.01)

        first, second = play(1), play(2)
        await asyncio.sleep(0.1)
        assert asked == []
        may_reset.set()
        # Both environments are ready, and one of them has the only place.
        await until(lambda: sorted(seen) == ["reset 1", "reset 2"] and len(asked) == 1)
        go.set()
        # The other gets it while the first environment still closes.
        await until(lambda: len(asked) == 2 and sum(event.startswith("step") for event in seen) == 2)
        assert not any(event.startswith("close") for event in seen)
        assert not first.done() and not second.done()
        may_close.set()
        assert [trajectory.reward for trajectory in await asyncio.gather(first, second)] == [1.0, 1.0]

    async def test_tools_of_an_environment(self):
        host = runner(EnvConfig(id=f"{__name__}:Tooled", name="tooled"), SUMS)
        assert (await host.run_episode(Task(0, "tooled", 1), "g", 0, 0, SAMPLING)).reward == 1.0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.ActorDiedError(), FailureKind.ENGINE_LOST),
        (WorkerCrashedError(), FailureKind.ENGINE_LOST),
        (RuntimeError("odd"), FailureKind.ENGINE_ERROR),
        (TaskCancelledError(), FailureKind.CANCELLED),
        (RayTaskError("f", "tb", EpisodeFailure(FailureKind.ENGINE_TIMEOUT, "late")), FailureKind.ENGINE_TIMEOUT),
        (RayTaskError("f", "tb", ValueError("odd")), FailureKind.ENGINE_ERROR),
    ],
)
def test_what_serve_errors_mean(error, kind):
    failure = engine_failure(error)
    assert failure.kind is kind and failure.detail


class FakeServe:
    """A deployment's handle whose replicas are TurnServers of this process; an exception is one that died or hangs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listed: list[TurnAddress | Exception] = []
        self.first: asyncio.Future[TurnAddress] = asyncio.get_running_loop().create_future()
        self.turn_address = self
        self.servers: list[TurnServer] = []
        monkeypatch.setattr("raygym.actors.turn_exchange.serve.get_deployment_handle", lambda *_: self)

    def remote(self) -> asyncio.Future[TurnAddress]:
        return self.first

    def broadcast(self, method: str) -> FakeServe:
        return self

    def results(self, timeout_s: float, return_exceptions: bool = False) -> list[Any]:
        if not self.listed:
            raise DeploymentUnavailableError(DeploymentID("d", "a"))
        for each in self.listed:
            if isinstance(each, Exception) and not return_exceptions:
                raise each
        return self.listed

    async def replica(self, name: str) -> TurnAddress:
        async def generate(request: Any) -> Generation:
            return answer(name)

        self.servers.append(TurnServer(generate))
        return await self.servers[-1].address(name, "127.0.0.1")


@pytest.fixture
async def fake_serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = FakeServe(monkeypatch)
    yield fake
    for server in fake.servers:
        server.close()


class TestTurnExchange:
    PROMPT = np.asarray([20], np.int32)

    async def test_a_replica_that_died_does_not_hide_the_others(self, fake_serve: FakeServe) -> None:
        dead = WorkerCrashedError()
        fake_serve.listed = [dead, await fake_serve.replica("7"), TimeoutError()]
        generated = await TurnExchange("d", "a")(self.PROMPT, SAMPLING, "s")
        assert generated.token_ids.tolist() == answer("7").token_ids.tolist()

    async def test_while_there_is_no_replica_turns_wait_for_one(self, fake_serve: FakeServe) -> None:
        exchange = TurnExchange("d", "a")
        asked = [asyncio.ensure_future(exchange(self.PROMPT, SAMPLING, f"s{i}")) for i in range(3)]
        asked[0].cancel()  # its deadline; the others wait on
        await asyncio.wait(asked, timeout=0.2)
        assert [turn.done() for turn in asked] == [True, False, False]
        fake_serve.first.set_result(await fake_serve.replica("8"))
        assert [(await turn).token_ids.tolist() for turn in asked[1:]] == [answer("8").token_ids.tolist()] * 2

    async def test_new_sessions_avoid_a_replica_that_may_hang(
        self, fake_serve: FakeServe, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_serve.listed = [await fake_serve.replica("7"), await fake_serve.replica("8")]
        suspect = property(lambda client: client.address.replica == "7")
        monkeypatch.setattr("raygym.turn_client.TurnClient.suspect", suspect)
        exchange = TurnExchange("d", "a")
        for i in range(4):
            generated = await exchange(self.PROMPT, SAMPLING, f"s{i}")
            assert generated.token_ids.tolist() == answer("8").token_ids.tolist()

    async def test_new_sessions_go_where_fewest_turns_wait(self, fake_serve: FakeServe) -> None:
        held: dict[str, asyncio.Event] = {}
        asked_of: list[str] = []

        async def replica(name: str) -> TurnAddress:
            async def generate(request: Any) -> Generation:
                asked_of.append(name)
                await held.setdefault(request.session_id, asyncio.Event()).wait()
                return answer(name)

            fake_serve.servers.append(TurnServer(generate))
            return await fake_serve.servers[-1].address(name, "127.0.0.1")

        fake_serve.listed = [await replica("7"), await replica("8"), await replica("9")]
        exchange = TurnExchange("d", "a")
        turns = {}

        async def ask(session: str) -> None:
            turns[session] = asyncio.ensure_future(exchange(self.PROMPT, SAMPLING, session))
            async with asyncio.timeout(30):
                while session not in held:
                    await asyncio.sleep(0)

        for number in range(5):
            await ask(f"s{number}")
        assert asked_of == ["7", "8", "9", "7", "8"]
        for session in ("s0", "s3"):  # the two of the first replica
            held[session].set()
            await turns[session]
        await ask("s5")
        await ask("s6")
        assert asked_of[5:] == ["7", "7"], "which has one turn then, as the last"
        for session, event in held.items():
            event.set()
            await turns[session]


async def test_loads_that_cannot_be_had_change_nothing_and_are_asked_again(monkeypatch, caplog):
    answers: list[Any] = [
        EpisodeFailure(FailureKind.ENGINE_TIMEOUT, "late"),
        ValueError("no such deployment"),
        [("r", EngineLoad(4, 0))],
        EpisodeFailure(FailureKind.ENGINE_LOST, "gone"),
    ]

    async def ask(handle, method, timeout_s):
        assert method == "load" and timeout_s > 0
        answer = answers.pop(0) if answers else await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(concurrency_loop, "replicas_that_answer", ask)
    monkeypatch.setattr(concurrency_loop, "_EVERY_S", 0.0)
    monkeypatch.setattr(concurrency_loop.serve, "get_deployment_handle", lambda deployment, app: None)
    seconds, limits = itertools.count(0.0, 10.0), list[int]()
    control = AdaptiveConcurrency(4, 16, lambda: next(seconds))
    loop = ConcurrencyLoop(control, "D", "a", lambda: 4, limits.append)
    loop.start()
    loop.start()
    while answers:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert limits == [8]
    assert len(caplog.records) == 2, "one for each time that it begins to fail"


class FakePolicy:
    """A deployment whose answer depends on the group: `ok`, `refuse`, `raise`, `die`, `slow`; `train` takes 1 s."""

    def __init__(self) -> None:
        self.cancelled = self.training = 0
        self.capacity = 1000
        self.answer = answer("10")
        self.turns = TurnServer(lambda turn: self.generate(turn.prompt_token_ids, turn.sampling, turn.session_id))

    async def turn_address(self) -> TurnAddress:
        return await self.turns.address(
            serve.get_replica_context().replica_id.unique_id, ray.util.get_node_ip_address()
        )

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
        match session_id.partition("-")[0]:
            case "refuse":
                raise EpisodeFailure(FailureKind.CONTEXT_OVERFLOW, "too long for me")
            case "raise":
                raise ValueError("no such luck")
            case "die":
                os._exit(1)
            case "train":
                self.training += 1
                # Long beside what an episode takes outside its turn, also on a slow machine: all are in one at once.
                await asyncio.sleep(1.0)
                self.training -= 1
            case "slow":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
        assert prompt_token_ids.dtype == np.int32 and sampling.seed is not None
        return self.answer

    async def cancellations(self) -> int:
        return self.cancelled

    async def trained(self) -> int:
        """Turns of `train` that are there now, whatever the capacity."""
        return self.training

    async def have_capacity(self, capacity: int) -> None:
        self.capacity = capacity

    async def load(self) -> tuple[str, EngineLoad]:
        """That of an engine of this capacity, made up: nothing waits here."""
        running = min(self.training, self.capacity)
        return serve.get_replica_context().replica_id.unique_id, EngineLoad(running, self.training - running)


@pytest.fixture(scope="module")
def policy(ray_cluster: Any) -> Iterator[Any]:
    deployment = serve.deployment(
        FakePolicy,
        name=DEPLOYMENT,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0, "runtime_env": IMPORTS_THIS_MODULE},
        health_check_period_s=1,
    )
    yield serve.run(deployment.bind(), name=APP, route_prefix=None)
    # Not only the application: a Serve that goes on keeps its HTTP port, and later tests need their own.
    serve.shutdown()


@pytest.fixture(scope="module")
def actor(policy: Any) -> Iterator[Any]:
    handle = start_env_runner(
        [SUMS, GUESS, EnvConfig(id=f"{__name__}:Crashes", name="crashes")],
        str(resolve_policy("tiny")),
        EpisodeLimits(**{**{f: getattr(LIMITS, f) for f in LIMITS.__slots__}, "turn_timeout_s": TURN_TIMEOUT_S}),
        run_seed=0,
        deployment=DEPLOYMENT,
        app=APP,
        max_concurrent=16,
        runtime_env=IMPORTS_THIS_MODULE,
    )
    # Its first turns find the replica, which on a busy machine takes longer than a turn may.
    deadline = time.monotonic() + 150
    while (trajectory := run(handle, "ok")).failure:
        assert trajectory.failure is FailureKind.ENGINE_TIMEOUT and time.monotonic() < deadline
    yield handle
    ray.kill(handle)


def run(actor: Any, group_id: str, env: str = "sums", episode: int = 0) -> Trajectory:
    return ray.get(actor.run_episode.remote(Task(0, env, 3), group_id, episode, 0, SAMPLING), timeout=150)


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestActor:
    def test_episodes_through_serve(self, actor):
        refs = [actor.run_episode.remote(Task(0, "guess", 3), "ok", i, 0, SAMPLING) for i in range(16)]
        trajectories = ray.get(refs, timeout=150)
        assert {t.status for t in trajectories} == {EpisodeStatus.TERMINATED}
        assert [t.episode for t in trajectories] == list(range(16))
        assert ray.get(actor.running.remote(), timeout=60) == 0

    def test_failure_raised_by_the_replica_keeps_its_kind(self, actor):
        trajectory = run(actor, "refuse")
        assert (trajectory.failure, trajectory.failure_detail) == (FailureKind.CONTEXT_OVERFLOW, "too long for me")

    def test_other_errors_are_engine_errors(self, actor):
        trajectory = run(actor, "raise")
        assert trajectory.failure is FailureKind.ENGINE_ERROR and "no such luck" in trajectory.failure_detail

    def test_deadline_cancels_the_request_in_the_replica(self, actor, policy):
        assert run(actor, "slow").failure is FailureKind.ENGINE_TIMEOUT
        deadline = time.monotonic() + 60
        while (cancelled := policy.cancellations.remote().result(timeout_s=60)) == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert cancelled == 1

    def test_a_manager_follows_the_engines_load(self, actor, policy):
        config = RolloutConfig(
            groups_per_step=1000, group_size=4, concurrency="adaptive", min_concurrent=4, max_concurrent=16
        )
        options = {"runtime_env": IMPORTS_THIS_MODULE}
        at = (DEPLOYMENT, APP)
        manager = start_manager(config, [SUMS], 0, 1, 0.0, [actor], policy=at, actor_options=options)
        ray.get(manager.progress.remote(), timeout=150)  # its process has to start first
        manager.collect.remote(0)

        def wait_for(reached: Callable[[int, int], bool]) -> None:
            deadline = time.monotonic() + 150
            while not reached(
                int(ray.get(manager.progress.remote(), timeout=60).split("at most ")[1].split()[0]),
                policy.trained.remote().result(timeout_s=60),
            ):
                assert time.monotonic() < deadline
                time.sleep(0.1)

        wait_for(lambda limit, running: limit == 16 and running > 8)
        policy.have_capacity.remote(4).result(timeout_s=60)
        # What the runner had waiting already starts no more either. The load stays, so that the limit does as well.
        wait_for(lambda limit, running: 0 < running <= limit < 16)
        ray.kill(manager)

    def test_dead_replica_is_engine_lost_and_its_successor_serves(self, actor):
        assert run(actor, "die").failure is FailureKind.ENGINE_LOST
        deadline = time.monotonic() + 150
        while (trajectory := run(actor, "ok")).failure and time.monotonic() < deadline:
            assert trajectory.failure in (FailureKind.ENGINE_LOST, FailureKind.ENGINE_TIMEOUT)
        assert trajectory.status is EpisodeStatus.TERMINATED

    def test_runner_that_dies_with_its_environment_comes_back(self, actor):
        with pytest.raises(ray.exceptions.RayActorError):
            run(actor, "ok", env="crashes")
        deadline = time.monotonic() + 150
        while True:
            try:
                assert run(actor, "ok").status is EpisodeStatus.TERMINATED
                return
            except ray.exceptions.RayActorError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
