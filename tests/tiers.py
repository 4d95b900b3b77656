"""How much of the costly tests runs: a part in `make test`, all of it in `make test-long`."""

import os

import pytest

LONG = os.environ.get("RAYGYM_LONG") == "1"
only_long = pytest.mark.skipif(not LONG, reason="runs in `make test-long`")


def examples(few: int, many: int) -> int:
    """How many cases of a property are tried: a part in `make test`, all of them in `make test-long`."""
    return many if LONG else few
