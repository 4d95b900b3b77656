"""`raygym serve` in front of two simulated engines: load, and the loss of a replica. No model is behind it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from tiers import LONG

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [
        sys.executable, "-m", "raygym", "serve", "configs/tiny.yaml", "policy.engine=simulated", "policy.replicas=2",
        "policy.simulated.turn_latency_s=0.5",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment | {"RAYGYM_TEST": str(os.getpid())}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+:\d+(?=/v1)", process.stdout.readline())
        assert found is not None
        yield found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == 130


def replicas() -> list[psutil.Process]:
    """The replica processes of this module's server."""
    found = []
    for process in psutil.process_iter():
        try:
            if "ServeReplica" in " ".join(process.cmdline()) and process.environ().get("RAYGYM_TEST") == str(
                os.getpid()
            ):
                found.append(process)
        except psutil.Error:
            continue  # it has ended or is not ours to read
    return found


async def test_many_requests_at_once(url: str) -> None:
    count = 2000 if LONG else 200
    before = sum(process.memory_info().rss for process in replicas())
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=ASK) for _ in range(count)))
    assert {answer.status_code for answer in answers} == {200}
    after = sum(process.memory_info().rss for process in replicas())
    assert after - before < 400 << 20, "memory of the replicas is bounded"


def given(client: httpx.Client) -> dict[str, int]:
    """How many requests each replica was given so far."""
    text = client.get("/metrics").text
    return {
        name: int(float(n)) for name, n in re.findall(r'^raygym_requests_total\{replica="(.*)"\} (\S+)', text, re.M)
    }


def test_a_client_with_affinity_stays_and_others_spread(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        before = given(client)
        for _ in range(20):
            client.post("/v1/chat/completions", json=ASK, headers={"x-session-id": "episode-7"})
        affine = {name: count - before[name] for name, count in given(client).items()}
        assert max(affine.values()) >= 20
        assert min(affine.values()) <= 2, "the calls for metrics"
        before = given(client)
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda _: client.post("/v1/chat/completions", json=ASK), range(40)))
        spread = {name: count - before[name] for name, count in given(client).items()}
        assert min(spread.values()) >= 10


def test_sessions_are_opened_on_both_replicas(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        owners = {client.post("/sessions", json={}).json()["id"].partition(".")[0] for _ in range(24)}
        text = client.get("/metrics").text
    assert len(owners) == 2
    assert float(re.findall(r"^raygym_replica_imbalance (\S+)", text, re.M)[0]) < 2


def test_a_lost_replica_ends_its_sessions_and_gets_no_traffic(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        sessions: dict[str, str] = {}
        while len(sessions) < 2:
            opened = client.post("/sessions", json={}).json()["id"]
            sessions.setdefault(opened.partition(".")[0], opened)
        for session in sessions.values():
            assert client.post(f"/sessions/{session}/v1/chat/completions", json=ASK).status_code == 200
        victim, *_ = replicas()
        victim.kill()
        deadline = time.monotonic() + 120
        states: dict[str, int] = {}
        while time.monotonic() < deadline and sorted(states.values()) != [200, 410]:
            for owner, session in sessions.items():
                answer = client.post(f"/sessions/{session}/v1/chat/completions", json=ASK)
                states[owner] = answer.status_code
                if answer.status_code == 410:
                    assert answer.json()["error"]["code"] == "session_lost"
        assert sorted(states.values()) == [200, 410]
        answers = [client.post("/v1/chat/completions", json=ASK).status_code for _ in range(20)]
        assert answers == [200] * 20
