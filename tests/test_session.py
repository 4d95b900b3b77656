"""What becomes of a session that cannot start; without a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
