"""Who removes a Serve application after its job, and who may deploy one. On actors of a real cluster, without Serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from raygym.actors import app_guard, serving
from raygym.actors.app_guard import AppGuard, AppWatch
from raygym.config import ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


class Exited(BaseException):
    """The watch has ended its actor."""


class Answers:
    """In Ray's place: a sign of life that raises these, one after the other, when it is asked."""

    def __init__(self, *answers: Exception | None) -> None:
        self.left = list(answers)
        self.ping = SimpleNamespace(remote=lambda: None)
        self.actor = SimpleNamespace(exit_actor=self.exit)

    def exit(self) -> None:
        raise Exited

    def get(self, reference: Any, timeout: float) -> None:
        if (error := self.left.pop(0)) is not None:
            raise error


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(app_guard, "time", clock)
    return slept


def watched(monkeypatch: pytest.MonkeyPatch, sign: Answers, failures: int) -> list[tuple[str, bool]]:
    """What was asked to be removed, by a Serve that fails so often."""
    asked: list[tuple[str, bool]] = []

    def remove(app: str, ends_serve: bool) -> None:
        asked.append((app, ends_serve))
        if len(asked) <= failures:
            raise RuntimeError("Serve is being restarted")

    monkeypatch.setattr(app_guard, "ray", sign)
    monkeypatch.setattr(app_guard, "remove", remove)
    with pytest.raises(Exited):
        AppWatch().watch("raygym-t", sign, True)
    return asked


def test_only_a_job_that_has_ended_loses_its_application(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    sign = Answers(None, ActorUnavailableError("its node is away", None), GetTimeoutError(), None, ActorDiedError())
    assert watched(monkeypatch, sign, failures=2) == [("raygym-t", True)] * 3
    assert not sign.left
    assert slept == [5.0] * (4 + 2), "no answer, however it fails, is a reason to ask again at once"


def test_what_cannot_be_removed_does_not_keep_the_watch_for_ever(
    monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    watched(monkeypatch, Answers(ActorDiedError()), failures=10_000)
    assert sum(slept) == 600


def test_the_application_of_a_job_that_lives_is_not_taken(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = AppGuard("raygym-t", on_own_cluster=False)
    try:
        # Short for this one only: below, Ray may take its time to notice that a sign is gone.
        with (
            monkeypatch.context() as patch,
            pytest.raises(ConfigError, match=r"^name: a run of this name \(t\) is on this cluster"),
        ):
            patch.setattr(app_guard, "_GONE_WITHIN_S", 1.0)
            AppGuard("raygym-t", on_own_cluster=False)
        watch = ray.get_actor("guard-raygym-t", namespace="raygym")
        assert watch == first._watch, "the one that lives keeps its watch"
        other = AppGuard("raygym-u", on_own_cluster=False)
        for actor in (other._watch, other._sign, first._sign):
            ray.kill(actor)
        second = AppGuard("raygym-t", on_own_cluster=False)
        for actor in (second._watch, second._sign):
            ray.kill(actor)
    finally:
        for actor in (first._watch, first._sign):
            ray.kill(actor)


def test_while_it_is_still_deployed_the_watch_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr(app_guard, "ray", SimpleNamespace(kill=killed.append))
    monkeypatch.setattr(app_guard.serving, "undeploy", lambda name: None)
    guard = AppGuard("raygym-t", on_own_cluster=True)
    guard._watch, guard._sign = "watch", "sign"
    guard.undeploy("t", deploys_still=True)
    assert not killed
    guard.undeploy("t")
    assert killed == ["watch", "sign"]


def test_a_controller_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    class Hung:
        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda *_: method)

    def get(_: Any, timeout: float) -> None:
        waited.append(timeout)
        raise GetTimeoutError

    monkeypatch.setattr(serving, "get_global_client", lambda **_: SimpleNamespace(_controller=Hung()))
    monkeypatch.setattr(serving, "ray", SimpleNamespace(get=get))
    assert serving.wanted_replicas("t") is None
    with pytest.raises(TimeoutError, match=r"^Serve's controller gave no answer within 30 s"):
        serving.scale("t", 2)
    assert waited == [30.0, 30.0]


def test_the_watch_removes_with_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(app_guard, "serve_runs", lambda: True)
    monkeypatch.setattr(app_guard.serving, "undeploy", removed.append)
    app_guard.remove("raygym-t", False)
    assert removed == ["t"], "serve.delete itself waits without end"
