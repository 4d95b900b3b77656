"""Where the time of whole runs goes: `raygym train` in processes of its own, settings in turn in each repetition.

- `first_line_s_demo`, `ready_s_demo`, `first_token_s_demo`, `first_step_s_demo`, and the same of tiny: start-up, in
  seconds from the start of the process to its first line, to engines and learners that are ready, to the first token,
  and to the end of the first step. `start_s` is "ready" of tiny.
- `share_generate_smollm2`, `share_learn_smollm2`, `share_sync_smollm2`, `share_rest_smollm2`: parts of a step of
  the demo, as it is, without validations.
- `async_over_sync_real_tiny`, `async_over_sync_real_smollm2`: steps a second with `rollout.max_staleness` 1 over those
  with 0, same tasks and seeds, real vLLM and DeepSpeed; a step's time is from one step's end to the next one's.
- `async_over_sync_simulated`, `async_share_of_ideal_simulated`: the same with the **simulated** engine, whose time is
  continuous batching at a GPU's pace, so that generating leaves the processor to the learner (tiny), and takes a little
  longer than learning. The second is the ideal's time (`harness/step_times.py: ideal_step_s`) over the asynchronous
  step's. `.._simulated_fast`: with an engine so fast that the learner is what is waited for.
- `logging_share_of_step`: of a step of the demo, what writing it down takes the trainer (`time/log_s`: metrics.jsonl,
  ledger, trajectories with the learner's logprobs, TensorBoard, Ray's metrics, console), and what drawing the live view
  of a terminal takes of a core. `logging_share_of_step_tiny`: the same of tiny, whose steps are short.

`async_share_of_ideal` and `start_to_first_token_s` are those of `simulated` and of the demo, and `async_over_sync_real`
is the worse of what was measured with the real engine (`PLAIN_NAMES`).

Where two settings are compared, an entropy bonus of nearly nothing has every sequence computed: without it, how much a
step learns from depends on its rewards. The first steps of each run are its warm-up. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from harness import calibrate, report
from harness.step_times import (
    PARTS,
    BrokenRows,
    ideal_step_s,
    logging_share,
    require_stale,
    shares,
    step_s,
    total,
    warm,
)
from harness.train_run import RunFailed, TrainRun, override, train
from harness.view_cost import view_share
from harness.worst import worst

TINY, DEMO = "configs/tiny.yaml", "configs/demo.yaml"
PLAIN = ("validation.tasks=0", "checkpoint.every=0", "checkpoint.save_final=false")
EQUAL_WORK = "learner.entropy_coef=1e-6"
# The pace of a GPU with a model of some billions of parameters: 15 ms a token of a small batch, 200 tokens of a prompt
# in 6 ms. With it an episode takes about as long as the tiny policy learns from a step on two cores.
GPU_STEP_S = 0.015
# Several times as fast, so that the learner is what is waited for.
FAST_STEP_S = 0.004
ROLLOUT = {"groups_per_step": 12, "group_size": 8, "max_turns": 4, "max_tokens_per_turn": 16, "max_concurrent": 96}
BIG_TINY = (TINY, "rollout.groups_per_step=8", "rollout.group_size=8", "rollout.max_concurrent=64", EQUAL_WORK)


def simulated_config(step_s: float) -> tuple[str, ...]:
    """The arguments of a run with the simulated engine. `step_s`: seconds of an engine's step that makes one token."""
    batching = {"step_s": step_s, "request_s": 0.0001, "prefill_token_s": 0.00003}
    engine = override("policy.simulated", {"max_model_len": 1024, "max_token_id": 120, "batching": batching})
    return TINY, "policy.engine=simulated", engine, override("rollout", ROLLOUT), EQUAL_WORK


WARM_UP = {"simulated": 3, "tiny": 3, "smollm2": 1}


