"""Options of `raygym config check`; apart from the command itself, whose imports take a second."""

from __future__ import annotations

from typing import Any

from raygym.argument_types import above_zero, at_least_one
from raygym.roofline import H100


def add_options(parser: Any) -> None:
    """The command's own options."""
    parser.add_argument("--strict", action="store_true", help="as a run would: download, and refuse what is not here")
    cluster = parser.add_argument_group("the cluster (defaults: nodes of eight H100)")

    def of_cluster(option: str, default: float, metavar: str, text: str) -> None:
        cluster.add_argument(option, type=above_zero, default=default, metavar=metavar, help=f"{text} ({default:g})")

    cluster.add_argument("--gpus-per-node", type=at_least_one, default=8, metavar="N")
    of_cluster("--gpu-memory-gib", 80.0, "GIB", "memory of a GPU")
    of_cluster("--gpu-tflops", H100.flops / 1e12, "T", "dense, in bf16")
    of_cluster("--gpu-tb-per-s", H100.bytes_per_s / 1e12, "T", "bandwidth of its memory")
    of_cluster("--mfu", H100.training_share, "SHARE", "of the FLOP/s, reached by a learner")
    of_cluster("--sync-gib-per-s", 1.0, "GIB", "at which weights are broadcast")
    load = parser.add_argument_group("what is assumed of episodes")

    def of_load(option: str, what: str, parse: Any = at_least_one) -> None:
        load.add_argument(option, type=parse, metavar="N", help=f"default: {what}")

    of_load("--prompt-tokens", "512")
    of_load("--turns", "as many as may be")
    of_load("--tokens-per-turn", "half of what may be; the mean")
    of_load("--observation-tokens", "a quarter of the prompt")
    of_load("--env-seconds", "0.05, of an environment's step", above_zero)
