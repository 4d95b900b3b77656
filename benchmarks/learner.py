"""raygym's learner beside TRL's GRPOTrainer: trained tokens a second, memory, padding, and that both compute the same.

Both get the same rollouts (`harness.learn_workloads`), model, hyper-parameters and number of threads, fp32, no KL term,
each in a process of its own. They make their steps in turns, each from loss to AdamW; generation is no part of it. The
first step of each is a warm-up, and what is compared: loss and gradient norm. A ratio is of two steps that followed
each other; `tokens_per_cpu_s_over_trl` is the same by processor time, which other work on the machine disturbs less.

What is not equal: raygym has its defaults. TRL has the best of several micro-batches (`TRL_ROWS`, tried in the same
run), and gradient checkpointing turned off; `equal_checkpointed` is with it on and 8 rows, TRL's defaults. On CPU, TRL
runs its output head over prompts too; where it has Triton it does not.

TRL lives in a Python of its own: `make trl` first. Without it the benchmark says so and succeeds. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import calibrate, report, report_skipped
from harness.learn_rollouts import Rollouts
from harness.learn_settings import LearnSettings
from harness.learn_workloads import Workload, make_rollouts
from harness.step_process import StepProcess

from raygym.models import resolve_policy
from raygym.nemo_gym.interpreter import clean_environment

TRL_PYTHON = Path(__file__).resolve().parent.parent / ".venv-trl" / "bin" / "python"
TRL_ROWS = (4, 8, 16)
MODEL, QUICK_MODEL = "smollm2-135m-instruct", "tiny"
WORKLOADS = {
    "equal": Workload(groups=2, group_size=8, prompt_tokens=64, completion_tokens=192),
    "lognormal": Workload(groups=2, group_size=8, prompt_tokens=64, completion_tokens=96, sigma=1.0, longest=512),
    "shared_prompt": Workload(groups=1, group_size=8, prompt_tokens=512, completion_tokens=64),
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "token_mean": {},
    "clip_higher": {"clip_high": 0.28},
    "sequence_mean": {"loss_mean": "sequence"},
    "dr_grpo": {"advantage": "dr_grpo", "loss_mean": "constant", "loss_length": 128},
    "dual_clip": {"dual_clip": 1.5},
    "gspo": {"loss": "gspo", "loss_mean": "sequence", "clip_low": 0.01, "clip_high": 0.01},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.2},
    "kl": {"kl_coef": 0.1},
}
"""What both have. `kl` shows from the second step on, since the first is made with the reference's own weights."""
QUICK_SETTINGS = ("token_mean", "gspo", "kl")
ADVANTAGES_DIFFER = 1e-4


@dataclass(frozen=True)
class Run:
    """What the command line says."""

    model_dir: Path
    folder: Path
    repetitions: int
    trl_rows: tuple[int, ...]
    learner: dict[str, Any]
    profile: bool
    settings: Sequence[str] = tuple(SETTINGS)


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the tiny model, one repetition, no search of micro-batches, three settings",
    )
    parser.add_argument("--only", nargs="+", default=[], choices=list(MEASUREMENTS), help="names of measurements")
    parser.add_argument(
        "--trl-rows", nargs="+", type=int, default=[], help="sequences of TRL's micro-batches, to be tried"
    )
    parser.add_argument("--learner", type=json.loads, default={}, help="JSON: keys of `learner` to have other values")
    parser.add_argument("--repetitions", type=int, default=0, help="timed steps of each (default: 3, quick: 1)")
    parser.add_argument("--profile", action="store_true", help="one more step of each, its operators to standard error")
    options = parser.parse_args()
    if not TRL_PYTHON.exists():
        report_skipped("learner", "TRL is not prepared here; run `make trl` once")
        return
    calibrate()
    model = QUICK_MODEL if options.quick else MODEL
    with tempfile.TemporaryDirectory(prefix="raygym-learner-") as folder:
        run = Run(
            model_dir=resolve_policy(model),
            folder=Path(folder),
            repetitions=options.repetitions or (1 if options.quick else 3),
            trl_rows=tuple(options.trl_rows) or ((8,) if options.quick else TRL_ROWS),
            learner=options.learner,
            profile=options.profile,
            settings=QUICK_SETTINGS if options.quick else tuple(SETTINGS),
        )
        samples: dict[str, list[float]] = {}
        for name in options.only or [name for name in MEASUREMENTS if not (options.quick and name in NOT_QUICK)]:
            samples |= MEASUREMENTS[name](run)
    config = f"{model}, fp32, {threads()} threads, TRL 1.16.0"
    if options.learner:
        config += f", learner {json.dumps(options.learner)}"
    report("learner", samples | totals(samples), config=config)


