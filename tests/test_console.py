"""What a run prints: rows and a view that fit, how much is told to whom, and what stays out of sight."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from raygym.actor_logs import gather_logs
from raygym.cli import main
from raygym.console import RunConsole, sparkline
from raygym.driver_log import driver_log
from raygym.live_console import LiveConsole, Verbosity, duration
from raygym.rollout_console import RolloutConsole

STEP = {
    "reward/mean": 0.5, "reward/std": 0.25, "tokens/generated": 16, "episodes/completed": 4, "learn/tokens_per_s": 8.0,
    "time/step_s": 4.0, "time/generate_s": 2.0, "time/learn_s": 1.0, "time/sync_s": 0.5, "policy/staleness_max": 1,
    "policy/logprob_abs_diff": 1e-6, "episodes/failed/env_error": 3, "episodes/failed/engine_lost": 1,
}  # fmt: skip


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def console_of(width: int, *, terminal: bool = False, height: int = 24, **options: Any) -> Console:
    return Console(
        width=width, height=height, record=True, file=io.StringIO(), highlight=False, force_terminal=terminal, **options
    )


def shown(run: RunConsole, console: Console) -> list[str]:
    """The lines of the view."""
    console.export_text()
    console.print(run.view())
    return console.export_text().splitlines()


def stepped(console: Console, steps: int = 8, *, made: int = 3, **metrics: float) -> tuple[RunConsole, Clock]:
    clock = Clock()
    run = RunConsole(steps, console, clock=clock)
    run.start_clock()
    for step in range(1, made + 1):
        clock.now_s += 4.0
        run.step(step, STEP | {"reward/mean": step / 10} | metrics)
    return run, clock


@pytest.mark.parametrize("width", [80, 200])
def test_a_file_gets_one_row_a_step_with_all_columns(width: int) -> None:
    console = console_of(width)
    run = RunConsole(200, console)
    for step in range(1, 101):
        run.step(step, STEP)
    lines = console.export_text().splitlines()
    titles = ["step", "reward", "generate", "learn", "sync", "tok/s", "stale", "logp", "Δ", "eta", "failed"]
    assert lines[0].split() == titles
    assert lines[1].split()[:8] == ["1/200", "0.500", "2.0s", "1.0s", "0.5s", "4", "1", "1e-06"]
    assert lines[1].endswith("4  env_error 3, engine_lost 1")
    assert len(lines) == 105, "100 rows and a line of titles before every 20th"
    assert len({line.index("2.0s") for line in lines if "0.500" in line}) == 1, "columns stay where they are"


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100])
def test_rows_and_view_fit_a_terminal(width: int) -> None:
    console = console_of(width, terminal=True)
    run, _ = stepped(console, steps=1000)
    rows = console.export_text().splitlines()
    assert max(map(len, rows)) <= width
    assert len(rows) == 4 and "0.300" in rows[-1]
    run.validation(0, {"val/reward": 0.1, "val/failed": 0, "time/validate_s": 2.0})
    with run.doing("step 4"):
        run.progress("collecting: 2 of 4 groups whole, 16 episodes running " * 3)
        assert max(map(len, shown(run, console))) < width


def test_the_view_tells_what_a_row_has_no_room_for() -> None:
    console = console_of(100, terminal=True)
    run, clock = stepped(console)
    run.validation(0, {"val/reward": 0.125, "val/failed": 0, "time/validate_s": 2.0})
    run.validation(3, {"val/reward": 0.25, "val/failed": 1, "time/validate_s": 2.0})
    with run.doing("step 4"):
        run.progress("collecting: 2 of 4 groups whole")
        clock.now_s += 7
        lines = [line.split() for line in shown(run, console)]
    text = [" ".join(line) for line in lines]
    assert text[1] == "● step 4 collecting: 2 of 4 groups whole 7s"
    assert text[2].endswith("3 of 8 steps eta 13s"), "5 steps of 4 s, of which 7 s are over"
    assert text[3] == "reward ▁▅█ 0.300 ± 0.25 validation 0.125 → 0.250 (step 3)"
    assert text[4].endswith("█ generate 50% ▓ learn 25% ▒ sync 12% other 12%")
    assert [text[4].count(glyph) for glyph in "█▓▒"] == [1 + 15, 1 + 7, 1 + 4], "in the legend and in a bar of 30"
    assert text[5] == "speed 4 tok/s generated 8 learned 4.0 s a step 1.0 episodes/s"
    assert text[6] == "weights version 3 staleness 1 logp Δ to the engine 1e-06"
    assert text[7] == "failed 12 attempts: env_error 9, engine_lost 3"


def test_the_view_leaves_out_its_last_lines_where_the_terminal_is_low() -> None:
    console = console_of(100, terminal=True, height=5)
    run, _ = stepped(console)
    with run.doing("step 4"):
        assert [line.split()[0] for line in shown(run, console)][1:] == ["●", "run"]


def test_a_resumed_run_counts_its_time_from_there() -> None:
    console = console_of(100, terminal=True)
    clock = Clock()
    run = RunConsole(12, console, clock=clock)
    run.resume(10)
    clock.now_s += 6
    run.step(11, STEP)
    with run.doing("step 12"):
        assert "11 of 12 steps  eta 6s" in shown(run, console)[2]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_block_characters_gets_others(encoding: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=80, height=24, file=file, force_terminal=True, highlight=False)
    run, _ = stepped(console)
    with run.doing("step 4"):
        console.print(run.view())
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    assert "# generate 50%" in Text.from_ansi(file.buffer.getvalue().decode(encoding)).plain


def test_a_view_is_taken_back_and_prints_nothing_into_a_file() -> None:
    console = console_of(60, terminal=True)
    with LiveConsole(console).live("starting"):
        console.file.write("|")
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert "starting" in drawn and drawn.rstrip().endswith("\x1b[2K"), "its line was erased"
    plain = console_of(60)
    with LiveConsole(plain).live("starting"):
        pass
    with LiveConsole(plain).phase("saving"):
        pass
    assert plain.export_text() == "saving\n"


def test_threads_print_while_the_view_is_drawn() -> None:
    console = console_of(60, terminal=True)
    live = LiveConsole(console)
    with live.live("outer"):
        threads = [threading.Thread(target=lambda: [live.line(f"line {n}") for n in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(50):
            with live.live(f"inner {number}"):
                pass
        for thread in threads:
            thread.join(timeout=20)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("line 49") == 4


def test_who_wants_quiet_is_told_what_goes_wrong_alone() -> None:
    for verbosity, told in (
        (Verbosity.QUIET, ["lost"]),
        (Verbosity.NORMAL, ["lost", "ready"]),
        (Verbosity.VERBOSE, ["lost", "ready", "logged"]),
    ):
        console = console_of(100)
        run = RunConsole(8, console, verbosity)
        run.line("lost")
        run.note("ready")
        run.detail("logged")
        assert console.export_text().split() == told
        run.step(1, STEP)
        assert ("1/8" in console.export_text()) == (verbosity > Verbosity.QUIET)


@pytest.mark.parametrize("flags", [["-q", "-v"], ["--quiet", "--verbose"]])
def test_quiet_and_verbose_exclude_each_other(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "x.yaml", *flags])
    assert "not allowed with" in capsys.readouterr().err


def test_a_rollout_shows_how_far_it_is() -> None:
    clock = Clock()
    console = console_of(60, terminal=True)
    rollout = RolloutConsole(10, console, clock=clock)
    rollout.start_clock()
    clock.now_s += 5
    rollout.progress(4, 9, 100, 3, {"env_error": 2})
    with rollout.doing("playing"):
        console.print(rollout.view())
    bar, numbers, failed = [line.split("  ") for line in console.export_text().splitlines()[1:]]
    assert bar[-1] == "4/10 episodes"
    assert numbers[1:] == ["3 running", "9 turns", "20 tok/s", "eta 8s"]
    assert failed == ["", "failed 2 (env_error 2)"]


def test_a_rollouts_lines_in_a_file_become_rarer() -> None:
    clock, console = Clock(), console_of(100)
    rollout = RolloutConsole(10, console, clock=clock)
    rollout.start_clock()
    for _ in range(3600):
        clock.now_s += 1
        rollout.progress(1, 1, 1, 1, {})
    assert 50 < len(console.export_text().splitlines()) < 100


def test_the_driver_log_has_what_is_logged_and_warned(tmp_path: Path) -> None:
    console = console_of(100)
    quiet, verbose = LiveConsole(console), LiveConsole(console, Verbosity.VERBOSE)
    for live in (quiet, verbose):
        with driver_log(tmp_path / "logs" / "driver.log", live):
            logging.getLogger("some.library").warning("odd %s", live.verbosity.name)
            logging.getLogger("raygym.x").info("noted %s", live.verbosity.name)
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("old call", stacklevel=1)
    text = (tmp_path / "logs" / "driver.log").read_text()
    assert "WARNING some.library: odd NORMAL" in text and "old call" in text
    assert "noted NORMAL" not in text and "INFO raygym.x: noted VERBOSE" in text
    lines = console.export_text().splitlines()
    assert lines[0] == "some.library: odd VERBOSE", "and nothing of the quiet one"
    with driver_log(tmp_path / "logs" / "driver.log" / "below a file", quiet):
        pass
    assert "cannot be written" in console.export_text()


OUT_OF_SIGHT = """
import os, subprocess, sys
from pathlib import Path
from raygym.console import RunConsole
from raygym.driver_log import driver_log
console = RunConsole(3)
console.line("before")
with driver_log(Path(sys.argv[1]), console):
    console.line("inside")
    print("a library prints")
    os.write(2, b"C++ writes\\n")
    subprocess.run([sys.executable, "-c", "print('a child prints')"], check=True)
