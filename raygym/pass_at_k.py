"""pass@k: how likely is it that at least one of k attempts at a task succeeds?"""

from __future__ import annotations

from math import comb


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The unbiased estimate from `samples` attempts, `successes` of which succeeded (Chen et al., 2021, "Evaluating
    Large Language Models Trained on Code", equation 1): 1 - C(n - c, k) / C(n, k).

    That is the share of all choices of k attempts that hold a success.
    """
    assert 0 <= successes <= samples, (successes, samples)
    assert 1 <= k <= samples, (k, samples)
    return 1.0 - comb(samples - successes, k) / comb(samples, k)


def ks(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, and `samples` itself."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples]
