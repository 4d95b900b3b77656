"""A full disk: lines wait for room, a checkpoint is left out, nothing is half there. On failures that are made up, and
on a real file system without room."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_run_files import collected

from raygym.checkpoint import Checkpoint, CheckpointStore
from raygym.config import RunConfig
from raygym.config_file import parse_config
from raygym.durable import replace_durably
from raygym.full_disk import DiskFull, DiskPatience, append_whole, is_full
from raygym.learner_state import Gang, save_learner_state
from raygym.resume import ResumePoint
from raygym.rollout_state import RolloutState
from raygym.run_files import RunFiles
from raygym.schedule import SchedulerState
from raygym.supervision import Kind, PartEvent, What
from raygym.testing import chaos
from raygym.testing.chaos import Fault, Plan
from raygym.tracking.tensorboard_events import TensorBoardEvents
from raygym.whole_file import write_whole


def no_room() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def patience(wait_s: float, told: list[str] | None = None) -> tuple[DiskPatience, Time]:
    time = Time()
    return DiskPatience(wait_s, (told if told is not None else []).append, lambda: time.now, time.sleep), time


def failing(times: int, error: Exception | None = None) -> tuple[Callable[[], None], list[None]]:
    """A write that fails so often, and what succeeded."""
    written: list[None] = []
    left = times

    def write() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error or no_room()
        written.append(None)

    return write, written


def test_a_line_waits_for_room_and_says_so_every_few_seconds() -> None:
    told: list[str] = []
    disk, time = patience(60, told)
    write, written = failing(24)
    disk.write("metrics.jsonl", write)
    assert written == [None]
    assert time.now == 12
    assert told == [
        "the disk is full: metrics.jsonl waits for room (0 of 60 s)",
        "the disk is full: metrics.jsonl waits for room (5 of 60 s)",
        "the disk is full: metrics.jsonl waits for room (10 of 60 s)",
        "there is room on the disk again: metrics.jsonl was written after 12 s",
    ]


def test_it_does_not_wait_for_ever_nor_twice_in_vain() -> None:
    disk, time = patience(60)
    write, written = failing(10_000)
    with pytest.raises(DiskFull, match=r"no room for metrics.jsonl within 60 s \(logging.disk_wait_s\)") as raised:
        disk.write("metrics.jsonl", write)
    assert raised.value.__cause__ is None, "what is told is this, not what it came from"
    assert time.now == 60
    with pytest.raises(DiskFull, match=r"no room for summary\.json"):
        disk.write("summary.json", write)
    assert time.now == 60 and not written


def test_other_errors_are_not_waited_for() -> None:
    disk, time = patience(60)
    write, _ = failing(1, OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(PermissionError):
        disk.write("metrics.jsonl", write)
    with pytest.raises(ValueError, match="bug"):
        disk.attempt("a checkpoint", failing(1, ValueError("bug"))[0], "x")
    assert time.now == 0


def test_a_checkpoint_is_tried_once() -> None:
    told: list[str] = []
    disk, time = patience(60, told)
    write, written = failing(1)
    assert not disk.attempt("checkpoint step_000002", write, "the run goes on")
    assert told == ["the disk is full: checkpoint step_000002 was not written; the run goes on"]
    assert disk.attempt("checkpoint step_000004", write, "the run goes on")
    assert (len(told), time.now, written) == (1, 0, [None])


class FromAnotherProcess(RuntimeError):
    """As Ray has it: the cause is an attribute."""

    cause: BaseException


def test_a_full_disk_is_recognised_through_whatever_wraps_it() -> None:
    remote = FromAnotherProcess("a traceback")
    remote.cause = OSError(errno.EDQUOT, "Disk quota exceeded")
    try:
        raise RuntimeError("learner rank 0 failed") from remote
    except RuntimeError as error:
        assert is_full(error)
    assert is_full(no_room())
    assert not is_full(OSError(errno.EIO, "Input/output error"))
    assert not is_full(RuntimeError("learner rank 0 failed"))


@settings(deadline=None)
@given(
    before=st.binary(max_size=20),
    data=st.binary(min_size=1, max_size=40),
    room=st.integers(0, 50),
    most=st.integers(1, 9),
)
def test_a_line_is_there_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, data: bytes, room: int, most: int
) -> None:
    """The disk takes `room` bytes more, in writes of at most `most` bytes."""
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    path.write_bytes(before)
    real, left = os.write, room

    def write(handle: int, chunk: Any) -> int:
        nonlocal left
        if left == 0:
            raise no_room()
        taken = min(left, most, len(chunk))
        left -= taken
        return real(handle, bytes(chunk[:taken]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        try:
            append_whole(path, data)
        except OSError as error:
            assert is_full(error) and room < len(data)
            assert path.read_bytes() == before
        else:
            assert path.read_bytes() == before + data


def test_an_interrupt_leaves_no_half_line_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n")
    real = os.write

    def interrupted(handle: int, chunk: Any) -> int:
        real(handle, bytes(chunk[:3]))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_whole(path, b'{"step": 1}\n')
    assert path.read_bytes() == b"{}\n"


@pytest.mark.parametrize(
    ("write", "by"),
    [
        (lambda path: write_whole(path, "new"), "open"),
        (lambda path: replace_durably(path, b"new"), "open"),
    ],
)
def test_a_file_that_cannot_be_replaced_is_the_old_one_and_nothing_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], by: str
) -> None:
    path = tmp_path / "scheduler.json"
    path.write_text("old")

    def half(self: Path, *_: Any, **__: Any) -> None:
        os.close(os.open(self, os.O_CREAT | os.O_WRONLY))
        raise no_room()

    with monkeypatch.context() as patch:
        patch.setattr(Path, by, half)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.read_text() == "new"


def test_a_link_at_the_new_files_name_leads_nobody_out(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "run" / "report.html"
    victim.write_text("untouched")
    path.parent.mkdir()
    (path.parent / "report.html.new").symlink_to(victim)
    write_whole(path, "report")
    assert victim.read_text() == "untouched"
    assert path.read_text() == "report" and not path.is_symlink()


def test_a_checkpoint_without_room_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    with chaos.active(Plan((Fault("disk.*", "fill_disk", hit=5, hits=1),)), tmp_path / "fired"):
        fill(store, 2)  # manifest, latest: three points
        with pytest.raises(OSError, match="No space left"):
            while True:
                fill(store, 4)
    assert [entry.name for entry in store.path.iterdir() if ".tmp-" in entry.name or entry.name.endswith(".new")] == []
    assert store.newest_whole(pytest.fail) is not None
    fill(store, 6)
    store.retain({})
    assert store.steps() == [6]


def fill(store: CheckpointStore, step: int) -> None:
    with store.writing(step, {}) as folder:
        (folder / "model").write_bytes(bytes(1000))


class Counting:
    """A `TrainState` that counts the collective calls."""

    def __init__(self) -> None:
        self.calls = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (2,), "b": (2,)}

    def read(self, name: str, kind: str) -> torch.Tensor:
        self.calls += 1
        return torch.zeros(2)

    def optimizer_steps(self) -> int:
        return 1


def test_a_learner_without_room_makes_all_its_collective_calls_before_it_says_so(tmp_path: Path) -> None:
    """Other ranks are in them; one that is missing would make them wait for ever."""
    state: Any = Counting()
    with (
        chaos.active(Plan((Fault("disk.learner_state", "fill_disk", hit=1, hits=1),)), tmp_path / "fired"),
        pytest.raises(OSError, match="No space left"),
    ):
        save_learner_state(tmp_path / "state", state, 1, Gang(), shard_bytes=1)
    assert state.calls == 6
    save_learner_state(tmp_path / "state", state, 1, Gang(), shard_bytes=1)


def config_of(folder: Path, wait_s: float, **logging: Any) -> RunConfig:
    data = {"name": "t", "steps": 1, "runs_dir": str(folder), "policy": {"model": "tiny"}, "envs": [{"id": "a"}],
            "logging": {"tensorboard": False, "disk_wait_s": wait_s, **logging}}  # fmt: skip
    return parse_config(data)


def run_files(folder: Path, told: list[str], wait_s: float) -> RunFiles:
    return RunFiles(config_of(folder, wait_s), told=told.append)


def test_a_runs_files_outlive_a_full_disk(tmp_path: Path) -> None:
    told: list[str] = []
    files = run_files(tmp_path, told, 60)
    with chaos.active(Plan((Fault("disk.*", "fill_disk", rate=0.5, hits=1, times=20),), seed=1), tmp_path / "fired"):
        for step in range(1, 6):
            files.metrics(step, {"reward/mean": 1.0})
            files.ledger(step, collected())
            files.rollouts(step, collected())
        files.summary({"steps": 5})
    assert told
    rows = [json.loads(line) for line in (tmp_path / "t/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert len((tmp_path / "t/ledger.jsonl").read_text().splitlines()) == 5 * 3
    names = {entry.name for entry in (tmp_path / "t/trajectories").iterdir()}
    assert names == {f"step_{step:06d}.jsonl" for step in range(1, 6)}


def events_of(run: Path) -> list[float]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [datetime.fromisoformat(json.loads(line)["time"]).timestamp() for line in lines]


def event(at_s: float) -> PartEvent:
    return PartEvent(at_s, Kind.REPLICA, "replica 0", What.LOST, "it died")


def test_an_event_waits_for_nobody_and_is_written_later(tmp_path: Path) -> None:
    """With a patience that would fail the test, and the file system's own errors, too."""
    told: list[str] = []
    files = run_files(tmp_path, told, 300)
    with chaos.active(Plan((Fault("disk.append", "fill_disk", hit=1, hits=3),)), tmp_path / "fired"):
        for at_s in (1.0, 2.0, 3.0):
            files.event(event(at_s))
        assert not (tmp_path / "t/events.jsonl").read_bytes()
        files.event(event(4.0))
    assert events_of(tmp_path / "t") == [1.0, 2.0, 3.0, 4.0]
    assert len(told) == 1 and "events.jsonl cannot be written" in told[0]
    for last in (lambda: files.ledger(1, collected()), files.close):
        before = events_of(tmp_path / "t")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", raising(OSError(errno.EIO, "Input/output error")))
            files.event(event(9.0))
        assert events_of(tmp_path / "t") == before
        last()
        assert events_of(tmp_path / "t") == [*before, 9.0]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def test_a_line_that_the_disk_has_is_written_once_whatever_closing_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's file system, which finds out late: at `fsync` the line is taken back, after it it stays."""
    path, closed, synced = tmp_path / "metrics.jsonl", os.close, os.fsync

    def close(handle: int) -> None:
        closed(handle)
        raise no_room()

    monkeypatch.setattr(os, "close", close)
    append_whole(path, b"1\n")
    tries = iter([no_room(), None])

    def sync(handle: int) -> None:
        if error := next(tries):
            raise error
        synced(handle)

    monkeypatch.setattr(os, "fsync", sync)
    disk, _ = patience(60)
    disk.write("metrics.jsonl", lambda: append_whole(path, b"2\n"))
    assert path.read_bytes() == b"1\n2\n"