console.line("after")
print("stderr again", file=sys.stderr)
"""


def test_what_others_print_is_in_the_log_alone(tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_SIGHT, str(log)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["before", "inside", "after"] and done.stderr == "stderr again\n"
    assert log.read_text().splitlines() == ["a library prints", "C++ writes", "a child prints"]


def test_a_record_that_cannot_be_formatted_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raise
    console = console_of(100)
    with driver_log(tmp_path / "driver.log", LiveConsole(console, Verbosity.VERBOSE)):
        logging.getLogger("some.library").warning("%d of", "x")
        try:
            raise LookupError("no such key")
        except LookupError:
            logging.getLogger("some.library").exception("odd")
    assert "--- Logging error ---" in capsys.readouterr().err
    shown = console.export_text().splitlines()
    assert (shown[0], shown[-1]) == ("some.library: odd", "LookupError: no such key")


def test_who_ends_a_run_names_its_log(tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    with pytest.raises(RuntimeError) as raised, driver_log(log, LiveConsole(console_of(100))):
        raise RuntimeError("no GPU")
    assert raised.value.__notes__ == [f"what it and its libraries printed is in {log}"]


ENDS_HARD = """
import faulthandler, os, sys, threading
from pathlib import Path
from raygym.driver_log import driver_log
from raygym.live_console import LiveConsole
hook = threading.excepthook
with driver_log(Path("before.log"), LiveConsole()):
    pass
