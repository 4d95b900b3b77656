"""The guard of a Ray cluster, with processes and directories in Ray's place."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from raygym import cluster_guard
from raygym.cluster_guard import KEEP_LOGS, KEPT, REMOVE, clear, forget_old, sessions_of, writers

# Writes a log as Ray's processes do, and does not end by itself.
WRITER = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'a'); f = open(sys.argv[1], 'a'); print(flush=True); time.sleep(600)"  # noqa: E501
DRIVER = "import sys, time; print(flush=True); f = open(input(), 'a'); print(flush=True); time.sleep(600)"
READER = "import sys, time; f = open(sys.argv[1]); print(flush=True); time.sleep(600)"


def session(root: Path, pid: int, time_of_day: str = "10-00-00_000000") -> Path:
    """A directory as Ray makes it."""
    folder = root / f"session_2026-01-01_{time_of_day}_{pid}"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "raylet.out").write_text("why it failed")
    (folder / "sockets").mkdir()
    (folder / "node_ip_address.json").write_text("{}")
    return folder


def process(program: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", "-c", program, str(log)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()  # the file is open
    return started


def wait_until_deaf(pid: int) -> None:
    """Until it ignores SIGINT."""
    deadline = time.monotonic() + 30
    while True:
        mask = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert mask is not None
        if int(mask[1], 16) >> (signal.SIGINT - 1) & 1:
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_only_reads_a_log_is_none_of_the_clusters(tmp_path: Path) -> None:
    log = session(tmp_path, 1) / "logs" / "raylet.out"
    started = [process(WRITER, log), process(READER, log)]
    try:
        assert writers(log.parent.parent) == [started[0].pid]
        assert writers(tmp_path / "session_2026-01-01_10-00-00_00000") == []
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_a_link_to_rays_directory_hides_no_process(tmp_path: Path) -> None:
    """As in RAY_TMPDIR; /proc has the real path."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = session(tmp_path / "link", 1)
    writer = process(WRITER, folder / "logs" / "raylet.out")
    try:
        assert writers(folder) == [writer.pid]
    finally:
        writer.kill()
        writer.wait()


def test_what_cannot_be_removed_does_not_keep_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = session(tmp_path, 3)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        clear(folder, keep_logs=True)
    assert not (folder / "node_ip_address.json").exists()
    forget_old(tmp_path)
    assert (folder / "logs" / "raylet.out").exists()


@pytest.fixture
def start() -> Iterator[Callable[[str, Path], subprocess.Popen[bytes]]]:
    """Starts programs, which are ended after the test."""
    with ExitStack() as stack:

        def started(program: str, log: Path) -> subprocess.Popen[bytes]:
            begun = stack.enter_context(process(program, log))
            stack.callback(begun.kill)
            return begun

        yield started


@pytest.mark.parametrize("order", [REMOVE, KEEP_LOGS, b""])
def test_at_every_end_of_the_driver(
    order: bytes, tmp_path: Path, start: Callable[[str, Path], subprocess.Popen[bytes]]
) -> None:
    """`b""`: the pipe is closed without a word, as by a kill -9."""
    driver = start(DRIVER, tmp_path)
    old = session(tmp_path, driver.pid, "09-00-00_000000")
    command = [sys.executable, "-I", "-S", cluster_guard.__file__, str(tmp_path), str(driver.pid), "0.3", old.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        ours, others = session(tmp_path, driver.pid), session(tmp_path, 77)
        (tmp_path / "session_latest").symlink_to(ours)
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(f"{ours}/logs/driver.log\n".encode())
        driver.stdin.flush()
        driver.stdout.readline()
        writer, reader = start(WRITER, ours / "logs" / "w"), start(READER, ours / "logs" / "raylet.out")
        assert sorted(writers(ours)) == sorted([driver.pid, writer.pid])
        wait_until_deaf(guard.pid)
        guard.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert guard.poll() is None
        assert (ours / "sockets").exists()
        assert guard.stdin is not None
        guard.stdin.write(order)
        guard.stdin.close()
        assert writer.wait(timeout=60) == -signal.SIGKILL
        assert guard.wait(timeout=60) == 0
    assert reader.poll() is None
    assert driver.poll() is None, "it may go on, with its own log open"
    assert (old / "sockets").is_dir(), "another process had this id before"
    assert (others / "sockets").is_dir()
    if order == REMOVE:
        assert not ours.exists()
        assert not (tmp_path / "session_latest").is_symlink()
    else:
        assert (ours / "logs" / "raylet.out").read_text() == "why it failed"
        assert not (ours / "sockets").exists()
        assert not (ours / "node_ip_address.json").exists()


def test_a_link_below_a_session_is_removed_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "data").touch()
    root = tmp_path / "ray"
    for keep_logs in (True, False):
        folder = session(root, 3, f"1{int(keep_logs)}-00-00_000000")
        (folder / "runtime_resources").symlink_to(mine)
        clear(folder, keep_logs=keep_logs)
        assert (mine / "data").exists()
        assert not (folder / "runtime_resources").exists()


def test_only_the_newest_kept_logs_stay_and_nothing_of_others_goes(tmp_path: Path) -> None:
    others = session(tmp_path, 5, "00-00-00_000000")
    ours = [session(tmp_path, 5, f"1{hour}-00-00_000000") for hour in range(KEPT + 3)]
    for folder in ours:
        clear(folder, keep_logs=True)
    forget_old(tmp_path)
    assert sessions_of(tmp_path, 5) == {others.name, *(folder.name for folder in ours[3:])}


def test_the_guard_itself_is_no_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = session(tmp_path, 1) / "logs" / "raylet.out"
    with log.open("a"):
        assert writers(tmp_path) == []
        me = os.getpid()
        fake: Callable[[], int] = lambda: me + 1  # noqa: E731
        monkeypatch.setattr(os, "getpid", fake)
        assert writers(tmp_path) == [me]
