"""NeMo Gym itself: four of its servers, unmodified, both ways. Needs the Python that `make nemo-gym` prepares."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_policy import WRONG, ScriptedPolicy, call, right_actions
from tiers import only_long

from raygym.config_file import load_config
from raygym.env_host import EnvHost
from raygym.episode import EpisodeLimits
from raygym.nemo_gym.agent import run_agent_episode
from raygym.nemo_gym.config import NemoGymConfig, NemoGymError
from raygym.nemo_gym.interpreter import prepared_folder
from raygym.nemo_gym.play import Play, prepare
from raygym.nemo_gym.resolve import Policy
from raygym.nemo_gym.resources import ResourcesEnv
from raygym.nemo_gym.rows import load_rows
from raygym.nemo_gym.servers import ServerSet
from raygym.types import EpisodeFailure, FailureKind, Sampling, Task, Trajectory

prepared = pytest.mark.skipif(
    not (prepared_folder() / "bin" / "python").exists(),
    reason="NeMo Gym's own Python is not prepared (make nemo-gym)",
)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), prepared]
ROOT = Path(__file__).parent.parent
NAMES = ("workplace_assistant", "example_session_state_mgmt", "example_multi_step", "reasoning_gym")
PATHS = [f"resources_servers/{name}/configs/{name}.yaml" for name in NAMES]
ROWS = range(20)
"""Each server ships five example rows."""
TURNS = 20
LIMITS = EpisodeLimits(TURNS, 64, 100_000, 30.0, 60.0, 60.0)


class Gym:
    """The servers of one config in both modes, and the policy that their model server calls."""

    def __init__(self, agents: Play, direct: Play, servers: ServerSet, policy: ScriptedPolicy) -> None:
        self.agents, self.direct, self.servers, self.policy = agents, direct, servers, policy

    async def run(self, row: int) -> Trajectory:
        """NeMo Gym's agent plays a row."""

        async def version() -> int:
            return 5

        return await run_agent_episode(
            self.agents, Task(row, "gym", row), group_id=f"g{row}", episode=0, attempt=0, served_version=version,
            renderer_for=lambda _: Undrifted(), limits=LIMITS, sampling=Sampling(1.0, 64),  # type: ignore[arg-type,return-value]
        )  # fmt: skip

    async def play(self, row: int, actions: list[Any]) -> tuple[float, list[str]]:
        """raygym plays a row with these actions: the reward, and what the tools said."""
        host = EnvHost(lambda: ResourcesEnv(self.direct))
        try:
            await host.reset(Task(row, "gym", row), 60)
            said: list[str] = []
            for action in actions:
                step = await host.step(action, 60)
                said += [message["content"] for message in step.messages]
                if step.terminated or step.truncated:
                    return step.reward, said
        finally:
            await host.close()
        raise AssertionError("the episode did not end")

    def row(self, row: int) -> Any:
        return self.direct.row(row, "train").data


class Undrifted:
    def drifted(self, messages: Any, token_ids: Any) -> bool:
        return False


@pytest.fixture(scope="module")
def gym(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gym]:
    folder = tmp_path_factory.mktemp("gym")
    # The workplace agent's own bound is 6 turns; a row's ground truth has up to 5 calls.
    section = NemoGymConfig(config_paths=PATHS, mode="agent")
    rows = load_rows(prepare(section, Policy("http://127.0.0.1:1/v1", "policy"), TURNS).play.files["train"])
    with ScriptedPolicy([row.data for row in rows]).serving() as policy:
        at = Policy(policy.url, "policy")
        published = str(folder / "servers.json")
        agents = prepare(section, at, TURNS).published_at(published)
        direct = prepare(section.model_copy(update={"mode": "resources"}), at, TURNS).published_at(published)
        servers = ServerSet(agents, folder / "logs", back_off_s=0.1)
        servers.start()
        try:
            servers.wait_ready()
            yield Gym(agents.play, direct.play, servers, policy)
        finally:
            servers.stop()


async def test_right_calls_earn_everything_and_wrong_ones_nothing(gym: Gym) -> None:
    for row in ROWS:
        assert (await gym.play(row, right_actions(gym.row(row))))[0] == 1.0, gym.row(row)
    for row in ROWS:
        reward, said = await gym.play(row, WRONG)
        assert reward <= 0.01, gym.row(row)  # a hundredth is what reasoning-gym gives for any text
        assert said and ("no_such_tool" in said[0] or "Not Found" in said[0])


async def test_agents_earn_the_same(gym: Gym) -> None:
    played = await asyncio.gather(*(gym.run(row) for row in ROWS))
    for row, trajectory in zip(ROWS, played, strict=True):
        assert trajectory.failure is None, trajectory.failure_detail
        assert trajectory.reward == 1.0, gym.row(row)
        assert len(trajectory.turns) == len(right_actions(gym.row(row)))
        for turn in trajectory.turns:
            assert trajectory.loss_mask[turn.start : turn.end].all() and turn.end - turn.start == 2
        assert trajectory.loss_mask.sum() == 2 * len(trajectory.turns)
        assert set(trajectory.weight_versions[trajectory.loss_mask]) == {5}
    gym.policy.wrong = True
    try:
        played = await asyncio.gather(*(gym.run(row) for row in ROWS))
    finally:
        gym.policy.wrong = False
    for trajectory in played:
        assert trajectory.failure is None and trajectory.reward <= 0.01
        shown = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
        assert shown and ("no_such_tool" in shown[0] or "Not Found" in shown[0])


