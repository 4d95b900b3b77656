"""Server processes: started, restarted together, ended without leftovers. The servers are small stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiers import only_long

from raygym.nemo_gym.config import NemoGymConfig, NemoGymError
from raygym.nemo_gym.endpoints import read_endpoints
from raygym.nemo_gym.layout import read_layout
from raygym.nemo_gym.play import Environment, Play
from raygym.nemo_gym.resolve import Resolved
from raygym.nemo_gym.servers import ServerSet, with_addresses
from raygym.types import EpisodeFailure

# Answers as much as the supervisor asks; has a process of its own; tells its log how it was ended.
APP = """
import http.server, json, os, subprocess, sys, time
config = json.loads(os.environ["NEMO_GYM_CONFIG_DICT"])
entry = config[os.environ["NEMO_GYM_CONFIG_PATH"]]["resources_servers"]["fake"]
if entry.get("crashes"):
    sys.exit("ValueError: it does not want to")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"paths": {"/reset": 0, "/step": 0} if entry.get("gymnasium") else {"/close_session": 0}}
        body.update(config=config, helper=helper.pid, pid=os.getpid())
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def log_message(self, *_): pass
helper = subprocess.Popen(["sleep", "600"])
if entry.get("silent"):
    time.sleep(600)
try:
    http.server.HTTPServer((entry["host"], entry["port"]), Handler).serve_forever()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    if entry.get("restless"):
        while True:
            time.sleep(1)
