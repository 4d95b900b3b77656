"""What becomes of a session that cannot start; without a cluster."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raygym.actors import serving
from raygym.actors import session as module
from raygym.config_file import parse_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def test_a_start_that_fails_is_cleaned_up_once_and_keeps_its_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = Counter[str]()

    def counted(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: calls.update([name])

    class Learners:
        shutdown = staticmethod(counted("shutdown"))

    def deploy(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the proxy died")

    monkeypatch.setattr(module.cluster, "connect", counted("connect"))
    monkeypatch.setattr(module.cluster, "disconnect", counted("disconnect"))
    monkeypatch.setattr(module.serving, "deploy", deploy)
    monkeypatch.setattr(module.serving, "undeploy", counted("undeploy"))
    monkeypatch.setattr(module.LearnerGroup, "launch", lambda *args: Learners)
    data = {"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}
    session = module.Session(parse_config(data), "", 0, rolling_out=False)
    with pytest.raises(RuntimeError, match="the proxy died"):
        try:
            session.__enter__()
        finally:
            session.__exit__()  # as `runs` does it
    assert calls == {"connect": 1, "shutdown": 1, "undeploy": 1, "disconnect": 1}


def test_a_start_that_fails_while_it_deploys_leaves_the_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a cluster of others, the thread may deploy once more after the application was removed."""
    deploying, end, undeployed = threading.Event(), threading.Event(), list[bool]()

    class Guard:
        def __init__(self, app: str, *, on_own_cluster: bool) -> None:
            pass

        def undeploy(self, run_name: str, *, deploys_still: bool) -> None:
            undeployed.append(deploys_still)

    def deploy(*args: Any, **kwargs: Any) -> None:
        deploying.set()
        assert end.wait(60)

    def launch(*args: Any) -> None:
        assert deploying.wait(60)
        raise RuntimeError("no GPUs")

    monkeypatch.setattr(module.cluster, "connect", lambda: None)
    monkeypatch.setattr(module.cluster, "disconnect", lambda **kwargs: None)
    monkeypatch.setattr(module, "AppGuard", Guard)
    monkeypatch.setattr(module.serving, "deploy", deploy)
    monkeypatch.setattr(module.LearnerGroup, "launch", launch)
    data = {"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}
    try:
        with pytest.raises(RuntimeError, match="no GPUs"):
            module.Session(parse_config(data), "", 0, rolling_out=False).__enter__()
        assert undeployed == [True]
    finally:
        end.set()


def test_an_application_that_does_not_go_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(serving.serve, "delete", lambda *args, **kwargs: forever.wait(60))
    with pytest.raises(TimeoutError, match=r"raygym-t was not gone after 0\.1 s"):
        serving.undeploy("t", timeout_s=0.1)
    forever.set()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(serving.serve, "delete", refuse)
    with pytest.raises(RuntimeError, match="no"):
        serving.undeploy("t")
