"""`make trl`: what it says where it cannot be done. The installation itself is seen by the benchmark."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    module = importlib.import_module("trl")
    assert Path(str(module.__file__)).parent == TOOLS
    monkeypatch.setattr(module, "FOLDER", tmp_path / "venv")
    return module


def test_another_python_does_not_fit(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trl.py", "--python", "/no/such/python"])
    assert tool.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("trl: error: ") and "3.11" in said and "TRL_PYTHON=" in said and said.count("\n") == 1


def test_what_pip_says_becomes_what_to_do(tool: ModuleType, tmp_path: Path) -> None:
    venv = tool.LockedVenv("x", "X", "1", tmp_path, tmp_path, "", ("3.11",), 2, "X_PYTHON")
    assert "PIP_EXTRA_INDEX_URL" in venv._pip_failure(["ERROR: No matching distribution found for torch==2.13.0+cpu"])
    assert "disk is full" in venv._pip_failure(["OSError: [Errno 28] No space left on device"])
    assert "network" in venv._pip_failure(["WARNING: Retrying after NewConnectionError"])
    assert venv._pip_failure(["Collecting a", "ERROR: it broke"]) == "pip failed: ERROR: it broke"


def test_the_lock_is_of_the_version_that_is_named(tool: ModuleType) -> None:
    pins = [line for line in tool.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert f"trl=={tool.VERSION}" in pins and all("==" in pin for pin in pins)
