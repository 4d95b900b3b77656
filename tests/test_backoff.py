"""Waits between attempts."""

from raygym.backoff import Backoff


def test_waits_grow_to_their_bound() -> None:
    backoff = Backoff(first_s=0.5, most_s=30.0)
    waits = []
    for _ in range(2000):
        waits.append(backoff.wait_s())
        backoff.failed()
    assert waits[:8] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0] and waits[-1] == 30.0
    backoff.succeeded()
    assert backoff.wait_s() == 0.0