"""


def environment(folder: Path, timeout_s: float = 60, **servers: dict[str, Any]) -> Environment:
    """An environment with these servers; the settings of each are given."""
    code = folder / "resources_servers" / "fake"
    code.mkdir(parents=True)
    (code / "app.py").write_text(APP)
    config: dict[str, Any] = {
        name: {"resources_servers": {"fake": {"entrypoint": "app.py", **settings}}}
        for name, settings in servers.items()
    }
    config |= {
        "not_needed": {"resources_servers": {"fake": {"entrypoint": "app.py"}}},
        "relay": {"environment_servers": {"legacy_agent": {"entrypoint": "app.py"}}},
        "head_server": {"host": "127.0.0.1", "port": 11000},
    }
    resolved = Resolved(config, folder, sys.executable)
    layout = read_layout(resolved, "resources", next(iter(servers)))
    section = NemoGymConfig(config_paths=["a.yaml"], startup_timeout_s=timeout_s)
    play = Play(layout, {}, "policy", 4, str(folder / "servers.json"))
    return Environment(section, resolved, tuple(layout.needed(set(servers))), play)


class Running:
    """A set of servers and what it publishes."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.published = folder / "servers.json"
        self.logs = folder / "logs"
        self.set = ServerSet(environment, self.logs, back_off_s=0.01)
        self.set.start()

    def ask(self, name: str) -> Any:
        with urllib.request.urlopen(f"{read_endpoints(self.published)[name].url}/openapi.json", timeout=30) as answer:
            return json.load(answer)

    def everybody(self) -> list[int]:
        """Process ids of guards, servers, and the servers' own processes."""
        guards = list(self.set.processes().values())
        return guards + [child.pid for guard in guards for child in psutil.Process(guard).children(recursive=True)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def starting(timeout_s: float = 60, **servers: dict[str, Any]) -> Running:
        started.append(Running(tmp_path, environment(tmp_path, timeout_s, **servers)))
        return started[-1]

    yield starting
    for running in started:
        running.set.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_servers_know_each_other_and_end_cleanly(start: Callable[..., Running]) -> None:
    running = start(a={}, b={"gymnasium": True})
    running.set.wait_ready()
    endpoints = read_endpoints(running.published)
    assert {name: (at.gymnasium, at.closes) for name, at in endpoints.items()} == {
        "a": (False, True),
        "b": (True, False),
    }
    config = running.ask("a")["config"]
    assert set(config) == {"a", "b", "head_server", "results_dir", "cache_dir"}
    assert endpoints["b"].url.endswith(f":{config['b']['resources_servers']['fake']['port']}")
    everybody = running.everybody()
    assert len(everybody) == 6
    running.set.stop()
    assert gone(everybody)
    assert read_endpoints(running.published) == {}
    assert "interrupted" in (running.logs / "a.log").read_text()


@pytest.mark.parametrize("whom", ["server", pytest.param("guard", marks=only_long)])
def test_one_that_is_killed_takes_all_to_a_fresh_start(start: Callable[..., Running], whom: str) -> None:
    running = start(a={}, b={})
    running.set.wait_ready()
    before, everybody = read_endpoints(running.published), running.everybody()
    os.kill(running.ask("a")["pid"] if whom == "server" else running.set.processes()["a"], signal.SIGKILL)
    wait_for(lambda: read_endpoints(running.published) != before)
    after = wait_for(lambda: read_endpoints(running.published))
    assert not {at.url for at in before.values()} & {at.url for at in after.values()}
    assert gone(everybody)
    assert running.ask("b")["pid"] not in everybody


@only_long
def test_a_server_that_does_not_start_says_why(start: Callable[..., Running]) -> None:
    with pytest.raises(NemoGymError, match=r"b ended: ValueError: it does not want to \(see .*b\.log\)"):
        start(a={}, b={"crashes": True}).set.wait_ready()


@only_long
def test_a_server_that_does_not_answer_is_named(start: Callable[..., Running]) -> None:
    running = start(timeout_s=0.3, a={"silent": True})
    with pytest.raises(NemoGymError, match=r"a does not answer within 0\.3 s \(startup_timeout_s\)"):
        running.set.wait_ready()
    with pytest.raises(EpisodeFailure, match=r"env_lost.*does not answer"):
        read_endpoints(running.published)


@only_long
@pytest.mark.slow
def test_one_that_keeps_dying_is_given_up(start: Callable[..., Running]) -> None:
    running = start(a={})
    running.set.wait_ready()
    app = running.published.parent / "resources_servers" / "fake" / "app.py"
    app.write_text("import sys; sys.exit('it broke')")
    os.kill(running.ask("a")["pid"], signal.SIGKILL)

    def given_up() -> bool:
        try:
            read_endpoints(running.published)
        except EpisodeFailure as failure:
            return "it broke" in failure.detail
        return False

    wait_for(given_up)


@only_long
@pytest.mark.slow
def test_nothing_outlives_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_nemo_gym_servers import *\n"
        "folder = Path(sys.argv[1])\n"
        "running = Running(folder, environment(folder, a={}, b={'restless': True}))\n"
        "running.set.wait_ready(); print(json.dumps(running.everybody()), flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    root = str(Path(__file__).parent.parent)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as starter:
        assert starter.stdout is not None
        everybody = json.loads(starter.stdout.readline())
        assert len(everybody) == 6 and not gone(everybody)
        starter.kill()
    # One of them does not end on SIGINT, and is killed five seconds later.
    wait_for(lambda: gone(everybody))


def test_agents_may_not_take_more_steps_than_the_run_allows(tmp_path: Path) -> None:
    made = environment(tmp_path, a={})
    config = {
        "a": made.resolved.config["a"],
        **{
            name: {"responses_api_agents": {kind: {"entrypoint": "app.py", **bound}}}
            for name, kind, bound in (
                ("few", "simple_agent", {"max_steps": 2}),
                ("many", "simple_agent", {"max_steps": 20}),
                ("any", "simple_agent", {}),
                ("other", "own_agent", {}),
            )
        },
    }
    resolved = Resolved(config, tmp_path, sys.executable)
    layout = read_layout(resolved, "agent", "few")
    agents = Environment(made.section, resolved, tuple(layout.servers.values()), made.play)
    given = with_addresses(agents, dict.fromkeys(config, 1), tmp_path)
    steps = {
        name: settings.get("max_steps")
        for name, entry in given.items()
        if isinstance(entry, dict)
        for settings in entry.get("responses_api_agents", {}).values()
    }
    assert steps == {"few": 2, "many": 4, "any": 4, "other": None}
    assert "max_steps" not in config["any"]["responses_api_agents"]["simple_agent"]
