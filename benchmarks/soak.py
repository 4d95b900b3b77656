"""A long run with a fault a minute: whether memory, file descriptors, processes or shared memory grow.

`raygym train` on tiny with simulated engines: two replicas, two EnvRunners, as many learners as are asked for. Every
`--fault-every` seconds one process is killed, or stopped for a while. Each kind of process and the machine's /dev/shm
are looked at every `--sample-every` seconds; what is printed is the slope of a line through the samples after the warm
up. Last line: one JSON object. Example: `python benchmarks/soak.py --minutes 60`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from harness import calibrate, report

ROOT = Path(__file__).parent.parent
# What the name begins with that Ray gives to an actor's process.
KINDS = {
    "replica": "ray::ServeReplica",
    "learner": "ray::LearnerActor",
    "runner": "ray::EnvRunner",
    "manager": "ray::RolloutManager",
    "store": "ray::WeightStore",
}
VICTIMS = ("replica", "runner", "manager", "learner", "store")
_STARTS_WITHIN_S = 600.0
_ENDS_WITHIN_S = 180.0
_HUNG_S = 5.0
_MIB = 2**20


def main() -> None:
    """Run, hurt, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="from the first step on (default: 60)")
    parser.add_argument("--fault-every", type=float, default=60.0, metavar="S", help="default: 60")
    parser.add_argument("--sample-every", type=float, default=10.0, metavar="S", help="default: 10")
    parser.add_argument("--victims", default=",".join(VICTIMS), help=f"default: {','.join(VICTIMS)}; empty: none")
    parser.add_argument(
        "--turn-latency",
        type=float,
        metavar="S",
        help="of the simulated engine; a high one leaves processor time to others (default: the config's)",
    )
    parser.add_argument("--learners", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--warm-up", type=float, default=0.2, metavar="F", help="part that is not fitted (default: 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path, help="a file that each sample is appended to, as one JSON object")
    options = parser.parse_args()
    victims = [kind for kind in options.victims.split(",") if kind]
    if unknown := set(victims) - set(KINDS):
        parser.error(f"--victims: {unknown.pop()} is none of {', '.join(KINDS)}")
    calibrate()
    with tempfile.TemporaryDirectory(prefix="raygym-soak-") as folder, training(Path(folder), options) as run:
        samples, faults = watch(run, options, victims)
        steps = steps_made(Path(folder))
    slopes = {f"{key}_per_hour": [slope_per_hour(samples, key, options.warm_up)] for key in keys(samples)}
    print(f"{len(samples)} samples, {steps} steps, faults: {', '.join(faults) or 'none'}")
    for name, (slope,) in slopes.items():
        print(f"  {name:<32} {slope:+12.2f}   last {samples[-1][1].get(name.removesuffix('_per_hour'), 0):.0f}")
    details = {"minutes": options.minutes, "steps": steps, "faults": faults, "turn_latency_s": options.turn_latency}
    report(
        "soak", slopes, **details, config=f"tiny, simulated engines, 2 replicas, 2 runners, {options.learners} learners"
    )


@contextmanager
def training(folder: Path, options: argparse.Namespace) -> Iterator[psutil.Process]:
    """A run that has made its first step; it is asked to end at the end."""
    settings = {
        "runs_dir": folder,
        "steps": 10**9,
        "policy.engine": "simulated",
        "policy.replicas": 2,
        "rollout.env_runners": 2,
        "learner.num_learners": options.learners,
        "checkpoint.every": 20,
        # More is lost here than a run is to put up with.
        **{f"supervision.{kind}_restarts": "null" for kind in ("learner", "manager", "replica", "weight_store")},
        "logging.tensorboard": "false",
    }
    if options.turn_latency is not None:
        settings["policy.simulated.turn_latency_s"] = options.turn_latency
    command = [sys.executable, "-m", "raygym", "train", str(ROOT / "configs/tiny.yaml")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (folder / "output").open("wb") as output:
        started = subprocess.Popen(
            [*command, *(f"{key}={value}" for key, value in settings.items())],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not steps_made(folder):
            if started.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the run made no step: {(folder / 'output').read_text()[-2000:]}")
            time.sleep(0.5)
        yield psutil.Process(started.pid)
        if started.poll() is not None:
            sys.exit(f"the run ended by itself: {(folder / 'output').read_text()[-2000:]}")
    finally:
        if started.poll() is None:
            started.terminate()  # a job in the background ignores interrupts
        started.wait(timeout=_ENDS_WITHIN_S)


def steps_made(folder: Path) -> int:
    """Rows of the run's metrics beside that of step 0."""
    path = folder / "tiny" / "metrics.jsonl"
    return max(0, len(path.read_bytes().splitlines()) - 1) if path.exists() else 0


def watch(
    run: psutil.Process, options: argparse.Namespace, victims: list[str]
) -> tuple[list[tuple[float, dict[str, float]]], list[str]]:
    """Samples, each with its seconds since the first, and what was done to whom."""
    draw = random.Random(options.seed)
    began = time.monotonic()
    sample_at, fault_at = began, began + options.fault_every
    samples: list[tuple[float, dict[str, float]]] = []
    faults: list[str] = []
    while (now := time.monotonic()) < began + options.minutes * 60 and alive(run):
        if now >= sample_at:
            samples.append((now - began, sample(run)))
            if options.samples:
                with options.samples.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"s": round(now - began), "faults": len(faults), **samples[-1][1]}) + "\n")
            sample_at += options.sample_every
        if victims and now >= fault_at:
            faults += strike(run, draw.choice(victims), draw.choice(("kill", "stop")), draw)
            fault_at += options.fault_every
        time.sleep(0.2)
    return samples, faults