def test_closing_tries_the_held_row_once_and_hides_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    files = run_files(tmp_path, told, 300)
    files.hold(1, {"reward/mean": 1.0})
    files._tensorboard = cast(TensorBoardEvents, Unclosable())
    with chaos.active(Plan((Fault("disk.append", "fill_disk", hit=1, hits=9),)), tmp_path / "fired"):
        files.close()
    assert not (tmp_path / "t/metrics.jsonl").read_bytes()
    assert [line.split("; ")[-1] for line in told] == ["it is left out", "TensorBoard's files could not be closed: x"]
    files = run_files(tmp_path, told, 300)
    files.hold(1, {"reward/mean": 1.0})
    files.close()
    assert len((tmp_path / "t/metrics.jsonl").read_text().splitlines()) == 1


class Unclosable:
    show = staticmethod(lambda *args: None)

    def close(self) -> None:
        raise OSError("x")


@pytest.mark.parametrize("hit", range(1, 8))
def test_a_rewind_on_a_full_disk_waits_for_room_and_loses_nothing(tmp_path: Path, hit: int) -> None:
    """At each of its writes in turn: `disk.replace` is hit by ledger, metrics, scheduler, pointers and config."""
    told: list[str] = []
    files = run_files(tmp_path, told, 60)
    store = CheckpointStore(tmp_path / "t/checkpoints")
    for step in (1, 2):
        files.metrics(step, {"reward/mean": 1.0})
        files.ledger(step, collected())
        files.rollouts(step, collected())
        fill(store, step)
    store.retain({})
    point = ResumePoint(Checkpoint(store.path_of(1), 1, {}), RolloutState(SchedulerState()), {}, validated=False)
    with chaos.active(Plan((Fault("disk.replace", "fill_disk", hit=hit, hits=1),)), tmp_path / "fired"):
        files.rewind(point)
    assert len(told) == 2, "it waited, and went on"
    aside = files.discarded
    assert aside is not None and list(aside.parent.iterdir()) == [aside]
    for folder, step, lines in ((tmp_path / "t", 1, 3), (aside, 2, 3)):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [step]
        assert len((folder / "ledger.jsonl").read_text().splitlines()) == lines
        assert [path.name for path in (folder / "trajectories").iterdir()] == [f"step_{step:06d}.jsonl"]
        assert CheckpointStore(folder / "checkpoints").steps() == [step]
    assert (store.path / "latest").read_text() == "step_000001\n"


