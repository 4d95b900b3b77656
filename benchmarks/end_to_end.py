"""Where the time of a whole run goes: real engine, real learner, the tiny model. Last line: one JSON object."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from harness import report

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("generate", "learn", "sync", "step")


def main() -> None:
    """Run `raygym train configs/tiny.yaml` a few times and print medians and spreads of its phases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run instead of three")
    repetitions = 1 if parser.parse_args().quick else 3
    samples: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for name, value in one_run().items():
            samples.setdefault(name, []).append(value)
    report("end_to_end", samples, config="configs/tiny.yaml steps=6 validation.tasks=0")


def one_run() -> dict[str, float]:
    """Start-up seconds, and the median seconds of each phase of a step after the first, which warms caches."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "raygym", "train", "configs/tiny.yaml", f"runs_dir={runs}"]
        subprocess.run([*command, "steps=6", "validation.tasks=0"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        run = Path(runs) / "tiny"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
    phases = {f"{phase}_s": median(row[f"time/{phase}_s"] for row in rows[1:]) for phase in PHASES}
    return {"start_s": summary["ready_s"], **phases}


if __name__ == "__main__":
    main()