def main() -> None:
    """Measure, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one repetition of short runs, SmolLM2 synchronous only, one simulated pace",
    )
    parser.add_argument("--repetitions", type=int, default=None, help="by default 2, with --quick 1")
    parser.add_argument("--only", nargs="+", choices=tuple(MEASUREMENTS))
    options = parser.parse_args()
    calibrate()
    names = options.only or [name for name in MEASUREMENTS if not (options.quick and name in NOT_QUICK)]
    samples: dict[str, list[float]] = {}
    load = [os.getloadavg()[0]]
    for _ in range(options.repetitions or (1 if options.quick else 2)):
        for name in names:
            try:
                found = MEASUREMENTS[name](options.quick)
            except (RunFailed, BrokenRows) as error:
                sys.exit(f"end_to_end: {name}: {error}")
            print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), file=sys.stderr)
            for key, value in found.items():
                samples.setdefault(key, []).append(value)
            load.append(os.getloadavg()[0])
    config = {
        "simulated": " ".join(simulated_config(GPU_STEP_S)),
        "tiny": " ".join(BIG_TINY),
        "smollm2": DEMO,
        "all": " ".join(PLAIN),
    }
    samples |= plain_names(samples)
    report("end_to_end", samples, config=config, warm_up_steps=WARM_UP, load_average=load)


PLAIN_NAMES = {
    "async_share_of_ideal": "async_share_of_ideal_simulated",
    "start_to_first_token_s": "first_token_s_demo",
}
REAL = ("async_over_sync_real_tiny", "async_over_sync_real_smollm2")


def plain_names(samples: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """What tools look for by a name that says nothing of the model: of what was measured."""
    found = {plain: samples[name] for plain, name in PLAIN_NAMES.items() if name in samples}
    if samples.keys() & set(REAL):
        found["async_over_sync_real"] = worst(samples, REAL)
    return found


def demo(quick: bool) -> dict[str, float]:
    """Start-up, time split and logging of the demo as it is."""
    run = train([DEMO, *PLAIN, f"steps={3 if quick else 4}"])
    rows = warm(run.rows, WARM_UP["smollm2"])
    found = {f"share_{part}_smollm2": share for part, share in shares(rows).items()}
    return found | start_up(run, "demo") | logging(run, "smollm2", "")


def tiny(quick: bool) -> dict[str, float]:
    """Synchronous against asynchronous with the real engine, and start-up and logging of the first of them."""
    synchronous, asynchronous = pair(BIG_TINY, 12 if quick else 40)
    found = compared(synchronous, asynchronous, "tiny", "real_tiny")
    started = start_up(synchronous, "tiny")
    return {"start_s": started.pop("ready_s_tiny")} | started | found | logging(synchronous, "tiny", "_tiny")


def smollm2(quick: bool) -> dict[str, float]:
    """Synchronous against asynchronous with the demo's policy and engine."""
    return compared(*pair((DEMO, EQUAL_WORK), 4), "smollm2", "real_smollm2")


def simulated(quick: bool) -> dict[str, float]:
    """Synchronous against asynchronous against the ideal, where generating takes about as long as learning."""
    return compared(*pair(simulated_config(GPU_STEP_S), 11 if quick else 50), "simulated", "simulated")


def simulated_fast(quick: bool) -> dict[str, float]:
    """The same where learning takes longer."""
    return compared(*pair(simulated_config(FAST_STEP_S), 20 if quick else 50), "simulated", "simulated_fast")


MEASUREMENTS = {
    "demo": demo,
    "tiny": tiny,
    "simulated": simulated,
    "simulated_fast": simulated_fast,
    "smollm2": smollm2,
}
NOT_QUICK = ("simulated_fast", "smollm2")


def pair(arguments: Sequence[str], steps: int) -> tuple[TrainRun, TrainRun]:
    """The same run with `max_staleness` 0 and 1."""
    runs = [train([*arguments, *PLAIN, f"steps={steps}", f"rollout.max_staleness={stale}"]) for stale in (0, 1)]
    return runs[0], runs[1]


def compared(synchronous: TrainRun, asynchronous: TrainRun, model: str, name: str) -> dict[str, float]:
    """Both runs' steps, their ratio, and the ideal. Raises BrokenRows."""
    warm_up = WARM_UP[model]
    rows = warm(synchronous.rows, warm_up)
    require_stale(warm(asynchronous.rows, warm_up))
    steps = step_s(synchronous.shown_s, warm_up), step_s(asynchronous.shown_s, warm_up)
    alone = {f"{part}_s_sync_{name}": total(rows, f"time/{part}_s") / len(rows) for part in PARTS}
    return {
        f"async_over_sync_{name}": steps[0] / steps[1],
        f"async_share_of_ideal_{name}": ideal_step_s(rows) / steps[1],
        f"step_s_sync_{name}": steps[0],
        f"step_s_async_{name}": steps[1],
        **alone,
    }


def start_up(run: TrainRun, name: str) -> dict[str, float]:
    """Seconds since the process was started."""
    return {
        f"first_line_s_{name}": run.first_line_s,
        f"ready_s_{name}": run.ready_s,
        f"first_token_s_{name}": run.first_token_s,
        f"first_step_s_{name}": run.first_step_s,
    }


def logging(run: TrainRun, model: str, suffix: str) -> dict[str, float]:
    """What logging takes of a step, with the view of a terminal and without. Raises BrokenRows."""
    warm_up = WARM_UP[model]
    files, view = logging_share(warm(run.rows, warm_up), step_s(run.shown_s, warm_up)), view_share(run.rows)
    return {
        f"logging_share_of_step{suffix}": files + view,
        f"files_share_of_step{suffix}": files,
        f"view_share_of_core{suffix}": view,
    }


if __name__ == "__main__":
    main()
