"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from ray_head import PATIENCE

# How long a case takes on a busy machine is no property of the code.
hypothesis.settings.register_profile("raygym", deadline=None)
hypothesis.settings.load_profile("raygym")
# Imports make many objects that live on; looking through them again and again takes a tenth of the pure tests.
gc.set_threshold(100_000, 50, 50)
# What a shell starts in the background ignores interrupts, and so would what tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Pure tests compute with tiny tensors: a second thread doubles their processor time and gains nothing.

    Not where Ray is started, whose actors would inherit it.
    """
    if "not ray" in config.option.markexpr:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not ray ..."`, files that hold nothing else are not even imported: that takes seconds."""
    if collection_path.suffix == ".py" and "not ray" in config.option.markexpr:
        return "pytestmark = [pytest.mark.ray" in collection_path.read_text(encoding="utf-8") or None
    return None


_STARTS = 5
_LEAST_TIMEOUT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first starts the cluster in its own time; a deadline here only ends what hangs."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            marker = item.get_closest_marker("timeout")
            if marker is None or marker.args[0] < _LEAST_TIMEOUT_S:
                item.add_marker(pytest.mark.timeout(_LEAST_TIMEOUT_S), append=False)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs in a directory of its own, shut down at the end of the session."""
    import ray

    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    # A short path: Ray puts Unix sockets below it, whose names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rg", ignore_cleanup_errors=True) as directory:
        for start in range(1, _STARTS + 1):
            try:
                ray.init(num_cpus=2, include_dashboard=False, _temp_dir=f"{directory}/{start}", log_to_driver=False)
                break
            except Exception as error:  # Ray has no class for it, and gives its raylet 30 s, whatever it is told
                if "timed out during startup" not in str(error) or start == _STARTS:
                    raise
                ray.shutdown()
        yield
        ray.shutdown()