def workload(run: Run, name: str) -> dict[str, list[float]]:
    """One distribution of lengths."""
    rollouts = make_rollouts(WORKLOADS[name], run.model_dir)
    settings = saved(run, rollouts)
    samples: dict[str, list[float]] = {}
    rows = run.trl_rows
    if len(rows) > 1:
        seconds = {r: trl_alone(replace(settings, trl_rows=r)) for r in rows if r <= len(rollouts.rewards)}
        rows = (min(seconds, key=lambda r: seconds[r]),)
        samples |= {f"trl_seconds_{name}_{r}_rows": [value] for r, value in seconds.items()}
    settings = replace(settings, trl_rows=rows[0])
    return samples | {f"trl_rows_{name}": [rows[0]]} | beside(run, name, settings, rollouts)


def equal_checkpointed(run: Run) -> dict[str, list[float]]:
    """Equal lengths, with TRL as it is unless told otherwise."""
    rollouts = make_rollouts(WORKLOADS["equal"], run.model_dir)
    settings = replace(saved(run, rollouts), trl_rows=8, trl_checkpointing=True)
    return beside(run, "equal_checkpointed", settings, rollouts)


def common_settings(run: Run) -> dict[str, list[float]]:
    """Loss and gradient norm of two steps with each setting, on the tiny model, logits at another temperature."""
    samples: dict[str, list[float]] = {}
    run = replace(run, model_dir=resolve_policy(QUICK_MODEL))
    lengths = Workload(groups=2, group_size=8, prompt_tokens=16, completion_tokens=32, sigma=0.7, longest=128)
    for name in run.settings:
        changes = SETTINGS[name]
        rollouts = make_rollouts(
            lengths,
            run.model_dir,
            temperature=0.8,
            noise=0.3,
            bounds=(0.8, 1.2, 1.28, 1.5),
            # What is not divided by a deviation stays about 1.
            largest_reward=1.0 if "advantage" in changes else 1000.0,
        )
        settings = replace(saved(run, rollouts), temperature=0.8, lr=1e-4, **changes)
        with trl(settings) as theirs, ours(settings) as own:
            for step in range(2):
                add(samples, differences(f"setting_{name}", own.step(), theirs.step(), step=step))
    return samples


MEASUREMENTS: Mapping[str, Callable[[Run], dict[str, list[float]]]] = {
    **{name: partial(workload, name=name) for name in WORKLOADS},
    "equal_checkpointed": equal_checkpointed,
    "settings": common_settings,
}
NOT_QUICK = ("equal_checkpointed",)


def beside(run: Run, name: str, settings: LearnSettings, rollouts: Rollouts) -> dict[str, list[float]]:
    """Both in turns, after a first step that is compared."""
    samples: dict[str, list[float]] = {}
    with trl(settings) as theirs, ours(settings) as own:
        add(samples, differences(name, own.step(), theirs.step()))
        for _ in range(run.repetitions):
            their, our = theirs.step(), own.step()
            tokens = rollouts.trained_tokens
            values = {
                "tokens_over_trl": their["seconds"] / our["seconds"],
                "tokens_per_cpu_s_over_trl": their["cpu_seconds"] / our["cpu_seconds"],
                "tokens_per_s": tokens / our["seconds"],
                "tokens_per_s_trl": tokens / their["seconds"],
                "peak_memory_mib": our["peak_mib"],
                "peak_memory_mib_trl": their["peak_mib"],
                "padding_fraction": our["padding_fraction"],
                "padding_fraction_trl": trl_padding(rollouts),
                "clip_fraction": our["clip_fraction"],
            }
            add(samples, {f"{key}_{name}": value for key, value in values.items()})
        if run.profile:
            for process, who in ((theirs, "TRL"), (own, "raygym")):
                print(f"{name}, {who}\n{process.step('profile')['operators']}", file=sys.stderr)
    return samples


