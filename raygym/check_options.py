"""Options of `raygym config check`; apart from the command itself, whose imports take a second."""

from __future__ import annotations

from typing import Any

from raygym.argument_types import above_zero, at_least_one
from raygym.roofline import H100


def add_options(parser: Any) -> None:
    """The command's own options."""
    parser.add_argument("--strict", action="store_true", help="download as a run would, refuse what is not here")
    assumed = parser.add_argument_group("what is assumed; by default nodes of eight H100")

    def of_cluster(option: str, default: float, metavar: str, text: str) -> None:
        assumed.add_argument(option, type=above_zero, default=default, metavar=metavar, help=f"{text} ({default:g})")

    assumed.add_argument("--gpus-per-node", type=at_least_one, default=8, metavar="N", help="of a node (8)")
    of_cluster("--gpu-memory-gib", 80.0, "GIB", "memory of a GPU")
    of_cluster("--gpu-tflops", H100.flops / 1e12, "T", "dense, in bf16")
    of_cluster("--gpu-tb-per-s", H100.bytes_per_s / 1e12, "T", "bandwidth of its memory")
    of_cluster("--mfu", H100.training_share, "SHARE", "of the FLOP/s, reached by a learner")
    of_cluster("--sync-gib-per-s", 1.0, "GIB", "at which weights are broadcast")

    def of_episodes(option: str, what: str, parse: Any = at_least_one) -> None:
        assumed.add_argument(option, type=parse, metavar="N", help=what)

    of_episodes("--prompt-tokens", "of an episode's first prompt (512)")
    of_episodes("--turns", "of an episode (as many as may be)")
    of_episodes("--tokens-per-turn", "the mean (half of what may be)")
    of_episodes("--observation-tokens", "of each (a quarter of the prompt)")
    of_episodes("--env-seconds", "of an environment's step (0.05)", above_zero)
