"""How long to wait before something that failed is tried again: twice as long each time, up to a bound."""

from __future__ import annotations


class Backoff:
    """Counts failures in a row."""

    def __init__(self, first_s: float, most_s: float) -> None:
        """Wait `first_s` seconds after the first failure and at most `most_s`."""
        self._first_s = first_s
        self._most_s = most_s
        self.failures = 0

    def failed(self) -> None:
        """It failed once more."""
        self.failures += 1

    def succeeded(self) -> None:
        """It works: the next failure is a first one."""
        self.failures = 0

    def wait_s(self) -> float:
        """Seconds to wait now; 0 without a failure."""
        if not self.failures:
            return 0.0
        # The exponent is bounded too: 2.0 ** 2000 does not exist.
        return float(min(self._most_s, self._first_s * 2.0 ** min(self.failures - 1, 60)))
