"""Bad input at the command line: exit code 2 and one line that names the key, never a traceback."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import raygym
from raygym.cli import main
from raygym.config import RunConfig

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.lrr=1"], ["learner.lrr", "unknown key", "lr"]),
        (["steps=soon"], ["steps", "integer", "'soon'"]),
        (["learner.num_learners=3"], ["learner.num_learners", "divisor of 16"]),
        (["policy.model=/no/such/dir"], ["policy.model", "/no/such/dir"]),
        (["policy.model=tinny"], ["policy.model", "tinny", "smollm2-135m-instruct"]),
        (["envs.0.id=raygym/NumberGues-v0"], ["envs.0", "raygym/NumberGues-v0", "raygym/NumberGuess-v0"]),
        (["envs.0.kwargs.hihg=3"], ["envs.0", "kwargs", "hihg"]),
        (["policy.vllm.max_modellen=512"], ["policy.vllm.max_modellen", "max_model_len"]),
        (["policy.vllm.max_model_len=long"], ["policy.vllm.max_model_len", "integer", "'long'"]),
        (["policy.simulated.turn_latency=1"], ["policy.simulated.turn_latency", "turn_latency_s"]),
        (["policy.simulated.error_rate=2"], ["policy.simulated.error_rate", "less than or equal to 1"]),
        (["envs.0.id=no_such_module:Env"], ["envs.0", "no_such_module"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", TINY, *overrides]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    for word in words:
        assert word in output.err


@pytest.mark.parametrize("flags", [[], ["--fresh"], ["--allow-config-change", "steps=2"]])
def test_train_says_how_to_treat_an_earlier_run(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    runs = SimpleNamespace(train=lambda config, model_dir, **options: seen.append(options))
    monkeypatch.setitem(sys.modules, "raygym.actors.runs", runs)  # type: ignore[arg-type]
    assert main(["train", TINY, *flags]) == 0
    (options,) = seen
    assert options["fresh"] == ("--fresh" in flags)
    assert options["allow_config_change"] == ("--allow-config-change" in flags)


def test_a_run_that_fails_names_its_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: RunConfig, model_dir: str, **options: Any) -> None:
        error = RuntimeError("no GPU")
        error.add_note("what it printed is in runs/x/logs/driver.log")
        raise error

    runs = SimpleNamespace(train=train, cause=str, kept_logs=lambda: None)
    monkeypatch.setitem(sys.modules, "raygym.actors.runs", runs)  # type: ignore[arg-type]
    assert main(["train", TINY]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["raygym: train failed: no GPU", "raygym: what it printed is in runs/x/logs/driver.log"]


def test_a_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["config"],
        ["train", TINY, "--samples=3"],
        ["rollout", TINY, "--samples=0"],
        ["rollout", TINY, "--tasks", "all"],
        ["rollout", TINY, "--split", "test"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: raygym" in capsys.readouterr().err


def test_a_good_config_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", TINY, "learner.lr=2e-6"]) == 0
    output = capsys.readouterr().out
    assert "lr: 2.0e-06" in output
    assert "max_replaced_groups: 16" in output


@pytest.mark.parametrize("command", [["config", "check", TINY], ["doctor", "--quick"], ["train", "--help"]])
def test_what_nobody_reads_ends_without_a_word(command: list[str]) -> None:
    words = [sys.executable, "-m", "raygym", *command]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout and run.stderr
    run.stdout.close()
    assert (run.stderr.read(), run.wait(60)) in (("", 141), ("", 0))
    run.stderr.close()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"raygym {raygym.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--temperature=-1"], "validation.temperature"), (["--tasks", "3", "learner.lrr=1", "--fresh"], "learner.lrr")],
)
def test_options_and_overrides_of_a_rollout_mix(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", TINY, *arguments]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.ray
def test_a_port_in_use_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["train", TINY, f"policy.http.port={port}", f"runs_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "policy.http.port" in error
    assert str(port) in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.vllm.enable_chunked_prefill=true", ["policy.vllm.enable_chunked_prefill", "must be false on CPU"]),
    ],
)
def test_engine_options_that_cannot_work_are_told_before_anything_starts(
    override: str, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", TINY, override, f"runs_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert list(tmp_path.iterdir()) == []
