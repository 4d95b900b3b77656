"""`import raygym as rg`: train, rollout and make as functions, whose errors are one family and never an exit."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiers import only_long

import raygym as rg
from raygym import cli, command_process
from raygym.config_file import load_config
from raygym.python_api import as_config
from raygym.results import Rollout
from raygym.run_files import trajectory_record
from raygym.types import EpisodeStatus, Sampling, Task, Trajectory, Turn

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SIMULATED: dict[str, Any] = {"policy.engine": "simulated", "checkpoint.save_final": False, "steps": 2}


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have `code` be the command that runs."""
    monkeypatch.setattr(command_process, "_PROGRAM", [sys.executable, "-c", code])


def test_importing_raygym_imports_nothing_else() -> None:
    code = (
        "import raygym, sys; dir(raygym); print({'numpy', 'pydantic', 'gymnasium', 'ray', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there() -> None:
    assert all(getattr(rg, name) is not None for name in rg.__all__)
    assert set(rg.__all__) <= set(dir(rg))
    with pytest.raises(AttributeError, match="no_such"):
        _ = rg.no_such


def test_a_config_may_have_any_form() -> None:
    whole = load_config(TINY, ["learner.lr=1e-5", "steps=7"])
    mapping = whole.model_dump(mode="json", exclude_unset=True)
    changes = {"learner.lr": 1e-5, "steps": 7}
    assert as_config(TINY, changes) == as_config(str(TINY), ["learner.lr=1e-5", "steps=7"]) == whole
    assert as_config(load_config(TINY), changes) == whole
    assert as_config(whole) is whole
    before = mapping["steps"]
    assert as_config(mapping, {"steps": 9}).steps == 9
    assert mapping["steps"] == before, "the caller's mapping stays as it is"


def test_what_follows_from_a_key_follows_its_override() -> None:
    config = load_config(TINY, ["learner.algorithm=grpo"])
    assert as_config(config, {"learner.algorithm": "dapo"}).learner.overlong == "shaped"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rg.train("nowhere.yaml"), ["nowhere.yaml", "cannot be read"]),
        (lambda: rg.train(TINY, {"learner.lrr": 1}), ["learner.lrr", "unknown key"]),
        (lambda: rg.train(TINY, "steps=1"), ["overrides", "list"]),
        (lambda: rg.train(TINY, {"steps": object()}), ["overrides", "object"]),
        (lambda: rg.train({"steps": 1}), ["name", "policy", "envs"]),
        (lambda: rg.rollout(), ["policy and env"]),
        (lambda: rg.rollout(TINY, kwargs={"high": 3}), ["kwargs", "env"]),
        (lambda: rg.rollout(TINY, samples=0), ["samples", "0"]),
        (lambda: rg.rollout(TINY, samples=2.5), ["samples", "2.5", "whole number"]),
        (lambda: rg.rollout(TINY, tasks=True), ["tasks", "True", "whole number"]),
        (lambda: rg.rollout(TINY, split="val"), ["split", "'val'", "validation"]),
        (lambda: rg.rollout(TINY, success=None), ["success", "None", "number"]),
        (lambda: rg.rollout(TINY, success=float("nan")), ["success", "nan"]),
        (lambda: rg.rollout(TINY, temperature="hot"), ["temperature", "'hot'", "number"]),
        (lambda: rg.rollout(TINY, temperature=-1), ["temperature", "-1", "from 0"]),
        (lambda: rg.make("raygym/NumberGues-v0"), ["raygym/NumberGuess-v0"]),
        (lambda: rg.make("raygym/NumberGuess-v0", hihg=3), ["hihg"]),
        (lambda: rg.make(dict), ["env_id", "dict", "module:Class"]),
        (lambda: rg.Run("/no/such/run"), ["/no/such/run", "raygym train"]),
        (lambda: rg.Rollout("/no/such/rollout"), ["/no/such/rollout", "raygym rollout"]),
        (lambda: rg.train(None), ["config", "None", "mapping"]),
        (lambda: rg.train(TINY, 5), ["overrides", "5", "steps=5"]),
        (lambda: rg.train(TINY, [5]), ["overrides", "[5]", "steps=5"]),
        # As text it would be an environment's argument of another kind than was given.
        (
            lambda: rg.train(TINY, {"envs": [{"id": "a:B", "kwargs": {"n": float("inf")}}]}),
            ["overrides: envs", "float"],
        ),
    ],
)
def test_errors_are_one_family_and_say_what_is_wrong(call: Any, words: list[str]) -> None:
    with pytest.raises(rg.RaygymError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert isinstance(caught.value, ValueError)


def test_another_kind_of_trajectories_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(Path(TINY).read_text())
    with pytest.raises(rg.ConfigError, match=r"kind: 'train' .*step, validation"):
        rg.Run(tmp_path).trajectories("train")


def test_what_only_the_command_can_know_is_a_config_error_too() -> None:
    with pytest.raises(rg.ConfigError, match=r"^envs\.0: .*did you mean raygym/NumberGuess-v0"):
        rg.rollout(policy="tiny", env="raygym/NumberGues-v0", quiet=True)


def test_make_gives_the_environment_itself() -> None:
    env = rg.make("raygym/NumberGuess-v0", high=20)
    messages, info = env.reset(seed=0)
    assert messages[-1]["role"] == "user"
    _, reward, terminated, _, _ = env.step({"role": "assistant", "content": str(info["secret"])})
    assert (reward, terminated) == (1.0, True)


def test_a_failed_run_says_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "import sys; print('noise\\nraygym: train failed: no GPU', file=sys.stderr); sys.exit(1)")
    with pytest.raises(rg.RunFailed, match=r"^train failed: no GPU$"):
        rg.train(TINY)