async def test_tool_errors_reach_the_policy(gym: Gym) -> None:
    counting = next(row for row in ROWS if "expected_count" in gym.row(row))
    wrong_type = call("increment_counter", {"count": "many"})
    _, said = await gym.play(counting, [wrong_type, call("increment_counter", "{oops"), *WRONG])
    assert "integer" in said[0] and "not JSON" in said[1]
    working = next(row for row in ROWS if "ground_truth" in gym.row(row))
    _, said = await gym.play(working, [call("email_send_email", {"nobody": 1}), WRONG[1]])
    assert "Error executing tool 'email_send_email'" in said[0]


async def test_a_hundred_episodes_keep_their_state_apart(gym: Gym) -> None:
    limit = asyncio.Semaphore(20)

    async def right(episode: int) -> float:
        async with limit:
            return (await gym.play(episode, right_actions(gym.row(episode))))[0]

    async def half(episode: int) -> float:
        async with limit:
            return (await gym.play(episode, [*right_actions(gym.row(episode))[:1], WRONG[1]]))[0]

    # Among the right ones are some that stop half-way, on the same rows: state of a neighbour's would show.
    rewards = await asyncio.gather(*(right(n) if n % 5 or n % 20 > 9 else half(n) for n in range(100)))
    for n, reward in enumerate(rewards):
        stopped = not (n % 5 or n % 20 > 9) and len(right_actions(gym.row(n))) > 2
        assert reward == (0.0 if stopped else 1.0), gym.row(n)


@only_long
async def test_a_killed_server_fails_its_episodes_and_comes_back(gym: Gym) -> None:
    working = next(row for row in ROWS if "ground_truth" in gym.row(row))
    asked = gym.policy.asked
    gym.policy.hold.clear()
    direct = EnvHost(lambda: ResourcesEnv(gym.direct))
    await direct.reset(Task(0, "gym", working), 60)
    by_agent = asyncio.create_task(gym.run(working))
    while gym.policy.asked == asked:
        await asyncio.sleep(0.02)
    guards = gym.servers.processes()
    (server,) = psutil.Process(guards["workplace_assistant"]).children()
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(EpisodeFailure) as caught:
        await direct.step(right_actions(gym.row(working))[0], 60)
    await direct.close()
    assert caught.value.kind is FailureKind.ENV_LOST
    lost = await by_agent
    assert lost.failure is FailureKind.ENV_LOST, lost.failure_detail
    gym.policy.hold.set()
    # A retry waits for the new servers.
    assert (await gym.run(working)).reward == 1.0
    assert (await gym.play(working, right_actions(gym.row(working))))[0] == 1.0
    assert not any(psutil.pid_exists(pid) for pid in guards.values())


def test_what_nemo_gym_refuses_is_told_with_the_key() -> None:
    policy = Policy("http://127.0.0.1:1/v1", "policy")
    broken = {"workplace_assistant_simple_agent.responses_api_agents.simple_agent.resources_server.name": "nobody"}
    for change, words in (
        ({"config_paths": ["nowhere.yaml"]}, "config_paths: .*nowhere.yaml"),
        ({"overrides": broken}, "config_paths: .*nobody"),
        ({"server": "nobody"}, "server: 'nobody' is not in the config"),
        ({"dataset": "train"}, "Hugging Face hub as nvidia/Nemotron-RL-agent-workplace_assistant"),
    ):
        with pytest.raises(NemoGymError, match=words):
            prepare(NemoGymConfig(**{"config_paths": PATHS[:1], **change}), policy, 4)  # type: ignore[arg-type]


def test_parameters_change_without_code() -> None:
    policy = Policy("http://127.0.0.1:1/v1", "policy")
    changed = {"workplace_assistant_simple_agent.responses_api_agents.simple_agent": {"max_steps": 3}}
    play = prepare(NemoGymConfig(config_paths=PATHS[:1], overrides=changed), policy, 9).play
    assert play.max_steps(play.row(0, "train")) == 3


@pytest.mark.parametrize(
    ("name", "servers"),
    [
        ("workplace_assistant_qwen3_4b", ["workplace_assistant"]),
        # Its verifier refers to a judge's model, which it never asks.
        ("dapo17k_qwen3_4b", ["math_with_judge", "policy_model"]),
    ],
)
def test_the_shipped_training_configs_fit_nemo_gym(name: str, servers: list[str]) -> None:
    env = load_config(ROOT / "configs" / "gpu" / f"{name}.yaml").envs[0]
    assert env.nemo_gym is not None
    shipped = env.nemo_gym.model_copy(update={"dataset": "example", "validation_dataset": ""})
    environment = prepare(shipped, Policy("http://127.0.0.1:1/v1", "policy"), 6)
    assert sorted(server.name for server in environment.servers) == servers


@only_long
def test_a_run_trains_on_both_ways(tmp_path: Path) -> None:
    """The tiny config: our own HTTP front, its token IDs through NeMo Gym and back, a learner, a weight update."""
    command = [sys.executable, "-m", "raygym", "train", "configs/nemo_gym.yaml", f"runs_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    records = [
        json.loads(line)
        for path in sorted((tmp_path / "nemo_gym" / "trajectories").glob("step_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    by_env = {record["env"]: record for record in records}
    assert set(by_env) == {"chat", "blackjack"}
    talked = [record for record in records if record["env"] == "chat"]
    assert any(len(record["turns"]) > 1 for record in talked)
    assert {version for record in talked for version in record["weight_versions"]} > {-1, 0}
    for record in records:
        generated = sum(turn["end"] - turn["start"] for turn in record["turns"])
        assert sum(record["loss_mask"]) == generated > 0
    metrics = [json.loads(line) for line in (tmp_path / "nemo_gym" / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith("episodes/failed/") for line in metrics for key in line)
    assert any("env/blackjack/player_value" in line for line in metrics)
    assert (tmp_path / "nemo_gym" / "nemo_gym").is_dir()  # the servers' logs
