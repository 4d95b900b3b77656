"""A run over several raylets of this machine, as `ray job submit` and as configs/cluster/slurm.sbatch start it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray_head import ray_head
from ray_nodes import more_nodes
from tiers import only_long

from raygym.actors.env_runner import start_env_runner
from raygym.config import EnvConfig
from raygym.episode import EpisodeLimits
from raygym.models import resolve_policy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), only_long]
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
RUN = ["policy.engine=simulated", "rollout.env_runners=2", "steps=2"]


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | more


def agent_ports() -> list[str]:
    """Of a node's own: with the default ones a raylet ends beside another cluster's on the same machine."""
    ports = []
    for option in ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(f"{option}={probe.getsockname()[1]}")
    return ports


def end(process: subprocess.Popen[bytes]) -> None:
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=60)


@contextmanager
def another_node(head: dict[str, str]) -> Iterator[None]:
    """One more raylet in the cluster of `ray_head`."""
    variables = environment(**{key: value for key, value in head.items() if key.startswith("RAY_")})
    command = [head["ray"], "start", f"--address={head['address']}", "--num-cpus=2", "--block", "--disable-usage-stats"]
    command += agent_ports()
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        end(process)


def wait_for_dashboard(address: str) -> None:
    """`ray job submit` asks once whether it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except urllib.error.HTTPError:  # it wants a token, so it is there
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("the dashboard was not up within 120 s")


def made(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_submitted_job_on_two_nodes(tmp_path: Path) -> None:
    with ray_head() as head, another_node(head):
        wait_for_dashboard(head["dashboard"])
        # The second node joins while the job is submitted; the job itself says whether it did.
        wait = (
            "import ray, sys, time; ray.init(log_to_driver=False); until = time.monotonic() + 60\n"
            "while len(ray.nodes()) < 2 and time.monotonic() < until: time.sleep(0.2)\n"
            "sys.exit(len(ray.nodes()) != 2)"
        )
        command = f'{sys.executable} -c "{wait}" && exec {sys.executable} -m raygym train configs/tiny.yaml '
        # No working directory: raylets of one machine would unpack it in the same place, and remove it for each other.
        places = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
        done = subprocess.run(
            [head["ray"], "job", "submit", "--address", head["dashboard"], "--runtime-env-json", places, "--",
             "bash", "-c", f"cd {ROOT}; " + command + " ".join([f"runs_dir={tmp_path}", *RUN])],
            cwd=ROOT, env=environment(**{key: value for key, value in head.items() if key.startswith("RAY_")}),
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert made(tmp_path / "tiny") == [0, 1, 2]


def test_slurms_script_with_real_ray_on_two_nodes(tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "scontrol").write_text("#!/bin/bash\necho alpha\necho beta\n")
    (stand_ins / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    ports = [" ".join(agent_ports()) for _ in range(2)]
    (stand_ins / "ray").write_text(
        f'#!/bin/bash\nports="{ports[0]}"\nif [[ $2 == --head ]]; then ports="{ports[1]} --temp-dir=$RAY_FOLDER"; fi\n'
        f'exec {BIN}/ray "$@" $ports\n'
    )
    for file in stand_ins.iterdir():
        file.chmod(0o755)
    variables = environment(
        PATH=f"{stand_ins}:{BIN}:/usr/bin:/bin", SLURM_JOB_NODELIST="[alpha,beta]", SLURM_JOB_ID=str(os.getpid()),
        SLURM_CPUS_ON_NODE="2", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    variables.pop("SLURM_GPUS_ON_NODE", None)
    variables["RAY_FOLDER"] = tempfile.mkdtemp(prefix="rg")  # a short path: Ray puts Unix sockets below it
    began = time.monotonic()
    done = subprocess.run(
        ["bash", str(ROOT / "configs/cluster/slurm.sbatch"), str(ROOT / "configs/tiny.yaml"),
         f"runs_dir={tmp_path}", *RUN],
        cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    print(f"{time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert made(tmp_path / "tiny") == [0, 1, 2]
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(tmp_path) in w for w in p.info["cmdline"] or [])]
    assert not left
    shutil.rmtree(variables["RAY_FOLDER"], ignore_errors=True)


def test_env_runners_are_spread_over_the_nodes(ray_cluster: None) -> None:
    with more_nodes(1, "--num-cpus=1"):
        envs, limits = [EnvConfig(id="raygym/NumberGuess-v0")], EpisodeLimits(8, 16, 1000, 5.0, 5.0, 5.0)
        nobody = {"deployment": "nobody", "app": "nobody"}
        runners = [
            start_env_runner(envs, str(resolve_policy("tiny")), limits, run_seed=0, max_concurrent=1, **nobody)
            for _ in range(4)
        ]
        ray.get([runner.ping.remote() for runner in runners], timeout=120)
        alive = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
        nodes = [actor["Address"]["NodeID"] for actor in alive if actor["ActorClassName"] == "EnvRunner"]
        for runner in runners:
            ray.kill(runner)
    assert len(nodes) == 4 and len(set(nodes)) == 2, nodes
