"""Learning curves at `rollout.max_staleness` 0, 1 and 4, and at 4 without any correction for stale tokens.

Whole runs of `raygym train`, with real engine and learner: `tiny` learns to answer in vowels, SmolLM2 plays the
demo's game. Each setting has the same tasks and seeds. Reported are, over the seeds, the last validation reward
(`final_*`), the mean over the curve without its start (`curve_*`), and the seconds of a step (`step_s_*`); and by how
much a setting's last reward is below that of 0, in spreads of the seeds (`reward_lost_in_spreads_*`: up to 1 is noise).
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from harness import calibrate, report

ROOT = Path(__file__).resolve().parent.parent
FRESH = "stale_0"
LEAST_SPREAD = 0.01
"""Of rewards of 0 to 1, where all seeds end alike."""
SETTINGS: dict[str, Sequence[str]] = {
    "stale_0": ("rollout.max_staleness=0",),
    "stale_1": ("rollout.max_staleness=1",),
    "stale_4": ("rollout.max_staleness=4",),
    # REINFORCE takes no notice of the policy that sampled.
    "stale_4_uncorrected": (
        "rollout.max_staleness=4",
        "learner.loss=reinforce",
        "learner.decoupled=false",
        "learner.correction=none",
    ),
}
TINY = (
    "configs/tiny.yaml",
    "envs=[{id: 'harness.vowels:Vowels'}]",
    "rollout={groups_per_step: 8, group_size: 8, max_turns: 1, max_tokens_per_turn: 12, max_concurrent: 64}",
    "learner.lr=1e-3",
    "steps=25",
    "validation={tasks: 32, every: 3, temperature: 1.0}",
)
SMOLLM2 = ("configs/demo.yaml", "validation.every=2")


def main() -> None:
    """Run each setting with each seed and print what they reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, one seed, 10 steps, staleness 0 and 4")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", help="more overrides of the run config")
    options = parser.parse_args()
    calibrate()
    base = [*(TINY if options.model == "tiny" else SMOLLM2), *options.overrides]
    settings, seeds = list(options.settings), options.seeds
    if options.quick:
        settings, seeds = ["stale_0", "stale_4"], 1
        base += ["steps=10"]
    curves: dict[str, list[dict[int, float]]] = {setting: [] for setting in settings}
    samples: dict[str, list[float]] = {}
    # Seed by seed, so that a change of the machine's load falls on all settings.
    for seed in range(seeds):
        for setting in settings:
            rows = run([*base, *SETTINGS[setting], f"seed={seed}"])
            curve = {row["step"]: row["val/reward"] for row in rows if "val/reward" in row}
            curves[setting].append(curve)
            found = {
                "final": curve[max(curve)],
                "curve": fmean(reward for step, reward in curve.items() if step > 0),
                "step_s": median(row["time/step_s"] for row in rows if "time/step_s" in row),
                "stalest": max(row["policy/staleness_max"] for row in rows if "policy/staleness_max" in row),
            }
            for name, value in found.items():
                samples.setdefault(f"{name}_{setting}", []).append(value)
            print(f"{setting}, seed {seed}: {found}", file=sys.stderr, flush=True)
    samples |= lost_in_spreads(samples)
    report("staleness", samples, config=" ".join(base), seeds=seeds, validation_reward=curves)


def lost_in_spreads(samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """How far each setting's median of `final_*` is below that without stale tokens, over the larger of their spreads.

    A spread is the largest of the seeds minus the smallest. Nothing is told of one seed.
    """
    fresh = samples.get(f"final_{FRESH}", ())
    found = {}
    for setting in SETTINGS:
        stale = samples.get(f"final_{setting}", ())
        if setting != FRESH and min(len(fresh), len(stale)) > 1:
            spread = max(LEAST_SPREAD, *(max(rewards) - min(rewards) for rewards in (fresh, stale)))
            found[f"reward_lost_in_spreads_{setting}"] = [(median(fresh) - median(stale)) / spread]
    return found


def run(arguments: Sequence[str]) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of one run, on a cluster of its own; it ends with this process."""
    paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runs:
        command = [sys.executable, "-m", "raygym.owned_command", "train", *arguments, f"runs_dir={runs}", "name=run"]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as process:
            # Not `communicate` or `run`, which close the pipe at once, and with it the run.
            status = process.wait()
        if status:
            sys.exit(f"staleness: {' '.join(command)} ended with exit status {status}")
        text = (Path(runs) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    main()
