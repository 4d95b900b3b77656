"""Fixtures shared by all tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs in a directory of its own, shut down at the end of the session."""
    import ray

    # A short path: Ray puts Unix sockets below it, whose names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rg", ignore_cleanup_errors=True) as directory:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=directory, log_to_driver=False)
        yield
        ray.shutdown()