def alive(run: psutil.Process) -> bool:
    """It has not ended; what nobody has waited for yet still has its process."""
    try:
        return bool(run.is_running() and run.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def strike(run: psutil.Process, kind: str, action: str, draw: random.Random) -> list[str]:
    """Hurt one process of a kind; returns what was done, nothing where there was none."""
    found = [process for of, process in processes(run) if of == kind]
    if not found:
        return []
    victim = draw.choice(found)
    with suppress(psutil.NoSuchProcess):  # it ended by itself
        if action == "kill":
            victim.kill()
        else:
            victim.suspend()
            time.sleep(_HUNG_S)
            victim.resume()
    return [f"{action} {kind}"]


def processes(run: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """The driver and all below it, each with what it is; `ray`: Ray's own."""
    yield "driver", run
    for process in run.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            name = " ".join(process.cmdline())
            yield next((kind for kind, begins in KINDS.items() if name.startswith(begins)), "ray"), process


def sample(run: psutil.Process) -> dict[str, float]:
    """Of each kind of process: MiB of resident memory and open files, together; and of the machine's /dev/shm."""
    now: dict[str, float] = defaultdict(float)
    for kind, process in processes(run):
        with suppress(psutil.Error):
            now[f"{kind}_rss_mib"] += process.memory_info().rss / _MIB
            now[f"{kind}_fds"] += process.num_fds()
            now["processes"] += 1
    shared = os.statvfs("/dev/shm")
    now["shm_mib"] = (shared.f_blocks - shared.f_bfree) * shared.f_frsize / _MIB
    return dict(now)


def keys(samples: list[tuple[float, Mapping[str, float]]]) -> list[str]:
    """What was seen in any sample."""
    return sorted({key for _, sampled in samples for key in sampled})


def slope_per_hour(samples: list[tuple[float, Mapping[str, float]]], key: str, warm_up: float) -> float:
    """Of the line of least squares through the samples after the warm-up that have the key; 0 for fewer than two.

    A process that is being replaced is missing in a sample or two, whose low values say nothing of growth: those below
    half the median are left out.
    """
    seconds_S, values_S = np.array([(at, sampled.get(key, 0.0)) for at, sampled in samples]).T
    kept_S = (seconds_S >= warm_up * seconds_S[-1]) & (values_S >= np.median(values_S) / 2)
    if kept_S.sum() < 2:
        return 0.0
    slope, _ = np.polyfit(seconds_S[kept_S] / 3600, values_S[kept_S], 1)
    return float(slope)


if __name__ == "__main__":
    main()
