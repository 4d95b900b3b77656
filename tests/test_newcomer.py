"""What somebody does who has just found this: clone, `make demo`, look at it, write an environment. Timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from doc_blocks import ALL
from tiers import only_long

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2 * 3600), only_long]
ROOT = Path(__file__).parent.parent


class Newcomer:
    """Their folder, and how long each thing took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.took: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.took[what] = time.monotonic() - began

    def run(self, what: str, *command: str, timeout_s: float) -> str:
        hidden = {"RAY_ADDRESS", "PYTHONPATH", "VIRTUAL_ENV"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        with self.timed(what):
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        assert done.returncode == 0, f"{what}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


def test_from_nothing_to_an_environment_of_ones_own(tmp_path: Path) -> None:
    there = Newcomer(tmp_path)
    there.run("clone", "git", "clone", "--quiet", str(ROOT), "raygym", timeout_s=300)
    there.folder = tmp_path / "raygym"
    there.run("set-up", "make", "setup", timeout_s=1800)
    there.run("make demo", "make", "demo", timeout_s=3600)
    summary = json.loads((there.folder / "runs/demo/summary.json").read_text(encoding="utf-8"))
    first, *_, last = summary["validation_reward"].values()
    assert last > first, summary

    raygym = str(there.folder / ".venv/bin/raygym")
    with there.timed("raygym view: first page"):
        page = first_page([raygym, "view", "runs/demo", "--port", "0"], there.folder)
    assert "<html" in page

    for block in ALL:
        if block.page.name == "README.md" and block.file:
            (there.folder / block.file).write_text(block.text, encoding="utf-8")
    there.run("raygym env check", raygym, "env", "check", "my_env:Guess", timeout_s=300)
    there.run("a run of one's own, two steps", raygym, "train", "guess.yaml", "steps=2", timeout_s=1800)
    rows = (there.folder / "runs/guess/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[-1])["episodes/completed"] == 48

    total = sum(there.took.values())
    print(*(f"{seconds:8.1f} s  {what}" for what, seconds in (there.took | {"in all": total}).items()), sep="\n")


def first_page(command: list[str], folder: Path) -> str:
    """Start `raygym view`, read its page once, and end it."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                with urllib.request.urlopen(found[0], timeout=30) as answer:
                    return str(answer.read().decode())
        raise AssertionError("raygym view ended without an address")
    finally:
        process.terminate()
        process.wait(timeout=30)
