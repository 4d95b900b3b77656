"""What else an engine on CPU could be: vLLM by itself with other options and threads, beside what raygym picks.

- `tokens_per_s_default_<n>`: generated tokens a second, <n> requests at once, with the options of a raygym replica.
- `<variant>_over_default_<n>`: the same of a variant, over the default's of the same round.
- `start_s_<variant>`: from the process's start to the end of its first round, imports and warm-up included.
- `logprob_abs_diff_max_<variant>`: the largest difference of a token's logprob from the default's. The learner computes
  in float32, and what it takes for the engine's logprob has to be that: training wants 1e-3 at most.

Each variant has a process of its own; all of them are up, and take turns. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import calibrate, report
from harness.engine_variant import AT_ONCE
from harness.step_process import StepError, StepProcess


@dataclass(frozen=True, slots=True)
class Variant:
    """How an engine differs from a replica's."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's."""
    environment: Mapping[str, str] = field(default_factory=dict)


DEFAULT = "default"
VARIANTS = {
    DEFAULT: Variant(),
    "bfloat16": Variant({"dtype": "bfloat16"}),
    "compiled": Variant({"enforce_eager": False}),
    "one_thread": Variant(environment={"OMP_NUM_THREADS": "1"}),
    "spinning": Variant(environment={"OMP_WAIT_POLICY": "ACTIVE"}),
    "blocks_of_128": Variant({"block_size": 128}),
}


def main() -> None:
    """Start each, take turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of five, and only dtypes and threads")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", nargs="+", choices=[name for name in VARIANTS if name != DEFAULT])
    options = parser.parse_args()
    calibrate()
    names = options.only or (["bfloat16", "one_thread"] if options.quick else [name for name in VARIANTS][1:])
    samples: dict[str, list[float]] = {}
    engines: dict[str, StepProcess] = {}
    expected: list[float] = []
    with ExitStack() as stack:
        try:
            for name in (DEFAULT, *names):
                began = time.monotonic()
                engines[name] = stack.enter_context(process(name, options.model))
                logprobs = engines[name].step()["logprobs"]
                samples[f"start_s_{name}"] = [time.monotonic() - began]
                if name == DEFAULT:
                    expected = logprobs
                else:
                    samples[f"logprob_abs_diff_max_{name}"] = [float(np.abs(np.subtract(logprobs, expected)).max())]
            for _ in range(1 if options.quick else 5):
                add_round({name: engine.step() for name, engine in engines.items()}, samples)
        except StepError as error:
            sys.exit(f"generation: {error}")
    report("generation", samples, config=f"{options.model}, 64 prompt tokens, 32 answer tokens, no prefix cache")


def process(name: str, model: str) -> StepProcess:
    """Of a variant; it begins to load."""
    variant = VARIANTS[name]
    arguments = [model, json.dumps(dict(variant.options))]
    return StepProcess(Path(sys.executable), "harness.engine_variant", arguments, {**os.environ, **variant.environment})


def add_round(answers: Mapping[str, Mapping[str, Any]], samples: dict[str, list[float]]) -> None:
    """The default's speeds, and the ratios of the others."""
    for at_once in map(str, AT_ONCE):
        speeds = {name: answer["tokens_per_s"][at_once] for name, answer in answers.items()}
        samples.setdefault(f"tokens_per_s_{DEFAULT}_{at_once}", []).append(speeds[DEFAULT])
        for name, speed in speeds.items():
            if name != DEFAULT:
                samples.setdefault(f"{name}_over_default_{at_once}", []).append(speed / speeds[DEFAULT])


if __name__ == "__main__":
    main()
