"""The actor that keeps NeMo Gym's servers: they end with it, and come back with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_nemo_gym_servers import environment, gone, wait_for

from raygym.nemo_gym.endpoints import read_endpoints

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]


def test_servers_end_with_a_killed_actor_and_come_back(tmp_path: Path) -> None:
    import ray

    from raygym.actors.nemo_gym import NemoGymServers

    class WithPid(NemoGymServers):
        def pid(self) -> int:
            return os.getpid()

    made = environment(tmp_path, a={}, b={})
    actor: Any = ray.remote(WithPid).options(num_cpus=0, max_restarts=-1, max_concurrency=4)
    servers = actor.remote([made], str(tmp_path / "logs"))
    ray.get(servers.wait_ready.remote(), timeout=150)
    published = tmp_path / "servers.json"
    before = read_endpoints(published)
    guards = list(ray.get(servers.processes.remote(), timeout=60).values())
    os.kill(ray.get(servers.pid.remote(), timeout=60), signal.SIGKILL)
    wait_for(lambda: gone(guards))
    wait_for(lambda: read_endpoints(published) not in ({}, before))
    guards = list(ray.get(servers.processes.remote(), timeout=60).values())
    ray.get(servers.stop.remote(), timeout=60)
    assert gone(guards)
    ray.kill(servers)


def test_the_driver_is_told_why_servers_do_not_start(tmp_path: Path) -> None:
    import ray

    from raygym.actors.nemo_gym import NemoGymServers

    actor: Any = ray.remote(NemoGymServers).options(num_cpus=0)
    servers = actor.remote([environment(tmp_path, a={"crashes": True})], str(tmp_path / "logs"))
    with pytest.raises(Exception, match="a ended: ValueError: it does not want to"):
        ray.get(servers.wait_ready.remote(), timeout=150)
    ray.kill(servers)
