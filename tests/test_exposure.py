"""What a run on this machine shows to others: the sockets on which it listens, who is let in, where keys are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from started_run import StartedRun, listening, started_run, step_was_made

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
CANARY = "canary-4f1d9c7ab2"
WRONG = "wrong-canary-77e0"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedRun]:
    folder = tmp_path_factory.mktemp("exposure")
    settings = ["policy.api_key_env=CANARY_KEY", "policy.replicas=2", "learner.num_learners=2", "checkpoint.every=1"]
    with started_run(folder, *settings, CANARY_KEY=CANARY) as started:
        started.wait_for(step_was_made(2))
        yield started


def api(run: StartedRun) -> tuple[str, int]:
    found = re.search(r"OpenAI API at http://([\d.]+):(\d+)/v1", run.output)
    assert found is not None, run.output
    return found[1], int(found[2])


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).split("\0")[0].strip()
    except psutil.Error:
        return ""


def is_loopback(address: str) -> bool:
    at = ip_address(address)
    return (getattr(at, "ipv4_mapped", None) or at).is_loopback


def test_nothing_listens_beyond_this_machine_but_serves_own_port(run: StartedRun) -> None:
    """Serve opens one port for calls between deployments in each replica, on all addresses; Ray's token guards it."""
    members = run.members()
    everywhere = {p.pid: [at for at in listening(p) if not is_loopback(at[0])] for p in members}
    allowed = {p.pid: 1 if "ServeReplica" in title(p) else 0 for p in members}
    too_many = {title(p): everywhere[p.pid] for p in members if len(everywhere[p.pid]) > allowed[p.pid]}
    assert too_many == {}
    assert sum("ServeReplica" in title(p) for p in members) == 2, "the processes were seen at all"


def test_the_api_listens_on_the_configured_host_alone(run: StartedRun) -> None:
    host, port = api(run)
    assert host == "127.0.0.1"
    assert {at for process in run.members() for at in listening(process) if at[1] == port} == {(host, port)}


def test_ray_refuses_who_has_no_token_or_a_wrong_one(run: StartedRun) -> None:
    gcs = next(process for process in run.members() if "gcs_server" in title(process))
    (_, port), *_ = listening(gcs)
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray/auth_token").read_text().strip()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        for given in ((), (("authorization", f"Bearer {'0' * len(token)}"),)):
            with pytest.raises(grpc.RpcError) as refused:
                nodes.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), metadata=given, timeout=60)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        right = (("authorization", f"Bearer {token}"),)
        cluster = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        answer = cluster.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), metadata=right, timeout=60)
        assert len(answer.node_info_list) == 1


def test_other_users_cannot_read_the_token(run: StartedRun) -> None:
    token = Path.home() / ".ray/auth_token"
    assert not token.exists() or token.stat().st_mode & 0o077 == 0


def test_the_proxy_itself_tells_without_a_key_that_it_lives_and_its_routes_and_no_more(run: StartedRun) -> None:
    host, port = api(run)
    with httpx.Client(timeout=60, base_url=f"http://{host}:{port}") as client:
        said = {path: client.get(path) for path in ("/-/healthz", "/-/routes", "/health", "/v1/models")}
    assert {path: answer.status_code for path, answer in said.items()} == {
        "/-/healthz": 200, "/-/routes": 200, "/health": 200, "/v1/models": 401
    }  # fmt: skip
    assert said["/-/healthz"].text == "success" and list(said["/-/routes"].json()) == ["/"]


def test_a_key_is_nowhere_but_in_the_environment(run: StartedRun) -> None:
    host, port = api(run)
    url = f"http://{host}:{port}/v1/chat/completions"
    with httpx.Client(timeout=60) as client:
        right = client.post(url, json=ASK, headers={"Authorization": f"Bearer {CANARY}"})
        wrong = client.post(url, json=ASK, headers={"Authorization": f"Bearer {WRONG}"})
        broken = client.post(url, content=b"{", headers={"Authorization": f"Bearer {CANARY}"})
        none = client.post(url, json=ASK)
    assert [answer.status_code for answer in (right, wrong, broken, none)] == [200, 401, 400, 401]
    for answer in (right, wrong, broken, none):
        assert CANARY not in answer.text + str(answer.headers) and WRONG not in answer.text + str(answer.headers)
    for process in run.members():
        assert CANARY not in title(process)
    assert run.session is not None
    # Not by rglob: it fails where a folder goes while it is read, as those of older checkpoints do.
    walks = (walk for folder in (run.folder, run.session) for walk in os.walk(folder))
    looked_at = [path for at, _, files in walks for name in files if (path := Path(at) / name).is_file()]
    showing, names = [], set()
    for path in looked_at:
        with suppress(FileNotFoundError):  # of an older checkpoint, which goes while the run goes on
            content = path.read_bytes()
            names.add(path.name)
            showing += [path for key in (CANARY, WRONG) if key.encode() in content]
    assert showing == []
    assert names >= {"config.yaml", "manifest.json", "ledger.jsonl", "gcs_server.out"}, "the right folders"
    assert any("trajectories" in str(path) for path in looked_at)
    assert CANARY not in run.output
