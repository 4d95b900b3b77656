"""`python -m raygym.actors.cluster_probe ADDRESS`: which versions a Ray cluster has, and this Python, as JSON."""

from __future__ import annotations

import json
import platform
import sys

import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of a compiled module


def main(address: str) -> None:
    """Ask without joining it, which would refuse other versions by a traceback."""
    known = get_cluster_metadata(GcsClient(address=canonicalize_bootstrap_address_or_die(address)))
    here = {"ray": ray.__version__, "python": platform.python_version()}
    print(json.dumps(here | {"cluster_ray": known["ray_version"], "cluster_python": known["python_version"]}))


if __name__ == "__main__":
    main(sys.argv[1])
