"""Write requirements/cpu.txt from a pip report, without the packages that must not be installed beside the CPU build.

    pip install --dry-run --ignore-installed --report report.json \
        ".[cpu,dev]" torch==2.13.0+cpu setuptools==78.1.1 wheel
    .venv/bin/python tools/lock.py report.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "cpu.txt"
# The reasons are in the header of the lock.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python"}


def reachable(report: dict[str, Any]) -> list[str]:
    """`name==version` of everything that the requested packages need once LEFT_OUT is not followed."""
    packages: dict[str, Any] = {canonicalize_name(item["metadata"]["name"]): item for item in report["install"]}
    extras: dict[str, set[str]] = {}
    queue = [(name, set(item.get("requested_extras", []))) for name, item in packages.items() if item["requested"]]
    while queue:
        name, wanted = queue.pop()
        if name in LEFT_OUT or name not in packages or (name in extras and wanted <= extras[name]):
            continue
        extras.setdefault(name, set()).update(wanted)
        needs = packages[name]["metadata"].get("requires_dist", [])
        queue += [(canonicalize_name(need.name), set(need.extras)) for need in _active(needs, extras[name])]
    found = [packages[name]["metadata"] for name in sorted(extras) if name != "raygym"]
    return [f"{metadata['name']}=={metadata['version']}" for metadata in found]


def _active(requirements: Iterable[str], extras: set[str]) -> Iterable[Requirement]:
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield requirement


def main(report: str) -> None:
    """Replace the pins of the lock and keep its header."""
    header = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    pins = reachable(json.loads(Path(report).read_text()))
    LOCK.write_text("\n".join([*header, *pins]) + "\n")
    print(f"{LOCK}: {len(pins)} packages")


if __name__ == "__main__":
    main(sys.argv[1])
