"""vLLM by itself with other options, in a process of its own: `python -m harness.engine_variant MODEL OPTIONS`.

Each step is one round at each number of requests; the first one's answer also has logprobs of fixed tokens.
"""

from __future__ import annotations

import json
import sys

from harness.bare_engine import BareEngine
from harness.step_server import StepServer

AT_ONCE = (1, 8, 32)


def main() -> None:
    """Start the engine, then a round whenever it is asked for."""
    server, (model, options) = StepServer(), sys.argv[1:]
    engine = BareEngine(model, json.loads(options))
    logprobs = engine.logprobs()
    for at_once in AT_ONCE:
        engine.tokens_per_s(at_once)
    while True:
        server.wait()
        speeds = {str(at_once): engine.tokens_per_s(at_once) for at_once in AT_ONCE}
        server.answer(tokens_per_s=speeds, logprobs=logprobs)


if __name__ == "__main__":
    main()