assert threading.excepthook is hook and not faulthandler.is_enabled()
with driver_log(Path("driver.log"), LiveConsole()):
    def lose(error):
        raise error
    for error in (ValueError("odd\\nvalue"), SystemExit(1), ValueError("odd\\nvalue")):
        thread = threading.Thread(target=lose, args=[error], name="mirror")
        thread.start()
        thread.join()
    os.abort()
"""


def test_a_driver_that_ends_hard_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("PYTHONFAULTHANDLER", None)
    done = subprocess.run(
        [sys.executable, "-c", ENDS_HARD], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert done.stdout == "warning: thread mirror has ended by ValueError: odd value; see driver.log\n", "once"
    assert (tmp_path / "driver.log").read_text().count("Traceback") == 2


def written_to(file: Any, monkeypatch: pytest.MonkeyPatch) -> RunConsole:
    """All that a run's console can print, on a standard output that is `file`."""
    monkeypatch.setattr(sys, "stdout", file)
    run = RunConsole(8, verbosity=Verbosity.VERBOSE)
    run.line("line")
    run.detail("detail")
    with run.phase("phase"):
        run.step(1, STEP)
    return run


def test_a_console_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    written_to(full, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        full.close()
    closed = (tmp_path / "closed").open("w")
    closed.close()
    for absent in (closed, None):
        run = written_to(absent, monkeypatch)
        with monkeypatch.context() as later:
            later.setattr(sys, "stdout", text := io.StringIO())
            run.write_to(None)
            run.line("seen")
        assert text.getvalue() == "seen\n"


class FullForAWhile(io.RawIOBase):
    full, taken = True, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        self.taken += bytes(data)
        return len(data)


def test_what_a_full_disk_has_no_room_for_is_written_later_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullForAWhile()
    file = io.TextIOWrapper(io.BufferedWriter(disk), encoding="utf-8", line_buffering=True)
    monkeypatch.setattr(sys, "stdout", file)
    live = LiveConsole()
    live.line("one")
    live.line("two")
    disk.full = False
    live.line("three")
    assert disk.taken == b"one\ntwo\nthree\n"


NOBODY_READS = """
import os, sys, threading
from pathlib import Path
from raygym.console import RunConsole
from raygym.driver_log import driver_log
console = RunConsole(3)
def say(where):
    console.line(where)
    thread = threading.Thread(target=console.line, args=[where])
    thread.start()
    thread.join()
if sys.argv[2] == "early":
    sys.stdin.readline()
    say("before")
with driver_log(Path(sys.argv[1]), console):
    if sys.argv[2] == "late":
        console.line("shown")
        sys.stdin.readline()
    say("inside")
    print("a library prints", flush=True)
say("after")
Path(sys.argv[1]).with_name("went on").touch()
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_run_goes_on_when_nobody_reads_what_it_prints(when: str, tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    command = [sys.executable, "-c", NOBODY_READS, str(log), when]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdin and run.stdout and run.stderr
    if when == "late":
        assert run.stdout.readline() == "shown\n"
    run.stdout.close()
    run.stdin.write("go on\n")
    run.stdin.close()
    assert (run.wait(60), run.stderr.read()) == (0, "")
    run.stderr.close()
    assert (tmp_path / "went on").exists()
    assert log.read_text() == "a library prints\n", "the log is still the log"


def worker_logs(folder: Path, logs: Mapping[str, str]) -> Path:
    folder.mkdir()
    for name, text in logs.items():
        (folder / name).write_text(text)
    return folder


def test_actors_logs_are_kept_under_their_names(tmp_path: Path) -> None:
    worker, job = "ab" * 28, "01000000"
    logs = worker_logs(tmp_path / "session", {
        f"worker-{worker}-{job}-12.err": ":job_id:01000000\n:actor_name:EnvRunner\nsaid\n" + "x" * 100 + "\nend\n",
        f"worker-{worker}-{job}-12.out": ":job_id:01000000\n:actor_name:EnvRunner\n",
        f"worker-{worker}-{job}-13.out": ":actor_name:ServeReplica:app#1:Policy/Server\nout\n",
        f"worker-{worker}-ffffffff-14.out": "idle\n",
        "raylet.out": "not an actor's\n",
    })  # fmt: skip
    kept = gather_logs(logs, tmp_path / "kept", most_bytes=50)
    assert [path.name for path in kept] == ["EnvRunner-12.err", "ServeReplica_app_1_Policy_Server-13.out"]
    assert kept[0].read_text() == "x" * 45 + "\nend\n", "the end of a long one"
    assert kept[1].read_text() == "out\n"
    assert gather_logs(tmp_path / "nowhere", tmp_path / "none") == [] and not (tmp_path / "none").exists()


def test_a_picture_of_a_run_shows_its_own_rows(tmp_path: Path) -> None:
    run = tmp_path / "guess"
    run.mkdir()
    root = Path(__file__).parent.parent
    (run / "config.yaml").write_text((root / "configs/tiny.yaml").read_text())
    validated = {"step": 0, "val/failed": 0, "val/reward": 0.25, "time/validate_s": 1.0}
    rows = [validated, *({"step": step, **STEP, "reward/mean": step / 8} for step in (1, 2, 3))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(root / "tools/console_picture.py"), str(run), str(tmp_path / "x.svg"), "--step", "2"]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(root)})
    picture = (tmp_path / "x.svg").read_text()
    assert "0.250" in picture and "step&#160;3" in picture and "0.375" not in picture


def test_what_a_rewind_takes_back_is_not_in_the_view() -> None:
    console = console_of(100, terminal=True)
    run, _ = stepped(console)
    for step, reward in ((0, 0.125), (2, 0.25), (3, 0.5)):
        run.validation(step, {"val/reward": reward, "val/failed": 0, "time/validate_s": 2.0})
    run.resume(2)
    with run.doing("step 3"):
        reward = " ".join(shown(run, console)[3].split())
    assert reward == "reward ▁█ 0.200 ± 0.25 validation 0.125 → 0.250 (step 2)"


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 90000)] == ["0s", "1m00s", "1m01s", "1h00m", "25h00m"]
