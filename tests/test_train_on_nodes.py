"""A whole run on three raylets of this machine, of which one is lost with all that runs on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray_nodes import Node, more_nodes
from run_audit import audit, lines_of
from test_train_command import COMMAND, ROOT
from tiers import only_long

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS: dict[str, Any] = {
    "name": "nodes",
    "policy.engine": "simulated",
    "policy.simulated.turn_latency_s": 0.05,
    "policy.replicas": 3,
    "rollout.env_runners": 3,
    "rollout.max_retries": 10,
    "learner.threads": 1,
    "sync.lease_s": 5,
    "sync.timeout_s": 20,
    "checkpoint.every": 3,
    "logging.tensorboard": "false",
}
LOST = {"ray::ServeReplica:raygym": "replica", "ray::EnvRunner": "env_runner"}
NOT_LOST = ("ray::LearnerActor",)
_DEADLINE_S = 600


@contextmanager
def training(folder: Path, steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """`raygym train` on the tests' cluster; its output is a file `output` there."""
    address = ray.get_runtime_context().gcs_address
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "train", str(ROOT / "configs/tiny.yaml"), f"runs_dir={folder}/runs", f"steps={steps}"]
            + [f"{key}={value}" for key, value in SETTINGS.items()],
            cwd=ROOT, env=os.environ | {"RAY_ADDRESS": address}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)


def running_on(node: Node) -> list[str]:
    """What its processes are called."""
    found = []
    for process in node.processes():
        with suppress(psutil.Error):  # it has ended meanwhile
            found.append(" ".join(process.cmdline()))
    return found


def rows_made(run: Path) -> int:
    """So far; the one that is being written is not there yet."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Ray takes a minute to miss a raylet that was killed.
@only_long
@pytest.mark.parametrize(("how", "steps"), [(signal.SIGTERM, 80), (signal.SIGKILL, 600)])
def test_what_a_lost_node_ran_is_replaced(how: int, steps: int, ray_cluster: None, tmp_path: Path) -> None:
    run, output = tmp_path / "runs/nodes", tmp_path / "output"
    with more_nodes(2, "--num-cpus=4") as nodes, training(tmp_path, steps) as process:
        deadline = time.monotonic() + _DEADLINE_S
        while rows_made(run) < 5:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        found = {node: running_on(node) for node in nodes}
        ours = [node for node, names in found.items() if not any(name.startswith(NOT_LOST) for name in names)]
        lost = max(ours, key=lambda node: sum(name.startswith(tuple(LOST)) for name in found[node]))
        kinds = {kind for begin, kind in LOST.items() if any(name.startswith(begin) for name in found[lost])}
        assert kinds, f"nothing of the run was there: {found}"
        lost.end(how)
        status = process.wait(timeout=_DEADLINE_S)
        assert status == 0, output.read_text()
    assert "Traceback" not in output.read_text()
    audit(run, steps)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["policy_version"] == steps
    assert set(summary["replicas"].values()) == {summary["weights_checksum"]}
    events = [(event["kind"], event["what"]) for event in lines_of(run / "events.jsonl")]
    for kind in kinds:
        assert (kind, "lost") in events and (kind, "recovered") in events, (kind, events)
