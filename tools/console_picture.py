"""A picture of the console of a run that was made: its rows of metrics.jsonl, shown again as they were shown then.

.venv/bin/python tools/console_picture.py runs/demo docs/images/console.svg --step 8
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

from rich.console import Console

from raygym.config_file import load_config
from raygym.console import RunConsole
from raygym.run_row import parsed_row, scalars


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def replay(run: Path, step: int, console: Console) -> None:
    """Print a run's rows up to `step`, and the view as it was while the next step was made."""
    config = load_config(run / "config.yaml")
    rows = {row.pop("step"): scalars(parsed_row(row)) for row in map(json.loads, (run / "metrics.jsonl").open())}
    clock = _Clock()
    shown = RunConsole(config.steps, console, clock=clock)
    shown.note(f"raygym: {config.name}, {config.policy.model}, {config.steps} steps -> runs/{config.name}")
    shown.start_clock()
    for number in sorted(number for number in rows if number <= step):
        clock.now_s += rows[number].get("time/step_s", 0.0)
        if number:
            shown.step(number, rows[number])
        if "time/validate_s" in rows[number]:
            shown.validation(number, rows[number])
    with shown.doing(f"step {step + 1}"):
        clock.now_s += 1.0
        shown.progress("collecting")
        console.print(shown.view())


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("picture", type=Path, help="an SVG file")
    parser.add_argument("--step", type=int, default=8, help="the last step whose row is shown (default: 8)")
    parser.add_argument("--width", type=int, default=100, help="columns (default: 100)")
    options = parser.parse_args()
    console = Console(
        record=True, width=options.width, height=40, force_terminal=True, file=io.StringIO(), highlight=False
    )
    replay(options.run, options.step, console)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    picture = console.export_svg(title=f"raygym train {options.run.name}.yaml")
    # rich's font comes from somebody's server; whoever looks has one of fixed width.
    options.picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
