"""What becomes of a session that cannot start; without a cluster."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raygym.actors import rollout_command, runs, serving
from raygym.actors import session as module
from raygym.config_file import parse_config
from raygym.console import RunConsole
from raygym.rollout_console import RolloutConsole

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
    monkeypatch.setattr(module.cluster, "is_own", lambda: True)  # else Ray is asked, and joins any cluster
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


class OnlyEnds:
    """A session that ends once, as a real one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.url = ""
        self.ended: list[object] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object = None, error: object = None, trace: object = None) -> None:
        if not self.ended:
            self.ended.append(error)


@contextmanager
def interrupted_while(self: object, text: str) -> Iterator[None]:
    if text == "stopping":
        raise KeyboardInterrupt
    yield


@pytest.mark.parametrize("second", ["while logs are gathered", "while it is told"])
def test_a_session_ends_also_at_a_second_interrupt(
    second: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, session = RuntimeError("the first"), OnlyEnds()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise first

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "Session", lambda *args, **kwargs: session)
    monkeypatch.setattr(runs, "_tracked", lambda *args: nullcontext())
    monkeypatch.setattr(runs, "train_through_losses", fail)
    monkeypatch.setattr(runs, "session_logs", lambda: tmp_path)
    if second == "while logs are gathered":
        monkeypatch.setattr(runs, "gather_logs", interrupt)
    else:
        monkeypatch.setattr(RunConsole, "phase", interrupted_while)
    data = {"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": [{"id": "a"}],
            "logging": {"tensorboard": False}}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        runs._train(parse_config(data), "", 0, RunConsole(1), None, None)
    assert session.ended == [first]


def test_a_rollouts_session_ends_also_at_a_second_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    session = OnlyEnds()
    monkeypatch.setattr(rollout_command, "Session", lambda *args, **kwargs: session)
    monkeypatch.setattr(RolloutConsole, "phase", interrupted_while)
    config, nothing = parse_config({"name": "t", "steps": 1, "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}), Any
    with pytest.raises(KeyboardInterrupt):
        rollout_command._play(config, "", 0, nothing, [], 1, RolloutConsole(1))
    assert len(session.ended) == 1 and isinstance(session.ended[0], AttributeError), "it has nothing to play"


@pytest.mark.parametrize(("cores", "waits"), [(2, True), (64, False)])
def test_on_few_cores_rollouts_begin_when_learners_are_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, waits: bool
) -> None:
    """They would only take their share of what the engine needs, which is up last."""
    answers = [False, False, True]
    data = {"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}
    session = module.Session(parse_config(data), "", 0)
    monkeypatch.setattr(module.cluster, "is_own", lambda: True)
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(session, "_learners", SimpleNamespace(settled=lambda: answers.pop(0)))
    monkeypatch.setattr(session, "_deploying", Future())
    session._leave_cores()
    assert len(answers) == (0 if waits else 3)


def test_on_few_cores_rollouts_begin_when_engines_are_up_before_learners(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = {"name": "t", "steps": 1, "runs_dir": str(tmp_path), "policy": {"model": "tiny"}, "envs": [{"id": "a"}]}
    session = module.Session(parse_config(data), "", 0)
    monkeypatch.setattr(module.cluster, "is_own", lambda: True)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(session, "_learners", SimpleNamespace(settled=lambda: False))
    deploying: Future[None] = Future()
    monkeypatch.setattr(session, "_deploying", deploying)
    timer = threading.Timer(0.3, deploying.set_result, (None,))
    timer.start()
    session._leave_cores()
    assert deploying.done()