def test_arguments_that_the_command_refuses_are_a_config_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "usage: raygym train [options]\\nraygym train: error: argument --fresh: no"
    program(monkeypatch, f"import sys; print('{said}', file=sys.stderr); sys.exit(2)")
    with pytest.raises(rg.ConfigError, match=r"^raygym train: error: argument --fresh: no$"):
        rg.train(TINY)


def test_a_run_that_dies_says_how_and_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(rg.RunFailed, match=r"ended by signal 9; [^\0]*last words"):
        rg.train(TINY)


_A_RUN = """
import os, shutil, sys
from raygym.config_file import load_config
config = load_config(sys.argv[2])
config.run_dir.mkdir(parents=True)
shutil.copy(sys.argv[2], config.run_dir / "config.yaml")
rows = ['{"step": 0, "val/reward": 0.25}', '{"step": 1, "reward/mean": 0.5}', '{"step": 2']
(config.run_dir / "metrics.jsonl").write_text("\\n".join(rows))
(config.run_dir / "summary.json").write_text('{"steps": 1}')
print("it went", sys.argv[1], *sys.argv[3:], "colours" * ("FORCE_COLOR" in os.environ))
"""


async def test_a_run_inside_an_event_loop_prints_where_its_caller_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a notebook's kernel has it
    program(monkeypatch, _A_RUN)
    assert asyncio.get_running_loop().is_running()
    with contextlib.redirect_stdout(io.StringIO()) as out:  # like a cell's output, it has no descriptor
        run = rg.train(TINY, {"runs_dir": str(tmp_path)}, fresh=True)
    assert out.getvalue() == "it went train --fresh \n"
    assert run.path == tmp_path / "tiny"
    assert run.finished and run.summary == {"steps": 1}
    assert run.metrics == [{"step": 0, "val/reward": 0.25}, {"step": 1, "reward/mean": 0.5}], "the cut line is left out"
    assert run.validation_reward == {0: 0.25}
    assert run.config.name == "tiny" and run.checkpoint is None
    assert "2 rows" in repr(run) and "<table>" in run._repr_html_()


def _temporary_rollout(path: Path) -> Rollout:
    played = Trajectory(
        task=Task(0, "mine", 0, "train"), group_id="g", episode=0, attempt=0, status=EpisodeStatus.TERMINATED,
        token_ids=np.arange(3, dtype=np.int32), loss_mask=np.array([False, True, True]),
        logprobs=np.zeros(3, np.float32), weight_versions=np.zeros(3, np.int32),
        turns=(Turn(1, 3, 0.5, "stop", 0.1, 0.1),), reward=0.5, messages=(), sampling=Sampling(1.0, 2), drifted=False,
    )  # fmt: skip
    path.mkdir()
    (path / "trajectories.jsonl").write_text((json.dumps(trajectory_record(played)) + "\n") * 3)
    return Rollout(path, temporary=True)


def test_a_rollout_that_nobody_keeps_is_there_while_it_is_read(tmp_path: Path) -> None:
    read = 0
    for trajectory in _temporary_rollout(tmp_path / "played"):
        gc.collect()
        assert trajectory.reward == 0.5
        read += 1
    assert read == 3
    gc.collect()
    assert not (tmp_path / "played").exists()