def test_without_room_for_tensorboard_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("raygym.run_files._tensorboard", raising(no_room()))
    RunFiles(config_of(tmp_path, 60, tensorboard=True), told=told.append).metrics(1, {"reward/mean": 1.0})
    assert len(told) == 1 and "TensorBoard's files cannot be written" in told[0]


def test_old_checkpoints_go_although_there_is_no_room_for_the_pointer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1, keep_best=1)
    for step in (1, 2, 3):
        fill(store, step)
    with chaos.active(Plan((Fault("disk.replace", "fill_disk", hit=1, hits=9),)), tmp_path / "fired"):
        with pytest.raises(OSError, match="No space left"):
            store.retain({2: 1.0})
        assert store.steps() == [2, 3]
    store.retain({2: 1.0})
    assert [(store.path / name).read_text() for name in ("latest", "best")] == ["step_000003\n", "step_000002\n"]
    with chaos.active(Plan((Fault("disk.replace", "fill_disk", hit=1, hits=9),)), tmp_path / "fired again"):
        store.retain({2: 1.0})  # nothing has changed, so nothing is written


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    ) if os.geteuid() == 0 else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("mounting a file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def test_a_real_disk_without_room(tiny_disk: Path) -> None:
    told: list[str] = []
    files = run_files(tiny_disk, told, 0)
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(200 << 10))
    files.metrics(1, {"reward/mean": 1.0})
    with pytest.raises(DiskFull, match=r"metrics\.jsonl"):
        while True:
            files.metrics(2, {"reward/mean": 1.0, "long": "x" * 30_000})
    lines = (tiny_disk / "t/metrics.jsonl").read_bytes()
    assert lines.endswith(b"\n") and all(json.loads(line) for line in lines.splitlines())

    store = CheckpointStore(tiny_disk / "checkpoints")
    with pytest.raises(OSError, match="No space left"), store.writing(1, {}) as folder:
        (folder / "model").write_bytes(bytes(300 << 10))
    assert not list(store.path.iterdir())
    # What libraries say that write by themselves.
    with pytest.raises(Exception, match="No space left") as raised:
        save_file({"a": torch.zeros(100_000)}, tiny_disk / "a.safetensors")
    assert is_full(raised.value)
    (tiny_disk / "a.safetensors").unlink(missing_ok=True)
    ballast.unlink()
    fill(store, 1)
    assert store.steps() == [1]
