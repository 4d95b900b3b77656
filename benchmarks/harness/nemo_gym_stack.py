"""NeMo Gym, unchanged, as its own launcher starts it, and its own rollout collector; in its own Python."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.fake_policy import FakePolicy
from raygym.nemo_gym.interpreter import clean_environment, find_interpreter

SERVER = "example_session_state_mgmt"
AGENT = f"{SERVER}_simple_agent"
_CONFIGS = (
    f"resources_servers/{SERVER}/configs/{SERVER}.yaml",
    "responses_api_models/vllm_model/configs/vllm_model_for_training.yaml",
)
# What its launcher starts a server from: we have all of them in one virtual environment.
_SERVERS = (
    f"resources_servers/{SERVER}",
    "responses_api_agents/simple_agent",
    "responses_api_models/vllm_model",
    "environment_servers/legacy_agent",
)
# A child of a background process ignores SIGINT, which is how its launcher is stopped.
_MAIN = """
import signal
from nemo_gym.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
_START_TIMEOUT_S = 300
_COLLECT_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Collection:
    """One call of the collector."""

    episodes: int
    seconds: float
    """From the first question that the policy was asked to its last answer: without the collector's own start."""
    cpu_s: float
    """Of all processes of NeMo Gym meanwhile: servers, head, Ray, collector. The policy's are not among them."""


class NemoGym:
    """Servers that are up."""

    def __init__(self, launcher: subprocess.Popen[bytes], common: list[str], policy: FakePolicy, folder: Path) -> None:
        self._launcher = launcher
        self._common = common
        self._policy = policy
        self._folder = folder

    def collect(self, episodes: int, turns: int, places: int) -> Collection:
        """Let the collector play, `places` episodes at once.

        Raises:
            RuntimeError: it failed, or an episode did not earn its reward.
        """
        rows, rollouts = self._folder / "rows.jsonl", self._folder / "rollouts.jsonl"
        rows.write_text("".join(json.dumps(_row(turns)) + "\n" for _ in range(episodes)))
        log = self._folder / "collector.log"
        command = [*_gym("eval", "run", "--no-serve", "--no-health-check", "--disable-aggregation"), "--agent", AGENT]
        command += ["--input", str(rows), "--output", str(rollouts), "--concurrency", str(places), *self._common]
        roots = [self._launcher.pid]
        taken: list[dict[int, float]] = []

        def take() -> None:
            taken.append(_cpu_s(roots))

        self._policy.expect(episodes * turns, take, take)
        with log.open("wb") as file, _process(command, self._folder, file) as collector:
            roots.append(collector.pid)
            try:
                seconds = self._policy.seconds(_COLLECT_TIMEOUT_S, lambda: collector.poll() is None)
                if collector.wait(_COLLECT_TIMEOUT_S):
                    raise RuntimeError(f"NeMo Gym's collector failed; see {log}:\n{_tail(log)}")
            except TimeoutError as error:
                raise RuntimeError(f"{error}; NeMo Gym's collector says:\n{_tail(log)}") from error
        earned = [json.loads(line)["reward"] for line in rollouts.read_text().splitlines()]
        if earned != [1.0] * episodes:
            raise RuntimeError(f"{sum(earned):g} of {episodes} episodes earned their reward; see {rollouts}")
        before, after = taken
        return Collection(episodes, seconds, sum(s - before.get(pid, 0.0) for pid, s in after.items()))


@contextmanager
def nemo_gym(policy: FakePolicy, folder: Path) -> Iterator[NemoGym]:
    """Its launcher and all servers that it starts, until the end.

    Raises:
        NemoGymError: NeMo Gym is not installed.
        RuntimeError: it does not start.
    """
    interpreter = Path(find_interpreter(""))
    for server in _SERVERS:
        (folder / "venvs" / server).mkdir(parents=True)
        (folder / "venvs" / server / ".venv").symlink_to(interpreter.parent.parent)
    port = _free_port()
    common = [f"+config_paths=[{','.join(_CONFIGS)}]", f"+head_server={{host: 127.0.0.1, port: {port}}}"]
    common += [f"+policy_base_url={policy.url}", "+policy_api_key=none", "+policy_model_name=policy"]
    common += ["+skip_venv_if_present=true", f"+uv_venv_dir={folder / 'venvs'}"]
    log = folder / "launcher.log"
    with log.open("wb") as file, _process([*_gym("env", "start"), *common], folder, file) as launcher:
        _wait_ready(launcher, f"http://127.0.0.1:{port}/readyz", log)
        yield NemoGym(launcher, common, policy, folder)


def _row(turns: int) -> dict[str, Any]:
    tools = [
        {"type": "function", "name": "increment_counter", "description": "", "strict": True, "parameters": {
            "type": "object", "properties": {"count": {"type": "integer", "description": ""}},
            "required": ["count"], "additionalProperties": False}},
        {"type": "function", "name": "get_counter_value", "description": "", "strict": True, "parameters": {
            "type": "object", "properties": {}, "required": [], "additionalProperties": False}},
    ]  # fmt: skip
    asked = {"input": [{"role": "user", "content": f"Count to {turns - 2}."}], "tools": tools}
    return {"responses_create_params": asked, "initial_count": 0, "expected_count": turns - 2}


def _gym(*arguments: str) -> list[str]:
    return [find_interpreter(""), "-I", "-c", _MAIN, *arguments]


@contextmanager
def _process(command: list[str], folder: Path, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end with all that it started."""
    # It joins the cluster that Ray's folder names, even one that was killed months ago, and waits for it for minutes.
    environment = clean_environment() | {"RAY_TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        started = _tree(process.pid)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        for one in started:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(started, timeout=_STOP_TIMEOUT_S)


def _wait_ready(launcher: subprocess.Popen[bytes], url: str, log: Path) -> None:
    ends = time.monotonic() + _START_TIMEOUT_S
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        if launcher.poll() is not None or time.monotonic() > ends:
            raise RuntimeError(f"NeMo Gym's servers do not start:\n{_tail(log)}")
        time.sleep(0.5)


def _cpu_s(roots: list[int]) -> dict[int, float]:
    """Processor seconds so far, by process, of these and all that they started."""
    seconds = {}
    for process in [one for root in roots for one in _tree(root)]:
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


def _tree(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