_STOPPED_BY_ITS_OWNER = """
import raygym.cli, sys, time, pathlib, runpy
def main():
    try:  # the interrupt comes as soon as the mark is there
        pathlib.Path(sys.argv[1]).write_text("up")
        for _ in range(600):  # a signal just before a sleep does not end it
            time.sleep(0.1)
    except KeyboardInterrupt:
        pathlib.Path(sys.argv[1]).write_text("stopped")
        return 130
raygym.cli.main = main
runpy.run_module("raygym.owned_command", run_name="__main__")
"""


def _once(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text() == text):
        assert time.monotonic() < deadline, f"{path} does not become {text!r}"
        time.sleep(0.02)


def test_an_interrupt_stops_the_run_and_is_raised_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    program(monkeypatch, _STOPPED_BY_ITS_OWNER)

    def interrupt() -> None:
        _once(mark, "up")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        command_process.run_command([str(mark)])
    assert mark.read_text() == "stopped"


@pytest.mark.parametrize("ignored", [False, True], ids=["", "SIGINT is ignored, as with nohup"])
def test_a_run_does_not_outlive_a_caller_that_was_killed(tmp_path: Path, ignored: bool) -> None:
    mark = tmp_path / "mark"
    code = (
        "import signal, sys; from raygym import command_process\n"
        f"signal.signal(signal.SIGINT, signal.SIG_IGN) if {ignored} else None\n"
        f"command_process._PROGRAM = [sys.executable, '-c', {_STOPPED_BY_ITS_OWNER!r}]\n"
        f"command_process.run_command([{str(mark)!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as caller:
        _once(mark, "up")
        caller.kill()
    _once(mark, "stopped")


_NOT_TO_BE_INTERRUPTED = """
import os, queue, signal, time, types
from raygym import owned_command
taken = queue.SimpleQueue()
def interrupted(*_):
    os.write(1, b"interrupted\\n")
    taken.put(None)
def sleep(seconds):  # until the interrupt was taken, however long that takes: two at once would be one
    taken.get()
    os.write(1, f"waited {seconds} s\\n".encode())
owned_command.time = types.SimpleNamespace(sleep=sleep)
owned_command.end_with_owner(again_s=7, times=3)
signal.signal(signal.SIGINT, interrupted)
print("up", flush=True)
for _ in range(6000):  # a signal just before a sleep does not end it
    time.sleep(0.01)
"""


def test_a_run_that_takes_no_interrupt_ends_all_the_same() -> None:
    command = [sys.executable, "-c", _NOT_TO_BE_INTERRUPTED]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.stdin.close()
        said = process.stdout.read()
        assert (said.count("interrupted"), said.count("waited 7 s")) == (3, 3)
    assert process.returncode == 130


def test_a_command_that_does_not_stop_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    write = "import pathlib, sys, time; mark = pathlib.Path(sys.argv[1]); mark.write_text('up'); time.sleep(60)"
    program(monkeypatch, f"{write}; mark.write_text('end')")
    monkeypatch.setattr(command_process, "_STOP_S", 0.2)

    def interrupt() -> None:
        _once(mark, "up")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        command_process.run_command([str(mark)])
    assert mark.read_text() == "up"


def test_an_interrupt_of_the_checks_before_a_run_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_inputs(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raygym.preflight.check_inputs", check_inputs)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert cli.main(["train", str(TINY)]) == 130
    assert capsys.readouterr().err == "raygym: interrupted; everything was stopped\n"


@only_long  # two starts, each a quarter of a minute
@pytest.mark.ray
@pytest.mark.timeout(900)
async def test_a_real_run_and_a_real_rollout_inside_an_event_loop(tmp_path: Path) -> None:
    run = rg.train(TINY, {**SIMULATED, "runs_dir": str(tmp_path)}, quiet=True)
    assert [row["step"] for row in run.metrics] == [0, 1, 2]
    assert run.finished and sorted(run.validation_reward) == [0, 2]
    trained = list(run.trajectories())
    assert len(trained) == 2 * run.config.rollout.groups_per_step * run.config.rollout.group_size
    assert all(t.loss_mask.any() and len(t.token_ids) == len(t.logprobs) for t in trained)
    played = rg.rollout(run.config, env="raygym/Arithmetic-v0", tasks=3, samples=2, quiet=True)
    assert len(played) == len(list(played)) == 6
    assert {t.task.env for t in played} == {"raygym/Arithmetic-v0"}
    path = played.path
    assert path.is_dir()
    del played
    assert not path.exists()
