"""A killed compile's lock goes; one that somebody holds, or another machine may hold, stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raygym import build_locks
from raygym.build_locks import remove_stale_locks
from raygym.extension_folder import use_own_folder


def lock(folder: Path, name: str = "op") -> Path:
    path = folder / "py311_cpu" / name / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_stays_while_its_process_lives_and_goes_after_it_was_killed(tmp_path: Path) -> None:
    baton = tmp_path / "py311_cpu" / "op" / "lock"
    compiling = subprocess.Popen([sys.executable, "-c", COMPILE, str(baton.parent)], stdout=subprocess.PIPE, text=True)
    try:
        assert compiling.stdout is not None and compiling.stdout.readline() == "compiling\n"
        assert remove_stale_locks(tmp_path) == []
        assert baton.exists()
    finally:
        compiling.kill()
        compiling.wait()
    assert remove_stale_locks(tmp_path) == [baton]
    assert not baton.exists()
    assert remove_stale_locks(tmp_path) == []


COMPILE = """
import os, sys, time
from torch.utils.file_baton import FileBaton
os.makedirs(sys.argv[1])
assert FileBaton(os.path.join(sys.argv[1], "lock")).try_acquire()
print("compiling", flush=True)
time.sleep(600)
"""


def test_a_lock_that_a_process_of_another_container_holds_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_locks, "_open_files", set)  # as /proc shows none of those with PIDs of their own
    held, stale = lock(tmp_path, "held"), lock(tmp_path, "stale")
    with held.open("rb"):
        assert remove_stale_locks(tmp_path) == [stale]
        assert held.exists()
    assert remove_stale_locks(tmp_path) == [held]


def test_ranks_that_ask_at_the_same_time_do_not_take_each_other_for_a_compile(tmp_path: Path) -> None:
    for number in range(8):
        lock(tmp_path, f"op{number}")
    threads = [threading.Thread(target=remove_stale_locks, args=[tmp_path]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list(tmp_path.glob("**/lock"))


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    stale = lock(tmp_path)
    (stale.parent / "op.so").touch()
    assert remove_stale_locks(tmp_path) == [stale]
    assert [path.name for path in stale.parent.iterdir()] == ["op.so"]
    assert remove_stale_locks(tmp_path / "not there") == []


def test_on_a_disk_of_several_machines_only_an_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_locks, "_is_local", lambda path: False)
    young, old = lock(tmp_path, "young"), lock(tmp_path, "old")
    os.utime(old, (time.time() - 3700,) * 2)
    assert remove_stale_locks(tmp_path) == [old]
    assert young.exists()


def test_each_environment_has_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = []
    for prefix in ("/a/.venv", "/b/.venv", "/a/.venv"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(sys, "prefix", prefix)
        folders.append(use_own_folder())
        assert Path(_get_build_directory("op", False)).is_relative_to(folders[-1]), "torch looks there"
    assert folders[0] == folders[2] != folders[1]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "chosen"))
    assert use_own_folder() == tmp_path / "chosen"
