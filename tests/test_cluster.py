"""Ray's token while a cluster is being started; without one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raygym.actors import cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """With no guard and no Ray in it: `connect` fails where Ray would have started."""

    class Guarded(cluster._OwnCluster):
        def __init__(self) -> None:
            pass

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_OwnCluster", Guarded)
    monkeypatch.setattr(cluster, "_own", None)
    yield tmp_path


@pytest.mark.parametrize("folder_was_there", [False, True])
def test_the_token_of_a_start_that_fails_is_nobody_elses(
    home: Path, monkeypatch: pytest.MonkeyPatch, folder_was_there: bool
) -> None:
    token = home / ".ray" / "auth_token"
    if folder_was_there:
        token.parent.mkdir(mode=0o755)
    before = mode(token.parent) if folder_was_there else 0o700

    def start(**options: Any) -> None:
        assert mode(token.parent) == 0o700, "nobody else comes to the file, whatever its mode is"
        token.touch(mode=0o644)
        raise RuntimeError("the raylet died")

    monkeypatch.setattr(cluster, "_init", start)
    with pytest.raises(RuntimeError, match="the raylet died"):
        cluster.connect()
    assert mode(token) == 0o600 and mode(token.parent) == before


def test_a_folder_with_a_token_stays_as_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.touch(mode=0o644)
    monkeypatch.setattr(cluster, "_init", lambda **options: token.write_text(f"{mode(token.parent):o}"))
    cluster.connect()
    assert (token.read_text(), mode(token)) == ("755", 0o600)


_LISTENS = """
import tempfile, psutil, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
print({c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"})
"""


@pytest.mark.parametrize("chosen", [None, "eth7"])
def test_process_groups_of_an_own_cluster_are_on_this_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    variables = {**os.environ} | ({"GLOO_SOCKET_IFNAME": chosen} if chosen else {})
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(cluster, "_init", lambda **options: None)
    cluster.connect()
    assert variables["GLOO_SOCKET_IFNAME"] == (chosen or "lo"), "what the user has set stays"
    if not chosen:
        listens = subprocess.run([sys.executable, "-c", _LISTENS], env=variables, capture_output=True, text=True)
        assert listens.stdout.strip() == "{'127.0.0.1'}", listens.stderr


@pytest.mark.parametrize(("late", "started"), [(2, True), (3, False)])
def test_a_raylet_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch, late: int, started: bool) -> None:
    calls: list[str] = []

    def init(**options: Any) -> None:
        calls.append("init")
        if calls.count("init") <= late:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: calls.append("shutdown"))
    if started:
        cluster._start(address="local")
    else:
        with pytest.raises(Exception, match="timed out during startup"):
            cluster._start(address="local")
    assert calls == ["init", "shutdown"] * 2 + ["init"], "and what is left of it is ended before"


def test_what_else_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise ConnectionError("no cluster there")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ConnectionError):
        cluster._start(address="local")
