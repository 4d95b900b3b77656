"""What this machine does at its best: what benchmarks are read beside.

A copy in memory; a broadcast by gloo alone, over TCP on the loopback interface, from one process to another; a call of
a Ray actor and one of a Serve handle, both on this machine, one after another; and tokens a second of vLLM with SmolLM2
by itself, one and eight requests at once. Nothing here is raygym's and nothing is simulated. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from harness import report
from harness.bare_engine import ANSWER, PROMPT, BareEngine
from harness.calibration import memcpy_gib_per_s
from harness.handle_round_trip import handle_round_trips_s
from harness.plain_gloo import PlainGloo
from harness.ray_round_trip import ray_round_trips_s

from raygym.actors import cluster

MODEL = "smollm2-135m-instruct"
_VERSION_BYTES, _BUCKET_BYTES = 2**28, 2**26
_AT_ONCE = (1, 8)


def main() -> None:
    """Measure one after the other, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two repetitions instead of five")
    repetitions = 2 if parser.parse_args().quick else 5
    samples = {"memcpy_gib_per_s": memcpy_gib_per_s()}
    with PlainGloo(2, _VERSION_BYTES, _BUCKET_BYTES) as group:
        group.gib_per_s()  # connects, and touches the memory
        samples["gloo_gib_per_s"] = [group.gib_per_s() for _ in range(repetitions)]
    cluster.connect()
    try:
        samples["ray_call_ms"] = [s * 1000 for s in ray_round_trips_s(repetitions)]
        samples["serve_handle_call_ms"] = [s * 1000 for s in handle_round_trips_s(repetitions)]
    finally:
        cluster.disconnect()
    if find_spec("vllm") is None:
        print("vLLM is not installed here, so its tokens/s are not measured", file=sys.stderr)
    else:
        engine = BareEngine(MODEL)
        for at_once in _AT_ONCE:
            speeds = [engine.tokens_per_s(at_once) for _ in range(repetitions)]
            samples[f"bare_engine_tokens_per_s_{at_once}"] = speeds
    config = f"gloo: {_VERSION_BYTES >> 20} MiB; engine: {MODEL}, {PROMPT} prompt tokens, {ANSWER} answer tokens"
    report("calibrate", samples, config=config, calibration={})


if __name__ == "__main__":
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    main()