def differences(name: str, our: Mapping[str, Any], their: Mapping[str, Any], step: int = 0) -> dict[str, float]:
    """What two answers of the same step differ by, each named for what it is of."""
    apart = float(np.abs(np.subtract(our["advantages"], their["advantages"])).max())
    assert apart < ADVANTAGES_DIFFER, f"{name}: advantages are up to {apart} apart, so nothing can be compared"
    norms = our["grad_norm"], their["grad_norm"]
    return {
        f"loss_abs_diff_trl_{name}": abs(our["loss"] - their["loss"]),
        f"grad_norm_rel_diff_trl_{name}": abs(norms[0] - norms[1]) / norms[1],
        f"grad_norm_abs_diff_trl_{name}": abs(norms[0] - norms[1]),
        f"loss_trl_{name}_{step}": their["loss"],
        f"grad_norm_trl_{name}_{step}": norms[1],
    }


def totals(samples: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The worst of all that was measured."""
    found = {}
    for total, prefix in {
        "padding_fraction_max": "padding_fraction_",
        "loss_abs_diff_trl": "loss_abs_diff_trl_",
        "grad_norm_rel_diff_trl": "grad_norm_rel_diff_trl_",
        "grad_norm_abs_diff_trl": "grad_norm_abs_diff_trl_",
        "peak_memory_mib": "peak_memory_mib_",
        "peak_memory_mib_trl": "peak_memory_mib_trl_",
    }.items():
        own = [key for key in samples if key.startswith(prefix) and (prefix.endswith("trl_") or "_trl_" not in key)]
        if own:
            found[total] = [max(value for key in own for value in samples[key])]
    return found


def trl_alone(settings: LearnSettings) -> float:
    """Seconds of TRL's second step."""
    with trl(settings) as theirs:
        theirs.step()
        return float(theirs.step()["seconds"])


def trl(settings: LearnSettings) -> StepProcess:
    """TRL's process, which begins to load."""
    return StepProcess(TRL_PYTHON, "harness.trl_side", [settings.as_json()], clean_environment() | thread_limits())


def ours(settings: LearnSettings) -> StepProcess:
    """raygym's process, which begins to load."""
    return StepProcess(
        Path(sys.executable), "harness.learner_side", [settings.as_json()], {**os.environ, **thread_limits()}
    )


def thread_limits() -> dict[str, str]:
    """Of a learner's process."""
    return {"OMP_NUM_THREADS": str(threads())}


def threads() -> int:
    """As many as there are cores."""
    return len(os.sched_getaffinity(0))


def saved(run: Run, rollouts: Rollouts) -> LearnSettings:
    """The settings that all measurements begin from, with the rollouts in a file."""
    path = run.folder / f"rollouts_{len(list(run.folder.iterdir()))}.npz"
    rollouts.save(path)
    return LearnSettings(str(run.model_dir), str(path), threads(), learner=run.learner)


def trl_padding(rollouts: Rollouts) -> float:
    """Of all positions that TRL computes: it pads a step's prompts to the longest, and so its completions."""
    lengths = np.array([(len(p), len(c)) for p, c in zip(rollouts.prompts, rollouts.completions, strict=True)])
    return float(1 - lengths.sum() / (len(lengths) * lengths.max(axis=0).sum()))


def add(samples: dict[str, list[float]], values: Mapping[str, float]) -> None:
    """One more sample of each."""
    for key, value in values.items():
        samples.setdefault(key, []).append(value)


if __name__ == "__main__":
    torch.set_num_threads(threads())
    main()
