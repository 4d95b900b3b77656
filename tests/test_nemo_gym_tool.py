"""`make nemo-gym`: what it says, and that it does nothing twice. The installation itself is seen by the real tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "nemo_gym.py"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.syspath_prepend(TOOL.parent)  # as for a script that is run
    spec = importlib.util.spec_from_file_location("nemo_gym_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path))

    def call(*arguments: str, lock: str = "nemo-gym==0.7.0\n") -> int:
        (tmp_path / "lock.txt").write_text(lock)
        monkeypatch.setattr(module, "LOCK", tmp_path / "lock.txt")
        monkeypatch.setattr(sys, "argv", ["nemo_gym.py", *arguments])
        return int(module.main())

    return call


def stamp(folder: Path, text: str) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "raygym-lock").write_text(text)


def test_without_a_fitting_python_it_says_so(tool: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for python in ("/no/such/python", sys.executable):  # raygym's own is too old
        assert tool("--python", python) == 1
        said = capsys.readouterr().err
        assert said.startswith("nemo-gym: error: ") and "NEMO_GYM_PYTHON=" in said and said.count("\n") == 1
    assert tool("--if-possible", "--python", "/no/such/python") == 0
    assert capsys.readouterr().err.startswith("nemo-gym: not prepared: ")


def test_what_is_prepared_is_left_alone(
    tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    lock = "nemo-gym==0.7.0\n"
    stamp(tmp_path / "nemo-gym" / "0.7.0", hashlib.sha256(lock.encode()).hexdigest())
    assert tool("--python", "/no/such/python", lock=lock) == 0
    assert capsys.readouterr() == ("", "")
    # Another lock: it must be made anew.
    assert tool("--python", "/no/such/python", lock=lock + "more==1\n") == 1
